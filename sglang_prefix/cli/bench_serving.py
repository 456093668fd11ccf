"""`sglang-prefix bench serving`: stock and prefix servers, or engines, under the same loads."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from sglang_prefix.cli.bench_run import finish, make_run
from sglang_prefix.cli.command import typed_command
from sglang_prefix.cli.options import (
    MAX_REPEATS,
    MAX_SECONDS,
    MAX_SEED,
    ApiKeyOption,
    JsonOption,
    folder_to_write,
    loadable_model,
    readable_file,
    server_url,
)
from sglang_prefix.cli.output import console, fail

if TYPE_CHECKING:
    from sglang_prefix.bench.run import BenchRun

__all__ = ["serving"]

_ENGINES = "Engines, with --engine"
# Of servers and engines alike; all others are for the one or, in their own panel, the other.
_FOR_BOTH = ("out", "seed", "report", "resume", "json_file", "engine")
# Of a trace, and of the engines' model, whose context is 65536.
_MAX_TRACE, _MAX_OUTPUT = 1_000_000, 60_000
_engine_option = partial(Option, rich_help_panel=_ENGINES)


def serving(
    ctx: typer.Context,
    out: Annotated[
        Path | None, Option(help="Folder for all that is written.", callback=folder_to_write)
    ] = None,
    server_args: Annotated[
        list[str] | None,
        Argument(metavar="-- SERVER_ARGS...", help="Of `sglang serve`, for both servers."),
    ] = None,
    model_path: Annotated[
        str | None, Option(help="Default: a tiny one, made in OUT.", callback=loadable_model)
    ] = None,
    tokenizer: Annotated[
        str | None, Option(help="Default: the model's.", callback=loadable_model)
    ] = None,
    stock_url: Annotated[
        str | None, Option(help="A stock server that runs already.", callback=server_url)
    ] = None,
    prefix_url: Annotated[
        str | None,
        Option(
            "--prefix-url",
            "--base-url",
            help="A prefix server that runs already.",
            callback=server_url,
        ),
    ] = None,
    api_key: ApiKeyOption = None,
    quick: Annotated[bool, Option("--quick", help="Small sizes: minutes on a CPU.")] = False,
    workload: Annotated[list[str] | None, Option(help="May be repeated. Default: all.")] = None,
    workload_file: Annotated[
        Path | None, Option(help="Workloads in the format of ours.", callback=readable_file)
    ] = None,
    trace: Annotated[
        Path | None,
        Option(help="Requests to replay, as Mooncake's traces.", callback=readable_file),
    ] = None,
    trace_requests: Annotated[
        int | None, Option(min=1, max=_MAX_TRACE, help="Replay the first so many.")
    ] = None,
    trace_block_tokens: Annotated[
        int | None,
        Option(min=1, max=512, help="Tokens of a block of 512; all lengths shrink alike."),
    ] = None,
    trace_speed: Annotated[
        float | None, Option(min=0.001, max=1000, help="1 is as recorded.")
    ] = None,
    repeats: Annotated[
        int, Option(min=1, max=MAX_REPEATS, help="Timed runs of each, whose median counts.")
    ] = 1,
    seed: Annotated[
        int | None, Option(min=0, max=MAX_SEED, help="Default: 0; with --engine a new one.")
    ] = None,
    min_equal: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            help="Share of tokens before an answer's first difference that a comparison needs. "
            "Default: 1 in float32, 0.25 otherwise, where rounding differs.",
        ),
    ] = None,
    port: Annotated[int | None, Option(min=1, max=65535, help="Default: a free one.")] = None,
    start_timeout: Annotated[
        float, Option(min=1, max=MAX_SECONDS, help="Seconds to start a server.")
    ] = 900,
    workload_timeout: Annotated[
        float,
        Option(
            min=1,
            max=MAX_SECONDS,
            help="Seconds to answer a workload once, beside the length of a trace.",
        ),
    ] = 1800,
    report: Annotated[bool, Option("--report/--no-report", help="Write OUT/report.html.")] = True,
    resume: Annotated[bool, Option("--resume", help="Go on with the run in OUT.")] = False,
    json_file: JsonOption = None,
    engine: Annotated[
        bool,
        _engine_option("--engine", help="Offline engines with a model of Llama-3.1-8B's shape."),
    ] = False,
    model: Annotated[
        Path | None,
        _engine_option(
            help="Folder for the model, 15 GB. Default: a temporary one.", callback=folder_to_write
        ),
    ] = None,
    long_output: Annotated[
        int, _engine_option(min=1, max=_MAX_OUTPUT, help="Tokens of long rollouts.")
    ] = 8192,
    only: Annotated[str, _engine_option(help="Regular expression that names of cases hold.")] = "",
    list_cases: Annotated[bool, _engine_option("--list", help="Print the cases only.")] = False,
    budget_s: Annotated[
        float, _engine_option(min=0, max=MAX_SECONDS, help="Begin no case later.")
    ] = 540,
    dry: Annotated[bool, _engine_option("--dry", help="A tiny model on the CPU.")] = False,
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
        from sglang_prefix.bench.serving.loads import measurements

        found = measurements(long_output=long_output, dry=dry)
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
        command=typed_command(),
        **{name: chosen[name] for name in names},
    )


def _server_run(chosen: dict[str, Any]) -> BenchRun:
    from sglang_prefix.bench.serving.run import ServingRun

    return ServingRun(command=typed_command(), **chosen)


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
