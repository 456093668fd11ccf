"""`bench serving` without SGLang: traces, workloads, servers that fail, conclusions, resuming."""

from __future__ import annotations

import gzip
import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sglang_prefix.bench import serving_run, serving_servers
from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.serving_cells import judge, new_cell, step_delta, sum_up
from sglang_prefix.bench.serving_process import ClientError
from sglang_prefix.bench.serving_run import Plan, Run, steps
from sglang_prefix.bench.serving_servers import (
    RunningServer,
    ServerError,
    describe,
    launch,
    read_counters,
    wait_until_ready,
)
from sglang_prefix.bench.serving_trace import read_trace, scale_trace
from sglang_prefix.bench.serving_workloads import Workload, load_workloads
from sglang_prefix.cli.main import app

pytest.importorskip("matplotlib", reason="the command needs matplotlib for its plots")

# -- traces -------------------------------------------------------------------------------------

LINE: dict[str, Any] = {
    "timestamp": 3000,
    "input_length": 1100,
    "output_length": 64,
    "hash_ids": [0, 7, 9],
}
TOKENS = list(range(1000, 2000))


def write_trace(path: Path, *changes: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(LINE | change) for change in changes) + "\n")
    return path


def rows_of(path: Path, **options: int) -> Any:
    chosen = {"block_tokens": 16, "max_prompt_tokens": 99, "max_output_tokens": 99, "seed": 3}
    return scale_trace(read_trace(path, 10), TOKENS, **(chosen | options))


def test_requests_that_begin_with_the_same_ids_begin_with_the_same_tokens(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"timestamp": 0, "hash_ids": [0, 7, 8]}]
    changes.append({"hash_ids": [1, 7, 9]})
    a, b, c = rows_of(write_trace(tmp_path / "trace", *changes))
    assert [row.timestamp for row in (a, b, c)] == [0, 3000, 3000]  # in the order of their times
    assert len(a.prompt) == round(1100 * 16 / 512)
    assert a.output_len == 2
    assert a.prompt[:32] == b.prompt[:32]
    assert a.prompt[32:] != b.prompt[32:]
    assert c.prompt[:16] != b.prompt[:16]
    assert c.prompt[16:] == b.prompt[16:]
    assert set(a.prompt) <= set(TOKENS)


