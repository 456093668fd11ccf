"""The measurement of tiles on the CPU: a dry run, and what a result file makes of the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import tune
from benchmarks.gpu.inputs import MismatchError
from benchmarks.gpu.tune_cells import TuneWork, cells, dry_cells
from prefix_kernels.tiles import (
    TABLE,
    TileConfig,
    TileShape,
    candidate_tiles,
    formula_tile,
    load_tuned_tiles,
    row_classes,
)

ROOT = Path(__file__).parents[1]


def start(*options: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "patches"))
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.tune", *map(str, options)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_dry_run_from_budget_to_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result, table = tmp_path / "tune.json", tmp_path / "table.json"
    stopped = start("--dry", "--budget-s", "0", "--out", result)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    resumed = start("--dry", "--resume", result)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    report = json.loads(result.read_text())
    assert report["order"] == [cell.name for cell in dry_cells()]
    assert [len(run["cells"]) for run in report["runs"]] == [0, len(dry_cells())]
    for cell in report["cells"].values():
        assert cell["status"] == "done"
        assert cell["formula"] in cell["candidates"]
        assert len(cell["candidates"]) > 1
        for candidate in cell["candidates"].values():
            assert candidate["status"] == "done"
            assert candidate["kernel_us"] > 0
            assert candidate["bytes_per_s"] > 0
            assert 0 <= candidate["error"] < 1e-2
    assert "DRY RUN, no measurement" in resumed.stdout

    with pytest.raises(SystemExit, match="is a dry run's: name another --table"):
        tune.write_table(result, TABLE)
    monkeypatch.setattr(sys, "argv", ["", "--write-table", str(result), "--table", str(table)])
    assert tune.main() == 0
    assert "Next: sglang-prefix kernels --arch sm_90" in capsys.readouterr().out
    entry = json.loads(table.read_text())["cpu"]
    assert entry["result_file"] == str(result)
    for row in entry["tiles"]:
        assert {"head_dim", "v_head_dim", "q_itemsize", "kv_itemsize", "block_m"} <= set(row)
        assert row["head_dim"] == row["v_head_dim"] == 16
    load_tuned_tiles(table)


@pytest.mark.slow
def test_control_a_tile_with_another_result_is_refused() -> None:
    work = TuneWork(dry_cells()[1], torch.device("cpu"), 0, dry=True)
    (tile, *_) = work.candidates
    assert work.check(tile) < 1e-2
    work._launches[work._place].arguments["sm_scale"] *= 2
    with pytest.raises(MismatchError, match="from the formula's tile, more than"):
        work.check(tile)


def result_of(times: dict[TileConfig, float], **changes: Any) -> dict[str, Any]:
    """A result file with one cell; the first tile is the formula's."""
    shape = {"head_dim": 128, "v_head_dim": 128, "q_itemsize": 2, "kv_itemsize": 2}
    return {
        "kind": "gpu-tune",
        "dry": True,
        "device_name": "NVIDIA H200",
        "arch": "sm_90",
        "cells": {
            "left": {"status": "not run"},
            "measured": {
                "status": "done",
                "shape": shape,
                "formula": "0",
                "candidates": {
                    str(i): {
                        "status": "done",
                        "kernel_us": us,
                        "tile": {name: getattr(tile, name) for name in TileConfig.__slots__},
                    }
                    for i, (tile, us) in enumerate(times.items())
                }
                | {"spilling": {"status": "n/a"}},
            },
        },
        **changes,
    }


def written(tmp_path: Path, result: dict[str, Any]) -> Path:
    file, table = tmp_path / "tune.json", tmp_path / "table.json"
    file.write_text(json.dumps(result))
    tune.write_table(file, table)
    return table


SHAPE = TileShape(128, 128, 2, 2, device="NVIDIA H200")
FORMULA = formula_tile(16, SHAPE)
OTHERS = [tile for tile in candidate_tiles(16, SHAPE) if tile != FORMULA][:2]


@pytest.mark.parametrize(
    ("us", "chosen"),
    [((100, 98.5, 99), None), ((100, 110, 120), None), ((100, 97, 90), 1), ((100, 97, 99), 0)],
)
def test_the_fastest_is_taken_where_it_gains_enough(
    us: tuple[float, ...], chosen: int | None, tmp_path: Path
) -> None:
    times = dict(zip((FORMULA, *OTHERS), us, strict=True))
    device = load_tuned_tiles(written(tmp_path, result_of(times)))["NVIDIA H200"]
    expected = {} if chosen is None else {(SHAPE, 16): OTHERS[chosen]}
    assert device.tiles == expected
    assert device.arch == "sm_90"


def test_other_devices_stay_in_the_table(tmp_path: Path) -> None:
    times = {FORMULA: 2.0, OTHERS[0]: 1.0}
    written(tmp_path, result_of(times))
    table = written(tmp_path, result_of(times, device_name="NVIDIA H100 80GB HBM3"))
    assert list(json.loads(table.read_text())) == ["NVIDIA H200", "NVIDIA H100 80GB HBM3"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kind": "gpu-bench"}, "is of kind 'gpu-bench'; legal: 'gpu-tune'"),
        ({"dry": False}, "must stand in the repository"),
        ({"arch": "sm_89"}, "NVIDIA H200 is sm_89, which has no audit; legal: sm_80, sm_90"),
    ],
)
def test_what_no_table_is_made_of(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=complaint):
        written(tmp_path, result_of({FORMULA: 1.0}, **changes))


def test_a_tile_that_is_no_candidate_leaves_the_table_alone(tmp_path: Path) -> None:
    table = written(tmp_path, result_of({FORMULA: 2.0, OTHERS[0]: 1.0}))
    before = table.read_text()
    with pytest.raises(ValueError, match="is not among its candidate_tiles"):
        written(tmp_path, result_of({FORMULA: 2.0, TileConfig(16, 64, 4, 9): 1.0}))
    assert table.read_text() == before


def test_the_order_is_fixed_and_the_most_valuable_come_first() -> None:
    names = [cell.name for cell in cells()]
    assert len(set(names)) == len(names) == 16
    assert names[:2] == ["dim128/bf16/rows16", "dim128/bf16/rows128"]
    assert all(name.startswith("dim128/bf16") for name in names[:4])
    assert all("fp8" not in name for name in names[:8])
    for cell in cells():
        assert cell.rows in row_classes(TileShape(cell.head_dim, cell.head_dim, 2, 1))
