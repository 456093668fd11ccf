"""The GPU entry points on the CPU: dry runs, their files, budget and resumption, and a control."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu.targets import default_way, evaluate
from benchmarks.gpu.workloads import PAT_TREES, cells, dry_cells
from prefix_kernels.plan import verify_plan, verify_slots
from sglang_prefix.bench.report import build_page, find_sources
from sglang_prefix.bench.workloads.trees import TreeBatch, random_tree
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing.planner import PackPlanner
from tests import forests
from tests.attention import SPLITS

ROOT = Path(__file__).parents[1]
BENCH, CHECK = "benchmarks.gpu.bench", "benchmarks.gpu.check"


def start(module: str, *options: str) -> subprocess.Popen[str]:
    """As `make` starts it on a host where this package is not installed."""
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "patches"))
    return subprocess.Popen(
        [sys.executable, "-m", module, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=500)
    return process.returncode, output


@dataclass
class DryRuns:
    """What both dry runs printed and wrote; the check was stopped once before it began."""

    bench: dict[str, Any]
    bench_output: str
    stopped: dict[str, Any]
    stopped_output: str
    check: dict[str, Any]
    check_output: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> DryRuns:
    folder = tmp_path_factory.mktemp("gpu")
    bench_file, check_file = folder / "bench.json", folder / "check.json"
    bench = start(BENCH, "--dry", "--out", str(bench_file))
    code, stopped_output = finish(
        start(CHECK, "--dry", "--budget-s", "0", "--out", str(check_file))
    )
    assert code == 0, stopped_output
    stopped = json.loads(check_file.read_text())
    check = start(CHECK, "--dry", "--resume", str(check_file))
    outputs = []
    for process in (check, bench):
        code, output = finish(process)
        assert code == 0, output
        outputs.append(output)
    return DryRuns(
        json.loads(bench_file.read_text()),
        outputs[1],
        stopped,
        stopped_output,
        json.loads(check_file.read_text()),
        outputs[0],
    )


def assert_schema(report: dict[str, Any], kind: str) -> None:
    assert report["schema"] == 1
    assert report["kind"] == kind
    assert report["dry"] is True
    assert list(report["cells"]) == report["order"]
    assert {"date", "commit", "seed", "device", "runs"} <= set(report)
    for run in report["runs"]:
        assert {"torch", "triton", "python", "clocks_before"} <= set(run["environment"])
    for name, cell in report["cells"].items():
        assert cell["status"] in ("done", "passed", "n/a", "not run"), (name, cell)


@pytest.mark.slow
def test_a_budget_of_nothing_runs_nothing_and_says_so(runs: DryRuns) -> None:
    assert_schema(runs.stopped, "gpu-check")
    assert {cell["status"] for cell in runs.stopped["cells"].values()} == {"not run"}
    assert "not run: policies-and-ways, " in runs.stopped_output


@pytest.mark.slow
def test_the_dry_check_resumes_and_passes(runs: DryRuns) -> None:
    assert_schema(runs.check, "gpu-check")
    assert runs.check["seed"] == runs.stopped["seed"]
    assert runs.check["order"] == runs.stopped["order"]
    assert [len(run["cells"]) for run in runs.check["runs"]] == [0, len(runs.check["order"])]
    statuses = {name: cell["status"] for name, cell in runs.check["cells"].items()}
    assert "not run" not in statuses.values()
    assert {n for n, s in statuses.items() if s == "n/a"} == {
        "sanitizer/memcheck",
        "sanitizer/racecheck",
    }
    assert len(runs.check["cells"]["policies-and-ways"]["errors"]) == 7
    assert "one prefix" in runs.check["cells"]["graph/fused/in_kernel"]["errors"]
    assert f"seed {runs.check['seed']}" in runs.check_output


@pytest.mark.slow
def test_the_dry_bench_has_every_field(runs: DryRuns) -> None:
    assert_schema(runs.bench, "gpu-bench")
    assert runs.bench["order"] == [cell.name for cell in dry_cells()]
    assert set(runs.bench["runs"][0]["baselines"]) == {
        "sglang-triton",
        "flashinfer",
        "flashinfer-cascade",
        "fa3",
        "fasttree",
    }
    for name, cell in runs.bench["cells"].items():
        assert cell["status"] == "done", name
        if "chains" in cell:
            assert len(cell["chains"]) == 16
            continue
        ours = {n: c for n, c in cell["candidates"].items() if c.get("kind") == "ours"}
        assert len(ours) >= 7
        for candidate in ours.values():
            assert candidate["status"] == "done"
            assert candidate["total_us"] >= candidate["total_kept_us"] >= candidate["kernel_us"] > 0
            assert candidate["over_floor"] > 0
            assert candidate["kv_read_ratio"] > 0
        for candidate in cell["candidates"].values():
            assert candidate["status"] == "done" or candidate["reason"]
    assert "DRY RUN, no measurement" in runs.bench_output
    for name, target in runs.bench["targets"].items():
        assert name == "ours" or target["status"] in ("met", "missed", "not measured")


@pytest.mark.slow
def test_the_report_shows_all_cells_and_calls_nothing_a_gain(runs: DryRuns, tmp_path: Path) -> None:
    for number, result in enumerate((runs.bench, runs.check, runs.stopped)):
        (tmp_path / f"{number}.json").write_text(json.dumps(result))
    sources, left_out = find_sources([tmp_path])
    page = build_page(sources, title="dry")
    assert not left_out
    assert page.count("the times mean nothing") >= 3
    assert "Nothing was compared" in page
    for cell in (*runs.bench["cells"], *runs.check["cells"]):
        assert f">{cell}</th>" in page


@pytest.mark.slow
def test_control_a_lost_work_item_fails_the_check_by_name(tmp_path: Path) -> None:
    out = tmp_path / "control.json"
    only = "^(padding-rows|graph/streams/launch|same-bits)$"
    code, output = finish(start(CHECK, "--dry", "--control", "--only", only, "--out", str(out)))
    assert code == 1
    assert "FAILED: same-bits, padding-rows, graph/streams/launch" in output
    report = json.loads(out.read_text())
    assert report["control"] is True
    assert {cell["status"] for cell in report["cells"].values()} == {"failed", "not run"}


@pytest.mark.slow
def test_nothing_but_torch_triton_and_numpy_is_needed() -> None:
    program = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"rich", "typer", "packaging", "sglang", "pytest", "hypothesis"}:
            raise ImportError(f"{name} is not on a bare host")
sys.meta_path.insert(0, Absent())
sys.argv = ["", "--list"]
for name in ("bench", "check", "tune", "serve", "sanitize"):
    module = f"benchmarks.gpu.{name}"
    try:
        runpy.run_module(module, run_name="__main__" if name != "sanitize" else module)
    except SystemExit as stop:
        assert not stop.code, stop.code
"""
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "patches"))
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(cells()[0].name)
    assert "policies-and-ways" in run.stdout
    assert "dim128/bf16/rows16" in run.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "cannot be resumed: its kind is 'gpu-bench', here it is 'gpu-check'"),
        ([], "no GPU here; legal without one: --dry"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path: Path, options: list[str], message: str) -> None:
    if not options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"schema": 1, "kind": "gpu-bench", "dry": True}))
    given = ["--dry", *options, str(old)] if options else []
    code, output = finish(start(CHECK, *given))
    assert code == 1
    assert message in output


