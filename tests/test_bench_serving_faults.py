"""`bench serving` when an option, a file, a server, the client or SGLang is not as it should be."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil  # type: ignore[import-untyped]
import pytest
from typer.testing import CliRunner

from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.serving import run as serving_run
from sglang_prefix.bench.serving import servers as serving_servers
from sglang_prefix.bench.serving.servers import (
    RunningServer,
    ServerError,
    cpu_environment,
    describe,
    launch,
    read_counters,
    wait_until_ready,
)
from sglang_prefix.cli.main import app
from tests.serving_runs import (
    COUNTERS,
    ENTRY,
    ROLLOUTS,
    FakeClient,
    fake_servers,
    fakes,  # noqa: F401
    go,
    plan,
)

pytest.importorskip("matplotlib", reason="the command needs matplotlib for its plots")

# -- options, files and servers that run -----------------------------------------------------------


@contextlib.contextmanager
def serve(**answers: Any) -> Iterator[str]:
    """A server that answers with JSON by path; yields its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path[1:])
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def not_http() -> Iterator[str]:
    """Something that listens and talks otherwise."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(b"220 mail.example\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def info(*replicas: dict[str, Any], **fields: Any) -> dict[str, Any]:
    states = [{"sglang_prefix": [r]} if r else {} for r in replicas]
    return {"dtype": "float32", "load_format": "auto", "internal_states": states} | fields


def workloads(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"workloads": entries}).encode()


REQUEST = {"timestamp": 3000, "input_length": 1100, "output_length": 64, "hash_ids": [0, 1]}
# FILE is one with the content that follows, URL that of the server that does.
FAULTS: list[tuple[str, str, Any]] = [
    ("--workload nothing", "--workload is nothing; legal: shared-prefix, random", None),
    ("--workload trace", "needs --trace FILE", None),
    ("-- --port 1", "server argument --port is set by this command; use --port before", None),
    ("-- --attention-backend=prefix", "would be on both sides", None),
    ("-- --load-format dummy", "equal tokens would prove nothing", None),
    ("--workload-file /nowhere.json", "/nowhere.json cannot be read", None),
    ("--stock-url http://h:1 --prefix-url http://h:2 -- -x", "both run already", None),
    ("--dry", "--dry: only with --engine", None),
    ("--engine --quick", "--quick: only without --engine", None),
    ("--engine -- -x", "arguments of servers: only without --engine", None),
    ("--trace FILE", "holds no request", b""),
    ("--trace FILE", "line 1", b"timestamp,input_length"),
    ("--trace FILE", "hash_ids", json.dumps(REQUEST).encode()),
    ("--trace FILE", "is not text", gzip.compress(json.dumps(REQUEST).encode())[:-9]),
    ("--workload-file FILE", "is not JSON", b"{"),
    ("--workload-file FILE", "at least 1 item", workloads()),
    ("--workload-file FILE", "two workloads of one name", workloads(ENTRY, ENTRY)),
    ("--workload-file FILE", "driver: Input should be", workloads(ENTRY | {"driver": "wrk"})),
    ("--workload-file FILE", "group: Input should be", workloads(ENTRY | {"group": "other"})),
    (
        "--workload-file FILE",
        "workload a: samples: Input should be greater than 0",
        workloads(ENTRY | {"full": ROLLOUTS | {"samples": 0}}),
    ),
    (
        "--workload-file FILE",
        "workload a: prompts: Field required",
        workloads(ENTRY | {"full": {"samples": 2}}),
    ),
    ("--workload-file FILE", "is not a file of workloads", workloads({"name": "r"})),
    ("--prefix-url URL", "is no prefix server", serve(server_info=info({}), model_info={})),
    ("--stock-url URL", "is no stock server", serve(server_info=info(COUNTERS), model_info={})),
    (
        "--stock-url URL",
        "has dummy weights",
        serve(server_info=info({}, load_format="dummy"), model_info={}),
    ),
    ("--stock-url URL", "server_info does not answer: Not Found", serve()),
    ("--stock-url URL", "server_info is not SGLang's", serve(server_info=[], model_info=[])),
    ("--stock-url URL", "server_info does not answer: no HTTP server", not_http()),
    ("--stock-url URL", "server_info does not answer: Connection refused", nobody()),
]


@pytest.mark.parametrize(("options", "told", "given"), FAULTS, ids=range(len(FAULTS)))
def test_what_is_wrong_is_told_in_one_line_and_nothing_is_written(
    tmp_path: Path, options: str, told: str, given: Any
) -> None:
    file, out = tmp_path / "file", tmp_path / "out"
    if isinstance(given, bytes):
        file.write_bytes(given)
    server = contextlib.nullcontext("") if given is None or file.exists() else given
    with server as url:
        words = options.replace("FILE", str(file)).replace("URL", url).split()
        models = [] if "--engine" in words or "--dry" in words else ["--model-path", "m"]
        command = ["bench", "serving", "--out", str(out), *models, *words]
        result = CliRunner().invoke(app, command)
    assert result.exit_code in (1, 2)
    (line,) = result.output.strip().splitlines()
    assert told in line
    assert str(file) in line or not file.exists()
    assert url in line
    assert not (out / "serving.json").exists()


def test_counters_of_replicas_are_added() -> None:
    with serve(server_info=info(COUNTERS, COUNTERS), model_info={"model_path": "m"}) as url:
        total = read_counters(RunningServer("prefix", url))
        found = describe(RunningServer("prefix", url))
    assert total is not None
    assert total["packed_steps"] == 20
    assert total["stock_reasons"] == {"gate-no-gain": 4}
    assert (found["model"], found["tokenizer"], found["dtype"]) == ("m", "m", "float32")
    with serve(server_info=info({})) as url:
        assert read_counters(RunningServer("stock", url)) is None


@pytest.mark.parametrize(
    ("stock", "prefix", "told"),
    [
        ({"max_total_num_tokens": 1000}, {"max_total_num_tokens": 991}, None),
        (
            {"max_total_num_tokens": 1000},
            {"max_total_num_tokens": 989},
            r"KV pools hold: 1000 \(stock\) and 989 \(prefix\); give both the same",
        ),
        ({}, {"model": "n"}, "the servers differ in model: m and n"),
        ({}, {"dtype": "bfloat16"}, "the servers differ in dtype: bfloat16 and float32"),
    ],
)
def test_only_equal_servers_are_compared(
    tmp_path: Path, stock: dict[str, Any], prefix: dict[str, Any], told: str | None
) -> None:
    refused = pytest.raises(ServerError, match=told) if told else contextlib.nullcontext()
    with fake_servers(stock=stock, prefix=prefix), refused:
        assert go(plan(tmp_path, stock_url="stock", prefix_url="prefix"))["not_run"] == {}


# -- servers that are started ----------------------------------------------------------------------

TOO_BIG = """
print("loading"); print("Traceback (most recent call last):"); print("  File x, line 1")
print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 64.00 GiB"); print("Killed")
raise SystemExit(9)
"""
SLEEPS = "import os, time; print(os.getpid(), flush=True); time.sleep(99)"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Launches a program instead of a server; all end with the test."""
    running = []

    def start(program: str) -> RunningServer:
        monkeypatch.setattr(serving_servers, "_SERVE", (sys.executable, "-c", program))
        running.append(launch("prefix", [], None, tmp_path / "log"))
        return running[-1]

    yield start
    for server in running:
        server.stop()
        assert server.process is not None
        assert server.process.returncode is not None


