"""Kernels compiled ahead of time: found by another process, from other sources, in another place.

Compiles four kernels, once.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton import knobs
from triton.language import constexpr
from triton.runtime import cache as triton_cache

from prefix_kernels import forward, kernel_cache, launch, merge, plan_buffers, server_launches
from prefix_kernels.kernel_cache import KernelLaunch, Pointer
from prefix_kernels.launches import LAUNCH_MODES, MERGE_MODES
from prefix_kernels.server_launches import ServedLayers, launch_all
from prefix_kernels.tiles import ROW_CLASSES
from prefix_kernels.triton_identity import installed_triton, triton_of_wheel
from sglang_prefix.kernel_cache import settle

ARCH = "sm_90"
LAYERS = ServedLayers(2, 1, 16, 16, "fp16", "fp16")
KERNELS = Path(kernel_cache.__file__).parent
# What a process of its own does, with a compiler that only raises: it asks for launches before and
# after the cache is settled where it lies now, and then for the real ones, on tensors.
TAKE = """
import json, pickle, sys
from prefix_kernels import kernel_cache
from prefix_kernels.launch import fix_key, recorded
from sglang_prefix.kernel_cache import settle
folder, arch, launches, work = pickle.load(sys.stdin.buffer)
kernel_cache._prepare(folder, arch)
from triton.compiler.compiler import ASTSource
def refuse(self, *_, **__):
    raise RuntimeError(self.fn.__name__)
ASTSource.make_ir = refuse
def ask():
    names = []
    for launch in launches:
        try:
            kernel_cache._ask_for(launch)
        except RuntimeError as error:
            names.append(str(error))
    return names
before, moved = ask(), settle(folder)
with kernel_cache.counted() as counts:
    after = ask()
real = set()
def take(kernel, grid, arguments):
    fix_key(kernel)
    try:
        kernel.warmup(grid=grid, **arguments)
    except RuntimeError:
        return
    real.add(kernel_cache.KernelLaunch.of(kernel, arguments))
with recorded(take, run=False):
    work()
