"""The measurement of tiles on the CPU: a dry run, and what a result file makes of the table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from prefix_kernels.tiles import (
    TileConfig,
    TileShape,
    candidate_tiles,
    formula_tile,
    load_tuned_tiles,
    row_classes,
)
from sglang_prefix.bench.results import read_result, write_result
from sglang_prefix.bench.tune import TileWork, pack_shapes, write_table
from sglang_prefix.bench.workloads.inputs import MismatchError
from sglang_prefix.cli.main import app
from tests.report_files import MADE_UP


def tune(*options: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", "tune", *map(str, options)])


@pytest.mark.extended
@pytest.mark.slow
def test_a_dry_run_from_budget_to_table(tmp_path: Path) -> None:
    table, file = tmp_path / "table.json", tmp_path / "tune.json"
    stopped = tune("--dry", "--budget-s", "0", "--out", tmp_path)
    assert stopped.exit_code == 0, stopped.output
    names = [pack.name for pack in pack_shapes(dry=True)]
    assert list(read_result(file)["not_run"]) == names
    resumed = tune("--dry", "--resume", "--budget-s", "1700", "--out", tmp_path)
    assert resumed.exit_code == 0, resumed.output
    data = read_result(file, "bench-tune")
    assert [case["name"] for case in data["cases"]] == names
    for case in data["cases"]:
        assert case["formula"] in case["tiles"]
        assert len(case["tiles"]) > 1
        assert case["failed"] == case["absent"] == {}
        assert all(0 <= found["error"] < 1e-2 for found in case["tiles"].values())
    assert "the times mean nothing" in resumed.stdout

    refused = tune("--write-table", file)
    assert refused.exit_code == 2
    assert "is a dry run's: name another --table" in refused.stderr
    written = tune("--write-table", file, "--table", table)
    assert written.exit_code == 0
    assert "Next: sglang-prefix kernels --arch sm_90" in written.stdout
    entry = json.loads(table.read_text())["cpu"]
    assert entry["result_file"] == str(file)
    for row in entry["tiles"]:
        assert {"head_dim", "v_head_dim", "q_itemsize", "kv_itemsize", "block_m"} <= set(row)
        assert row["head_dim"] == row["v_head_dim"] == 16
    load_tuned_tiles(table)


def test_control_a_tile_with_another_result_is_refused() -> None:
    work = TileWork(pack_shapes(dry=True)[1], torch.device("cpu"), 0, dry=True)
    tile = work.tiles[1]
    assert work.check(tile) < 1e-2
    work._launches[work._place].keywords["sm_scale"] *= 2
    with pytest.raises(MismatchError, match=r"off by .*, more than"):
        work.check(tile)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no GPU here; legal without one: --dry"),
        (["--dry"], "--out is missing; legal: a folder for the result file"),
        (["--dry", "--resume"], "--out is missing"),
        (["--write-table", "/nowhere.json"], "'--write-table': /nowhere.json: No such file"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str) -> None:
    done = tune(*options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


SHAPE = TileShape(128, 128, 2, 2, device="NVIDIA H200")
FORMULA = formula_tile(16, SHAPE)
OTHERS = [tile for tile in candidate_tiles(16, SHAPE) if tile != FORMULA][:2]


def written(
    tmp_path: Path, times: dict[TileConfig, float], device: str = "NVIDIA H200", **changes: Any
) -> Path:
    """The table after a dry result whose first tile is the formula's; times are in us."""
    tiles = {
        str(number): {"tile": asdict(tile), "kernel_us": us}
        for number, (tile, us) in enumerate(times.items())
    }
    shape = {"head_dim": 128, "v_head_dim": 128, "q_itemsize": 2, "kv_itemsize": 2}
    made_up = MADE_UP["bench-tune"]()
    case = made_up["cases"][0] | {"shape": shape, "formula": "0", "tiles": tiles}
    given = {"dry": True, "device_name": device, "arch": "sm_90", "cases": [case]}
    file, table = tmp_path / "tune.json", tmp_path / "table.json"
    write_result(file, made_up | given | changes)
    write_table(file, table)
    return table


@pytest.mark.parametrize(
    ("us", "chosen"),
    [((100, 98.5, 99), None), ((100, 110, 120), None), ((100, 97, 90), 1), ((100, 97, 99), 0)],
)
def test_the_fastest_is_taken_where_it_gains_enough(
    us: tuple[float, ...], chosen: int | None, tmp_path: Path
) -> None:
    table = written(tmp_path, dict(zip((FORMULA, *OTHERS), us, strict=True)))
    device = load_tuned_tiles(table)["NVIDIA H200"]
    assert device.tiles == ({} if chosen is None else {(SHAPE, 16): OTHERS[chosen]})
    assert device.arch == "sm_90"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kind": "gpu-check"}, "kind is 'gpu-check'; legal: 'bench-tune'"),
        ({"dry": False}, "must stand in the repository"),
        ({"cases": []}, "has no case that was measured"),
        ({"arch": "sm_89"}, "arch of NVIDIA H200 is 'sm_89'; legal: sm_80, sm_90"),
    ],
)
def test_what_no_table_is_made_of(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        written(tmp_path, {FORMULA: 1.0}, **changes)


def test_other_devices_stay_in_the_table_and_bad_tiles_leave_it_alone(tmp_path: Path) -> None:
    times = {FORMULA: 2.0, OTHERS[0]: 1.0}
    written(tmp_path, times)
    table = written(tmp_path, times, "NVIDIA H100 80GB HBM3")
    before = table.read_text()
    assert list(json.loads(before)) == ["NVIDIA H200", "NVIDIA H100 80GB HBM3"]
    with pytest.raises(ValueError, match="is not among its candidate_tiles"):
        written(tmp_path, {FORMULA: 2.0, TileConfig(16, 64, 4, 9): 1.0})
    assert table.read_text() == before


def test_tiles_of_shapes_that_were_not_measured_again_stay(tmp_path: Path) -> None:
    table = written(tmp_path, {FORMULA: 2.0, OTHERS[0]: 1.0})
    content = json.loads(table.read_text())
    wide = next(iter(candidate_tiles(128, SHAPE)))
    (row,) = content["NVIDIA H200"]["tiles"]
    content["NVIDIA H200"]["tiles"].append(row | asdict(wide))
    table.write_text(json.dumps(content))
    written(tmp_path, {FORMULA: 2.0, OTHERS[1]: 1.0})
    found = load_tuned_tiles(table)["NVIDIA H200"].tiles
    assert found == {(SHAPE, 16): OTHERS[1], (SHAPE, 128): wide}
    written(tmp_path, {FORMULA: 1.0, OTHERS[1]: 1.0})
    assert load_tuned_tiles(table)["NVIDIA H200"].tiles == {(SHAPE, 128): wide}


def test_every_pack_shape_is_of_a_row_class_of_its_own() -> None:
    packs = pack_shapes()
    assert len({pack.name for pack in packs}) == len(packs) == 16
    for pack in packs:
        assert pack.rows in row_classes(TileShape(pack.head_dim, pack.head_dim, 2, 1))
