"""`sglang-prefix bench gpu`: a GPU's few minutes, what is carried there, and what comes of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sglang_prefix.cli.bench_run import (
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
from sglang_prefix.cli.options import (
    MAX_SECONDS,
    JsonOption,
    existing_path,
    folder_to_write,
    readable_file,
)
from sglang_prefix.cli.output import console, say, track

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["gpu"]

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
    budget_s: Annotated[
        float, typer.Option(min=0, max=MAX_SECONDS, help="Begin no step that may end later.")
    ] = 540,
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
            help="Triton's cache. What the steps launch and it lacks is compiled into it first.",
            callback=folder_to_write,
            rich_help_panel=_CARRYING,
        ),
    ] = None,
    arch: Annotated[
        Literal["sm_80", "sm_90", "sm_100"],
        typer.Option(help="That the cache is for.", rich_help_panel=_CARRYING),
    ] = "sm_90",
    wheel: Annotated[
        Path | None,
        typer.Option(
            metavar="WHEEL",
            help="Of the host's Triton, if its Python is another: the same release as here.",
            callback=readable_file,
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
        _pack(pack, screen, arch, wheel, cache=cache, kit=kit, fasttree=fasttree)
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
    finish(run, budget_s, screen, json_file)


def _pack(
    folder: Path, screen: Console, arch: str, wheel: Path | None, **parts: Path | None
) -> None:
    """Fill the cache, make the folder, and say what it holds."""
    from sglang_prefix.bench.gpu import pack as module

    if cache := parts["cache"]:
        _fill(cache, arch, wheel, screen)
    sizes = make_run(lambda: module.pack(folder, **parts), folder, "--pack")
    for name, size in (sizes | {"in all": sum(sizes.values())}).items():
        say(screen, f"{size / 2**20:6.1f} MiB  {name}")
    for name in (name for name, given in parts.items() if given is None):
        say(screen, f"      none  {name}: --{name} names no folder")


def _fill(cache: Path, arch: str, wheel: Path | None, screen: Console) -> None:
    """Compile what the steps launch and the cache lacks."""
    from prefix_kernels.kernel_cache import collect_launches, compile_launches
    from sglang_prefix.bench.gpu import launches as module
    from sglang_prefix.cli.kernel_cache import find_triton

    triton = find_triton(wheel)
    with screen.status("asking the steps what they launch"):
        found = [one for work in module.WORKS for one in collect_launches(partial(work, arch))]
    launches = dict.fromkeys(found)
    compiled = compile_launches(launches, cache, arch, triton=triton)
    kernels = track(compiled, len(launches), f"compiling for {arch}", screen)
    new = sum(not kernel.was_there for kernel in kernels)
    of_triton = f"{arch} and Triton {triton.version} ({triton.digest})"
    say(screen, f"{len(kernels)} kernels for {of_triton} in {cache}; {new} compiled now")