counted = [counts.found, counts.compiled]
print(json.dumps([kernel_cache.__file__, before, moved, after, counted, real == set(launches[:4])]))
"""


def changed(launch: KernelLaunch, **values: Any) -> KernelLaunch:
    return replace(launch, arguments=tuple((dict(launch.arguments) | values).items()))


def test_another_process_takes_everything_from_a_cache_that_has_moved(tmp_path: Path) -> None:
    """From a copy of the sources elsewhere; and a launch that differs in one thing is not found."""
    work = partial(launch_all, [LAYERS], ARCH, modes=LAUNCH_MODES[:1], merges=MERGE_MODES[:1])
    every = kernel_cache.collect_launches(work)
    launches = list({launch.name: launch for launch in every}.values())
    assert len(launches) == 4
    first, moved = tmp_path / "first", tmp_path / "moved"
    compiled = list(kernel_cache.compile_launches(launches, first, ARCH, jobs=1))
    assert [one.launch for one in compiled] == launches
    assert not any(one.was_there for one in compiled)
    entries = {entry.name: entry for entry in first.iterdir()}
    assert set(entries) == {one.key for one in compiled}
    for one in compiled:
        files = {file.name: file for file in entries[one.key].iterdir()}
        group = f"__grp__{one.launch.name}.json"
        assert set(files) == {group, f"{one.launch.name}.json", f"{one.launch.name}.cubin"}
        assert one.num_bytes == sum(f.stat().st_size for f in files.values() if f.name != group)

    copy = tmp_path / "sources"
    shutil.copytree(KERNELS, copy / KERNELS.name)
    first.rename(moved)
    (run,) = [one for one in launches if one.name == "pack_forward_kernel"]
    others = [
        changed(run, BLOCK_N=32),
        changed(run, num_warps=2),
        changed(run, q_ptr=Pointer("bfloat16", is_aligned=True)),
        changed(run, q_ptr=Pointer("float16", is_aligned=False)),
    ]
    what = (str(moved), ARCH, [*launches, *others], work)
    path, before, settled, after, counted, real_ones_are_there = taken(what, copy)
    assert Path(path).is_relative_to(copy)
    names = [one.name for one in launches]
    assert before == names + ["pack_forward_kernel"] * len(others)
    assert settled == len(launches)
    assert after == ["pack_forward_kernel"] * len(others)
    assert counted == [len(launches), 0]
    assert real_ones_are_there
    (moved / compiled[0].key / f"{launches[0].name}.json").write_text("{")
    before_looking = sorted(moved.rglob("*"))
    looked = kernel_cache.find_launches([*launches, *others], moved, ARCH)
    assert looked == [False, *[True] * (len(launches) - 1), *[False] * len(others)]
    assert sorted(moved.rglob("*")) == before_looking


def taken(what: object, sources: Path) -> Any:
    paths = [str(sources), *(path for path in sys.path if Path(path) != KERNELS.parent)]
    done = subprocess.run(
        [sys.executable, "-c", TAKE],
        input=pickle.dumps(what),
        env={
            **{key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
            "PYTHONPATH": os.pathsep.join(paths),
        },
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


# Which launches: recorded here, from the interpreter's kernels, which know no types.


def settings_of(arguments: dict[str, Any]) -> frozenset[tuple[str, Any]]:
    options = ("num_warps", "num_stages", "maxnreg")
    return frozenset((key, arguments[key]) for key in arguments if key.isupper() or key in options)


@contextmanager
def seen() -> Iterator[set[Any]]:
    found: set[Any] = set()

    def record(kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        found.add((kernel.__name__, settings_of(arguments)))

    with launch.recorded(record, run=False):
        yield found


@pytest.mark.parametrize("group_size", [1, 3, 4, 8])
@pytest.mark.parametrize("mode", LAUNCH_MODES)
def test_a_batch_of_any_size_launches_what_was_compiled(
    mode: str, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = replace(LAYERS, num_qo_heads=group_size)
    with seen() as compiled:
        launch_all([layers], ARCH, modes=[mode])
    sizes = range(1, max(ROW_CLASSES) + 3)
    monkeypatch.setattr(server_launches, "warm_up_sizes", lambda *_: sizes)
    with seen() as launched:
        launch_all([layers], ARCH, modes=[mode])
    assert {name for name, _ in compiled} == {
        "copy_slots_kernel", "append_slots_kernel", "pack_forward_kernel", "merge_kernel",
    }  # fmt: skip
    assert launched == compiled


def test_caches_of_8_bits_are_run_with_and_without_scales() -> None:
    def scales(dtype: str) -> set[bool]:
        with seen() as found:
            launch_all([replace(LAYERS, kv_dtype=dtype)], ARCH)
        return {dict(one)["HAS_SCALES"] for _, one in found if "HAS_SCALES" in dict(one)}

    assert scales("fp16") == {False}
    assert scales("fp8_e4m3") == {False, True}


def test_layers_with_sinks_have_kernels_of_their_own() -> None:
    def dtypes(sinks: str | None) -> set[Any]:
        found = set()

        def record(kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
            if "sinks_ptr" in arguments:
                given = arguments["sinks_ptr"]
                found.add((kernel.__name__, None if given is None else given.dtype))

        with launch.recorded(record, run=False):
            launch_all([replace(LAYERS, sinks=sinks)], ARCH)
        return found

    for name, dtype in ((None, None), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        assert dtypes(name) == {("pack_forward_kernel", dtype), ("merge_kernel", dtype)}


def test_numbers_stand_for_those_that_need_the_same_code() -> None:
    """As Triton specialises them: 1, multiples of 16, those of 64 bits; some parameters never."""

    def as_seen(value: object, **flags: bool) -> Any:
        names = ("is_constexpr", "do_not_specialize", "do_not_specialize_on_alignment")
        parameter = SimpleNamespace(**dict.fromkeys(names, False) | flags)
        return kernel_cache._as_compiled(value, parameter)

    assert as_seen(1) == 1
    assert as_seen(32) == as_seen(0) == 16
    assert as_seen(3) == as_seen(17) == 2
    assert as_seen(1, do_not_specialize=True) == as_seen(16, do_not_specialize=True) == 2
    assert as_seen(16, do_not_specialize_on_alignment=True) == 2
    assert as_seen(1 << 31) % 16 == 0
    assert as_seen(1 << 31) >= 1 << 31
    assert as_seen(7, is_constexpr=True) == 7
    assert as_seen(0.25) == as_seen(4.0)


# The key of a kernel.


def test_what_a_kernel_calls_is_hashed_before_it() -> None:
    """Whichever is launched first: Triton 3.6 would else give each order a key of its own."""
    hashed = []

    class Kernel:
        def __init__(self, fn: Any) -> None:
            self.fn = fn

        @property
        def cache_key(self) -> str:
            hashed.append(self.fn.__name__)
            return ""

        def __getitem__(self, grid: Any) -> Any:
            return lambda **_: hashed.append("launched")

    names: dict[str, Any] = {}
    for body in (
        "def leaf(): pass", "def branch(): leaf()", "def root(): branch(); leaf()",
    ):  # fmt: skip
        exec(body, names)
    for name in ("leaf", "branch", "root"):
        names[name] = Kernel(names[name])
    launch.launch(names["root"], (1,))
    launch.launch(names["branch"], (1,))
    assert hashed == ["leaf", "branch", "root", "launched", "launched"]


def test_constants_of_one_name_have_one_value() -> None:
    """Triton 3.6 takes them into a key in the order of their modules' addresses."""
    values: dict[str, set[Any]] = {}
    for module in (forward, merge, plan_buffers):
        for name, value in vars(module).items():
            if isinstance(value, constexpr):
                values.setdefault(name, set()).add(value.value)
    assert len(values) > 8
    assert {name: found for name, found in values.items() if len(found) > 1} == {}


