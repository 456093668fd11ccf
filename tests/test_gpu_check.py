"""`make gpu-check` without a GPU: what a bare host needs; the dry run, budget, control."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.workloads.inputs import MismatchError
from tests.gpu.conftest import Setting
from tests.gpu.variants import variants

ROOT = Path(__file__).parents[1]
# What a GPU host may lack. Of pytest's plugins, hypothesis' alone is there.
BARE_HOST = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"pydantic", "sglang", "transformers", "pytest_timeout", "xdist"}:
            raise ImportError(f"{name} is not on a bare host")
sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main(["-p", "_hypothesis_pytestplugin", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def gpu_check(*options: str) -> tuple[int, str]:
    """As `make` starts it on a host where nothing of ours is installed."""
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "patches"))
    done = subprocess.run(
        [sys.executable, "-c", BARE_HOST, "-q", "-m", "gpu", "tests/gpu", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_bare_host_without_a_gpu_skips_and_says_what_is_missing(tmp_path: Path) -> None:
    code, printed = gpu_check("--out", str(tmp_path / "check.json"))
    assert code == 0, printed
    assert "no GPU here; --dry runs tiny shapes without one" in printed
    assert f"{len(variants()) + 7} skipped" in printed
    assert not (tmp_path / "check.json").exists()


def test_the_most_telling_come_first() -> None:
    names = [variant.name for variant in variants()]
    assert len(set(names)) == len(names) > 40
    assert names[0] == "policies-and-modes"
    code, printed = gpu_check("--collect-only")
    assert code == 0, printed
    order = [line.partition("[")[2][:-1] for line in printed.splitlines() if "[" in line]
    assert order[:7] == [*names[:6], "graph/streams/launch"]
    assert order[-2:] == ["sanitizer/memcheck", "sanitizer/racecheck"]


def test_a_control_in_which_nothing_mismatches_fails() -> None:
    setting = Setting(torch.device("cpu"), seed=0, dry=True, control=True)
    with setting.verdict():
        raise MismatchError("as it should")
    with pytest.raises(pytest.fail.Exception), setting.verdict():
        pass


@pytest.mark.extended
def test_a_dry_run_stops_with_its_budget_resumes_and_passes(tmp_path: Path) -> None:
    file = tmp_path / "check.json"

    def read() -> dict[str, Any]:
        return read_result(file, "gpu-check")

    code, printed = gpu_check("--dry", "--budget-s", "0", "--out", str(file))
    assert code == 0, printed
    stopped = read()
    assert "not run: policies-and-modes, " in printed
    assert not stopped["cases"]
    code, printed = gpu_check("--dry", "--control", "--resume", str(file))
    assert code == 4
    assert "cannot be resumed: its options is {'control': False}" in printed
    code, printed = gpu_check("--dry", "--resume", str(file))
    assert code == 0, printed
    done = read()
    assert done["seed"] == stopped["seed"]
    assert f"--hypothesis-seed={done['seed']}" in printed
    assert set(done["not_run"]) == {"sanitizer/memcheck", "sanitizer/racecheck"}
    cases = {case["name"]: case for case in done["cases"]}
    assert list(cases) == [name for name in stopped["not_run"] if name in cases]
    assert len(cases["policies-and-modes"]["errors"]) == 11
    assert "one prefix" in cases["graph/fused/in_kernel"]["errors"]


@pytest.mark.extended
def test_control_a_lost_work_item_is_seen_by_every_check(tmp_path: Path) -> None:
    file = tmp_path / "control.json"
    code, printed = gpu_check("--dry", "--control", "--out", str(file))
    assert code == 0, printed
    data = json.loads(file.read_text())
    assert data["options"] == {"control": True}
    assert len(data["cases"]) == len(variants(dry=True)) + 4
    assert set(data["not_run"]) == {"every_mode_once", "sanitizer/memcheck", "sanitizer/racecheck"}
