"""`bench serving` without SGLang: traces, workloads, arguments, servers that fail."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sglang_prefix.bench.serving import servers as serving_servers
from sglang_prefix.bench.serving.servers import (
    RunningServer,
    ServerError,
    describe,
    launch,
    read_counters,
    wait_until_ready,
)
from sglang_prefix.bench.serving.trace import scale_trace
from sglang_prefix.bench.serving.workloads import load_workloads
from sglang_prefix.bench.workloads.traces import read_trace
from sglang_prefix.cli.main import app
from tests.serving_runs import COUNTERS

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
    return scale_trace(read_trace(path), TOKENS, **(chosen | options))


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


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no request"),
        (b"timestamp,input_length\n", "line 1"),
        (json.dumps(LINE | {"hash_ids": [0, 1]}).encode(), "hash_ids"),
        (gzip.compress(json.dumps(LINE).encode())[:-9], "is not text"),
    ],
    ids=range(4),
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
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


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
    assert describe(RunningServer("prefix", url))["dtype"] == "float32"
    assert read_counters(RunningServer("stock", serve(server_info=info({})))) is None


def test_what_auto_stands_for_is_told(serve: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    url = serve(server_info=info({}, dtype="auto"), model_info={"model_path": str(tmp_path)})
    assert describe(RunningServer("stock", url))["dtype"] == "auto (model: bfloat16)"


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
    server.stop()


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from sglang_prefix.bench.serving import servers as serving_servers
sleeping = "import os, time; print(os.getpid(), flush=True); time.sleep(99)"
serving_servers._SERVE = (sys.executable, "-c", sleeping)
log = Path(sys.argv[1])
serving_servers.launch("stock", [], None, log)
while not log.read_text().endswith("\\n"):
    time.sleep(0.05)
"""
    log = tmp_path / "log"
    subprocess.run([sys.executable, "-c", code, str(log)], check=True, timeout=60)
    deadline = time.monotonic() + 20
    while is_running(int(log.read_text())):
        assert time.monotonic() < deadline, "the server outlived who started it"
        time.sleep(0.1)


def is_running(process: int) -> bool:
    """Whether a process has not ended; zombies have, whoever is to reap them."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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


def test_a_cpu_server_leaves_a_core_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cores, threads in ((1, "1"), (2, "1"), (16, "15")):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert serving_servers.cpu_environment() == {"OMP_NUM_THREADS": threads}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert serving_servers.cpu_environment() == {}
