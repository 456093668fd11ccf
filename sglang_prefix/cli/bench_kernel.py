"""`sglang-prefix bench kernel`: decode attention on batches that share, ours against stock."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sglang_prefix.cli.output import JsonOption, console, fail, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_prefix.bench.cells import KernelCell, KernelOptions
    from sglang_prefix.bench.kernel_run import KernelRun

__all__ = ["kernel", "kernel_table"]

_INTERRUPTED = 130
_FILE_WIDTH = 130
_DTYPES = ("bfloat16", "float16", "float32")
# What a resumed run may be told anew: none of it changes what its numbers mean.
_WITH_RESUME = ("ctx", "out", "resume", "budget_s", "json_file", "plots", "report")
_BUDGET_S = {True: 240.0, False: 600.0}  # by --quick


def kernel(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for kernel.json, plots and page.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Small batches; a few minutes on two CPU cores.")
    ] = False,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|REGEX",
            help="Registry file (trees, unrelated, chunk, ...), or a regular expression that the "
            "names of cells contain; may be repeated. Default: all files.",
        ),
    ] = None,
    tree: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N1,N2_L1,L2",
            help="A batch in PAT's notation, as in 1,8,512_512,512,256; may be repeated.",
        ),
    ] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Batches from a trace in Mooncake's format, .jsonl or .jsonl.gz; may be repeated.",
        ),
    ] = None,
    trace_batches: Annotated[int, typer.Option(min=1, help="Moments of a trace.")] = 3,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="pat, node, chunk or query; may be repeated. Default: all."),
    ] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QO:KV[:DIM]", help="May be repeated. Default: the workload's own, or 32:8:128."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(_DTYPES)}.")] = "bfloat16",
    page_size: Annotated[int, typer.Option(min=1, help="Tokens per page of the KV pool.")] = 1,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Timed rounds per cell. Default: as many as fit, 3 to 15."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all inputs.")] = 0,
    max_tokens: Annotated[
        int,
        typer.Option(min=1, help="KV tokens that a batch may store; trace batches are cut to it."),
    ] = 1 << 18,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch on the CPU. Default: torch's own choice.")
    ] = None,
    budget_s: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Time for the cells; small batches come first. Default: 600, with --quick 240.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, under its options.")
    ] = False,
    plots: Annotated[bool, typer.Option(help="Draw the plots (needs matplotlib).")] = True,
    report: Annotated[bool, typer.Option(help="Write the page report.html into --out.")] = True,
    json_file: JsonOption = None,
) -> None:
    """Compare decode attention kernels on batches that share prefixes.

    Every output is compared with a float64 oracle before it is timed. The file in --out is whole
    after every cell: Ctrl-C keeps what is there, and --resume goes on. At the end a page
    with all tables and plots lies beside it, report.html.
    """
    if plots and find_spec("matplotlib") is None:
        fail("plots need matplotlib: pip install 'sglang-prefix[bench]', or give --no-plots", 2)
    if resume:
        _check_resume(ctx, out)
    _check("dtype", [dtype], _DTYPES)
    _check("policy", policy or [], ("pat", "node", "chunk", "query"))
    from sglang_prefix.bench.cells import KernelOptions

    options = KernelOptions(
        quick=quick,
        workloads=tuple(workload or ()),
        trees=tuple(tree or ()),
        traces=tuple(trace or ()),
        trace_batches=trace_batches,
        heads=tuple(heads or ()),
        dtype=dtype,
        page_size=page_size,
        rounds=rounds,
        seed=seed,
        max_tokens=max_tokens,
        threads=threads,
        **({"policies": tuple(dict.fromkeys(policy))} if policy else {}),
    )
    screen = console(json_file)
    run = _prepared(out, options, resume, screen)
    budget_s = _BUDGET_S[run.options.quick] if budget_s is None else budget_s
    interrupted = _measure(run, budget_s, screen)
    _print(run.data, run.ours, screen)
    if run.path.exists():
        screen.print(f"written to {run.path}", soft_wrap=True)
    problems = [*run.problems(), *_draw(run, screen, plots=plots, report=report)]
    write_json(run.data, json_file)
    if interrupted:
        problems.append(f"interrupted; --resume --out {out} goes on")
    _end(problems, _INTERRUPTED if interrupted else 1)


def _draw(run: KernelRun, screen: Console, *, plots: bool, report: bool) -> list[str]:
    """Write the plots and the page beside the result file; what could not be written, and why."""
    folder, problems = run.path.parent, []
    if plots and run.data["cells"]:
        from sglang_prefix.bench.plots import save_plots

        try:
            for path in save_plots(run.data, folder):
                screen.print(f"written to {path}", soft_wrap=True)
        except OSError as error:
            problems.append(f"plots cannot be written to {folder}: {error.strerror or error}")
    if report and run.path.exists():
        from sglang_prefix.bench.report import ResultError, write_folder_page

        try:
            path = write_folder_page(folder, plots=plots)
            screen.print(f"written to {path}", soft_wrap=True)
        except ResultError as error:
            problems.append(f"no page: {' '.join(str(error).split())}")
        except OSError as error:
            problems.append(
                f"{folder / 'report.html'} cannot be written: {error.strerror or error}"
            )
    return problems


def _end(problems: list[str], status: int) -> None:
    """End with one line for each problem; without any, end well."""
    for problem in problems[:-1]:
        typer.echo(f"sglang-prefix: {problem}", err=True)
    if problems:
        fail(problems[-1], status)


def _check(option: str, values: list[str], legal: tuple[str, ...]) -> None:
    for value in values:
        if value not in legal:
            fail(f"--{option} is {value!r}; legal: {', '.join(legal)}", 2)


def _check_resume(ctx: typer.Context, out: Path) -> None:
    for name in ctx.params:
        # By name: typer may bring a click of its own.
        source = ctx.get_parameter_source(name)
        if source and source.name == "COMMANDLINE" and name not in _WITH_RESUME:
            flag = name.replace("_", "-")
            fail(f"--{flag} with --resume: the run in {out} has its own; legal: without", 2)


def _prepared(out: Path, options: KernelOptions, resume: bool, screen: Console) -> KernelRun:
    with screen.status("importing torch"):
        from sglang_prefix.bench.kernel_run import KernelRun
    try:
        run = KernelRun(out, options, ["sglang-prefix", *sys.argv[1:]], resume=resume)
    except ValueError as error:
        fail(f"{error}", 2)
    except OSError as error:
        fail(f"--out {out} cannot be written: {error.strerror}; legal: a folder of yours", 2)
    with screen.status("importing SGLang for its own kernels"):
        run.prepare()
    return run


def _measure(run: KernelRun, budget_s: float, screen: Console) -> bool:
    """Measure with progress shown; whether the user stopped it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    text = TextColumn("{task.description} [dim]{task.fields[doing]}")
    with Progress(*columns, text, console=screen, transient=True) as progress:
        bar = progress.add_task("", total=len(run.cells), doing="", completed=-1)

        def begin(cell: KernelCell) -> None:
            progress.update(bar, advance=1, description=cell.name, doing="")

        try:
            run.run(budget_s, begin, lambda what: progress.update(bar, doing=what))
        except KeyboardInterrupt:
            return True
        except OSError as error:
            fail(f"{run.path} cannot be written: {error.strerror}")
    return False


