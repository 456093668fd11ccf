"""The table of measured tiles: what ships, what is chosen from it, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from prefix_kernels import tuned_tiles
from prefix_kernels.compile_report import compile_variants, find_problems
from prefix_kernels.kernel_variants import HEAD_DIMS, kernel_variants, legal_dtypes
from prefix_kernels.tiles import (
    TileConfig,
    TileShape,
    choose_fused_tiles,
    choose_tile,
    formula_tile,
    row_classes,
)
from prefix_kernels.tuned_tiles import TABLE, candidate_tiles, load_tuned_tiles

ROOT = Path(__file__).parents[1]
DEVICE = "NVIDIA H200"
SHAPE = TileShape(128, 128, 2, 2, device=DEVICE)
# Compiles without spilling for sm_90, as `test_a_wide_tile_compiles` says.
WIDE = TileConfig(16, 128, 4, 2, 168)
ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8_e4m3": 1, "fp8_e5m2": 1}


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
    monkeypatch.setattr(tuned_tiles, "TABLE", write(tmp_path / "table.json", table(row())))


class TestWhatShips:
    def test_every_entry_names_the_file_it_came_from(self) -> None:
        for name, device in load_tuned_tiles(TABLE).items():
            report = json.loads((ROOT / device.result_file).read_text())
            assert report["kind"] == "gpu-tune"
            assert report["device_name"] == name
            assert not report["dry"]

    def test_the_compile_report_covers_every_tile(self) -> None:
        """`sglang-prefix kernels` then shows whether it spills; TestCompiled does for sm_90."""
        for device in load_tuned_tiles(TABLE).values():
            listed = {
                (v.head_dim, ITEMSIZES[v.dtype], ITEMSIZES[v.kv_dtype], v.tile)
                for v in kernel_variants(device.arch, dtypes=legal_dtypes(device.arch))
            }
            for (shape, _), tile in device.tiles.items():
                assert shape.head_dim == shape.v_head_dim
                assert (shape.head_dim, shape.q_itemsize, shape.kv_itemsize, tile) in listed


@pytest.mark.usefixtures("tuned")
class TestChoice:
    def test_the_table_has_the_first_word_on_its_device(self) -> None:
        assert choose_tile(9, 1000, SHAPE) == WIDE
        assert choose_tile(16, 17, SHAPE) == WIDE
        assert choose_tile(4, 16, SHAPE) == replace(WIDE, block_n=16)

    @pytest.mark.parametrize(
        ("rows", "shape"),
        [
            (17, SHAPE),
            (16, replace(SHAPE, device=None)),
            (16, replace(SHAPE, device="NVIDIA H100 80GB HBM3")),
            (16, replace(SHAPE, kv_itemsize=1)),
            (16, replace(SHAPE, head_dim=64)),
        ],
    )
    def test_all_else_is_the_formula(self, rows: int, shape: TileShape) -> None:
        assert choose_tile(rows, 1000, shape) == formula_tile(16 if rows < 17 else 32, shape)

    def test_a_fused_pair_was_not_measured(self) -> None:
        assert choose_fused_tiles(1000, SHAPE) == choose_fused_tiles(
            1000, replace(SHAPE, device=None)
        )

    def test_the_compile_report_lists_it_for_its_architecture(self) -> None:
        for arch, dtype, count in (
            ("sm_90", "bf16", 2),
            ("sm_90", "fp8_e4m3", 0),
            ("sm_100", "bf16", 0),
        ):
            variants = kernel_variants(arch, head_dims=[128], dtypes=[("bf16", dtype)])
            assert sum(variant.tile == WIDE for variant in variants) == count


class TestRefusals:
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
        ],
    )
    def test_a_table_that_is_none(self, content: object, complaint: str, tmp_path: Path) -> None:
        path = write(tmp_path / "table.json", content)
        with pytest.raises(ValueError, match=r"table.json is no table of tuned tiles: ") as refusal:
            load_tuned_tiles(path)
        assert complaint in str(refusal.value)

    def test_a_file_that_is_no_json(self, tmp_path: Path) -> None:
        path = tmp_path / "table.json"
        path.write_text("{")
        with pytest.raises(ValueError, match=r"table.json is no table of tuned tiles: JSONDecode"):
            load_tuned_tiles(path)


class TestCandidates:
    @pytest.mark.parametrize("kv_itemsize", [1, 2])
    @pytest.mark.parametrize("dim", HEAD_DIMS)
    def test_every_candidate_fills_an_sm(self, dim: int, kv_itemsize: int) -> None:
        shape = TileShape(dim, dim, 2, kv_itemsize)
        widths = set()
        for rows in row_classes(shape):
            tiles = list(candidate_tiles(rows, shape))
            assert len(set(tiles)) == len(tiles)
            for tile in tiles:
                assert tile.block_m == rows
                assert 1 <= tile.programs_per_sm <= 4
                widths.add(tile.block_n)
        assert widths == {32, 64, 128}

    @pytest.mark.slow
    def test_a_wide_tile_compiles(self, tuned: None) -> None:
        """128 tokens wide, without spilling, where the formula stops at 64."""
        variants = [
            variant
            for variant in kernel_variants("sm_90", head_dims=[128], dtypes=[("bf16", "bf16")])
            if variant.tile == WIDE
        ]
        reports = list(compile_variants(variants, "sm_90", jobs=2))
        assert len(reports) == 2
        assert find_problems(reports) == []
        for report in reports:
            estimate = WIDE.shared_bytes(SHAPE)
            assert report.shared_bytes <= estimate <= report.shared_bytes + 8 * 1024
            assert report.programs_per_sm >= WIDE.resident_programs(SHAPE) == 3
