"""`bench serving --quick` as a user runs it, and a control: broken decode must not pass."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from sglang_prefix.bench.results import read_result
from tests.engine.driver import HOLD_FILE, HOOKS, MODE_FILE

pytest.importorskip("matplotlib", reason="the plots need matplotlib")

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

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


def bench(out: Path, trace: Path, mode: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command with the hooks loaded in all processes; ``mode`` says what they break."""
    # Other workers may use the cores: threads that wait for one would spin meanwhile.
    threads = {"OMP_NUM_THREADS": "1"}
    hooks = {MODE_FILE: str(mode), HOLD_FILE: str(mode.with_name("never"))}
    python_path = os.pathsep.join([str(HOOKS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "sglang_prefix.cli.main", "bench", "serving"]
    return subprocess.run(
        [*command, "--out", str(out), "--quick", "--trace", str(trace), *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
        env=os.environ | {"PYTHONPATH": python_path, "HF_HUB_OFFLINE": "1"} | hooks | threads,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in ``out``, what it printed in ``stdout``, and the ``trace`` that it replayed."""
    root = tmp_path_factory.mktemp("bench-serving")
    (root / "trace").write_text("\n".join(map(json.dumps, TURNS)))
    done = bench(root / "out", root / "trace", root / "mode")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (root / "stdout").write_text(done.stdout)
    return root


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    """The result file of the run."""
    return read_result(folder / "out" / "serving.json", "bench-serving")


def test_every_workload_is_a_comparison_with_equal_tokens(result: dict[str, Any]) -> None:
    cells = {cell["name"]: cell for cell in result["cells"]}
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


def test_what_was_read_follows_what_was_shared(result: dict[str, Any]) -> None:
    sides = {cell["name"]: cell["sides"]["prefix"] for cell in result["cells"]}
    read = {name: side["kv_read_ratio"] for name, side in sides.items()}
    assert read["random"] == 1
    assert max(read["shared-prefix"], read["rollouts"]) < 0.3
    assert read["forks"] < 0.5
    assert read["trace"] < 0.9
    for side in sides.values():
        assert side["packed_share"] >= 0.9
        assert sum(side["steps"].values()) >= 15


def test_times_hang_together(result: dict[str, Any]) -> None:
    for cell in result["cells"]:
        assert cell["sides"]["stock"]["steps"] is None
        for side in cell["sides"].values():
            for name in ("ttft_ms", "tpot_ms", "itl_ms"):
                assert 0 < side[name]["median"] <= side[name]["p99"] < 1000 * side["duration_s"]
            (run,) = side["raw"]["runs"]
            assert run["output_tokens"] == cell["tokens_compared"]
            rate = run["output_tokens"] / side["duration_s"]
            assert side["output_tokens_per_s"] == pytest.approx(rate, rel=0.01)


def test_table_and_plots_are_there_and_the_servers_are_not(
    folder: Path, result: dict[str, Any]
) -> None:
    printed = (folder / "stdout").read_text()
    assert printed.count("prefix / stock") == len(result["cells"])
    assert "no comparison" not in printed
    for name in ("serving_times.svg", "serving_reads.svg"):
        assert "<svg" in (folder / "out" / name).read_text()[:2000]
    for side in ("stock", "prefix"):
        with pytest.raises(OSError):  # noqa: PT011
            urllib.request.urlopen(result[side]["url"] + "/health", timeout=10)


def test_broken_decode_is_refused_when_a_run_goes_on(folder: Path) -> None:
    """Control: the run goes on from recorded stock answers, with a server that decodes zeros."""
    out, mode = folder / "broken", folder / "broken-mode"
    shutil.copytree(folder / "out", out)
    data = json.loads((out / "serving.json").read_text())
    (cell,) = (cell for cell in data["cells"] if cell["name"] == "rollouts")
    del cell["sides"]["prefix"]
    (out / "serving.json").write_text(json.dumps(data))
    mode.write_text("zeros")
    model = str(folder / "out" / "tiny-model")
    done = bench(out, folder / "trace", mode, "--resume", "--model-path", model)
    assert done.returncode == 1
    assert "no comparison: rollouts: tokens differ in 16 of 16 answers" in done.stderr
    cells = {c["name"]: c for c in read_result(out / "serving.json")["cells"]}
    assert cells["rollouts"]["sides"]["prefix"]["packed_share"] >= 0.9
    assert not cells["rollouts"]["is_comparison"]
    assert cells["rollouts"]["ratios"]["tpot"] is None
    assert cells["forks"]["is_comparison"]  # measured before
    assert "stock, " not in done.stdout