def wheel_of(folder: Path, *, without: str = "", version: str = triton.__version__) -> Path:
    """A wheel of the installed Triton's sources, around a library of a few bytes."""
    package = Path(triton.__file__).parent
    wheel = folder / "triton.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("compiler", "backends", "language", "runtime"):
            for file in (package / name).rglob("*.py"):
                archive.write(file, Path("triton", file.relative_to(package)))
        archive.writestr("triton/__init__.py", f"__version__ = '{version}'\n")
        if without != "library":
            archive.writestr("triton/_C/libtriton.so", b"library")
    return wheel


def test_the_key_of_a_wheel_is_what_triton_would_compute(tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel_of(tmp_path)) as archive:
        archive.extractall(tmp_path)
    code = triton_cache.triton_key.__wrapped__.__code__  # run as if it stood in that folder
    there = vars(triton_cache) | {"__file__": str(tmp_path / "triton" / "runtime" / "cache.py")}
    key = FunctionType(code, there)()
    found = triton_of_wheel(tmp_path / "triton.whl")
    assert (found.version, found.key) == (triton.__version__, key)
    assert found.key != installed_triton().key


# Where a cache lies.


def entry_in(folder: Path, key: str, *, paths_in: Path) -> Path:
    files = ("k.json", "k.cubin")
    (folder / key).mkdir(parents=True)
    for name in files:
        (folder / key / name).write_text(name)
    group = folder / key / "__grp__k.json"
    group.write_text(json.dumps({"child_paths": {n: str(paths_in / key / n) for n in files}}))
    return group


def test_only_what_has_moved_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, gone = tmp_path / "cache", tmp_path / "gone"
    kept, whole = (entry_in(cache, key, paths_in=cache) for key in ("kept", "whole"))
    kept.write_text(kept.read_text() + "\n")
    moved, damaged, missing = (
        entry_in(cache, key, paths_in=gone) for key in ("moved", "damaged", "missing")
    )
    damaged.write_text("{")
    missing.with_name("k.cubin").unlink()
    listed = entry_in(cache, "listed", paths_in=gone)
    listed.write_text('{"child_paths": ["k.json"]}')
    entry_in(cache, "empty", paths_in=gone).write_text("{}")
    outside = entry_in(cache, "outside", paths_in=gone)
    outside.write_text(json.dumps({"child_paths": {"../whole/k.json": "/nowhere"}}))
    before = {group: group.read_text() for group in cache.rglob("__grp__*")}
    monkeypatch.chdir(tmp_path)
    assert settle("cache") == 1
    paths = json.loads(moved.read_text())["child_paths"]
    assert paths == {name: str(cache / "moved" / name) for name in ("k.json", "k.cubin")}
    after = {group: group.read_text() for group in cache.rglob("__grp__*")}
    assert {group for group in before if after[group] != before[group]} == {moved}
    assert whole in after
    assert settle(cache) == settle(gone) == 0
    assert not gone.exists()


def test_kernels_are_counted_and_another_listener_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **what: told.append(what))
    with kernel_cache.counted() as counts:
        for hit in (True, False, True):
            listener: Any = knobs.compilation.listener
            listener(cache_hit=hit, src="s")
    assert (counts.found, counts.compiled) == (2, 1)
    assert told == [{"cache_hit": hit, "src": "s"} for hit in (True, False, True)]
    listener = knobs.compilation.listener
    listener(cache_hit=True)
    assert counts.found == 2