def test_the_order_is_fixed_and_the_most_valuable_come_first() -> None:
    names = [cell.name for cell in cells()]
    assert len(set(names)) == len(names)
    groups = [cell.group for cell in cells()][:23]
    assert groups == ["rollouts", *["unrelated"] * 2, "fixed", "chain", *["trees"] * 18]
    assert all("/32:8/page1" in name for name in names[:23] if not name.startswith("fixed"))
    trees = {(c.heads, c.page_size) for c in cells() if c.group == "trees"}
    assert len(trees) == 4 * 2
    assert sum(c.group == "trees" and c.page_size == 1 for c in cells()) == 18 * 4
    assert sum(c.group == "chunk" and c.page_size == 1 for c in cells()) == 9
    pages = [cell.page_size for cell in cells()]
    assert pages == sorted(pages)


def test_the_published_trees_share_what_they_should() -> None:
    assert set(PAT_TREES) == set(forests.PAT_TREES)
    for cell in cells()[:23]:
        text = cell.name.split("/")[1][3:]
        if text in PAT_TREES:
            batch = TreeBatch.lay_out(cell.make_tree(), page_size=16)
            ratio = batch.seq_lens.sum() / batch.forest().unique_tokens
            assert ratio == pytest.approx(forests.PAT_TREES[text], abs=0.006)