def test_long_prompts_lose_their_end_and_seeds_their_tokens(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace", {"output_length": 512 * 20})
    (whole,), (cut,) = rows_of(path), rows_of(path, max_prompt_tokens=20, max_output_tokens=5)
    assert cut.prompt == whole.prompt[:20]
    assert (whole.output_len, cut.output_len) == (99, 5)
    (other,) = rows_of(path, seed=4)
    assert other.prompt != whole.prompt


def test_a_packed_trace_reads_like_a_plain_one(tmp_path: Path) -> None:
    plain = write_trace(tmp_path / "trace", {}, {"timestamp": 1})
    packed = tmp_path / "trace.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_trace(packed, 10) == read_trace(plain, 10)
    assert len(read_trace(packed, 1)) == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no request"),
        (b"timestamp,input_length\n", "line 1: not JSON"),
        (b"[1]", "an object with timestamp, input_length, output_length, hash_ids"),
        (b'{"timestamp": 0, "input_length": 5, "output_length": 5}', "an object with"),
        (json.dumps(LINE | {"timestamp": -1}).encode(), "timestamp is -1"),
        (json.dumps(LINE | {"timestamp": "now"}).encode(), "timestamp is 'now'"),
        (json.dumps(LINE | {"input_length": 0}).encode(), "input_length is 0"),
        (json.dumps(LINE | {"output_length": 1.5}).encode(), "output_length is 1.5"),
        (json.dumps(LINE | {"hash_ids": [0, 1]}).encode(), "hash_ids is not a list"),
        (json.dumps(LINE | {"hash_ids": [0, "1", 2]}).encode(), "hash_ids is not a list"),
        (b"\xff\xfe\xfd", "not text"),
        (gzip.compress(json.dumps(LINE).encode())[:-9], "cannot be read"),
    ],
    ids=range(12),
)
def test_a_malformed_trace_is_named_in_one_line(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(content)
    arguments = ["bench", "serving", "--out", str(tmp_path / "out"), "--trace", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    (line,) = result.output.strip().splitlines()
    assert str(path) in line
    assert told in line
    assert not (tmp_path / "out").exists()


# -- workloads ----------------------------------------------------------------------------------


def test_the_registry_has_every_group_in_both_sizes() -> None:
    for quick in (False, True):
        groups = {workload.group for workload in load_workloads(quick=quick)}
        assert groups == {"shared-prefix", "random", "trace", "rollouts", "forks"}
    (one,) = load_workloads(quick=True, names=["trace"], overrides={"trace": {"requests": 3}})
    assert one.parameters["requests"] == 3


ROLLOUTS = {"prompts": 2, "samples": 2, "prompt_tokens": 8, "output_tokens": 4}
ENTRY = {"name": "r", "group": "rollouts", "driver": "rollouts", "about": "", "full": ROLLOUTS}


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([], "no workloads"),
        ([ENTRY, ENTRY], "two of one name"),
        ([ENTRY | {"driver": "wrk"}], "driver is 'wrk'; legal: bench_serving, trace"),
        ([ENTRY | {"group": "other"}], "group is 'other'; legal: shared-prefix"),
        ([ENTRY | {"full": ROLLOUTS | {"samples": 0}}], "samples is 0; legal: a whole number"),
        ([ENTRY | {"full": {"samples": 2}}], "its parameters must be prompts, samples"),
        ([{"name": "r"}], "is not a file of workloads"),
    ],
)
def test_a_malformed_workload_file_is_named(
    tmp_path: Path, entries: list[dict[str, Any]], told: str
) -> None:
    path = tmp_path / "workloads.json"
    path.write_text(json.dumps({"workloads": entries}))
    with pytest.raises(ValueError, match=told) as error:
        load_workloads(path, quick=False)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--workload", "nothing"], "--workload is nothing; legal: shared-prefix, random"),
        (["--workload", "trace"], "needs --trace FILE"),
        (["--", "--port", "1"], "server argument --port is set by this command; use --port before"),
        (["--", "--attention-backend=prefix"], "would be on both sides"),
        (["--", "--load-format", "dummy"], "equal tokens would prove nothing"),
        (["--workload-file", "/nowhere.json"], "/nowhere.json cannot be read"),
        (
            ["--stock-url", "http://h:1", "--prefix-url", "http://h:2", "--", "-x"],
            "both run already",
        ),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    tmp_path: Path, arguments: list[str], told: str
) -> None:
    result = CliRunner().invoke(app, ["bench", "serving", "--out", str(tmp_path / "o"), *arguments])
    assert result.exit_code in (1, 2)
    (line,) = result.output.strip().splitlines()
    assert told in line


