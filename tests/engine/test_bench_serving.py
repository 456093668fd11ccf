"""`bench serving` as a user runs it, with servers and with engines.

The servers have a control: one more workload, named ``zeros``, which is what the prefix server
decodes meanwhile (``hooks/controls.py``). That must be refused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from sglang_prefix.bench.engine import engine_environment
from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.serving.loads import measurements
from sglang_prefix.bench.serving.targets import evaluate
from sglang_prefix.bench.serving.workloads import REGISTRY
from tests.engine.driver import HOLD_FILE, MODE_FILE

pytest.importorskip("matplotlib", reason="the plots need matplotlib")

# Two servers start, one after the other, then two engines: 20 s each on two free cores, minutes on
# busy ones.
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.extended,
    pytest.mark.timeout(1200),
]

ROOT = Path(__file__).parents[2]
RUN_S = 1000
BENCH = (sys.executable, "-m", "sglang_prefix.cli.main", "bench", "serving")
CONTROL = "zeros"
# Four conversations of three turns below one system prompt; their second and third turns repeat the
# ones before.
TURNS = [
    {"timestamp": 100 * n, "input_length": 512 * len(ids), "output_length": 600, "hash_ids": ids}
    for n, ids in enumerate(
        [*range(8), *range(first, first + more)]
        for more in (4, 8, 12)
        for first in (100, 200, 300, 400)
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run in ``out``, and what it printed in ``stdout`` and ``stderr``."""
    root = tmp_path_factory.mktemp("bench-serving")
    (root / "trace").write_text("\n".join(map(json.dumps, TURNS)))
    registry = json.loads(REGISTRY.read_text())
    (rollouts,) = (entry for entry in registry["workloads"] if entry["name"] == "rollouts")
    registry["workloads"].append(rollouts | {"name": CONTROL})
    (root / "workloads.json").write_text(json.dumps(registry))
    command = [*BENCH, "--quick", "--out", str(root / "out")]
    command += ["--trace", str(root / "trace"), "--workload-file", str(root / "workloads.json")]
    settings = {
        MODE_FILE: str(root / "mode"),
        HOLD_FILE: str(root / "never"),
        "HF_HUB_OFFLINE": "1",
        # Other workers may use the cores: threads that wait for one would spin meanwhile.
        "OMP_NUM_THREADS": "1",
    }
    hooks = ["tests.engine.hooks.controls"]
    with (root / "stdout").open("wb") as stdout, (root / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=engine_environment(settings, hooks=hooks, base=os.environ),
        )
        try:
            status = process.wait(RUN_S)
        except subprocess.TimeoutExpired:
            pytest.fail((root / "stdout").read_text()[-3000:])
        finally:
            process.terminate()  # an interrupt, if it runs
            process.wait(60)
    # The control alone is wrong, which the next line would not say.
    assert status == 1, (root / "stderr").read_text()[-3000:]
    return root


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    """The result file."""
    return read_result(folder / "out" / "serving.json", "bench-serving")


@pytest.mark.parametrize(
    ("name", "requests", "least_read", "most_read"),
    [
        ("shared-prefix", 16, 0, 0.6),
        ("random", 8, 1, 1),
        ("trace", len(TURNS), 0, 0.9),
        ("rollouts", 16, 0, 0.6),
        ("questions", 16, 0, 0.6),
        ("forks", 16, 0, 0.6),
    ],
)
def test_a_workload_is_a_comparison_with_equal_tokens(
    result: dict[str, Any], name: str, requests: int, least_read: float, most_read: float
) -> None:
    assert (result["dtype"], result["not_run"], result["absent"]) == ("float32", {}, {})
    (case,) = (case for case in result["cases"] if case["name"] == name)
    extends = case["sides"]["prefix"]["extends"]
    if name == "questions":
        # Two documents; how many passes read the questions is a matter of when they arrive.
        assert extends["packed"] >= 1
        assert (extends["stock"] <= 2, extends["fallback"]) == (True, 0)
    assert case["is_comparison"], case["why_not"]
    assert case["requests_equal"] == case["requests"] == requests
    assert case["tokens_compared"] >= 2 * case["requests"]
    assert all(ratio > 0 for ratio in case["ratios"].values())
    # What was read follows what was shared: by half or more, the less the more are in time.
    stock, ours = case["sides"]["stock"], case["sides"]["prefix"]
    assert stock["steps"] is None
    assert least_read <= ours["kv_read_ratio"] <= most_read
    assert ours["packed_share"] >= 0.9
    assert sum(ours["steps"].values()) >= 15
    for side in (stock, ours):
        for metric in ("ttft_ms", "tpot_ms", "itl_ms"):
            assert 0 < side[metric]["median"] <= side[metric]["p99"] < 1000 * side["duration_s"]
        (run,) = side["raw"]["runs"]
        assert run["output_tokens"] == case["tokens_compared"]
        rate = run["output_tokens"] / side["duration_s"]
        assert side["output_tokens_per_s"] == pytest.approx(rate, rel=0.01)


