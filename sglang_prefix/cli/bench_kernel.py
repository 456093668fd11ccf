"""`sglang-prefix bench kernel`, `bench tune` and `bench host`: attention, tiles, host time."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import typer

from sglang_prefix.cli.command import typed_command
from sglang_prefix.cli.options import (
    MAX_REPEATS,
    MAX_REQUESTS,
    MAX_SECONDS,
    MAX_SEED,
    MAX_TOKENS,
    JsonOption,
    PageSize,
    folder_to_write,
    is_given,
    readable_file,
    writable_file,
)
from sglang_prefix.cli.output import complain, console, fail, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from sglang_prefix.bench.run import BenchRun

__all__ = [
    "finish",
    "host",
    "kernel",
    "make_run",
    "prepare_device",
    "print_names",
    "start_run",
    "tune",
]

T = TypeVar("T")
R = TypeVar("R", bound="BenchRun")

_INTERRUPTED = 130
_BUDGET_S, _QUICK_BUDGET_S = 600.0, 240.0
_MAX_MOMENTS, _MAX_THREADS = 1000, 1024
# What a resumed run may be told anew: none of it changes what its numbers mean.
_WITH_RESUME = ("ctx", "out", "resume", "budget_s", "json_file", "plots", "report")

Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the result file, plots and page.", callback=folder_to_write),
]
Budget = Annotated[
    float | None,
    typer.Option(
        min=0, max=MAX_SECONDS, help="Time for the run. Default: 600.", show_default=False
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --out, under its options.")
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of all inputs.")]
Dry = Annotated[
    bool,
    typer.Option("--dry", help="Tiny shapes in Triton's interpreter: shows the logic, no speed."),
]
WriteTable = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Measure nothing: take this result file into --table instead.",
        callback=readable_file,
    ),
]
Table = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What plans or kernels read. Default: the installed one.",
        callback=writable_file,
    ),
]
ListCases = Annotated[bool, typer.Option("--list", help="Print the names of the cases, run none.")]


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
            metavar="QO:KV[:DIM]", help="May be repeated. Default: the workload's own, or 32:8:128."
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

    given = {field.name: _given(ctx, field.name) for field in dataclasses.fields(KernelOptions)}
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
        budget_s = _QUICK_BUDGET_S if run.options.quick else _BUDGET_S
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


def start_run(
    ctx: typer.Context,
    kind: Callable[..., R],
    out: Path | None,
    options: dict[str, Any],
    *,
    resume: bool,
    **more: Any,
) -> R:
    """A run, new or resumed, in the folder that the user names."""
    if out is None:
        fail("--out is missing; legal: a folder for the result file", 2)
    run = make_run(
        lambda: kind(out, command=typed_command(), options=options, resume=resume, **more), out
    )
    if resume:
        _check_resume(ctx, run)
    return run


def prepare_device(*, dry: bool, needs_gpu: bool = False) -> None:
    """Turn Triton's interpreter on for a dry run; without one, see that there is a GPU."""
    if dry:
        # Triton reads it when a kernel is defined.
        os.environ.setdefault("TRITON_INTERPRET", "1")
        import triton

        if not triton.knobs.runtime.interpret:
            fail("--dry needs Triton's interpreter: set TRITON_INTERPRET=1", 2)
    elif needs_gpu:
        import torch

        if not torch.cuda.is_available():
            fail("no GPU here; legal without one: --dry", 2)


def _given(ctx: typer.Context, name: str) -> Any:
    """A parameter as JSON has it."""
    value = ctx.params[name]
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _check_resume(ctx: typer.Context, run: BenchRun) -> None:
    """Refuse options that are not those of the run that is resumed."""
    was = {**run.data["options"], "seed": run.data["seed"], "dry": run.data["dry"]}
    for parameter in ctx.command.params:
        name = parameter.name or ""
        is_new = is_given(ctx, name) and name not in _WITH_RESUME
        if is_new and was.get(name) != _given(ctx, name):
            flag, folder = parameter.opts[0], run.path.parent
            fail(f"{flag} with --resume: the run in {folder} has its own; legal: without", 2)


def print_names(names: list[str]) -> NoReturn:
    """Print the names of cases, and end."""
    typer.echo("\n".join(names))
    raise typer.Exit


def make_run(make: Callable[[], T], out: Path | None, option: str = "--out") -> T:
    """What ``make`` returns; bad input, or no writable ``out``, ends the command with one line."""
    try:
        return make()
    except ValueError as error:
        fail(f"{error}", 2)
    except OSError as error:
        fail(f"{option} {out} cannot be written: {error.strerror}; legal: a folder of yours", 2)


def finish(
    run: BenchRun,
    budget_s: float | None,
    screen: Console,
    json_file: str | None,
    *,
    plots: bool = False,
    report: bool = False,
) -> None:
    """Measure, print the tables, write plots, page and JSON; end with what went wrong."""
    from sglang_prefix.bench.report import print_section, section_of

    with screen.status("looking at what is here"):
        run.prepare()
    interrupted = _measure(run, _BUDGET_S if budget_s is None else budget_s, screen)
    print_section(section_of(run.data), screen)
    if run.path.exists():
        screen.print(f"written to {run.path}", soft_wrap=True)
    problems = [*run.problems(), *_draw(run, screen, plots=plots, report=report)]
    write_json(run.data, json_file)
    if interrupted:
        problems.append(f"interrupted; --resume --out {run.path.parent} goes on")
    for problem in problems[:-1]:
        complain(problem)
    if problems:
        fail(problems[-1], _INTERRUPTED if interrupted else 1)


def _measure(run: BenchRun, budget_s: float, screen: Console) -> bool:
    """Measure with progress shown; whether the user stopped it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    text = TextColumn("{task.description} [dim]{task.fields[doing]}")
    # Refreshed when there is news, by this thread: one of its own would take a core from what is
    # timed.
    options: dict[str, Any] = {"transient": True, "auto_refresh": False}
    with Progress(*columns, text, console=screen, **options) as progress:
        bar = progress.add_task("", total=len(run.order), doing="", completed=-1)
        try:
            run.run(
                budget_s,
                lambda name: progress.update(
                    bar, advance=1, description=name, doing="", refresh=True
                ),
                lambda what: progress.update(bar, doing=what, refresh=True),
            )
        except KeyboardInterrupt:
            return True
        except OSError as error:
            fail(f"{run.path} cannot be written: {error.strerror}")
    return False


def _draw(run: BenchRun, screen: Console, *, plots: bool, report: bool) -> list[str]:
    """Write the plots and the page beside the result file; what could not be written, and why."""
    from sglang_prefix.bench.plots import save_plots
    from sglang_prefix.bench.report import ResultError, write_folder_page

    folder, what = run.path.parent, "plots"
    try:
        paths = save_plots(run.data, folder) if plots and run.data["cases"] else []
        what = "the page"
        if report and run.path.exists():
            paths.append(write_folder_page(folder, plots=plots))
    except ResultError as error:
        return [f"no page: {' '.join(str(error).split())}"]
    except OSError as error:
        return [f"{what} cannot be written to {folder}: {error.strerror or error}"]
    for path in paths:
        screen.print(f"written to {path}", soft_wrap=True)
    return []
