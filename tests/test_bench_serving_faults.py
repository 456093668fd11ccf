"""`bench serving` when a server, the client or SGLang is not as it should be."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.serving import client as serving_client
from sglang_prefix.bench.serving import run as serving_run
from sglang_prefix.bench.serving import servers as serving_servers
from sglang_prefix.bench.serving.client import ClientProcess, ClientTimeoutError
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
from tests.serving_runs import COUNTERS, FakeClient, fake_servers, fakes, go, plan  # noqa: F401

# -- servers that run already ----------------------------------------------------------------------


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


def test_counters_of_replicas_are_added_and_auto_is_explained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    model = {"model_path": str(tmp_path)}
    with serve(server_info=info(COUNTERS, COUNTERS), model_info=model) as url:
        total = read_counters(RunningServer("prefix", url))
        found = describe(RunningServer("prefix", url))
    assert total is not None
    assert total["packed_steps"] == 20
    assert total["stock_reasons"] == {"gate-no-gain": 4}
    assert (found["model"], found["dtype"]) == (str(tmp_path), "float32")
    with serve(server_info=info({}, dtype="auto"), model_info=model) as url:
        assert read_counters(RunningServer("stock", url)) is None
        assert describe(RunningServer("stock", url))["dtype"] == "auto (model: bfloat16)"


@pytest.mark.parametrize(
    ("side", "server", "told"),
    [
        ("prefix", serve(server_info=info({}), model_info={}), "is no prefix server"),
        ("stock", serve(server_info=info(COUNTERS), model_info={}), "is no stock server"),
        (
            "stock",
            serve(server_info=info({}, load_format="dummy"), model_info={}),
            "has dummy weights",
        ),
        ("stock", serve(), "server_info does not answer: Not Found"),
        ("stock", serve(server_info=[], model_info=[]), "server_info is not SGLang's"),
        ("stock", not_http(), "server_info does not answer: no HTTP server"),
        ("stock", nobody(), "server_info does not answer: Connection refused"),
    ],
    ids=["stock", "prefix", "dummy", "no page", "no object", "not HTTP", "nobody"],
)
def test_a_server_that_cannot_be_used_is_named_and_nothing_is_written(
    tmp_path: Path, side: str, server: contextlib.AbstractContextManager[str], told: str
) -> None:
    with server as url:
        given = ["bench", "serving", "--out", str(tmp_path), "--model-path", "m"]
        result = CliRunner().invoke(app, [*given, f"--{side}-url", url])
    assert result.exit_code == 1
    (line,) = result.output.strip().splitlines()
    assert url in line
    assert told in line
    assert not (tmp_path / "serving.json").exists()


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
        assert go(plan(tmp_path, urls={"stock": "stock", "prefix": "prefix"}))["not_run"] == {}


# -- servers that are started ----------------------------------------------------------------------

TOO_BIG = """
print("loading"); print("Traceback (most recent call last):"); print("  File x, line 1")
print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 64.00 GiB"); print("Killed")
raise SystemExit(9)
"""
SLEEPS = "import os, time; print(os.getpid(), flush=True); time.sleep(99)"


@pytest.mark.parametrize(
    ("program", "timeout_s", "told"),
    [
        (TOO_BIG, 30, "the prefix server did not start: it ended with status 9: torch.OutOf"),
        (SLEEPS, 0.1, "the prefix server does not answer after 0 s; its log: "),
        ("import os; os.kill(os.getpid(), 9)", 30, "it ended with status 137: no output"),
    ],
    ids=["ends", "never answers", "killed"],
)
def test_a_server_that_does_not_start_is_told_with_its_cause(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    timeout_s: float,
    told: str,
) -> None:
    monkeypatch.setattr(serving_servers, "_SERVE", (sys.executable, "-c", program))
    server = launch("prefix", [], None, tmp_path / "prefix-server.log")
    try:
        with pytest.raises(ServerError) as error:
            wait_until_ready(server, timeout_s)
        assert told in str(error.value)
        assert str(error.value).endswith(f"its log: {tmp_path / 'prefix-server.log'}")
        with pytest.raises(ServerError, match=r"died with status|is dead: Connection refused"):
            server.raise_if_dead()
    finally:
        server.stop()
    assert server.process is not None
    assert server.process.returncode is not None


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} is in use; --port takes another"):
            launch("stock", [], port, tmp_path / "log")


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from sglang_prefix.bench.serving import servers
servers._SERVE = (sys.executable, "-c", {SLEEPS!r})
log = Path(sys.argv[1])
servers.launch("stock", [], None, log)
while not log.read_text().endswith("\\n"):
    time.sleep(0.05)
"""
    log = tmp_path / "log"
    subprocess.run([sys.executable, "-c", code, str(log)], check=True, timeout=60)
    wait_for(lambda: not is_running(int(log.read_text())))


