"""`sglang-prefix kernels`: what the compiler makes of the kernels, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefix_kernels import compile_report
from prefix_kernels.compile_report import (
    ALL_ARCHS,
    DEFAULT_DTYPES,
    HEAD_DIMS,
    LATENT_DIMS,
    KernelVariant,
    kernel_variants,
    legal_dtypes,
    triton_version,
)
from prefix_kernels.kernel_report import KernelReport, find_problems
from prefix_kernels.launches import MERGE_MODES
from prefix_kernels.tiles import ARCHS
from sglang_prefix.cli import kernel_cache
from sglang_prefix.cli.options import (
    MAX_TOKENS,
    JsonOption,
    checked,
    existing_path,
    folder_to_write,
    is_given,
    readable_file,
)
from sglang_prefix.cli.output import complain, console, fail, say, track, write_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sglang_prefix.cli.kernel_figures import Comparison, Variant


__all__ = ["kernels", "print_changes"]

# Columns of the table in a file or a pipe, where nothing says how wide a line may be.
_FILE_WIDTH = 140
# Heads per KV head of any model, rounded up; a compiler takes some 500 MB.
_MAX_GROUP, _MAX_JOBS = 256, 256
_HEAD_DIMS = (*HEAD_DIMS, *LATENT_DIMS)
_LATENTS = " and ".join(map(str, LATENT_DIMS))
_TARGETS = ("kernel", "dtypes", "merge", "dim", "tile")

# What goes with `--cache` alone, and what with the report alone.
_OF_THE_CACHE = ("check", "model_shape", "logit_cap", "sinks", "wheel")
# What SGLang keeps attention sinks in: float32 for its backend trtllm_mha, bfloat16 for others;
# MiMo-V2's have the model's dtype.
_SINK_DTYPES = ("bf16", "fp16", "fp32")
_OF_THE_REPORT = ("head_dim", "group_size", "kv_length", "triton", "compare")


def kernels(
    context: typer.Context,
    arch: Annotated[str, typer.Option(help=f"One of {', '.join(ALL_ARCHS)}.")],
    head_dim: Annotated[
        list[int] | None,
        typer.Option(
            min=min(_HEAD_DIMS),
            max=max(_HEAD_DIMS),
            help=f"Of q and k; may be repeated. Default: {', '.join(map(str, _HEAD_DIMS))}. With "
            f"{_LATENTS} v is the first elements of k.",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="Q/KV",
            help="Dtypes of queries and caches; may be repeated. Default: "
            f"those of {', '.join(map('/'.join, DEFAULT_DTYPES))} that the arch has.",
        ),
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(help=f"May be repeated. Default: {' and '.join(MERGE_MODES)}."),
    ] = None,
    kv_length: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=MAX_TOKENS, help="Tokens of packs; may be repeated. Default: of any length."
        ),
    ] = None,
    group_size: Annotated[
        int,
        typer.Option(
            min=1, max=_MAX_GROUP, help=f"Query heads per KV head; with {_LATENTS} at least 16."
        ),
    ] = 4,
    causal: Annotated[
        bool,
        typer.Option(
            "--causal",
            help="Those for several query tokens of a request, as where drafts are verified; for "
            "the cache beside the others.",
        ),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, max=_MAX_JOBS, help="Compilers at work. Default: one per CPU."),
    ] = None,
    triton: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Compile with the Triton that `pip install --target FOLDER` put there.",
            callback=existing_path,
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Show what changed since `--json FILE` was written.",
            callback=readable_file,
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Compile what a server launches into this Triton cache instead.",
            callback=folder_to_write,
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether the cache has it all.")
    ] = False,
    model_shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QO:KV:DIM[:VDIM]",
            help="Heads of one rank and head dims that the cache is for; may be repeated. Default: "
            f"{' and '.join(kernel_cache.DEFAULT_SHAPES)}.",
            callback=checked(kernel_cache.check_shape),
        ),
    ] = None,
    logit_cap: Annotated[
        bool, typer.Option("--logit-cap", help="The cache is for layers that cap their logits.")
    ] = False,
    sinks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DTYPE",
            help="The cache is for layers with attention sinks of this dtype, "
            f"{' or '.join(_SINK_DTYPES)}; may be repeated.",
        ),
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The cache is for another Python, whose wheel of the same Triton this is.",
            callback=readable_file,
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Compile every kernel variant for an architecture; needs no GPU.

    Reports registers, spills, shared memory and matrix instructions; also how many instructions a
    warp issues in the inner loop for 64 tokens of KV, and before the first copy of KV. Ends with 1
    if a variant of head dim 128 or less spills, if one does not fit into shared memory, or if an
    inner loop has grown by more than 5% since the file of --compare.

    With --cache, servers that are started with TRITON_CACHE_DIR=DIR compile nothing.
    """
    _check_given(context, cache)
    _check("arch", [arch], list(ALL_ARCHS if cache is None else ARCHS))
    _check("head-dim", head_dim or [], list(_HEAD_DIMS))
    _check("merge", merge or [], list(MERGE_MODES))
    legal = {"/".join(pair): pair for pair in legal_dtypes(arch)}
    _check("sinks", sinks or [], list(_SINK_DTYPES))
    _check("dtype", dtype or [], list(legal), f" with --arch {arch}")
    dtypes = [legal[name] for name in dict.fromkeys(dtype)] if dtype else None
    merges = tuple(dict.fromkeys(merge or MERGE_MODES))
    if cache is not None:
        kernel_cache.run(
            cache,
            arch,
            model_shape or kernel_cache.DEFAULT_SHAPES,
            dtypes or DEFAULT_DTYPES[:1],
            merges,
            has_cap=logit_cap,
            sinks=sinks or (),
            causal=causal,
            wheel=wheel,
            check=check,
            jobs=jobs,
            json_file=json_file,
        )
        return
    lengths = {"kv_lengths": dict.fromkeys(kv_length)} if kv_length else {}
    variants = kernel_variants(
        arch,
        head_dims=dict.fromkeys(head_dim) if head_dim else None,
        dtypes=dtypes,
        merges=merges,
        group_size=group_size,
        causal=causal,
        **lengths,
    )
    _report(list(variants), arch, jobs, triton, compare, json_file)


