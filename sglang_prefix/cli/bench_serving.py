"""`sglang-prefix bench serving`: stock and prefix servers, or engines, under the same loads."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sglang_prefix.cli.bench_kernel import finish, make_run
from sglang_prefix.cli.output import JsonOption, console, fail

if TYPE_CHECKING:
    from sglang_prefix.bench.run import BenchRun

__all__ = ["serving"]

_ENGINES = "Engines, with --engine"
# Of servers and engines alike; all others are for the one or, in their own panel, the other.
_FOR_BOTH = ("out", "seed", "report", "resume", "json_file", "engine")


def serving(
    ctx: typer.Context,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the result, the plots and the logs.")
    ] = None,
    server_args: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- SERVER_ARGS...", help="Of `sglang serve`, for both servers."),
    ] = None,
    model_path: Annotated[
        str | None, typer.Option(help="Model to serve. Default: a tiny random one, made in OUT.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Default: the model's.")] = None,
    stock_url: Annotated[
        str | None, typer.Option(help="A stock server that runs, instead of starting one.")
    ] = None,
    prefix_url: Annotated[
        str | None,
        typer.Option(
            "--prefix-url", "--base-url", help="A prefix server that runs, instead of starting one."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes of all workloads: minutes on a CPU.")
    ] = False,
    workload: Annotated[
        list[str] | None, typer.Option(help="May be repeated. Default: all in the file.")
    ] = None,
    workload_file: Annotated[
        Path | None, typer.Option(help="Workloads in the format of ours.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Requests to replay, JSON lines in Mooncake's format.")
    ] = None,
    trace_requests: Annotated[
        int | None, typer.Option(min=1, help="Replay the first so many.")
    ] = None,
    trace_block_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=512, help="Tokens of a block of 512; all lengths shrink alike."),
    ] = None,
    trace_speed: Annotated[
        float | None,
        typer.Option(min=0.001, help="Replay so many times faster than recorded."),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed runs of each workload; the medians count.")
    ] = 1,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of all requests. Default: 0; with --engine a fresh one."),
    ] = None,
    min_equal: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of tokens before an answer's first difference that a comparison needs. "
            "Default: 1 in float32, 0.25 otherwise, where rounding differs.",
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of the servers. Default: a free one.")
    ] = None,
    start_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that a server may take to start.")
    ] = 900,
    workload_timeout: Annotated[
        float,
        typer.Option(
            min=1,
            help="Seconds in which a server must answer all requests of a workload once, beside "
            "the time over which a trace sends them.",
        ),
    ] = 1800,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write OUT/report.html, with the plots.")
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in OUT that was interrupted.")
    ] = False,
    json_file: JsonOption = None,
    engine: Annotated[
        bool,
        typer.Option(
            "--engine",
            rich_help_panel=_ENGINES,
            help="Measure offline engines with a model of Llama-3.1-8B's shape on this GPU.",
        ),
    ] = False,
    model: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_ENGINES,
            help="Folder for the model, 15 GB. Default: one in the temporary folder.",
        ),
    ] = None,
    long_output: Annotated[
        int, typer.Option(min=1, rich_help_panel=_ENGINES, help="Tokens of the long rollouts.")
    ] = 8192,
    only: Annotated[
        str,
        typer.Option(
            rich_help_panel=_ENGINES, help="Regular expression that the names of cases contain."
        ),
    ] = "",
    list_cases: Annotated[
        bool,
        typer.Option(
            "--list", rich_help_panel=_ENGINES, help="Print the cases in order, run none."
        ),
    ] = False,
    budget_s: Annotated[
        float,
        typer.Option(min=0, rich_help_panel=_ENGINES, help="Begin no case after these seconds."),
    ] = 540,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry", rich_help_panel=_ENGINES, help="A tiny model on the CPU: proves no speed."
        ),
    ] = False,
) -> None:
    """Compare a stock server with a prefix server: TTFT, TPOT, ITL, throughput, KV read.

    Both get the same requests from SGLang's bench_serving, and their tokens are compared. Workloads
    in which tokens differ, or fewer than 90% of the decode steps were packed, get no ratios.

    With --engine: engines instead of servers, ours against every backend of SGLang that this host
    has. Time per output token at full batch, log probabilities, the size of the KV pool, and a
    guard against waiting for the device.
    """
    _check_mode(ctx, engine)
    if list_cases:
        from sglang_prefix.bench.serving.loads import (
            STOCK,
            dry_measurements,
            measurements,
        )

        found = dry_measurements() if dry else measurements(tuple(STOCK), long_output)
        typer.echo("\n".join(one.name for one in found))
        return
    if out is None:
        fail("--out is missing; legal: a folder for the result", 2)
    from sglang_prefix.bench.serving.servers import ServerError

    make = partial(_engine_run if engine else _server_run, ctx.params)
    plots = find_spec("matplotlib") is not None
    try:
        run = make_run(make, out)
        # Servers, client and engines end with us, however we end.
        with _ended_by_signals():
            screen = console(json_file)
            finish(run, budget_s if engine else inf, screen, json_file, plots=plots, report=report)
    except (ValueError, ServerError) as error:
        fail(str(error))


def _engine_run(chosen: dict[str, Any]) -> BenchRun:
    from sglang_prefix.bench.serving.engine_run import EngineRun

    names = ("long_output", "model", "only", "seed", "dry", "resume")
    return EngineRun(
        chosen["out"],
        command=["sglang-prefix", *sys.argv[1:]],
        **{name: chosen[name] for name in names},
    )


def _server_run(chosen: dict[str, Any]) -> BenchRun:
    from sglang_prefix.bench.serving.plan import Plan
    from sglang_prefix.bench.serving.run import Run

    if find_spec("matplotlib") is None:
        fail("the plots need matplotlib: pip install 'sglang-prefix[bench]'")
    names = {field.name for field in fields(Plan)} & chosen.keys()
    command = ["sglang-prefix", *sys.argv[1:]]
    plan = Plan(command=command, **{name: chosen[name] for name in names})
    return Run(plan, resume=chosen["resume"])


def _check_mode(ctx: typer.Context, engine: bool) -> None:
    for parameter in ctx.command.params:
        name, is_for_engines = parameter.name, getattr(parameter, "rich_help_panel", "") == _ENGINES
        if name is None or name in _FOR_BOTH or is_for_engines == engine:
            continue
        source = ctx.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = "arguments of servers" if name == "server_args" else parameter.opts[0]
            fail(f"{option}: only {'without' if engine else 'with'} --engine", 2)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP end this process as an interrupt does: cleaning up."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