# -- servers ------------------------------------------------------------------------------------


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Start a server that answers with JSON by path; returns its URL."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(**answers: Any) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = answers.get(self.path[1:])
                self.send_response(404 if found is None else 200)
                self.end_headers()
                self.wfile.write(json.dumps(found).encode())

            def log_message(self, *args: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


COUNTERS = {
    "packed_steps": 10,
    "stock_steps": 2,
    "fallback_steps": 0,
    "stock_reasons": {"gate-no-gain": 2},
    "fallback_reasons": {},
    "kv_tokens_read": 100,
    "kv_tokens_logical": 400,
}


def info(*replicas: dict[str, Any], **fields: Any) -> dict[str, Any]:
    states = [{"sglang_prefix": [r]} if r else {} for r in replicas]
    return {"dtype": "float32", "load_format": "auto", "internal_states": states} | fields


def test_counters_of_replicas_are_added(serve: Callable[..., str]) -> None:
    url = serve(server_info=info(COUNTERS, COUNTERS), model_info={"model_path": "m"})
    total = read_counters(RunningServer("prefix", url))
    assert total is not None
    assert total["packed_steps"] == 20
    assert total["stock_reasons"] == {"gate-no-gain": 4}
    assert describe(RunningServer("prefix", url))["model"] == "m"
    assert read_counters(RunningServer("stock", serve(server_info=info({})))) is None


def test_a_server_of_the_wrong_side_is_refused(serve: Callable[..., str]) -> None:
    stock = serve(server_info=info({}), model_info={})
    prefix = serve(server_info=info(COUNTERS), model_info={})
    dummy = serve(server_info=info({}, load_format="dummy"), model_info={})
    for side, url, told in (
        ("prefix", stock, "is no prefix server"),
        ("stock", prefix, "is no stock server"),
        ("stock", dummy, "dummy weights"),
        ("stock", serve(), "does not answer"),
        ("stock", serve(server_info=[], model_info=[]), "is not SGLang's"),
    ):
        with pytest.raises(ServerError, match=told):
            describe(RunningServer(side, url))


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_dead_server_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    arguments = ["--stock-url", url, "--base-url", url, "--model-path", "m"]
    result = CliRunner().invoke(app, ["bench", "serving", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 1
    (line,) = result.output.strip().splitlines()
    assert f"{url}/server_info does not answer: Connection refused" in line
    assert not (tmp_path / "serving.json").exists()


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} is in use; --port takes another"):
            launch("stock", [], port, tmp_path / "log")


TOO_BIG = """
print("loading"); print("Traceback (most recent call last):"); print("  File x, line 1")
print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 64.00 GiB"); print("Killed")
raise SystemExit(9)
"""


def test_a_server_that_does_not_start_is_told_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_servers, "_SERVE", (sys.executable, "-c", TOO_BIG))
    server = launch("prefix", [], None, tmp_path / "prefix-server.log")
    with pytest.raises(ServerError) as error:
        wait_until_ready(server, 30)
    told = str(error.value)
    assert told.startswith("the prefix server did not start: it ended with status 9: torch.OutOf")
    assert told.endswith(f"its log: {tmp_path / 'prefix-server.log'}")
    with pytest.raises(ServerError, match="died with status 9"):
        server.raise_if_dead()


def test_a_server_that_never_answers_is_stopped_waiting_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeping = (sys.executable, "-c", "import time; time.sleep(99)")
    monkeypatch.setattr(serving_servers, "_SERVE", sleeping)
    server = launch("stock", [], None, tmp_path / "log")
    try:
        with pytest.raises(ServerError, match="does not answer after 0 s"):
            wait_until_ready(server, 0.1)
    finally:
        server.stop()
    assert server.process is not None
    assert server.process.returncode is not None


# -- conclusions --------------------------------------------------------------------------------

WORKLOAD = Workload("rollouts", "rollouts", "rollouts", "", ROLLOUTS)


def a_run(scale: float = 1.0, packed: int | None = None, stock: int = 0) -> dict[str, Any]:
    times = {f"{m}_ms": {"median": 10 * scale, "p99": 20 * scale} for m in ("ttft", "tpot", "itl")}
    rates = {"output_tokens_per_s": 100 / scale, "requests_per_s": 1 / scale, "duration_s": scale}
    counters = None
    if packed is not None:
        after = COUNTERS | {
            "packed_steps": 10 + packed,
            "stock_steps": 2 + stock,
            "stock_reasons": {"gate-no-gain": 2 + stock},
            "kv_tokens_read": 100 + packed,
            "kv_tokens_logical": 400 + 4 * packed,
        }
        counters = step_delta(COUNTERS, after)
    return {**times, **rates, "counters": counters}


def said(*tokens: list[int], fingerprint: str = "f", texts: int = 1) -> dict[str, Any]:
    hashes = [str(one) for one in tokens]
    return {"fingerprint": fingerprint, "tokens": list(tokens), "texts": [hashes] * texts}


def judged(
    prefix: dict[str, Any], answers: dict[str, Any] | None = None, min_equal: float = 1.0
) -> dict[str, Any]:
    cell = new_cell(WORKLOAD)
    cell["sides"] = {"stock": sum_up([a_run(2.0)]), "prefix": sum_up([prefix])}
    evidence = {"stock": said([1, 2, 3], [4, 5, 6])}
    evidence["prefix"] = answers or said([1, 2, 3], [4, 5, 6])
    judge(cell, evidence, repeats=1, min_equal=min_equal)
    return cell


def test_a_comparison_has_ratios_of_prefix_over_stock() -> None:
    cell = judged(a_run(packed=19, stock=1))
    assert cell["is_comparison"]
    assert cell["why_not"] is None
    assert cell["ratios"] == {"ttft": 0.5, "tpot": 0.5, "itl": 0.5, "throughput": 2.0}
    assert cell["requests_equal"] == cell["requests"] == 2
    assert cell["tokens_compared"] == cell["tokens_equal"] == 6
    side = cell["sides"]["prefix"]
    assert side["steps"] == {"packed": 19, "stock": 1, "fallback": 0}
    assert side["packed_share"] == 0.95
    assert side["kv_read_ratio"] == 0.25
    assert side["reasons"] == {"gate-no-gain": 1}


def test_a_run_that_was_not_packed_is_no_comparison() -> None:
    cell = judged(a_run(packed=8, stock=2))
    assert not cell["is_comparison"]
    assert cell["why_not"] == "only 80% of the decode steps were packed (gate-no-gain)"
    assert set(cell["ratios"].values()) == {None}
    assert cell["unpacked_ratios"]["tpot"] == 0.5
    assert not judged(a_run(packed=0))["is_comparison"]  # nothing decoded is not all packed


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (said([1, 2, 3], [4, 5, 7]), "tokens differ in 1 of 2 answers (83% of tokens agree)"),
        (said([1, 9, 3], [4, 5, 6]), "tokens differ in 1 of 2 answers (67% of tokens agree)"),
        (said([1, 2, 3]), "1 answers for 2 requests"),
        (said([1, 2, 3], [4, 5, 6], fingerprint="g"), "did not get the same requests"),
        (said([1, 2, 3], [4, 5, 6, 7]), "tokens differ in 1 of 2 answers (100% of tokens agree)"),
        (
            said([1, 2, 3], [4, 5, 6]) | {"texts": [["[1, 2, 3]", "other"]]},
            "answers of the timed runs differ in 1 of 2 requests",
        ),
    ],
)
def test_sides_that_do_not_say_the_same_are_no_comparison(
    answers: dict[str, Any], told: str
) -> None:
    cell = judged(a_run(packed=20), answers)
    assert not cell["is_comparison"]
    assert cell["why_not"].endswith(told)
    assert set(cell["ratios"].values()) == {None}
    assert cell["unpacked_ratios"] is None


