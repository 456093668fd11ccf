"""`bench serving` when an option, a file, a server or SGLang is not as it should be."""

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
from sglang_prefix.bench.serving.workloads import REGISTRY
from sglang_prefix.cli.main import app

pytest.importorskip("matplotlib", reason="the command needs matplotlib for its plots")

# -- options, files and servers that run -----------------------------------------------------------


@contextlib.contextmanager
def serve(answers: dict[str, Any]) -> Iterator[str]:
    """A server that answers with JSON by path, or what no browser knows; yields its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path[1:])
            if isinstance(found, bytes):
                self.wfile.write(found)
                return
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def pages(*replicas: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Of a server with these counters of its replicas."""
    states = [{"sglang_prefix": [r]} if r else {} for r in replicas]
    info = {"dtype": "float32", "load_format": "auto", "internal_states": states} | fields
    return {"server_info": info, "model_info": {"model_path": "m"}}


def workloads(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"workloads": entries}).encode()


(ENTRY,) = (e for e in json.loads(REGISTRY.read_text())["workloads"] if e["name"] == "rollouts")
COUNTERS = {"packed_steps": 10, "stock_reasons": {"gate-no-gain": 2}, "num_packs": 3}
REQUEST = {"timestamp": 3000, "input_length": 1100, "output_length": 64, "hash_ids": [0, 1]}
# A port that nothing listens on: those below 1024 are given to no program that asks for any.
NOBODY = "http://127.0.0.1:1"
# FILE is one with the content that follows, URL that of a server with these pages.
FAULTS: list[tuple[str, str, Any]] = [
    ("--workload nothing", "--workload is nothing; legal: shared-prefix, random", None),
    ("--workload trace", "needs --trace FILE", None),
    ("-- --port 1", "server argument --port is set by this command; see its options", None),
    ("--workload-file /nowhere.json", "/nowhere.json: No such file", None),
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
        "workload rollouts: samples: Input should be greater than 0",
        workloads(ENTRY | {"full": ENTRY["full"] | {"samples": 0}}),
    ),
    (
        "--workload-file FILE",
        "workload rollouts: prompts: Field required",
        workloads(ENTRY | {"full": {"samples": 2}}),
    ),
    ("--workload-file FILE", "is not a file of workloads", workloads({"name": "r"})),
    ("--prefix-url URL", "is no prefix server", pages({})),
    ("--stock-url URL", "is no stock server", pages(COUNTERS)),
    ("--stock-url URL", "has dummy weights", pages({}, load_format="dummy")),
    ("--stock-url URL", "server_info does not answer: 404 Client Error: Not Found", {}),
    ("--stock-url URL", "server_info is not SGLang's", {"server_info": []}),
    ("--stock-url URL", "BadStatusLine", {"server_info": b"220\r\n"}),
    (f"--stock-url {NOBODY}", "Connection refused", None),
]


@pytest.mark.parametrize(("options", "told", "given"), FAULTS, ids=range(len(FAULTS)))
def test_what_is_wrong_is_told_in_one_line_and_nothing_is_written(
    tmp_path: Path, options: str, told: str, given: Any
) -> None:
    file, out = tmp_path / "file", tmp_path / "out"
    if isinstance(given, bytes):
        file.write_bytes(given)
    with serve(given if isinstance(given, dict) else {}) as url:
        words = options.replace("FILE", str(file)).replace("URL", url).split()
        models = [] if "--engine" in words or "--dry" in words else ["--model-path", "m"]
        command = ["bench", "serving", "--out", str(out), *models, *words]
        result = CliRunner().invoke(app, command)
    assert result.exit_code in (1, 2)
    (line,) = result.output.strip().splitlines()
    assert told in line
    assert str(file) in line or not file.exists()
    assert url in line or "URL" not in options
    assert not (out / "serving.json").exists()


def test_counters_of_replicas_are_added() -> None:
    with serve(pages(COUNTERS, COUNTERS)) as url:
        server = RunningServer("prefix", url)
        found = describe(server)
        assert (found["model"], found["dtype"]) == ("m", "float32")
        added = {"packed_steps": 20, "stock_reasons": {"gate-no-gain": 4}}
        assert read_counters(server) == added
    with serve(pages({})) as url:
        assert read_counters(RunningServer("stock", url)) is None


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


# -- SGLang's internals ----------------------------------------------------------------------------


def test_flags_that_bench_serving_does_not_have_are_told() -> None:
    pytest.importorskip("sglang.benchmark.serving", reason="SGLang's bench_serving is needed")
    from prefix_patches import load_generator

    assert load_generator.parse(["--num-prompts", "7"]).num_prompts == 7
    with pytest.raises(ValueError, match="unrecognized arguments: --num-prompt-groups"):
        load_generator.parse(["--num-prompt-groups", "7"])


def test_internals_that_are_gone_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sglang.benchmark.serving", reason="SGLang's bench_serving is needed")
    from sglang.benchmark import serving
    from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

    from prefix_patches import load_generator

    assert load_generator.missing() == []
    monkeypatch.delattr(serving, "get_dataset")
    monkeypatch.delattr(RuntimeEndpoint, "generate")
    first, second = load_generator.missing()
    assert "serving.get_dataset" in first
    assert "RuntimeEndpoint.generate" in second
