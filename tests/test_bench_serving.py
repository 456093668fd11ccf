"""`bench serving` without SGLang: its run and file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from math import ceil, inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sglang_prefix import tiny_model
from sglang_prefix.bench.child import ChildError
from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.serving import run as serving_run
from sglang_prefix.bench.serving.run import ServingRun
from sglang_prefix.bench.serving.servers import RunningServer, ServerError
from sglang_prefix.cli.bench_serving import serving
from sglang_prefix.cli.main import app
from tests.replaced_values import replaced_values
from tests.test_bench_serving_compare import COUNTERS, a_run

# -- the run and its file --------------------------------------------------------------------------

ROLLOUTS = {"prompts": 2, "samples": 2, "prompt_tokens": 8, "output_tokens": 4}
ENTRY = {"name": "a", "group": "rollouts", "driver": "rollouts", "about": "", "full": ROLLOUTS}
ENTRY |= {"quick": ROLLOUTS}
DEFAULTS = {n: p.default for n, p in signature(serving).parameters.items() if n != "ctx"}


class FakeClient:
    """Answers what an SGLang client would.

    Attributes:
        fails_with: by what it is asked for, what it raises instead.
        limits: of what the newest one was asked for, the seconds that it was given.
    """

    fails_with: ClassVar[dict[str, Exception]] = {}
    limits: ClassVar[dict[str, int]]

    def __init__(self, make: str, settings: dict[str, Any], **more: Any) -> None:
        FakeClient.limits = {}

    def ask(self, function: str, deadline: float, watch: Any, **arguments: Any) -> Any:
        order = function.rpartition(".")[2]
        url = arguments.get("url", "")
        what = f"{order} {url} {arguments.get('name')}"
        self.limits[what] = ceil(deadline - time.monotonic())
        if what in self.fails_with:
            raise self.fails_with[what]
        if order == "prepare":
            return {"fingerprint": "f", "replay_s": 100.0}
        return [[1, 2], [3, 4]] if order == "check" else a_run(1.0 if url == "prefix" else 2.0)

    def stop(self) -> None:
        pass


@contextmanager
def fake_servers(**described: dict[str, Any]) -> Iterator[None]:
    """No processes: servers answer at once, and pack everything.

    Args:
        described: by side, what the server is, beside a model "m" in float32.
    """
    packed = iter(range(0, 100_000, 10))

    def counters(server: RunningServer) -> dict[str, Any] | None:
        return COUNTERS | {"packed_steps": next(packed)} if server.side == "prefix" else None

    def describe(server: RunningServer) -> dict[str, Any]:
        return {"model": "m", "dtype": "float32"} | described.get(server.side, {})

    with (
        patch.object(serving_run, "ChildProcess", FakeClient),
        patch.object(serving_run, "launch", lambda side, *_: RunningServer(side, side)),
        patch.object(serving_run, "wait_until_ready", lambda *_: None),
        patch.object(serving_run, "describe", describe),
        patch.object(serving_run, "read_counters", counters),
    ):
        yield


@pytest.fixture
def fakes() -> Iterator[None]:
    """See :func:`fake_servers`."""
    with fake_servers():
        yield


def a_serving_run(out: Path, **changes: Any) -> ServingRun:
    """A run of two workloads, "a" and "b"."""
    out.mkdir(exist_ok=True)
    file = out / "workloads.txt"
    file.write_text(json.dumps({"workloads": [ENTRY, ENTRY | {"name": "b"}]}))
    given = {"out": out, "model_path": "m", "workload_file": file, "workload_timeout": 9}
    return ServingRun(command=[], **DEFAULTS | given | changes)


def measure(run: ServingRun) -> dict[str, Any]:
    run.run(inf, lambda name: None, lambda what: None)
    return read_result(run.path, "bench-serving")


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ChildError("gone", "log"), "prefix, b, run 1 of 2: gone; its log: "),
        (TimeoutError(), "no answer to 'measure' within 109 s; --workload-timeout gives longer"),
    ],
)
def test_an_interrupted_run_keeps_what_it_has_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    whole = measure(a_serving_run(tmp_path / "whole", repeats=2))
    assert [case["is_comparison"] for case in whole["cases"]] == [True, True]
    assert whole["not_run"] == {}
    monkeypatch.setattr(FakeClient, "fails_with", {"measure prefix b": error})
    with pytest.raises(ServerError, match=told):
        measure(a_serving_run(tmp_path / "part", repeats=2))
    monkeypatch.undo()
    part = read_result(tmp_path / "part" / "serving.json")
    assert list(part["not_run"]) == ["b"]
    assert [case["is_comparison"] for case in part["cases"]] == [True, False]
    assert part["cases"][1]["why_not"] == "not run to its end: prefix"
    resumed = measure(a_serving_run(tmp_path / "part", repeats=2, resume=True))
    # Of what was asked for, only what was left, and its tokens.
    assert FakeClient.limits == {"prepare  None": 9, "check prefix b": 9, "measure prefix b": 109}
    assert [case["ratios"] for case in resumed["cases"]] == [c["ratios"] for c in whole["cases"]]
    again = measure(a_serving_run(tmp_path / "part", repeats=2, resume=True))
    assert again == resumed  # nothing is left


@pytest.mark.usefixtures("fakes")
def test_servers_in_turn_or_taking_turns(tmp_path: Path) -> None:
    def order(**changes: Any) -> list[str]:
        found = a_serving_run(tmp_path, repeats=2, **changes).steps()
        return [f"{side[0]}{workload.name}{number}" for side, workload, number in found]

    assert order() == ["sa0", "sa1", "sb0", "sb1", "pa0", "pa1", "pb0", "pb1"]
    both = order(stock_url="http://a", prefix_url="http://b")
    assert both == ["sa0", "pa0", "pa1", "sa1", "sb0", "pb0", "pb1", "sb1"]


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
    refused = pytest.raises(ServerError, match=told) if told else nullcontext()
    with fake_servers(stock=stock, prefix=prefix), refused:
        run = a_serving_run(tmp_path, stock_url="stock", prefix_url="prefix")
        assert measure(run)["not_run"] == {}


@pytest.mark.usefixtures("fakes")
def test_a_new_run_replaces_the_file_once_its_servers_answer(tmp_path: Path) -> None:
    old = measure(a_serving_run(tmp_path))
    run = a_serving_run(tmp_path, seed=1, stock_url="u")
    for function, seed in (("describe", old["seed"]), ("ChildProcess", 1)):
        with (
            patch.object(serving_run, function, side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            measure(run)
        assert read_result(run.path)["seed"] == seed
    assert list(read_result(run.path)["not_run"]) == ["a", "b"]


# Another machine or software: tests/test_bench_kernel.py.
@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model_path": "n"}, "model"),
        ({"tokenizer": "t"}, "tokenizer"),
        ({"stock_url": "u"}, "urls"),
        ({"workload": ["a"]}, "workloads"),
        ({"repeats": 2}, "repeats"),
        ({"seed": 1}, "seed"),
        ({"server_args": ["-x"]}, "server_args"),
    ],
)
def test_a_run_is_not_resumed_as_another(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    measure(a_serving_run(tmp_path))
    with pytest.raises(ValueError, match=rf"serving\.json cannot be resumed: its {name} is "):
        a_serving_run(tmp_path, **change, resume=True)


@pytest.fixture(scope="module")
def finished() -> Iterator[Any]:
    """The result of a whole run."""
    with TemporaryDirectory() as folder, fake_servers():
        yield measure(a_serving_run(Path(folder)))


@given(data=st.data())
def test_a_changed_file_is_named_or_measured_again(finished: Any, data: st.DataObject) -> None:
    changed = data.draw(replaced_values(finished))
    with TemporaryDirectory() as folder, fake_servers():
        path = Path(folder, "serving.json")
        path.write_text(json.dumps(changed))
        try:
            run = a_serving_run(Path(folder), resume=True)
            measure(run)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert [case["name"] for case in run.data["cases"]] == ["a", "b"]
            assert run.data["not_run"] == {}


# -- what the command writes -----------------------------------------------------------------------


@pytest.mark.usefixtures("fakes")
def test_the_command_writes_plots_and_a_page_or_says_why_not(tmp_path: Path) -> None:
    def bench(*options: str) -> Any:
        command = ["bench", "serving", "--out", str(tmp_path), "--model-path", "m", "--quick"]
        return CliRunner().invoke(app, [*command, "--workload", "rollouts", *options])

    result = bench("--no-report")
    assert result.exit_code == 0, result.output
    assert "0.50x" in result.output or "2.00x" in result.output
    assert (tmp_path / "serving_times.svg").exists()
    assert not (tmp_path / "report.html").exists()
    assert read_result(tmp_path / "serving.json")["wall_s"] > 0
    assert bench("--resume").exit_code == 0
    assert "rollouts" in (tmp_path / "report.html").read_text()

    (tmp_path / "kernel.json").write_text("{")
    result = bench("--resume")
    assert result.exit_code == 1
    assert str(tmp_path / "kernel.json") in result.output.strip().splitlines()[-1]


def test_a_model_is_whole_or_not_there(tmp_path: Path) -> None:
    folder, config = tmp_path / "models" / "tiny", tiny_model.TinyModelConfig(num_layers=1)
    with (
        patch.object(tiny_model, "_write_tokenizer", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        tiny_model.build_once(folder, config)
    assert list(folder.parent.iterdir()) == []
    tiny_model.build_once(folder, config)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    tiny_model.build_once(folder, config)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="does not hold the model that is needed: remove it"):
        tiny_model.build_once(folder, tiny_model.TinyModelConfig(num_layers=2))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not a whole model, it lacks model\.safetensors"):
        tiny_model.build_once(folder, config)


def test_bench_modules_import_without_sglang() -> None:
    names = ("compare", "engine_run", "run", "servers", "workloads")
    imports = "; ".join(f"import sglang_prefix.bench.serving.{name}" for name in names)
    code = (
        f"{imports}; import sys; print([n for n in ('sglang', 'matplotlib') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
