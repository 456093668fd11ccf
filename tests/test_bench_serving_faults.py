"""What `bench serving` does when something is not as it should be: servers, clients, files."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from sglang_prefix import tiny_model
from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.serving import process as serving_process
from sglang_prefix.bench.serving import run as serving_run
from sglang_prefix.bench.serving import servers as serving_servers
from sglang_prefix.bench.serving.process import ClientProcess, ClientTimeoutError
from sglang_prefix.bench.serving.run import Run
from sglang_prefix.bench.serving.servers import RunningServer, ServerError
from sglang_prefix.cli import bench_serving as command
from sglang_prefix.cli.main import app
from tests.serving_runs import FakeClient, fakes, go, plan  # noqa: F401

pytest.importorskip("matplotlib", reason="the plots need matplotlib")


# -- servers ------------------------------------------------------------------------------------


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


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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


@pytest.mark.usefixtures("fakes")
def test_servers_with_unequal_kv_pools_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = {"stock": 1000, "prefix": 991}

    def described(server: RunningServer) -> dict[str, Any]:
        return {"model": "m", "dtype": "float32", "max_total_num_tokens": pools[server.side]}

    monkeypatch.setattr(serving_run, "describe", described)
    given = plan(tmp_path, urls={"stock": "stock", "prefix": "prefix"})
    assert go(given)["not_run"] == []
    pools["prefix"] = 989
    with pytest.raises(ServerError, match=r"KV pools hold: 1000 \(stock\) and 989 \(prefix\)"):
        go(given)


# -- a client that hangs ------------------------------------------------------------------------


def test_a_client_that_hangs_is_waited_for_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeping = (sys.executable, "-c", "import time; time.sleep(99)")
    monkeypatch.setattr(serving_process, "_COMMAND", sleeping)
    monkeypatch.setattr(serving_process, "_POLL_S", 0.05)
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
    assert len(read_result(tmp_path / "serving.json")["cells"][0]["sides"]) == 1  # a was kept


# -- the file of a run that begins, and one that goes on -----------------------------------------


@pytest.mark.usefixtures("fakes")
def test_a_run_that_begins_takes_the_place_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = go(plan(tmp_path))
    given = plan(tmp_path, seed=1, urls={"stock": "u", "prefix": None})

    def dead(server: RunningServer) -> dict[str, Any]:
        raise ServerError("dead")

    with monkeypatch.context() as patch:
        patch.setattr(serving_run, "describe", dead)
        run = Run(given, resume=False, tell=lambda text, is_done: None)
        with pytest.raises(ServerError, match="dead"):
            run.run()
    assert not run.is_written
    assert read_result(tmp_path / "serving.json") == old

    def interrupted(self: Any, *args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_client", interrupted)
    run = Run(given, resume=False, tell=lambda text, is_done: None)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.is_written
    new = read_result(tmp_path / "serving.json", "bench-serving")
    assert (new["seed"], new["not_run"]) == (1, ["a", "b"])
    assert json.loads((tmp_path / "serving-tokens.json").read_text()) == {}


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("name", ["device", "cpu", "gpu", "threads", "versions", "commit"])
def test_a_run_does_not_go_on_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    here = go(plan(tmp_path))["environment"]
    assert go(plan(tmp_path), resume=True)["environment"] == here
    there = here | {name: {"sglang": "0"} if name == "versions" else "other"}
    monkeypatch.setattr(serving_run, "environment", lambda: there)
    with pytest.raises(ValueError, match=rf"serving\.json: its {name} is ") as error:
        go(plan(tmp_path), resume=True)
    assert "\n" not in str(error.value)


def put(keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Change what is at a path of keys, split by blanks; None takes it away."""

    def change(data: dict[str, Any]) -> None:
        *path, last = (int(key) if key.isdigit() else key for key in keys.split())
        found: Any = data
        for key in path:
            found = found[key]
        if value is None:
            del found[last]
        else:
            found[last] = value

    return change


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("serving", put("environment versions", None), "environment.versions: Field required"),
        ("serving", put("environment", []), "environment: Input should be a valid dictionary"),
        ("serving", put("settings", None), "settings: Field required"),
        ("serving", put("cells 1 sides", None), "cells[1].sides: Field required"),
        ("serving", put("cells 0 sides stock raw runs", []), "cells[0].sides.stock.raw.runs: "),
        (
            "serving",
            put("cells 0 sides stock raw runs 0 ttft_ms", {"median": "fast", "p99": 1.0}),
            "cells[0].sides.stock.raw.runs[0].ttft_ms.median: ",
        ),
        ("serving", put("cells 1", None), "its cells are not a, b"),
        ("serving-tokens", put("a prefix", None), "lacks what prefix said in a"),
        ("serving-tokens", put("b", None), "lacks what stock said in b"),
        ("serving-tokens", put("a stock texts", [["one"]]), "lacks what stock said in a"),
        ("serving-tokens", put("a stock tokens", "none"), "a.stock.tokens: "),
    ],
)
def test_a_file_that_is_not_whole_is_named(
    tmp_path: Path, file: str, change: Callable[[dict[str, Any]], None], told: str
) -> None:
    go(plan(tmp_path))
    path = tmp_path / f"{file}.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="--resume: ") as error:
        go(plan(tmp_path), resume=True)
    assert str(path) in str(error.value)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