def _report(
    variants: list[KernelVariant],
    arch: str,
    jobs: int | None,
    triton: Path | None,
    compare: Path | None,
    json_file: str | None,
) -> None:
    """Compile, print, compare and write; ends the command if something is wrong."""
    version = _find_triton(triton)
    before = None if compare is None else _read_figures(compare, version, arch)
    out = console(json_file)
    reports = _compile(variants, arch, jobs, triton, out)
    _print_table(reports, f"{arch}, Triton {version}", out)
    problems = find_problems(reports)
    if before is not None:
        problems += _compare(before, reports, compare, out)
    if json_file is not None:
        write_text(_as_text(reports, version, arch), json_file)
    if problems:
        for problem in problems[:-1]:
            complain(problem)
        fail(problems[-1])


def _check_given(context: typer.Context, cache: Path | None) -> None:
    """End the command if an option stands there that goes with another task."""
    for name in _OF_THE_CACHE if cache is None else _OF_THE_REPORT:
        if is_given(context, name):
            option = f"--{name.replace('_', '-')}"
            fail(f"{option} goes {'with' if cache is None else 'without'} --cache only", 2)


def _check(
    option: str, values: list[str] | list[int], legal: list[object], where: str = ""
) -> None:
    for value in values:
        if value not in legal:
            names = ", ".join(map(str, legal))
            fail(f"--{option} is {value}; legal{where}: {names}", 2)


def _find_triton(folder: Path | None) -> str:
    """The version of the Triton to compile with."""
    try:
        return triton_version(folder)
    except ValueError as error:
        fail(f"--triton: {error}; legal: what `pip install --target FOLDER triton` made", 2)


def _read_figures(path: Path, version: str, arch: str) -> list[Variant]:
    """The variants of an earlier file."""
    from sglang_prefix.bench.results import ResultError
    from sglang_prefix.cli.kernel_figures import read_figures

    try:
        found: list[Variant] = read_figures(path, version, arch)["variants"]
    except OSError as error:
        fail(f"--compare is {path}: {error.strerror}", 2)
    except ResultError as error:
        fail(f"--compare: {error}", 2)
    return found


def _compile(
    variants: list[KernelVariant], arch: str, jobs: int | None, triton: Path | None, out: Console
) -> list[KernelReport]:
    reports = compile_report.compile_variants(variants, arch, jobs=jobs, triton_folder=triton)
    try:
        return track(reports, len(variants), f"compiling for {arch}", out)
    except Exception as error:
        # A Triton of any release may fail in any way; our environment's must not.
        if triton is None:
            raise
        fail(f"--triton is {triton}, which cannot compile this: {error!r}", 2)


