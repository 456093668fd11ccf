"""`make gpu-serve` without a GPU: two real engines run every kind of cell on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.serve_cells import dry_cells
from sglang_prefix.cli.exec import find_sgl_kernel, sglang_environment

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def start(*options: str | Path) -> str:
    """As `make` starts it."""
    base = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_PREFIX_")}
    roots = [str(ROOT / folder) for folder in (".", "kernels", "patches")]
    base["PYTHONPATH"] = os.pathsep.join([*roots, *filter(None, [base.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.serve", "--dry", *map(str, options)],
        cwd=ROOT,
        env=sglang_environment(find_sgl_kernel(), base),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=550,
    )
    assert run.returncode == 0, run.stdout
    return run.stdout


@dataclass
class DryRun:
    """What was stopped before it began, and what completed it."""

    stopped: dict[str, Any]
    report: dict[str, Any]
    output: str


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> DryRun:
    file = tmp_path_factory.mktemp("serve") / "serve.json"
    start("--budget-s", "0", "--out", file)
    stopped = json.loads(file.read_text())
    output = start("--resume", file)
    return DryRun(stopped, json.loads(file.read_text()), output)


def test_it_resumes_and_runs_every_cell(dry: DryRun) -> None:
    assert {cell["status"] for cell in dry.stopped["cells"].values()} == {"not run"}
    names = [cell.name for cell in dry_cells(["torch_native"])]
    assert dry.report["order"] == names
    assert [run["cells"] for run in dry.report["runs"]] == [[], names]
    assert dry.report["seed"] == dry.stopped["seed"]
    statuses = {cell["load"]["name"]: cell["status"] for cell in dry.report["cells"].values()}
    assert statuses == {
        "rollouts-64x8k": "done",
        "unrelated": "done",
        "agents": "done",
        "logprobs": "passed",
        "no-device-sync": "n/a",
    }


def test_engines_find_the_plugin_of_the_source_tree(dry: DryRun) -> None:
    for cell in dry.report["cells"].values():
        for engine in cell["engines"].values():
            (plugin,) = engine["plugin"]
            # An editable install has left the same beside the sources, which come first.
            assert "/plugin/sglang_prefix-" in plugin or Path(plugin).parent == ROOT
            assert engine["max_total_num_tokens"] == engine["arguments"]["max_total_tokens"]
        assert cell["engines"]["prefix"]["settings"]["SGLANG_PREFIX_STOCK_BACKEND"] == (
            "torch_native"
        )


@pytest.mark.parametrize("load", ["rollouts-64x8k", "agents"])
def test_shared_prompts_are_packed_and_timed(load: str, dry: DryRun) -> None:
    cell = dry.report["cells"][f"pair/{load}"]
    assert cell["shares"]
    ours, stock = cell["measured"]["prefix"], cell["measured"]["torch_native"]
    assert ours["packed"]
    assert ours["counters"]["kv_read_ratio"] < 0.8
    assert stock["counters"] == {}
    for found in (ours, stock):
        assert 0 < found["num_steps"] == len(found["step_us"]) < cell["load"]["output_tokens"]
        assert found["tpot_us"] > 0
        # All prompts were in the cache but for what decodes the first token.
        assert found["cached_tokens"] == sum(n for _, n in cell["load"]["levels"]) - 1


def test_answers_agree_and_wide_limits_are_not_why(dry: DryRun) -> None:
    cell = dry.report["cells"]["pair/logprobs"]
    assert cell["difference"]["requests_equal"] == cell["load"]["num_requests"]
    assert cell["difference"]["max"] < 1e-4
    assert cell["difference"]["values"] > 50
    assert cell["counters"]["packed_steps"] >= cell["load"]["output_tokens"] - 1


def test_both_sides_alternate(dry: DryRun) -> None:
    cell = dry.report["cells"]["pair/unrelated"]
    assert not cell["shares"]
    assert [list(one) for one in cell["rounds"]] == [
        ["torch_native", "prefix"],
        ["prefix", "torch_native"],
    ]
    assert len(cell["ratios"]) == 2


def test_steps_are_counted_under_the_guard(dry: DryRun) -> None:
    cell = dry.report["cells"]["pair/no-device-sync"]
    counters = cell["counters"]
    steps = counters["packed_steps"] + counters["stock_steps"] + counters["fallback_steps"]
    assert cell["guarded_steps"] == steps > 20
    assert counters["plans"] > 10
    assert cell["guard"] == {"steps": cell["guard"]["steps"], "on_gpu": False} | {
        "control": None,
        "raised": [],
    }


def test_the_output_says_that_it_means_nothing(dry: DryRun) -> None:
    assert "DRY RUN, no measurement" in dry.output
    assert set(dry.report["targets"]) == {
        "64 x 8k",
        "64 x 32k",
        "16 x 2k",
        "64 x 1k, long",
        "unrelated",
        "host time",
        "kv pool",
        "logprobs",
        "no device sync",
    }
    for name, target in dry.report["targets"].items():
        assert f"target {name}: {target['status']} (dry run" in dry.output