def _print(data: dict[str, Any], ours: str, screen: Console) -> None:
    if not screen.is_terminal:
        screen.width = max(screen.width, _FILE_WIDTH)
    screen.print(kernel_table(data, ours, screen.width))
    for line in _remarks(data):
        screen.print(line, soft_wrap=True, highlight=False, markup=False)


def _remarks(data: dict[str, Any]) -> list[str]:
    """What the table does not show: what is absent, failed or was not run, and why."""
    lines = [f"absent: {name}: {reason}" for name, reason in data["absent"].items()]
    for kind in ("absent", "failed"):
        where: dict[str, list[str]] = {}
        for cell in data["cells"]:
            for name, reason in cell[kind].items():
                where.setdefault(f"{name}: {reason}", []).append(cell["name"])
        lines += [f"{kind} in {_some(cells)}: {what}" for what, cells in where.items()]
    reasons: dict[str, list[str]] = {}
    for name, reason in data["why_not_run"].items():
        reasons.setdefault(reason, []).append(name)
    return lines + [f"not run: {_some(names)}: {reason}" for reason, names in reasons.items()]


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def kernel_table(data: dict[str, Any], ours: str, width: int = _FILE_WIDTH) -> Any:
    """The table of a result file, as a rich table; rows in which ours loses are marked.

    Args:
        data: of the file.
        ours: the contender to set against the fastest stock kernel.
        width: columns of the screen; narrow ones go without the split.
    """
    from rich.table import Table

    where = data["environment"]["gpu"] or data["environment"]["cpu"]
    stocks = dict.fromkeys(cell["best_stock"] or "absent" for cell in data["cells"])
    title = f"decode attention, {data['options']['dtype']}, {where}"
    caption = (
        f"ours: {ours}; stock: the fastest of {', '.join(stocks) or 'none'}; ms: median of a "
        "step's plan, copy and layers; over query: the same executor without sharing / ours; "
        "read: KV tokens read / KV tokens of all requests"
    )
    split = width >= _FILE_WIDTH
    if split:
        caption += (
            "; split of ours: plan + copy + forward + merge; on the CPU merge is timed alone, "
            "after the step, and forward is the rest of the layers' time (- where none is left)"
        )
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("cell", overflow="fold")
    columns = ("batch", "tokens", "stock ms", "ours ms", "speed-up", "over query", "read", "ideal")
    for column in (*columns, *(["split, ms"] if split else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for cell in data["cells"]:
        row, style = _row(cell, ours, with_stock=len(stocks) > 1)
        table.add_row(*row[: len(table.columns)], style=style)
    return table


def _row(cell: dict[str, Any], ours: str, *, with_stock: bool) -> tuple[list[str], str | None]:
    """The texts of a row, and its style."""
    best, mine = cell["best_stock"], cell["contenders"].get(ours)
    tokens = cell["tokens"]
    stock = f"{cell['contenders'][best]['ms']:.2f}" if best else "absent"
    row = [cell["name"], str(cell["batch"]), str(tokens["logical"])]
    row.append(f"{best} {stock}" if best and with_stock else stock)
    ideal = f"{tokens['ideal'] / tokens['logical']:.3f}"
    if mine is None:
        return [*row, "FAILED", "-", "-", "-", ideal, "-"], "red"
    query = cell["contenders"].get(f"{mine['executor']}/query")
    parts = [mine[f"{part}_ms"] for part in ("plan", "copy", "forward", "merge")]
    speedup = mine["speedup"]
    slower = speedup is not None and speedup < 1
    row += [
        f"{mine['ms']:.2f}",
        "-" if speedup is None else f"{speedup:.2f}x" + " slower" * slower,
        f"{query['ms'] / mine['ms']:.2f}x" if query else "-",
        f"{mine['kv_read_ratio']:.3f}",
        ideal,
        " + ".join("-" if part is None else f"{part:.1f}" for part in parts),
    ]
    return row, "red" if slower else None