def _as_text(reports: list[KernelReport], version: str, arch: str) -> str:
    """As JSON with a line per variant, so that a difference of files is one of variants.

    Nothing but the sources and the compiler decides what is in it: see `kernel_figures.Figures`.
    """
    head = {"kind": "kernels", "schema": 1, "triton": version, "arch": arch}
    rows = [{k: v for k, v in report.as_dict().items() if k not in head} for report in reports]
    lines = ",\n".join(map(json.dumps, rows))
    return f'{json.dumps(head)[:-1]}, "variants": [\n{lines}\n]}}\n'


def _compare(
    before: list[Variant], reports: list[KernelReport], path: Path | None, out: Console
) -> list[str]:
    """Print what changed; one line for each inner loop that grew too much."""
    from sglang_prefix.cli.kernel_figures import MAX_GROWTH, compare_figures

    found = compare_figures(before, [report.as_dict() for report in reports])
    print_changes(found, f"changes since {path}", out)
    return [
        f"{' '.join(_target(one.variant))}: {one.figure} grew from {one.before} to {one.now}, "
        f"by more than {MAX_GROWTH:.0%}"
        for one in found.changes
        if one.is_loop_growth
    ]


def _print_table(reports: list[KernelReport], title: str, out: Console) -> None:
    from rich.table import Table

    table = Table(title=f"sglang-prefix kernels, {title}", title_justify="left")
    for name in _TARGETS:
        table.add_column(name, no_wrap=True)
    columns = ("warps", "stages", "regs", "spill B", "smem KiB", "per SM", "loop", "first copy")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("mma")
    section = None
    for report in reports:
        variant, tile = report.variant, report.variant.tile
        if section not in (None, (variant.head_dim, variant.kv_dtype)):
            table.add_section()
        section = (variant.head_dim, variant.kv_dtype)
        table.add_row(
            *_target(report.as_dict()),
            str(tile.num_warps),
            str(tile.num_stages),
            str(report.registers),
            str(report.spill_bytes),
            f"{report.shared_bytes / 1024:.1f}",
            str(report.programs_per_sm),
            " ".join(str(tile.loop_instructions) for tile in report.tiles),
            " ".join(str(tile.first_copy_instructions or "") for tile in report.tiles),
            " ".join(report.instructions),
        )
    _print_wide(table, out)


def _target(variant: Variant) -> tuple[str, ...]:
    """What names a variant, in the columns of :data:`_TARGETS`."""
    tiles = [tile for tile in (variant["narrow_tile"], variant["tile"]) if tile]
    return (
        variant["kernel"] + (" causal" if variant.get("causal") else ""),
        f"{variant['dtype']}/{variant['kv_dtype']}",
        variant["merge"] if variant["kernel"].startswith("pack_forward") else "",
        str(variant["head_dim"] or ""),
        " ".join(f"{tile['block_m']}x{tile['block_n']}" for tile in tiles),
    )


def print_changes(found: Comparison, title: str, out: Console) -> None:
    """Print a table of what changed, if anything, and how many variants are as they were."""
    from rich.table import Table
    from rich.text import Text

    one_sided = [(one, "not in the file") for one in found.added]
    one_sided += [(one, "in the file alone") for one in found.gone]
    if found.changes or one_sided:
        table = Table(title=Text(title), title_justify="left")
        for name in (*_TARGETS, "figure"):
            table.add_column(name, no_wrap=True)
        for name in ("before", "now", "change"):
            table.add_column(name, justify="right")
        for one in found.changes:
            grown = "" if one.percent is None else f"{one.percent:+.1f}%"
            values = ("" if value is None else f"{value:,}" for value in (one.before, one.now))
            table.add_row(*_target(one.variant), one.figure, *values, grown)
        for variant, where in one_sided:
            table.add_row(*_target(variant), where)
        _print_wide(table, out)
    same = found.num_compared - len({id(one.variant) for one in found.changes})
    say(out, f"{same} of {found.num_compared} variants are as they were")


def _print_wide(table: Table, out: Console) -> None:
    if not out.is_terminal:
        out.width = max(out.width, _FILE_WIDTH)
    out.print(table)