@pytest.mark.parametrize(
    ("program", "timeout_s", "told"),
    [
        (TOO_BIG, 30, "the prefix server ended with status 9: torch.OutOf"),
        (SLEEPS, 0.1, "the prefix server does not answer after 0 s; its log: "),
        ("import os; os.kill(os.getpid(), 9)", 30, "ended with status 137: no output"),
    ],
    ids=["ends", "never answers", "killed"],
)
def test_a_server_that_does_not_start_is_told_with_its_cause(
    tmp_path: Path, started: Callable[..., Any], program: str, timeout_s: float, told: str
) -> None:
    server = started(program)
    with pytest.raises(ServerError) as error:
        wait_until_ready(server, timeout_s)
    assert told in str(error.value)
    assert str(error.value).endswith(f"its log: {tmp_path / 'log'}")
    with pytest.raises(ServerError, match=r"ended with status|is dead: Connection refused"):
        server.raise_if_dead()


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} is in use; --port takes another"):
            launch("stock", [], port, tmp_path / "log")


def test_a_server_has_stopped_when_all_its_processes_have(
    tmp_path: Path, started: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = started(SLEEPS)
    while not (tmp_path / "log").read_text().endswith("\n"):
        time.sleep(0.05)
    # The guard and the program below it, of which the first alone is reaped by us.
    assert len(serving_servers._running_in_group(server.process.pid)) == 2
    below = int((tmp_path / "log").read_text())
    server.stop()
    assert serving_servers._running_in_group(server.process.pid) == []
    assert not psutil.pid_exists(below) or psutil.Process(below).status() == psutil.STATUS_ZOMBIE
    monkeypatch.setattr(serving_servers, "_END_S", 0.0)
    with (
        patch.object(serving_servers, "_running_in_group", return_value=[7, 8]),
        pytest.raises(ServerError, match=r"was killed but does not end.* are left: 7, 8"),
    ):
        server.stop()


def test_a_cpu_server_leaves_a_core_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cores, threads in ((1, "1"), (2, "1"), (16, "15")):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert cpu_environment() == {"OMP_NUM_THREADS": threads}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert cpu_environment() == {}


# -- the client ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fakes")
def test_the_workload_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {}

    class Hanging(FakeClient):
        def ask(self, function: str, deadline: float, watch: Any, **arguments: Any) -> Any:
            order = function.rpartition(".")[2]
            limits[order] = round(deadline - time.monotonic())
            if order == "measure" and arguments["name"] == "b":
                raise TimeoutError
            found = super().ask(function, deadline, watch, **arguments)
            return found | {"replay_s": 100.0} if order == "prepare" else found

    def no_question(server: RunningServer) -> None:
        raise AssertionError("a server that hangs was asked")

    monkeypatch.setattr(serving_run, "ChildProcess", Hanging)
    monkeypatch.setattr(RunningServer, "raise_if_dead", no_question)
    with pytest.raises(ServerError) as error:
        go(plan(tmp_path))
    told = "stock, b: the server at stock did not answer all requests within 109 s; "
    assert str(error.value) == told + "--workload-timeout gives it longer"
    assert limits == {"prepare": 9, "check": 9, "measure": 109}
    assert len(read_result(tmp_path / "serving.json")["cases"][0]["sides"]) == 1  # a was kept


# -- SGLang's internals ----------------------------------------------------------------------------


def test_flags_that_bench_serving_does_not_have_are_told() -> None:
    pytest.importorskip("sglang.benchmark.serving", reason="SGLang's bench_serving is needed")
    from prefix_patches import load_generator

    assert load_generator.parse(["--num-prompts", "7"]).num_prompts == 7
    with pytest.raises(ValueError, match="unrecognized arguments: --num-prompt-groups"):
        load_generator.parse(["--num-prompt-groups", "7"])


def test_internals_that_are_gone_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sglang.benchmark.serving", reason="SGLang's bench_serving is needed")
    import sglang.benchmark.datasets
    import sglang.benchmark.utils
    from sglang.benchmark import serving
    from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

    from prefix_patches import load_generator

    touched = (
        (serving, "get_dataset"),
        (RuntimeEndpoint, "generate_stream"),
        (sglang.benchmark.datasets, "DatasetRow"),
        (sglang.benchmark.utils, "get_tokenizer"),
    )
    for owner, name in touched:
        assert load_generator.missing() == []
        with monkeypatch.context() as without:
            without.delattr(owner, name)
            (problem,) = load_generator.missing()
        assert name in problem
