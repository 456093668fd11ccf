"""`sglang-prefix bench kernel`, `bench tune` and `bench host`: attention, tiles, host time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from sglang_prefix.cli.bench_run import (
    DEFAULT_BUDGET_S,
    Budget,
    Dry,
    ListCases,
    Out,
    Resume,
    Seed,
    Table,
    WriteTable,
    finish,
    json_value,
    make_run,
    prepare_device,
    print_names,
    start_run,
)
from sglang_prefix.cli.options import (
    MAX_REPEATS,
    MAX_REQUESTS,
    MAX_SECONDS,
    MAX_TOKENS,
    JsonOption,
    PageSize,
    readable_file,
)
from sglang_prefix.cli.output import console, fail

__all__ = ["host", "kernel", "tune"]

_QUICK_BUDGET_S = 240.0
_MAX_MOMENTS, _MAX_THREADS = 1000, 1024


def kernel(
    ctx: typer.Context,
    out: Out = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small batches; a few minutes on two CPU cores.")
    ] = False,
    workloads: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            metavar="FILE|REGEX",
            help="Registry file (trees, unrelated, cpu, gpu, ...), or a regular expression that "
            "the names of cases contain; may be repeated, both choose together. Default: all "
            "files that are no suite.",
        ),
    ] = None,
    trees: Annotated[
        list[str] | None,
        typer.Option(
            "--tree",
            metavar="N1,N2_L1,L2",
            help="A batch in PAT's notation, as in 1,8,512_512,512,256; may be repeated.",
        ),
    ] = None,
    traces: Annotated[
        list[str] | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Batches from a trace in Mooncake's format, .jsonl or .jsonl.gz; may be repeated.",
            callback=readable_file,
        ),
    ] = None,
    trace_batches: Annotated[
        int, typer.Option(min=1, max=_MAX_MOMENTS, help="Moments of a trace.")
    ] = 3,
    ours: Annotated[bool, typer.Option("--ours", help="Look for no kernels of others.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--setting",
            help="On a GPU measure ours with a change of its kernels or plans, too: its name, or "
            "all; may be repeated.",
        ),
    ] = None,
    policies: Annotated[
        list[str] | None,
        typer.Option("--policy", help="pat, node, chunk or query; may be repeated. Default: all."),
    ] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QO:KV[:DIM[:VDIM]]",
            help="May be repeated; with VDIM v is the first elements of k. Default: the workload's "
            "own, or 32:8:128.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Of queries and KV.")
    ] = "bfloat16",
    page_size: PageSize = 1,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_REPEATS, help="Timed rounds per case. Default: as many as fit."
        ),
    ] = None,
    seed: Seed = 0,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_TOKENS,
            help="KV tokens that a batch may store. Default: what memory holds; of batches from "
            "a trace, which are cut to it, 262144.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=_MAX_THREADS, help="Of torch on the CPU. Default: torch's own choice."
        ),
    ] = None,
    budget_s: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=MAX_SECONDS,
            help="Time for the run; small batches come first. Default: 600, with --quick 240.",
            show_default=False,
        ),
    ] = None,
    resume: Resume = False,
    dry: Dry = False,
    list_cases: ListCases = False,
    plots: Annotated[bool, typer.Option(help="Draw the plots (needs matplotlib).")] = True,
    report: Annotated[bool, typer.Option(help="Write the page report.html into --out.")] = True,
    json_file: JsonOption = None,
) -> None:
    """Compare decode attention kernels on batches that share prefixes.

    Every output is compared with a float64 oracle before it is timed. The file in --out,
    kernel.json, is whole after every case: Ctrl-C keeps what is there, and --resume goes on. At the
    end a page with all tables and plots lies beside it, report.html.
    """
    prepare_device(dry=dry)
    from sglang_prefix.bench.cases import KernelOptions, kernel_cases
    from sglang_prefix.bench.plots import has_matplotlib

    given = {field.name: json_value(ctx, field.name) for field in dataclasses.fields(KernelOptions)}
    options = KernelOptions(**{name: value for name, value in given.items() if value})
    if list_cases:
        print_names([case.name for case in make_run(lambda: kernel_cases(options), out)])
    if plots and not has_matplotlib():
        fail("plots need matplotlib: pip install 'sglang-prefix[bench]', or give --no-plots", 2)
    screen = console(json_file)
    with screen.status("importing torch"):
        from sglang_prefix.bench.kernel import KernelRun

    run = start_run(
        ctx, KernelRun, out, dataclasses.asdict(options), seed=seed, dry=dry, resume=resume
    )
    if budget_s is None:
        budget_s = _QUICK_BUDGET_S if run.options.quick else DEFAULT_BUDGET_S
    finish(run, budget_s, screen, json_file, plots=plots, report=report)


def tune(
    ctx: typer.Context,
    out: Out = None,
    budget_s: Budget = None,
    seed: Seed = 0,
    resume: Resume = False,
    dry: Dry = False,
    list_cases: ListCases = False,
    write_table: WriteTable = None,
    table: Table = None,
    json_file: JsonOption = None,
) -> None:
    """Time the forward kernel with every tile that is worth trying, on this GPU.

    One pack shape per row class; each tile is checked before it is timed. The file in --out,
    tune.json, is whole after every shape, and --resume goes on. --write-table then takes what was
    faster into the table that the executor reads.
    """
    prepare_device(dry=dry, needs_gpu=not (list_cases or write_table))
    from sglang_prefix.bench import tune as module

    if list_cases:
        print_names([pack.name for pack in module.pack_shapes(dry=dry)])
    if write_table is not None:
        file, target = write_table, table or module.TABLE
        typer.echo(make_run(lambda: module.write_table(file, target), target))
        return
    run = start_run(ctx, module.TuneRun, out, {}, seed=seed, dry=dry, resume=resume)
    finish(run, budget_s, console(json_file), json_file)


def host(
    ctx: typer.Context,
    out: Out = None,
    requests: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=MAX_REQUESTS,
            help="Of a batch that is planned; may be repeated. Default: 256, 1024",
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, max=MAX_REPEATS, help="Timed rounds of planning.")
    ] = 50,
    engine: Annotated[
        bool, typer.Option(help="Run real engines, too: two starts, about a minute.")
    ] = True,
    model: Annotated[
        bool,
        typer.Option(help="Run SmolLM2 as well, fetched once, 93 MB: four minutes on two cores."),
    ] = False,
    budget_s: Budget = None,
    seed: Seed = 0,
    resume: Resume = False,
    list_cases: ListCases = False,
    json_file: JsonOption = None,
) -> None:
    """Time what planning and decode steps cost the host, on SGLang's own radix tree and engine.

    The file in --out is host.json.
    """
    from sglang_prefix.bench.host import HostRun

    options = {"requests": requests or [256, 1024], "rounds": rounds}
    options |= {"engine": engine, "model": model}
    folder = Path() if list_cases else out
    run = start_run(ctx, HostRun, folder, options, seed=seed, device="cpu", resume=resume)
    if list_cases:
        print_names(run.order)
    finish(run, budget_s, console(json_file), json_file)
