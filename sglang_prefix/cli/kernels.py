"""`sglang-prefix kernels`: what the compiler makes of the kernels, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefix_kernels import compile_report
from prefix_kernels.compile_report import (
    ARCHS,
    DEFAULT_DTYPES,
    HEAD_DIMS,
    KernelReport,
    KernelVariant,
    kernel_variants,
    legal_dtypes,
)
from prefix_kernels.tiles import MERGE_MODES
from sglang_prefix.cli import kernel_cache
from sglang_prefix.cli.options import JsonOption, checked, folder_to_write, is_given, readable_file
from sglang_prefix.cli.output import complain, console, fail, track, write_json

if TYPE_CHECKING:
    from rich.console import Console


__all__ = ["kernels"]

# Columns of the table in a file or a pipe, where nothing says how wide a line may be.
_FILE_WIDTH = 120
# Heads per KV head of any model, rounded up; a compiler takes some 500 MB.
_MAX_GROUP, _MAX_JOBS = 256, 256


# What goes with `--cache` alone, and what with the report alone.
_OF_THE_CACHE = ("check", "model_shape", "logit_cap", "wheel")
_OF_THE_REPORT = ("head_dim", "group_size")


def kernels(
    context: typer.Context,
    arch: Annotated[str, typer.Option(help=f"One of {', '.join(ARCHS)}.")],
    head_dim: Annotated[
        list[int] | None,
        typer.Option(
            min=min(HEAD_DIMS),
            max=max(HEAD_DIMS),
            help=f"May be repeated. Default: {', '.join(map(str, HEAD_DIMS))}.",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="Q/KV",
            help="Dtypes of queries and caches; may be repeated. Default: "
            f"{' and '.join(map('/'.join, DEFAULT_DTYPES))}, the latter where the arch has it.",
        ),
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(help=f"May be repeated. Default: {' and '.join(MERGE_MODES)}."),
    ] = None,
    group_size: Annotated[
        int, typer.Option(min=1, max=_MAX_GROUP, help="Query heads per KV head.")
    ] = 4,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, max=_MAX_JOBS, help="Compilers at work. Default: one per CPU."),
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

    Reports registers, spills, shared memory and matrix instructions. Ends with 1 if a variant of
    head dim 128 or less spills, or if one does not fit into shared memory.

    With --cache, servers that are started with TRITON_CACHE_DIR=DIR compile nothing.
    """
    _check("arch", [arch], list(ARCHS))
    _check("head-dim", head_dim or [], list(HEAD_DIMS))
    _check("merge", merge or [], list(MERGE_MODES))
    legal = {"/".join(pair): pair for pair in legal_dtypes(arch)}
    _check("dtype", dtype or [], list(legal), f" with --arch {arch}")
    dtypes = [legal[name] for name in dict.fromkeys(dtype)] if dtype else None
    merges = tuple(dict.fromkeys(merge or MERGE_MODES))
    _check_given(context, cache)
    if cache is not None:
        kernel_cache.run(
            cache,
            arch,
            model_shape or kernel_cache.DEFAULT_SHAPES,
            dtypes or DEFAULT_DTYPES[:1],
            merges,
            has_cap=logit_cap,
            wheel=wheel,
            check=check,
            jobs=jobs,
            json_file=json_file,
        )
        return
    variants = kernel_variants(
        arch,
        head_dims=dict.fromkeys(head_dim or HEAD_DIMS),
        dtypes=dtypes,
        merges=merges,
        group_size=group_size,
    )
    out = console(json_file)
    reports = _compile(list(variants), arch, jobs, out)
    _print_table(reports, arch, out)
    write_json([report.as_dict() for report in reports], json_file)
    problems = compile_report.find_problems(reports)
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


def _compile(
    variants: list[KernelVariant], arch: str, jobs: int | None, out: Console
) -> list[KernelReport]:
    reports = compile_report.compile_variants(variants, arch, jobs=jobs)
    return track(reports, len(variants), f"compiling for {arch}", out)


def _print_table(reports: list[KernelReport], arch: str, out: Console) -> None:
    from rich.table import Table

    table = Table(title=f"sglang-prefix kernels, {arch}", title_justify="left")
    for name in ("kernel", "dtypes", "merge"):
        table.add_column(name, no_wrap=True)
    for name in ("dim", "tile", "warps", "stages", "regs", "spill B", "smem KiB", "per SM"):
        table.add_column(name, justify="right")
    table.add_column("mma")
    section = None
    for report in reports:
        variant, tile, narrow = report.variant, report.variant.tile, report.variant.narrow_tile
        if section not in (None, (variant.head_dim, variant.kv_dtype)):
            table.add_section()
        section = (variant.head_dim, variant.kv_dtype)
        name = f"{tile.block_m}x{tile.block_n}"
        table.add_row(
            variant.kernel,
            f"{variant.dtype}/{variant.kv_dtype}",
            variant.merge if variant.kernel.startswith("pack_forward") else "",
            str(variant.head_dim or ""),
            f"{narrow.block_m}x{narrow.block_n} {name}" if narrow else name,
            str(tile.num_warps),
            str(tile.num_stages),
            str(report.registers),
            str(report.spill_bytes),
            f"{report.shared_bytes / 1024:.1f}",
            str(report.programs_per_sm),
            " ".join(report.instructions),
        )
    if not out.is_terminal:
        out.width = max(out.width, _FILE_WIDTH)
    out.print(table)
