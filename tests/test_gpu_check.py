"""`make gpu-check` without a GPU: what a bare host needs; the dry run, budget, control."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.workloads.inputs import MismatchError
from tests.bare_host import run_bare
from tests.gpu.conftest import Setting
from tests.gpu.variants import variants

# Of pytest's plugins, hypothesis' alone is there.
PYTEST = """
import pytest
options = ["-p", "_hypothesis_pytestplugin", "-p", "no:cacheprovider", "-q", "-m", "gpu"]
sys.exit(pytest.main([*options, "tests/gpu", *sys.argv[1:]]))
"""
gpu_check = partial(run_bare, PYTEST)  # as `make` starts it


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_bare_host_without_a_gpu_skips_and_says_what_is_missing(tmp_path: Path) -> None:
    code, printed = gpu_check("--out", tmp_path / "check.json")
    assert code == 0, printed
    assert "no GPU here; --dry runs tiny shapes without one" in printed
    assert f"{len(variants()) + 11} skipped" in printed
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
@pytest.mark.timeout(1800)
def test_a_dry_run_stops_with_its_budget_resumes_and_passes(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    code, printed = gpu_check("--dry", "--budget-s", "0", "--out", file)
    assert code == 0, printed
    stopped = read_result(file, "gpu-check")
    assert "not run: policies-and-modes, " in printed
    assert not stopped["cases"]
    code, printed = gpu_check("--dry", "--control", "--resume", file)
    assert code == 4
    assert "cannot be resumed: its options is {'control': False}" in printed
    code, printed = gpu_check("--dry", "--budget-s", "1700", "--resume", file)
    assert code == 0, printed
    done = read_result(file, "gpu-check")
    assert done["seed"] == stopped["seed"]
    assert f"--hypothesis-seed={done['seed']}" in printed
    assert set(done["not_run"]) == {"sanitizer/memcheck", "sanitizer/racecheck"}
    cases = {case["name"]: case for case in done["cases"]}
    assert list(cases) == [name for name in stopped["not_run"] if name in cases]
    assert len(cases["policies-and-modes"]["errors"]) == 11
    assert "one prefix" in cases["graph/fused/in_kernel"]["errors"]


@pytest.mark.extended
@pytest.mark.timeout(1800)
def test_control_a_lost_work_item_is_seen_by_every_check(tmp_path: Path) -> None:
    file = tmp_path / "control.json"
    code, printed = gpu_check("--dry", "--control", "--budget-s", "1700", "--out", file)
    assert code == 0, printed
    data = json.loads(file.read_text())
    assert data["options"] == {"control": True}
    assert len(data["cases"]) == len(variants(dry=True)) + 4
    assert set(data["not_run"]) == {"every_mode_once", "sanitizer/memcheck", "sanitizer/racecheck"}
