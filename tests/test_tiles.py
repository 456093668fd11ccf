"""Launches and tiles: what is chosen, the table of measured tiles, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_kernels import tiles
from prefix_kernels.compile_report import HEAD_DIMS, kernel_variants, legal_dtypes
from prefix_kernels.launches import (
    FUSED_ROWS,
    GRAPH_ROWS,
    LAUNCH_MODES,
    MERGE_MODES,
    SMALL_BATCH,
    PlanFacts,
    choose_launches,
    choose_modes,
    widest_block,
)
from prefix_kernels.tiles import (
    ROW_CLASSES,
    TABLE,
    TileConfig,
    TileShape,
    candidate_tiles,
    formula_tile,
    load_tuned_tiles,
    measured_device,
    next_power_of_two,
    row_classes,
)

ROOT = Path(__file__).parents[1]
DEVICE = "NVIDIA H200"
SHAPE = TileShape(128, 128, 2, 2, device=DEVICE)
# Compiles without spilling for sm_90, as `test_a_wide_tile_compiles` says.
WIDE = TileConfig(16, 128, 4, 2, 168, carries_item=True)
ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8_e4m3": 1, "fp8_e5m2": 1}

dims = st.sampled_from([16, 40, *HEAD_DIMS])
shapes = st.builds(
    TileShape, dims, dims, st.sampled_from([2, 4]), st.sampled_from([1, 2, 4]), st.booleans()
)
lengths = st.integers(0, 1 << 20)


def tile_for(rows: int, length: int | None, shape: TileShape) -> TileConfig:
    """The tile that holds ``rows``."""
    (launch,) = choose_launches(PlanFacts((rows,), length), shape, "streams")
    return launch.tile


@given(rows=st.integers(1, 4096), length=lengths, shape=shapes)
def test_a_tile_fits_its_packs_and_the_device(rows: int, length: int, shape: TileShape) -> None:
    tile = tile_for(rows, length, shape)
    assert tile.block_m in row_classes(shape)
    assert tile.block_m >= min(rows, row_classes(shape)[-1])
    assert tile.block_m == ROW_CLASSES[0] or tile.block_m < 2 * rows
    assert tile.block_n == next_power_of_two(tile.block_n) >= 16
    assert tile.block_n == 16 or length > 16
    assert tile == tile_for(rows, 17 if length > 16 else 1, shape)
    assert 2 <= tile.num_stages <= 4
    assert 32 * tile.num_warps * tile.max_registers * tile.programs_per_sm <= 1 << 16
    head_dims = next_power_of_two(shape.head_dim) + next_power_of_two(shape.v_head_dim)
    assert (tile.num_stages - 1) * tile.block_n * head_dims * shape.kv_itemsize <= 64 * 1024


@given(rows=st.lists(st.integers(1, 600), min_size=1, max_size=6), length=lengths, shape=shapes)
def test_streams_have_a_launch_for_each_row_class_in_use(
    rows: list[int], length: int, shape: TileShape
) -> None:
    launches = choose_launches(PlanFacts(tuple(rows), length), shape, "streams")
    found = [launch.tile.block_m for launch in launches]
    assert found == sorted({tile_for(number, length, shape).block_m for number in rows})
    assert [launch.work_list for launch in launches] == [*range(len(launches))]
    assert found[-1] <= widest_block("streams", shape) == widest_block("auto", shape)


@given(batch_size=st.integers(1, 600), group_size=st.integers(1, 130), shape=shapes)
def test_a_graph_has_tiles_for_every_plan_of_its_batch(
    batch_size: int, group_size: int, shape: TileShape
) -> None:
    """Tails in the narrowest, all requests in one block where a tile holds them, and 64 between."""
    most = batch_size * group_size
    classes = {
        graph_rows: [
            launch.tile.block_m
            for launch in choose_launches(
                PlanFacts.of_every_plan(batch_size, group_size, graph_rows), shape, "streams"
            )
        ]
        for graph_rows in (GRAPH_ROWS, FUSED_ROWS[:1])
    }
    legal = row_classes(shape)
    widest = min((rows for rows in legal if rows >= most), default=legal[-1])
    assert classes[FUSED_ROWS[:1]] == sorted({16, widest})
    middle = {64} if most > 64 and 64 in legal else set()
    assert classes[GRAPH_ROWS] == sorted({16, widest} | middle)
    assert PlanFacts.of_every_plan(batch_size, group_size).kv_length is None


def test_classes_of_a_graph() -> None:
    def classes(batch_size: int, *graph_rows: tuple[int, ...]) -> list[int]:
        facts = PlanFacts.of_every_plan(batch_size, 4, *graph_rows)
        return [launch.tile.block_m for launch in choose_launches(facts, SHAPE, "streams")]

    assert [classes(size) for size in (4, 5, 8, 9, 16)] == [[16], *[[16, 32]] * 2, *[[16, 64]] * 2]
    assert classes(17) == classes(256) == [16, 64, 128]
    assert classes(17, (16,)) == [16, 128]
    assert classes(17, ()) == [128]


@pytest.mark.parametrize(
    ("batch_size", "group_size", "is_small"),
    [
        *((1, 4, True), (16, 4, True), (17, 4, False), (8, 8, True), (9, 8, False)),
        *((SMALL_BATCH, 1, True), (SMALL_BATCH + 1, 1, False), (1, 64, True), (1, 65, False)),
    ],
)
def test_small_batches_are_one_launch(batch_size: int, group_size: int, is_small: bool) -> None:
    auto = ("fused", "in_kernel") if is_small else ("streams", "launch")
    assert choose_modes(batch_size, group_size) == auto
    for mode, merge in product(LAUNCH_MODES, MERGE_MODES):  # what is asked for wins
        assert choose_modes(batch_size, group_size, mode, merge) == (mode, merge)
        assert choose_modes(batch_size, group_size, mode) == (mode, auto[1])
        assert choose_modes(batch_size, group_size, merge=merge) == (auto[0], merge)
    if is_small:  # every pack has a tile of its own
        facts = PlanFacts.of_every_plan(batch_size, group_size)
        (launch,) = choose_launches(facts, SHAPE, auto[0])
        assert launch.tiles[-1].block_m >= batch_size * group_size


@given(rows=st.integers(1, 600), length=lengths, shape=shapes)
def test_fused_tiles_are_one_kernel(rows: int, length: int, shape: TileShape) -> None:
    (launch,) = choose_launches(PlanFacts((rows,), length), shape, "fused")
    alone = tile_for(16, length, shape), tile_for(64, length, shape)
    if rows <= 16:
        assert launch.tiles == alone[:1]
        return
    narrow, wide = launch.tiles
    assert replace(narrow, block_m=64, block_n=wide.block_n) == wide
    assert [tile.block_n for tile in alone] == [narrow.block_n, wide.block_n]
    assert wide.num_stages == min(tile.num_stages for tile in alone)


def test_wide_accumulators_have_fewer_rows_and_programs_share_an_sm() -> None:
    shape = TileShape(128, 128, 2, 2)
    assert row_classes(shape) == row_classes(TileShape(256, 128, 2, 2)) == ROW_CLASSES
    for dim in (192, 256):
        assert tile_for(1000, 1000, TileShape(dim, dim, 2, 2)).block_m == 64
    assert [tile_for(rows, None, shape).programs_per_sm for rows in ROW_CLASSES] == [3, 2, 2, 1]


def test_a_launch_has_no_more_programs_than_work_or_room() -> None:
    (launch,) = choose_launches(PlanFacts((16,), 1000), SHAPE, "streams")
    assert launch.num_programs(SHAPE, 132, 5) == 5
    assert launch.num_programs(SHAPE, 132, 0) == 1
    assert launch.num_programs(SHAPE, 132, 1000) == launch.num_programs(SHAPE, 132, None) == 396


# The table of measured tiles.


def row(tile: TileConfig = WIDE, **changes: Any) -> dict[str, Any]:
    shape = {"head_dim": 128, "v_head_dim": 128, "q_itemsize": 2, "kv_itemsize": 2}
    return {**shape, **asdict(tile), **changes}


def table(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    entry = {"arch": "sm_90", "result_file": "docs/results/a.json", "tiles": list(rows)}
    return {DEVICE: entry | changes}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with one tile."""
    monkeypatch.setattr(tiles, "TABLE", write(tmp_path / "table.json", table(row())))


