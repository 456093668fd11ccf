"""`sglang-prefix bench gpu`: a GPU's few minutes, what is carried there, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sglang_prefix.cli.bench_kernel import (
    Budget,
    Dry,
    ListCases,
    Out,
    Resume,
    Seed,
    finish,
    make_run,
    prepare_device,
    print_names,
    start_run,
)
from sglang_prefix.cli.options import JsonOption, existing_path, folder_to_write
from sglang_prefix.cli.output import console, say

__all__ = ["gpu"]

_BUDGET_S = 540.0
_CARRYING, _USING = "What is carried there", "What comes of it"


def gpu(
    ctx: typer.Context,
    out: Out = None,
    carried: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="What --pack made, to be unpacked.", callback=existing_path
        ),
    ] = None,
    budget_s: Budget = None,
    seed: Seed = 0,
    resume: Resume = False,
    dry: Dry = False,
    list_cases: ListCases = False,
    pack: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Run nothing: make this folder of what a GPU host without a network needs, and "
            "print the sizes.",
            callback=folder_to_write,
            rich_help_panel=_CARRYING,
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Triton's cache, as `kernels --cache` writes it.",
            callback=existing_path,
            rich_help_panel=_CARRYING,
        ),
    ] = None,
    kit: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Packages of others: archives in core/ and ops/.",
            callback=existing_path,
            rich_help_panel=_CARRYING,
        ),
    ] = None,
    fasttree: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            envvar="FASTTREE_KERNEL_BENCH",
            help="FastTree's kernel_bench.",
            callback=existing_path,
            rich_help_panel=_CARRYING,
        ),
    ] = None,
    use: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Run nothing: take the results in this folder into the checkout, tiles, limits "
            "and pages.",
            callback=existing_path,
            rich_help_panel=_USING,
        ),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The checkout. Default: this one.",
            callback=existing_path,
            rich_help_panel=_USING,
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Check and measure all that matters on a GPU in nine minutes, each step within its own limit.

    Correctness first: what is wrong stops the run. A step that overruns is killed, and the next
    one goes on. The file in --out, gpu.json, is whole after every step, and every step has a folder
    there with its own results.
    """
    screen = console(json_file)
    if pack is not None:
        from sglang_prefix.bench.gpu.pack import pack as make

        target = pack
        sizes = make_run(
            lambda: make(target, cache=cache, kit=kit, fasttree=fasttree), target, "--pack"
        )
        for name, size in (sizes | {"in all": sum(sizes.values())}).items():
            say(screen, f"{size / 2**20:6.1f} MiB  {name}")
        for name, given in (("cache", cache), ("kit", kit), ("fasttree", fasttree)):
            if given is None:
                say(screen, f"     none      {name}: --{name} names no folder")
        return
    if use is not None:
        from sglang_prefix.bench.gpu.use import ROOT, use_results

        folder, root = use, into or ROOT
        for line in make_run(lambda: use_results(folder, root), root, "--into"):
            say(screen, line)
        return
    prepare_device(dry=dry, needs_gpu=not list_cases)
    from sglang_prefix.bench.gpu.run import GpuRun

    if list_cases:
        print_names([step.name for step in GpuRun.steps])
    options = {"carried": str(carried) if carried else None}
    run = start_run(ctx, GpuRun, out, options, seed=seed, dry=dry, resume=resume)
    finish(run, _BUDGET_S if budget_s is None else budget_s, screen, json_file)