def test_broken_decode_is_no_comparison(folder: Path, result: dict[str, Any]) -> None:
    (case,) = (case for case in result["cases"] if case["name"] == CONTROL)
    assert not case["is_comparison"]
    assert case["sides"]["prefix"]["packed_share"] >= 0.9
    assert case["requests_equal"] == 0
    assert case["ratios"]["tpot"] is None
    (line,) = (folder / "stderr").read_text().strip().splitlines()
    assert "no comparison: zeros: tokens differ in 16 of 16 answers" in line


def test_tables_and_plots_are_there_and_the_servers_are_not(
    folder: Path, result: dict[str, Any]
) -> None:
    printed = (folder / "stdout").read_text()
    assert all(case["name"] in printed for case in result["cases"])
    assert "zeros is not a comparison: tokens differ" in " ".join(printed.split())
    assert "<svg" in (folder / "out" / "serving_times.svg").read_text()[:2000]
    assert ">zeros<" in (folder / "out" / "report.html").read_text()
    for side in ("stock", "prefix"):
        with pytest.raises(OSError):  # noqa: PT011
            urllib.request.urlopen(result[side]["url"] + "/health", timeout=10)


# -- engines ---------------------------------------------------------------------------------------


def run_engines(folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """A dry run: the result, and what was printed."""
    base = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_PREFIX_")}
    run = subprocess.run(
        [*BENCH, "--engine", "--dry", "--out", str(folder), *options],
        env=base,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_S,
    )
    assert run.returncode == 0, run.stdout
    return read_result(folder / "engine.json", "bench-engine"), run.stdout


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dry run with no time for anything, resumed."""
    folder = tmp_path_factory.mktemp("engines")
    stopped, _ = run_engines(folder, "--budget-s", "0")
    result, printed = run_engines(folder, "--resume", "--budget-s", str(RUN_S))
    names = [one.name for one in measurements(dry=True)]
    assert stopped["cases"] == []
    assert list(stopped["not_run"]) == names
    assert [case["name"] for case in result["cases"]] == names
    assert result["seed"] == stopped["seed"]
    assert (result["not_run"], result["failed"]) == ({}, {})
    assert result["targets"].keys() == evaluate([]).keys()
    assert "Dry run" in printed
    assert all(name in printed for name in result["targets"])
    return {case["name"].removeprefix("pair/"): case for case in result["cases"]}


def test_engines_find_the_plugin_of_the_source_tree(dry: dict[str, Any]) -> None:
    for case in dry.values():
        for engine in case["engines"].values():
            (plugin,) = engine["plugin"]
            # An editable install has left the same beside the sources, which come first.
            assert "/plugin/sglang_prefix-" in plugin or Path(plugin).parent == ROOT
            assert engine["max_total_num_tokens"] == engine["arguments"]["max_total_tokens"]
        settings = case["engines"]["prefix"]["settings"]
        assert settings["SGLANG_PREFIX_STOCK_BACKEND"] == "torch_native"


@pytest.mark.parametrize("load", ["rollouts-64x8k", "agents"])
def test_shared_prompts_are_packed_and_timed(load: str, dry: dict[str, Any]) -> None:
    case = dry[load]
    ours, stock = case["measured"]["prefix"], case["measured"]["torch_native"]
    assert ours["packed"]
    assert ours["counters"]["kv_read_ratio"] < 0.8
    assert stock["counters"] == {}
    for found in (ours, stock):
        assert 0 < found["num_steps"] == len(found["step_us"]) < case["load"]["output_tokens"]
        assert found["tpot_us"] > 0
        # All prompts were in the cache but for what decodes the first token.
        assert found["cached_tokens"] == sum(n for _, n in case["load"]["levels"]) - 1


def test_log_probabilities_agree_and_wide_limits_are_not_why(dry: dict[str, Any]) -> None:
    case = dry["logprobs"]
    assert case["status"] == "passed"
    assert case["difference"]["requests_equal"] == case["load"]["num_requests"]
    assert case["difference"]["max"] < 1e-4
    assert case["difference"]["values"] > 50
    assert case["counters"]["packed_steps"] >= case["load"]["output_tokens"] - 1


def test_both_sides_alternate(dry: dict[str, Any]) -> None:
    case = dry["unrelated"]
    assert [list(one) for one in case["rounds"]] == [
        ["torch_native", "prefix"],
        ["prefix", "torch_native"],
    ]
    assert len(case["ratios"]) == 2


def test_steps_are_counted_under_the_guard(dry: dict[str, Any]) -> None:
    case = dry["no-device-sync"]
    assert case["status"] == "n/a"
    counters = case["counters"]
    steps = counters["packed_steps"] + counters["stock_steps"] + counters["fallback_steps"]
    assert case["guarded_steps"] == steps > 20
    assert counters["plans"] > 10
    seen: dict[str, Any] = {"on_gpu": False, "control": None, "raised": []}
    assert case["guard"] == seen | {"steps": case["guard"]["steps"]}