# -- what the command writes ---------------------------------------------------------------------


def bench(out: Path, *arguments: str) -> Any:
    given = ["--out", str(out), "--model-path", "m", "--quick", "--workload", "rollouts"]
    return CliRunner().invoke(app, ["bench", "serving", *given, *arguments])


@pytest.mark.usefixtures("fakes")
def test_the_command_writes_plots_and_a_report_or_says_why_not(tmp_path: Path) -> None:
    result = bench(tmp_path, "--no-report")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "serving_times.svg").exists()
    assert not (tmp_path / "report.html").exists()
    assert read_result(tmp_path / "serving.json")["wall_s"] > 0
    assert bench(tmp_path, "--resume").exit_code == 0
    assert "rollouts" in (tmp_path / "report.html").read_text()

    (tmp_path / "kernel.json").write_text("{")
    result = bench(tmp_path, "--resume")
    assert result.exit_code == 1
    last = result.output.strip().splitlines()[-1]
    assert f"no {tmp_path / 'report.html'}: {tmp_path / 'kernel.json'} is not JSON" in last

    (tmp_path / "serving_times.svg").unlink()
    (tmp_path / "serving_times.svg").mkdir()
    result = bench(tmp_path, "--resume")
    assert result.exit_code == 1
    last = result.output.strip().splitlines()[-1]
    assert f"cannot write {tmp_path / 'serving_times.svg'}: Is a directory" in last
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_of_a_file_that_cannot_be_written_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(beside: Path) -> None:
        beside.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(typer.Exit):
        command._write_whole(tmp_path / "plot.svg", full)
    assert f"cannot write {tmp_path / 'plot.svg'}: No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_servers: dict[str, str | None] = {"stock": None, "prefix": None}

    def build(folder: Path, config: Any) -> None:
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        if len(names) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(tiny_model, "build_tiny_model", build)
    names = ["config.json"]
    with pytest.raises(KeyboardInterrupt):
        command._model(tmp_path, no_servers)
    assert list(tmp_path.iterdir()) == []
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert command._model(tmp_path, no_servers) == str(tmp_path / "tiny-model")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-model"]
    (tmp_path / "tiny-model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not a whole model, it lacks model\.safetensors"):
        command._model(tmp_path, no_servers)


# -- SGLang's internals --------------------------------------------------------------------------


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
        with monkeypatch.context() as change:
            change.delattr(owner, name)
            (problem,) = load_generator.missing()
            assert name in problem
