"""What all commands of `sglang-prefix bench` have in common: options, the run, its end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from sglang_prefix.cli.command import typed_command
from sglang_prefix.cli.options import (
    MAX_SECONDS,
    MAX_SEED,
    folder_to_write,
    is_given,
    readable_file,
    writable_file,
)
from sglang_prefix.cli.output import complain, fail, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from sglang_prefix.bench.run import BenchRun

__all__ = [
    "DEFAULT_BUDGET_S",
    "Budget",
    "Dry",
    "ListCases",
    "Out",
    "Resume",
    "Seed",
    "Table",
    "WriteTable",
    "finish",
    "json_value",
    "make_run",
    "prepare_device",
    "print_names",
    "start_run",
]

T = TypeVar("T")
R = TypeVar("R", bound="BenchRun")

DEFAULT_BUDGET_S = 600.0
_INTERRUPTED = 130
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


def json_value(ctx: typer.Context, name: str) -> Any:
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
        if is_new and was.get(name) != json_value(ctx, name):
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
    interrupted = _measure(run, DEFAULT_BUDGET_S if budget_s is None else budget_s, screen)
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