@pytest.mark.parametrize("page_size", [1, 16])
def test_paths_and_rows_of_a_tree_say_the_same(page_size: int) -> None:
    for seed in range(20):
        tree = random_tree(seed, num_requests=20, max_tokens=120, page_size=page_size)
        batch = TreeBatch.lay_out(tree, page_size=page_size, growth=3, seed=seed)
        forest = batch.forest()
        found = PrefixForest.from_rows(batch.table, batch.seq_lens, page_size=page_size)
        assert forest.sharing() == found.sharing()
        shape = cells()[0].heads
        plan = PackPlanner(shape.shape(torch.bfloat16, torch.bfloat16), SPLITS, policy="node").plan(
            forest
        )
        verify_plan(plan)
        verify_slots(plan, batch.table)
        used = np.concatenate([batch.table[b, :n] for b, n in enumerate(batch.seq_lens)])
        assert not np.intersect1d(used, batch.growth_slots).size
        assert used.min() >= page_size
        assert used.max() < batch.num_slots


# Targets, on made-up times.


def cell(
    group: str, candidates: Mapping[str, float], *, kv: int = 8, batch: int = 64, mib: int = 300
) -> dict[str, Any]:
    """A measured cell; kernel times in us, a plan costs 32 us of the host."""
    kinds = {"sglang-triton": "stock", "fa3": "stock", "fasttree": "other"}
    return {
        "status": "done",
        "shape": {
            "group": group,
            "page_size": 1,
            "kv": kv,
            "batch": batch,
            "kv_bytes_unique": mib << 20,
        },
        "floor": {"bytes": 2 * mib << 20, "bytes_us": 20.0},
        "candidates": {
            name: {
                "status": "done",
                "kind": kinds.get(name, "ours"),
                "policy": name.split("/")[0],
                "fixed": not name.endswith("fitted"),
                "kernel_us": us,
                "total_us": us + 1,
                "total_kept_us": us,
            }
            for name, us in candidates.items()
        }
        | {"flashinfer": {"status": "n/a", "reason": "not here"}},
    }


def test_nothing_measured_means_no_target_met() -> None:
    empty = evaluate({"a": {"status": "not run"}})
    assert empty["ours"] is None
    assert {t["status"] for name, t in empty.items() if name != "ours"} == {"not measured"}


def test_targets_are_read_off_the_cells() -> None:
    measured = {
        "a": cell("trees", {"pat/s/l": 10, "pat/f/a": 9, "pat/s/l/fitted": 1, "fa3": 40}),
        "b": cell("trees", {"pat/s/l": 10, "pat/f/a": 30, "fa3": 50, "sglang-triton": 40}),
        "c": cell("unrelated", {"pat/s/l": 13, "pat/f/a": 30, "fa3": 12, "fasttree": 14}),
        "d": cell("fixed", {"pat/s/l": 8, "pat/f/a": 9, "fa3": 7}, kv=1, batch=8, mib=1),
    }
    assert default_way(measured) == "pat/s/l"
    targets = evaluate(measured)
    assert targets["ours"] == "pat/s/l"
    # 300 MiB at the bandwidth of the run take 10 us.
    assert targets["read bandwidth"]["status"] == "missed"
    assert targets["read bandwidth"]["value"] == pytest.approx(10 / 13)
    assert set(targets["read bandwidth"]["missed"]) == {"c"}
    assert targets["sharing trees"]["value"] == pytest.approx(41 / 11)
    assert targets["sharing trees"]["status"] == "met"
    assert targets["sharing trees"]["cells"] == 2
    assert targets["sharing trees"]["expected_cells"] == 72
    assert targets["cascade"]["status"] == "not measured"
    assert targets["fasttree"]["status"] == "met"
    assert targets["nothing shared"]["status"] == "missed"
    assert targets["nothing shared"]["missed"] == {"c": pytest.approx(13 / 14)}
    assert targets["fixed cost"]["status"] == "met"
    assert targets["fixed cost"]["value"] == pytest.approx(1)