def is_running(process: int) -> bool:
    """Whether a process has not ended; zombies have."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_group_runs_until_its_last_process_has_ended() -> None:
    code = "import subprocess; subprocess.run(['sleep', '99'])"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        wait_for(lambda: len(serving_servers._running_in_group(process.pid)) == 2)
        assert process.pid in serving_servers._running_in_group(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    # Nobody has reaped the leader yet: a zombie holds nothing.
    wait_for(lambda: serving_servers._running_in_group(process.pid) == [])
    process.wait()


def test_a_server_has_stopped_when_all_its_processes_have(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [[7], [7], []]
    monkeypatch.setattr(serving_servers, "_running_in_group", lambda group: left.pop(0))
    monkeypatch.setattr(serving_servers, "_POLL_S", 0.01)

    def server() -> RunningServer:
        return RunningServer("stock", "", None, subprocess.Popen(["true"], start_new_session=True))

    server().stop()
    assert left == []
    monkeypatch.setattr(serving_servers, "_running_in_group", lambda group: [7, 8])
    monkeypatch.setattr(serving_servers, "_END_S", 0.05)
    with pytest.raises(ServerError, match=r"stock server was killed but .* are left: 7, 8"):
        server().stop()


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


def test_a_client_that_hangs_or_ends_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_client, "_PROGRAM", ("-c", SLEEPS))
    monkeypatch.setattr(serving_client, "_POLL_S", 0.05)
    client = ClientProcess(tmp_path / "log", {})

    def died() -> None:
        raise ServerError("died")

    try:
        with pytest.raises(ClientTimeoutError, match=r"no answer after 0\.2 s"):
            client.order("check", limit_s=0.2, watch=lambda: None)
        with pytest.raises(ServerError, match="died"):
            client.order("check", limit_s=60, watch=died)
    finally:
        client.stop()
    monkeypatch.setattr(serving_client, "_PROGRAM", ("-c", "raise SystemExit(3)"))
    client = ClientProcess(tmp_path / "log", {})
    with pytest.raises(serving_client.ClientError, match="ended with status 3; its log: "):
        client.order("check", limit_s=60, watch=lambda: None)
    client.stop()


def test_an_order_that_fails_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
from sglang_prefix.bench.serving import client
class Client:
    def check(self, what):
        if what:
            raise ValueError("first\\nno " + what)
        return [[1]]
client.Client = Client
client.main()
"""
    monkeypatch.setattr(serving_client, "_PROGRAM", ("-c", program))
    client = ClientProcess(tmp_path / "log", {})
    try:
        order = partial(client.order, "check", limit_s=60, watch=lambda: None)
        with pytest.raises(serving_client.ClientError) as error:
            order(what="tokens")
        assert str(error.value) == f"no tokens; the client's log: {tmp_path / 'log'}"
        assert order(what="") == [[1]]
    finally:
        client.stop()


@pytest.mark.usefixtures("fakes")
def test_the_workload_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    class Hanging(FakeClient):
        def order(self, order: str, /, **arguments: Any) -> Any:
            limits.append((order, arguments["limit_s"]))
            if order == "measure" and arguments["name"] == "b":
                raise ClientTimeoutError("no answer")
            found = super().order(order, **arguments)
            return found | {"replay_s": 100.0} if order == "prepare" else found

    def no_question(server: RunningServer) -> None:
        raise AssertionError("a server that hangs was asked")

    monkeypatch.setattr(serving_run, "ClientProcess", Hanging)
    monkeypatch.setattr(RunningServer, "raise_if_dead", no_question)
    with pytest.raises(ClientTimeoutError) as error:
        go(plan(tmp_path))
    told = "stock, b: the server at stock did not answer all requests within 109 s; "
    assert str(error.value) == told + "--workload-timeout gives it longer"
    assert dict(limits) == {"prepare": 9.0, "check": 9.0, "measure": 109.0}
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
        with monkeypatch.context() as patch:
            patch.delattr(owner, name)
            (problem,) = load_generator.missing()
        assert name in problem
