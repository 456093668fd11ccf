"""`bench serving --quick` as a user runs it, with a control: broken decode must be refused.

The control is one more workload, measured last on the same servers: when all others are in the
result file, the prefix server begins to decode zeros.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from sglang_prefix.bench.hooks import hook_environment
from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.serving.workloads import REGISTRY
from tests.engine.driver import HOLD_FILE, MODE_FILE

pytest.importorskip("matplotlib", reason="the plots need matplotlib")

# Two servers start, one after the other: 20 s each on two free cores, minutes on busy ones.
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
RUN_S = 1000
CONTROL = "control"
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
    command = [sys.executable, "-m", "sglang_prefix.cli.main", "bench", "serving", "--quick"]
    command += ["--out", str(root / "out"), "--trace", str(root / "trace")]
    command += ["--workload-file", str(root / "workloads.json")]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        MODE_FILE: str(root / "mode"),
        HOLD_FILE: str(root / "never"),
        "HF_HUB_OFFLINE": "1",
        # Other workers may use the cores: threads that wait for one would spin meanwhile.
        "OMP_NUM_THREADS": "1",
    }
    with (root / "stdout").open("wb") as stdout, (root / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=hook_environment(["tests.engine.hooks.controls"], os.environ | environment),
        )
        try:
            break_decode_for_the_control(process, root)
        finally:
            process.terminate()  # an interrupt, if it runs
            status = process.wait(60)
    # The control alone is wrong, which the next line would not say.
    assert status == 1, (root / "stderr").read_text()[-3000:]
    return root


def break_decode_for_the_control(process: subprocess.Popen[bytes], root: Path) -> None:
    """Wait for the end of a run; on the way, break decode when only the control is left."""
    deadline = time.monotonic() + RUN_S
    result = root / "out" / "serving.json"
    while process.poll() is None:
        assert time.monotonic() < deadline, (root / "stdout").read_text()[-3000:]
        if result.exists() and read_result(result)["not_run"] == [CONTROL]:
            (root / "mode").write_text("zeros")
        time.sleep(0.02)


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    """The result file."""
    return read_result(folder / "out" / "serving.json", "bench-serving")


@pytest.fixture(scope="module")
def cells(result: dict[str, Any]) -> dict[str, Any]:
    """All cells but the control."""
    return {cell["name"]: cell for cell in result["cells"] if cell["name"] != CONTROL}


def test_every_workload_is_a_comparison_with_equal_tokens(
    result: dict[str, Any], cells: dict[str, Any]
) -> None:
    assert set(cells) == {"shared-prefix", "random", "trace", "rollouts", "forks"}
    assert result["dtype"] == "float32"
    assert result["not_run"] == []
    assert result["absent"] == {}
    for name, cell in cells.items():
        assert cell["is_comparison"], (name, cell["why_not"])
        assert cell["requests_equal"] == cell["requests"] >= 8
        assert cell["tokens_compared"] >= 2 * cell["requests"]
        assert all(ratio > 0 for ratio in cell["ratios"].values())
    answers = {name: cell["requests"] for name, cell in cells.items()}
    assert answers["shared-prefix"] == answers["rollouts"] == answers["forks"] == 16
    assert answers["trace"] == len(TURNS)


def test_broken_decode_is_no_comparison(folder: Path, result: dict[str, Any]) -> None:
    (cell,) = (cell for cell in result["cells"] if cell["name"] == CONTROL)
    assert not cell["is_comparison"]
    assert cell["sides"]["prefix"]["packed_share"] >= 0.9
    assert cell["requests_equal"] == 0
    assert cell["ratios"]["tpot"] is None
    (line,) = (folder / "stderr").read_text().strip().splitlines()
    assert "no comparison: control: tokens differ in 16 of 16 answers" in line


def test_what_was_read_follows_what_was_shared(cells: dict[str, Any]) -> None:
    sides = {name: cell["sides"]["prefix"] for name, cell in cells.items()}
    read = {name: side["kv_read_ratio"] for name, side in sides.items()}
    assert read["random"] == 1
    assert max(read["shared-prefix"], read["rollouts"]) < 0.3
    assert read["forks"] < 0.5
    assert read["trace"] < 0.9
    for side in sides.values():
        assert side["packed_share"] >= 0.9
        assert sum(side["steps"].values()) >= 15


def test_times_hang_together(cells: dict[str, Any]) -> None:
    for cell in cells.values():
        assert cell["sides"]["stock"]["steps"] is None
        for side in cell["sides"].values():
            for name in ("ttft_ms", "tpot_ms", "itl_ms"):
                assert 0 < side[name]["median"] <= side[name]["p99"] < 1000 * side["duration_s"]
            (run,) = side["raw"]["runs"]
            assert run["output_tokens"] == cell["tokens_compared"]
            rate = run["output_tokens"] / side["duration_s"]
            assert side["output_tokens_per_s"] == pytest.approx(rate, rel=0.01)


def test_table_and_plots_are_there_and_the_servers_are_not(
    folder: Path, result: dict[str, Any], cells: dict[str, Any]
) -> None:
    printed = (folder / "stdout").read_text()
    assert printed.count("prefix / stock") == len(cells)
    assert "control is no comparison: tokens differ" in printed
    for name in ("serving_times.svg", "serving_reads.svg"):
        assert "<svg" in (folder / "out" / name).read_text()[:2000]
    for side in ("stock", "prefix"):
        with pytest.raises(OSError):  # noqa: PT011
            urllib.request.urlopen(result[side]["url"] + "/health", timeout=10)
