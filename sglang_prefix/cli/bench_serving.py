"""`sglang-prefix bench serving`: stock and prefix servers under the same loads."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sglang_prefix.cli.output import JsonOption, console, fail, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_prefix.bench.serving.run import Plan, Run
    from sglang_prefix.bench.serving.workloads import Workload

__all__ = ["serving"]

# Of a server argument, the option of ours that takes its place.
_OURS = {
    "--model-path": "--model-path before --",
    "--model": "--model-path before --",
    "--tokenizer-path": "--tokenizer before --",
    "--host": "nothing: servers listen on 127.0.0.1",
    "--port": "--port before --",
}
# A backend in these, one that packs would be on both sides.
_BACKENDS = ("--attention-backend", "--decode-attention-backend", "--prefill-attention-backend")
_INTERRUPTED = 130
_FILE_WIDTH = 132
_REPORT = "report.html"
# What a report of a folder shows, by `bench kernel` and this command.
_RESULTS = ("kernel.json", "serving.json")
# Of a model folder: without one of these it is not whole.
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def serving(
    out: Annotated[
        Path, typer.Option(help="Folder for serving.json, the plots and the servers' logs.")
    ],
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
        Path | None, typer.Option(help="Workloads in the format of serving_workloads.json.")
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
    seed: Annotated[int, typer.Option(min=0)] = 0,
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
) -> None:
    """Compare a stock server with a prefix server: TTFT, TPOT, ITL, throughput, KV read.

    Both get the same requests from SGLang's bench_serving, and their tokens are compared. Workloads
    in which tokens differ, or fewer than 90% of the decode steps were packed, get no ratios.
    """
    from sglang_prefix.bench.serving.process import ClientError
    from sglang_prefix.bench.serving.run import Plan
    from sglang_prefix.bench.serving.servers import ServerError

    if find_spec("matplotlib") is None:
        fail("the plots need matplotlib: pip install 'sglang-prefix[bench]'")
    overrides = {
        "requests": trace_requests,
        "block_tokens": trace_block_tokens,
        "speed": trace_speed,
    }
    urls = {"stock": stock_url, "prefix": prefix_url}
    given = _check_server_arguments(server_args or [], urls)
    try:
        workloads, absent = _workloads(workload_file, quick, workload or [], trace, overrides)
        _make_folder(out)
        model = model_path or _model(out, urls)
        plan = Plan(
            out=out,
            model=model,
            tokenizer=tokenizer,
            workloads=workloads,
            absent=absent,
            trace=str(trace) if trace else None,
            repeats=repeats,
            seed=seed,
            quick=quick,
            urls={side: url.rstrip("/") if url else None for side, url in urls.items()},
            server_args=_server_arguments(model, tokenizer, seed, given, urls),
            port=port,
            start_timeout_s=start_timeout,
            workload_timeout_s=workload_timeout,
            min_equal=min_equal,
            command=["sglang-prefix", *sys.argv[1:]],
        )
        terminal = console(json_file)
        run = _follow(plan, resume, terminal)
    except (ValueError, ServerError, ClientError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write to {out}: {error.strerror or error}")
    _show(run.data, terminal)
    write_json(run.data, json_file)
    files = [run.path, *_write_plots(run.data, out), *([_write_report(out)] if report else [])]
    names = ", ".join(map(str, files))
    terminal.print(f"written: {names}", highlight=False, markup=False, soft_wrap=True)
    _fail_on_problems(run.data, run.min_equal())


def _check_server_arguments(given: list[str], urls: dict[str, str | None]) -> list[str]:
    words = [word for argument in given for word in argument.split("=", 1)]
    for name, ours in _OURS.items():
        if name in words:
            fail(f"server argument {name} is set by this command; use {ours}", 2)
    for name, value in pairwise(words):
        if name in _BACKENDS and value == "prefix":
            fail(f"server argument {name} prefix would be on both sides; leave it out", 2)
        if (name, value) == ("--load-format", "dummy"):
            fail("server argument --load-format dummy: equal tokens would prove nothing", 2)
    if given and all(urls.values()):
        fail("server arguments are for servers that this command starts; both run already", 2)
    return given


def _workloads(
    file: Path | None,
    quick: bool,
    names: list[str],
    trace: Path | None,
    overrides: dict[str, Any],
) -> tuple[list[Workload], dict[str, str]]:
    from sglang_prefix.bench.serving.workloads import REGISTRY, load_workloads
    from sglang_prefix.bench.workloads.traces import read_trace

    changed = {name: value for name, value in overrides.items() if value is not None}
    found = load_workloads(file or REGISTRY, quick=quick, names=names, overrides={"trace": changed})
    if trace is not None:
        read_trace(trace)  # for its errors, before anything is started
        return found, {}
    without = [one for one in found if one.driver != "trace"]
    absent = {one.name: "no --trace FILE was given" for one in found if one not in without}
    if not without:
        raise ValueError(f"--workload {', '.join(absent)} needs --trace FILE")
    return without, absent


def _make_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {out}, which is a file; legal: a folder, or a new one's name")
    out.mkdir(parents=True, exist_ok=True)


def _model(out: Path, urls: dict[str, str | None]) -> str:
    """The model of a server that runs, or a tiny one with real random weights."""
    from sglang_prefix.bench.serving.servers import RunningServer, describe
    from sglang_prefix.tiny_model import TinyModelConfig, build_tiny_model

    for side, url in urls.items():
        if url is not None:
            return str(describe(RunningServer(side, url.rstrip("/")))["model"])
    folder = out / "tiny-model"
    if folder.exists():
        if lacking := [name for name in _MODEL_FILES if not (folder / name).is_file()]:
            raise ValueError(
                f"{folder} is not a whole model, it lacks {', '.join(lacking)}: remove it"
            )
        return str(folder)
    # As the demo's. Of more tokens, few are halves of characters: SGLang's tool takes the first
    # text for the first token.
    config = TinyModelConfig(
        num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64, vocab_size=4096
    )
    with tempfile.TemporaryDirectory(prefix=".tiny-model-", dir=out) as beside:
        whole = Path(beside, "model")
        build_tiny_model(whole, config)
        whole.rename(folder)
    return str(folder)


def _server_arguments(
    model: str,
    tokenizer: str | None,
    seed: int,
    given: list[str],
    urls: dict[str, str | None],
) -> dict[str, list[str]]:
    """Arguments of both servers, the user's last so that they count."""
    import torch

    common = ["--model-path", model, "--random-seed", str(seed)]
    if tokenizer:
        common += ["--tokenizer-path", tokenizer]
    if not torch.cuda.is_available():
        # Tokens can only be required to be equal where rounding hardly matters; the pool is bounded
        # by tokens, the fraction only has to be enough.
        common += ["--device", "cpu", "--dtype", "float32"]
        common += ["--mem-fraction-static", "0.7", "--max-total-tokens", "65536"]
    both = [*common, *given]
    found = {"stock": both, "prefix": [*both, "--decode-attention-backend", "prefix"]}
    return {side: [] if urls[side] else arguments for side, arguments in found.items()}