def test_every_entry_that_ships_names_its_measurement_and_is_in_the_compile_report() -> None:
    for name, device in load_tuned_tiles(TABLE).items():
        report = json.loads((ROOT / device.result_file).read_text())
        assert (report["kind"], report["dry"]) == ("bench-tune", False)
        assert name in json.dumps(report["environment"])
        listed = {
            (v.head_dim, ITEMSIZES[v.dtype], ITEMSIZES[v.kv_dtype], v.tile)
            for v in kernel_variants(device.arch, dtypes=legal_dtypes(device.arch))
        }
        for (shape, _), tile in device.tiles.items():
            assert shape.head_dim == shape.v_head_dim
            assert (shape.head_dim, shape.q_itemsize, shape.kv_itemsize, tile) in listed


def test_the_table_has_the_first_word_on_its_device(tuned: None) -> None:
    assert tile_for(9, 1000, SHAPE) == tile_for(16, 17, SHAPE) == WIDE
    assert tile_for(4, 16, SHAPE) == replace(WIDE, block_n=16)
    for rows, shape in (
        (17, SHAPE),
        (16, replace(SHAPE, device=None)),
        (16, replace(SHAPE, device="NVIDIA H100 80GB HBM3")),
        (16, replace(SHAPE, kv_itemsize=1)),
        (16, replace(SHAPE, head_dim=64)),
    ):
        assert tile_for(rows, 1000, shape) == formula_tile(16 if rows < 17 else 32, shape)
    # Another board and a slice of its chip.
    for device in ("NVIDIA H200 NVL", "NVIDIA H200 MIG 3g.71gb"):
        assert measured_device(device) == DEVICE
        assert tile_for(9, 1000, replace(SHAPE, device=device)) == WIDE
    facts = PlanFacts((64,), 1000)  # a fused pair was not measured
    elsewhere = replace(SHAPE, device=None)
    assert choose_launches(facts, SHAPE, "fused") == choose_launches(facts, elsewhere, "fused")