def test_where_rounding_differs_a_share_of_the_tokens_is_enough() -> None:
    answers = said([1, 2, 9], [4, 9, 9])
    assert judged(a_run(packed=20), answers, min_equal=0.5)["is_comparison"]
    assert judged(a_run(packed=20), answers, min_equal=0.5)["requests_equal"] == 0
    assert not judged(a_run(packed=20), answers, min_equal=0.6)["is_comparison"]


def test_the_median_run_counts() -> None:
    side = sum_up([a_run(scale, packed=10) for scale in (1.0, 9.0, 2.0)])
    assert side["ttft_ms"] == {"median": 20.0, "p99": 40.0}
    assert side["output_tokens_per_s"] == 50
    assert side["steps"]["packed"] == 30
    assert len(side["raw"]["runs"]) == 3


# -- the run, and going on with it ---------------------------------------------------------------


class FakeClient:
    """Answers what an SGLang client would; ``fails_at`` is the measurement that raises."""

    fails_at: int | None = None
    measured: tuple[str, ...] = ()

    def __init__(self, log: Path, settings: dict[str, Any]) -> None:
        pass

    @classmethod
    def begin(cls, fails_at: int | None = None) -> None:
        cls.measured, cls.fails_at = (), fails_at

    def order(self, order: str, /, *, url: str = "", **arguments: Any) -> Any:
        if order == "prepare":
            return {"fingerprint": "f", "flags": None}
        if order == "check":
            return [[1, 2], [3, 4]]
        if FakeClient.fails_at == len(FakeClient.measured):
            raise ClientError("gone")
        FakeClient.measured += (f"{url} {arguments['name']}",)
        found = a_run(1.0 if "prefix" in url else 2.0)
        del found["counters"]
        return found | {"texts": ["a", "b"]}

    def stop(self) -> None:
        pass


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes: servers answer at once, and pack everything."""
    packed = iter(range(0, 1000, 10))

    def counters(server: RunningServer) -> dict[str, Any] | None:
        return COUNTERS | {"packed_steps": next(packed)} if server.side == "prefix" else None

    def described(server: RunningServer) -> dict[str, Any]:
        return {"model": "m", "dtype": "float32"}

    FakeClient.begin()
    monkeypatch.setattr(serving_run, "ClientProcess", FakeClient)
    monkeypatch.setattr(serving_run, "launch", lambda side, *_: RunningServer(side, side))
    monkeypatch.setattr(serving_run, "describe", described)
    monkeypatch.setattr(serving_run, "read_counters", counters)
    monkeypatch.setattr(RunningServer, "raise_if_dead", lambda self: None)


def plan(out: Path, **changes: Any) -> Plan:
    workloads = [Workload(name, "rollouts", "rollouts", "", ROLLOUTS) for name in ("a", "b")]
    given: dict[str, Any] = {
        "out": out,
        "model": "m",
        "tokenizer": None,
        "workloads": workloads,
        "absent": {},
        "trace": None,
        "repeats": 1,
        "seed": 0,
        "quick": True,
        "urls": {"stock": None, "prefix": None},
        "server_args": {"stock": [], "prefix": []},
        "port": None,
        "start_timeout_s": 1.0,
        "min_equal": None,
        "command": ["x"],
    }
    return Plan(**(given | changes))


def go(given: Plan, *, resume: bool = False) -> dict[str, Any]:
    run = Run(given, resume=resume, tell=lambda text, is_done: None)
    run.run()
    return read_result(given.out / "serving.json", "bench-serving")


@pytest.mark.usefixtures("fakes")
def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path: Path) -> None:
    whole = go(plan(tmp_path / "whole", repeats=2))
    assert [cell["is_comparison"] for cell in whole["cells"]] == [True, True]
    assert whole["not_run"] == []
    FakeClient.begin(fails_at=5)
    with pytest.raises(ClientError, match="prefix, a: gone"):
        go(plan(tmp_path / "part", repeats=2))
    part = read_result(tmp_path / "part" / "serving.json")
    assert part["not_run"] == ["a", "b"]
    assert [cell["is_comparison"] for cell in part["cells"]] == [False, False]
    assert part["cells"][0]["why_not"] == "not run to its end: prefix"
    assert len(part["cells"][0]["sides"]["prefix"]["raw"]["runs"]) == 1
    FakeClient.begin()
    resumed = go(plan(tmp_path / "part", repeats=2), resume=True)
    assert FakeClient.measured == ("prefix a", "prefix b", "prefix b")
    assert [cell["ratios"] for cell in resumed["cells"]] == [c["ratios"] for c in whole["cells"]]
    assert go(plan(tmp_path / "part", repeats=2), resume=True) == resumed  # nothing is left


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "was made with another seed"),
        ({"repeats": 2}, "was made with another repeats"),
        ({"model": "n"}, "was made with another model"),
        ({"workloads": [WORKLOAD]}, "was made with another workload"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    go(plan(tmp_path))
    with pytest.raises(ValueError, match=told):
        go(plan(tmp_path, **change), resume=True)
    with pytest.raises(ValueError, match="--resume goes on with it"):
        go(plan(tmp_path, **change))
    (tmp_path / "serving.json").write_text("{")
    with pytest.raises(ValueError, match=r"serving\.json is not a result file"):
        go(plan(tmp_path), resume=True)


def test_servers_in_turn_or_taking_turns(tmp_path: Path) -> None:
    def order(**changes: Any) -> list[str]:
        found = steps(plan(tmp_path, repeats=2, **changes))
        return [f"{side[0]}{workload.name}{number}" for side, workload, number in found]

    assert order() == ["sa0", "sa1", "sb0", "sb1", "pa0", "pa1", "pb0", "pb1"]
    both = {"stock": "http://a", "prefix": "http://b"}
    assert order(urls=both) == ["sa0", "pa0", "pa1", "sa1", "sb0", "pb0", "pb1", "sb1"]


# -- what is shown ------------------------------------------------------------------------------


@pytest.mark.usefixtures("fakes")
def test_table_notes_and_plots_show_what_was_found(tmp_path: Path) -> None:
    from sglang_prefix.bench.serving_plots import PLOTS
    from sglang_prefix.bench.serving_table import comparison_table, notes

    data = go(plan(tmp_path, absent={"trace": "no --trace FILE was given"}))
    loser, winner = data["cells"]
    unpacked = judged(a_run(packed=0, stock=5))
    loser |= {key: deepcopy(unpacked[key]) for key in unpacked if key != "name"}
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(data))
    text = console.export_text()
    assert text.count("prefix / stock") == 1
    assert text.count("no comparison") == 1
    assert "0.50x" in text
    told = "\n".join(notes(data))
    assert "a is no comparison: only 0% of the decode steps were packed (gate-no-gain)" in told
    assert "costs when it does not pack: TPOT 0.50x" in told
    assert "trace is absent: no --trace FILE was given" in told
    for name, plot in PLOTS.items():
        file = tmp_path / f"{name}.svg"
        plot(data).savefig(file, format="svg")
        assert file.stat().st_size > 5000
    assert winner["is_comparison"]


def test_bench_modules_import_without_sglang() -> None:
    names = ("run", "cells", "table", "plots", "trace", "workloads", "servers", "process")
    imports = "; ".join(f"import sglang_prefix.bench.serving_{name}" for name in names)
    code = f"{imports}; import sys; print('sglang' in sys.modules, 'matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