def _follow(plan: Plan, resume: bool, terminal: Console) -> Run:
    """Run and show how far it is; servers and client end with us, however we end."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    from sglang_prefix.bench.serving.run import Run

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TimeElapsedColumn(), console=terminal, transient=True)

    def tell(text: str, is_done: bool) -> None:
        progress.update(task, description=text, advance=1 if is_done else 0)
        if is_done:
            progress.console.print(text, highlight=False)

    run = Run(plan, resume=resume, tell=tell)
    task = progress.add_task("starting", total=len(run.pending()))
    with _ended_by_signals(), progress:
        try:
            run.run()
        except KeyboardInterrupt:
            progress.stop()
            # A file of an earlier run is not this one's to go on with.
            goes_on = f"--resume goes on with {run.path}"
            fail(
                f"interrupted; {goes_on if run.is_written else 'nothing was measured'}",
                _INTERRUPTED,
            )
    return run


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


def _write_plots(data: dict[str, Any], out: Path) -> list[Path]:
    from sglang_prefix.bench.serving.plots import PLOTS

    paths = []
    for name, plot in PLOTS.items():
        path = out / f"{name}.svg"
        _write_whole(path, partial(plot(data).savefig, format="svg"))
        paths.append(path)
    return paths


def _write_report(out: Path) -> Path:
    """A page of the result, and of that of `bench kernel` if it is in the same folder."""
    from sglang_prefix.bench.report import ResultError, build_page, find_sources

    path = out / _REPORT
    results = [file for name in _RESULTS if (file := out / name).exists()]
    try:
        sources, _ = find_sources(results)
        page = build_page(sources, title="sglang-prefix results")
    except ResultError as error:
        fail(f"no {path}: {' '.join(str(error).split())}")
    _write_whole(path, lambda beside: beside.write_text(page, encoding="utf-8"))
    return path


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """All of a file or nothing: `write` is given the name of one beside it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        beside.replace(path)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror or error}")
    finally:
        beside.unlink(missing_ok=True)


def _show(data: dict[str, Any], terminal: Console) -> None:
    from sglang_prefix.bench.serving.table import comparison_table, notes

    if not terminal.is_terminal:
        terminal.width = max(terminal.width, _FILE_WIDTH)
    terminal.print(comparison_table(data))
    terminal.print(
        "TTFT, TPOT, ITL: median / 99th percentile. KV read: KV tokens read / KV tokens of all "
        "requests, in packed steps.",
        highlight=False,
    )
    for note in notes(data):
        terminal.print(note, highlight=False, markup=False, soft_wrap=True)


def _fail_on_problems(data: dict[str, Any], min_equal: float) -> None:
    """End with 1 where tokens differ, or where nothing that shares was compared."""
    cells = data["cells"]
    wrong = [c["name"] for c in cells if not c["is_comparison"] and not c["unpacked_ratios"]]
    if wrong:
        why = "; ".join(f"{c['name']}: {c['why_not']}" for c in cells if c["name"] in wrong)
        fail(f"no comparison: {why}")
    sharing = [cell for cell in cells if cell["group"] != "random"]
    if sharing and not any(cell["is_comparison"] for cell in sharing):
        fail("no workload that shares prefixes was packed: this run compares nothing")