def test_devices_of_one_chip_share_their_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boards = ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3"]
    boards += ["NVIDIA GeForce RTX 4090", "NVIDIA L4"]
    content = {name: table(row())[DEVICE] for name in boards}
    monkeypatch.setattr(tiles, "TABLE", write(tmp_path / "table.json", content))
    for device, found in {
        **{name: name for name in boards},
        "NVIDIA A100 80GB PCIe": boards[0],
        "NVIDIA A100-PCIE-40GB": boards[0],
        "NVIDIA H100 NVL": boards[1],
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": boards[1],
        **dict.fromkeys(("NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20", "NVIDIA H1"), None),
        **dict.fromkeys(("NVIDIA GeForce RTX 3090", "NVIDIA L40S", "AMD Instinct MI300X"), None),
    }.items():
        assert measured_device(device) == found


@pytest.mark.parametrize(
    ("arch", "dtype", "count"),
    [("sm_90", "bf16", 2), ("sm_90", "fp8_e4m3", 0), ("sm_100", "bf16", 0)],
)
def test_the_compile_report_lists_measured_tiles(
    arch: str, dtype: str, count: int, tuned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefix_kernels.compile_report.TABLE", tiles.TABLE)
    variants = kernel_variants(arch, head_dims=[128], dtypes=[("bf16", dtype)])
    assert sum(variant.tile == WIDE for variant in variants) == count


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([], "AttributeError"),
        ({DEVICE: {"tiles": []}}, "KeyError('arch')"),
        ({DEVICE: []}, "TypeError"),
        (table(arch="sm_12"), "arch of NVIDIA H200 is 'sm_12'; legal: sm_80, sm_90, sm_100"),
        (table({"block_m": 16}), "a tile of NVIDIA H200 has the fields block_m"),
        (table(row(num_warps=4.0)), "a value that is no positive integer"),
        (table(row(replace(WIDE, num_stages=0))), "a value that is no positive integer"),
        (table(row(replace(WIDE, num_stages=4))), "is not among its candidate_tiles"),
        (table(row(replace(WIDE, block_m=48))), "is not among its candidate_tiles"),
        (table(row(), row()), "two tiles of 16 rows"),
        (None, "JSONDecode"),
    ],
)
def test_a_table_that_is_none(content: object, complaint: str, tmp_path: Path) -> None:
    path = write(tmp_path / "table.json", content)
    if content is None:
        path.write_text("{")
    with pytest.raises(ValueError, match=r"table.json is no table of tuned tiles: ") as refusal:
        load_tuned_tiles(path)
    assert complaint in str(refusal.value)


@pytest.mark.parametrize("kv_itemsize", [1, 2])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_candidate_fills_an_sm(dim: int, kv_itemsize: int) -> None:
    shape = TileShape(dim, dim, 2, kv_itemsize)
    widths = set()
    for rows in row_classes(shape):
        candidates = list(candidate_tiles(rows, shape))
        assert len(set(candidates)) == len(candidates)
        for tile in candidates:
            assert tile.block_m == rows
            assert 1 <= tile.programs_per_sm <= 4
            widths.add(tile.block_n)
    assert widths == {32, 64, 128}
