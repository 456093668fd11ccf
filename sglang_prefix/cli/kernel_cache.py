"""`sglang-prefix kernels --cache`: kernels compiled ahead of time, for servers and images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prefix_kernels import kernel_cache
from prefix_kernels.compile_report import LATENT_DIMS
from prefix_kernels.kernel_cache import KernelLaunch
from prefix_kernels.triton_identity import TritonIdentity, installed_triton, triton_of_wheel
from sglang_prefix.cli.output import console, fail, say, track, write_json
from sglang_prefix.kernel_cache import settle

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["DEFAULT_SHAPES", "check_shape", "find_triton", "run"]

# Heads of one rank: Llama 3 8B and Qwen3 8B; Llama 3 70B and Qwen3 32B.
DEFAULT_SHAPES = ("32:8:128", "64:8:128")
_MAX_HEADS, _MAX_HEAD_DIM = 1024, 256


def check_shape(text: str) -> tuple[int, int, int, int]:
    """Read ``QO:KV:DIM`` or ``QO:KV:DIM:VDIM``, as in ``32:8:128``; of latents ``16:1:576:512``.

    Raises:
        ValueError: it is something else; the message says what is legal.
    """
    words = text.split(":")
    is_number = all(word.isascii() and word.isdigit() and len(word) < 5 for word in words)
    numbers = [int(word) for word in words] if is_number and len(words) in (3, 4) else [0] * 3
    heads, dims = numbers[:2], numbers[2:]
    is_legal = all(0 < n <= _MAX_HEADS for n in heads)
    is_legal &= _has_latent(dims) or all(0 < n <= _MAX_HEAD_DIM for n in dims)
    if not is_legal or heads[0] % heads[1]:
        raise ValueError(
            f"it is {text!r}; legal: QO:KV:DIM or QO:KV:DIM:VDIM, heads up to {_MAX_HEADS} of "
            f"which QO are a multiple of KV, and dims up to {_MAX_HEAD_DIM}, as in '32:8:128', or "
            f"{' or '.join(f'{k}:{v}' for k, v in LATENT_DIMS.items())}, where v is in k"
        )
    return heads[0], heads[1], dims[0], dims[-1]


def _has_latent(dims: Sequence[int]) -> bool:
    """Whether these are the head dims of k and v where v is the first elements of k."""
    return len(dims) == 2 and LATENT_DIMS.get(dims[0]) == dims[1]


def run(
    folder: Path,
    arch: str,
    shapes: Iterable[str],
    dtypes: Iterable[tuple[str, str]],
    merges: tuple[str, ...],
    *,
    has_cap: bool,
    sinks: Sequence[str],
    causal: bool,
    wheel: Path | None,
    check: bool,
    jobs: int | None,
    json_file: str | None,
) -> None:
    """Fill a cache, or look whether it is filled.

    Args:
        folder: the cache.
        arch: such as "sm_90".
        shapes, dtypes, has_cap, sinks: of the layers; names of dtypes of q and the caches, and of
            attention sinks; no such names for layers without.
        causal: whether requests have several query tokens in some of their passes.
        merges: of `tiles.MERGE_MODES`.
        wheel: of the Triton whose cache it is; None for the one that is installed.
        check: whether only to look.
        jobs: compilers at work.
        json_file: the value of ``--json``.
    """
    if check and not folder.is_dir():
        fail(f"--cache {folder} is no folder; legal: one that this command has filled", 2)
    triton = find_triton(wheel)
    out = console(json_file)
    launches = _launches(shapes, tuple(dtypes), arch, merges, has_cap, sinks, out, causal=causal)
    report: dict[str, object] = {
        "folder": os.path.abspath(folder),
        "arch": arch,
        "triton": triton.version,
        "triton_digest": triton.digest,
        "kernels": len(launches),
    }
    if check:
        _check(launches, folder, triton, report, out, json_file)
    else:
        _write(launches, folder, triton, report, out, jobs, json_file)


def find_triton(wheel: Path | None) -> TritonIdentity:
    """The Triton whose cache is meant; ends the command if the wheel is of another release."""
    installed = installed_triton()
    if wheel is None:
        return installed
    legal = f"legal: a wheel of Triton {installed.version}"
    try:
        other = triton_of_wheel(wheel)
    except OSError as error:
        fail(f"--wheel {wheel}: {error.strerror}; {legal}", 2)
    except ValueError as error:
        fail(f"--wheel {wheel}: {error}; {legal}", 2)
    if other.version != installed.version:
        fail(f"--wheel {wheel} is Triton {other.version}; {legal}, which is installed", 2)
    return other


def _launches(
    shapes: Iterable[str],
    dtypes: tuple[tuple[str, str], ...],
    arch: str,
    merges: tuple[str, ...],
    has_cap: bool,
    sinks: Sequence[str],
    out: Console,
    *,
    causal: bool = False,
) -> list[KernelLaunch]:
    from prefix_kernels.server_launches import ServedLayers, launch_all

    sink_dtypes: list[str | None] = [*dict.fromkeys(sinks)] or [None]
    layers = [
        ServedLayers(
            *shape, *pair, has_cap, v_in_k=_has_latent(shape[2:]), sinks=name, causal=causal
        )
        for shape in map(check_shape, dict.fromkeys(shapes))
        for pair in dtypes
        for name in sink_dtypes
    ]
    with out.status("asking the executor what it launches"):
        return kernel_cache.collect_launches(partial(launch_all, layers, arch, merges=merges))


def _write(
    launches: list[KernelLaunch],
    folder: Path,
    triton: TritonIdentity,
    report: dict[str, object],
    out: Console,
    jobs: int | None,
    json_file: str | None,
) -> None:
    arch = str(report["arch"])
    compiled = kernel_cache.compile_launches(launches, folder, arch, triton=triton, jobs=jobs)
    try:
        kernels = track(compiled, len(launches), f"compiling for {arch}", out)
    except OSError as error:
        fail(f"cannot write to {folder}: {error.strerror}")
    num_bytes, num_new = sum(k.num_bytes for k in kernels), sum(not k.was_there for k in kernels)
    size = f"{num_bytes / 2**20:.1f} MiB"
    say(out, f"{len(kernels)} kernels for {arch}, {size}; {num_new} of them compiled now")
    say(out, f"for Triton {triton.version} ({triton.digest}); with another, servers compile theirs")
    say(out, f"start servers with TRITON_CACHE_DIR={report['folder']}")
    write_json(report | {"compiled": num_new, "bytes": num_bytes}, json_file)


def _check(
    launches: list[KernelLaunch],
    folder: Path,
    triton: TritonIdentity,
    report: dict[str, object],
    out: Console,
    json_file: str | None,
) -> None:
    try:
        num_moved = settle(folder)
    except OSError as error:
        fail(f"{folder} was filled elsewhere, and cannot be changed: {error.strerror}")
    if num_moved:
        say(out, f"{num_moved} kernels have moved here, and are found from now on")
    arch = str(report["arch"])
    found = kernel_cache.find_launches(launches, folder, arch, triton=triton)
    of_triton = f"for {arch} and Triton {triton.version} ({triton.digest})"
    say(out, f"{sum(found)} of {len(found)} kernels {of_triton} are in {folder}")
    write_json(report | {"found": sum(found), "moved": num_moved}, json_file)
    if not all(found):
        missing = [one.name for one, is_there in zip(launches, found, strict=True) if not is_there]
        names = ", ".join(dict.fromkeys(missing))
        fail(f"{len(missing)} kernels are missing or damaged: {names}")
