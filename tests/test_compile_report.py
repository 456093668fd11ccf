"""Tile choice, and what the compiler makes of the kernels for architectures that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from prefix_kernels import compile_report, plan_buffers, triton_executor
from prefix_kernels.compile_report import KernelReport, compile_variants, find_problems
from prefix_kernels.kernel_variants import ARCHS, HEAD_DIMS, KernelVariant, kernel_variants
from prefix_kernels.tiles import (
    ROW_CLASSES,
    TileConfig,
    TileShape,
    choose_fused_tiles,
    choose_tile,
    next_power_of_two,
    row_class,
    row_classes,
)
from prefix_kernels.triton_executor import LAUNCH_MODES, MERGE_MODES
from sglang_prefix.cli.main import app
from tests import plan_runs
from tests.attention import make_case
from tests.forests import Fork, build_batch
from tests.plan_runs import SPLITS

ANY_LENGTH = 1 << 30
JOBS = 2
DTYPE_NAMES = {
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}

shapes = st.builds(
    TileShape,
    st.sampled_from([16, 40, *HEAD_DIMS]),
    st.sampled_from([16, 40, *HEAD_DIMS]),
    st.sampled_from([2, 4]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
lengths = st.integers(0, 1 << 20)


class TestTiles:
    @given(rows=st.integers(1, 4096), length=lengths, shape=shapes)
    def test_a_tile_fits_its_packs_and_the_device(
        self, rows: int, length: int, shape: TileShape
    ) -> None:
        tile = choose_tile(rows, length, shape)
        assert tile.block_m in row_classes(shape)
        assert tile.block_m >= min(rows, row_classes(shape)[-1])
        assert tile.block_m == ROW_CLASSES[0] or tile.block_m < 2 * rows
        assert tile.block_n == next_power_of_two(tile.block_n) >= 16
        assert tile.block_n == 16 or length > 16
        assert tile == choose_tile(rows, 17 if length > 16 else 1, shape)
        assert 2 <= tile.num_stages <= 4
        assert 32 * tile.num_warps * tile.max_registers * tile.programs_per_sm <= 1 << 16
        dims = next_power_of_two(shape.head_dim) + next_power_of_two(shape.v_head_dim)
        kv_tile = tile.block_n * dims * shape.kv_itemsize
        assert (tile.num_stages - 1) * kv_tile <= 64 * 1024

    @given(length=lengths, shape=shapes)
    def test_fused_tiles_are_one_kernel(self, length: int, shape: TileShape) -> None:
        narrow, wide = choose_fused_tiles(length, shape)
        assert replace(narrow, block_m=64, block_n=wide.block_n) == wide
        alone = choose_tile(narrow.block_m, length, shape), choose_tile(64, length, shape)
        assert [tile.block_n for tile in alone] == [narrow.block_n, wide.block_n]
        assert wide.num_stages == min(tile.num_stages for tile in alone)

    def test_wide_accumulators_have_fewer_rows(self) -> None:
        assert row_classes(TileShape(128, 128, 2, 2)) == ROW_CLASSES
        assert row_classes(TileShape(256, 128, 2, 2)) == ROW_CLASSES
        for dim in (192, 256):
            assert row_class(1000, TileShape(dim, dim, 2, 2)) == 64

    def test_programs_share_an_sm(self) -> None:
        shape = TileShape(128, 128, 2, 2)
        tiles = [choose_tile(rows, ANY_LENGTH, shape) for rows in ROW_CLASSES]
        assert [tile.programs_per_sm for tile in tiles] == [3, 2, 2, 1]


class TestVariants:
    """The report covers what is launched."""

    @pytest.mark.parametrize("merge", MERGE_MODES)
    @pytest.mark.parametrize("mode", LAUNCH_MODES)
    def test_every_launch_is_a_variant(
        self, mode: str, merge: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        variants = list(kernel_variants("sm_90", head_dims=[64], dtypes=[("fp16", "fp16")]))
        seen = set()
        for name, arguments in _launches(mode, merge, monkeypatch):
            variant = _variant_of(name, arguments, merge)
            assert variant in variants
            seen.add((variant.kernel, variant.tile.block_m))
            _, pointers, constants = compile_report._arguments(variant)
            assert set(constants) == {key for key in arguments if key.isupper()}
            for key, value in arguments.items():
                if isinstance(value, torch.Tensor):
                    expected = pointers.get(key.removesuffix("_ptr"), "i32")
                    assert DTYPE_NAMES[value.dtype] == expected, key
        launched = {("copy_slots", 1), ("append_slots", 1)}
        if mode == "streams":
            launched |= {("pack_forward", rows) for rows in ROW_CLASSES}
        else:
            launched |= {("pack_forward_fused", 64)}
        if merge == "launch":
            launched |= {("merge", 4)}
        assert seen == launched

    def test_an_architecture_without_fp8_has_no_such_variant(self) -> None:
        for arch in ARCHS:
            dtypes = {variant.kv_dtype for variant in kernel_variants(arch)}
            assert ("fp8_e4m3" in dtypes) == (arch != "sm_80")


def _launches(
    mode: str, merge: str, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, dict[str, Any]]]:
    """What an executor launches, but does not run, for packs of 1 to 60 requests by 4 heads."""
    launches: list[tuple[str, dict[str, Any]]] = []
    for module in (plan_buffers, triton_executor):
        monkeypatch.setattr(
            module,
            "launch",
            lambda kernel, grid, **arguments: launches.append((kernel.__name__, arguments)),
        )
    for scale in (1, 10, 100):  # packs of all lengths
        forks = [Fork(0, 0, 8 * scale), *(Fork(0, 4 * scale, 4 * scale) for _ in range(41))]
        for parent, size in ((1, 6), (2, 12)):
            forks += [Fork(parent, 7 * scale, scale)] * size
        batch = build_batch(forks, growth=4)
        case = make_case(batch, num_kv_heads=8, group=4, head_dim=64, dtype=torch.float16)
        runs = plan_runs.load(batch, case, "node", SPLITS)
        executor = triton_executor.TritonExecutor(
            32, 8, TileShape(64, 64, 2, 2), torch.device("cpu"), mode=mode, merge=merge
        )
        runs.runner._executor = executor
        case.req_pool_indices = case.req_pool_indices.long()
        runs.runner.load(runs.plan, case.req_to_token, case.req_pool_indices)
        runs()
        executor.append(case.seq_lens.long(), case.seq_lens.long())
    return launches


def _variant_of(name: str, arguments: dict[str, Any], merge: str) -> KernelVariant:
    """The variant that a launch asks for, written down from its arguments; takes the options."""
    kernel = name.removesuffix("_kernel")
    defaults = {"num_warps": 4, "num_stages": 3, "maxnreg": 0}
    options = [arguments.pop(key, default) for key, default in defaults.items()]
    if "BLOCK" in arguments:
        tile = TileConfig(1, arguments["BLOCK"], *options)
        return KernelVariant(kernel, 0, "int32", "int32", tile)
    if kernel == "merge":
        tile = TileConfig(arguments["GROUP_SIZE"], 1, *options)
        return KernelVariant(kernel, 64, "fp16", "fp32", tile)
    tile = TileConfig(arguments["BLOCK_M"], arguments["BLOCK_N"], *options)
    narrow = None
    if arguments["WIDE_BLOCK_M"]:
        kernel, narrow = "pack_forward_fused", tile
        tile = TileConfig(arguments["WIDE_BLOCK_M"], arguments["WIDE_BLOCK_N"], *options)
    return KernelVariant(kernel, 64, "fp16", "fp16", tile, narrow, merge)


def forward_variant(tile: TileConfig, **changes: Any) -> KernelVariant:
    return replace(KernelVariant("pack_forward", 128, "bf16", "bf16", tile), **changes)


class TestCompiled:
    @pytest.fixture(scope="class")
    def sm_90(self) -> list[dict[str, Any]]:
        """The command's own JSON; TRITON_INTERPRET must not matter to it."""
        options = ["--head-dim", "128", "--merge", "in_kernel", "--json"]
        command = [sys.executable, "-m", "sglang_prefix.cli.main", "kernels", "--arch", "sm_90"]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(
            [*command, *options, "--jobs", str(JOBS)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        reports: list[dict[str, Any]] = json.loads(done.stdout)
        return reports

    def test_nothing_spills_on_sm_90(self, sm_90: list[dict[str, Any]]) -> None:
        assert {report["head_dim"] for report in sm_90} == {0, 128}
        assert {report["kv_dtype"] for report in sm_90} >= {"bf16", "fp8_e4m3"}
        for report in sm_90:
            assert 0 < report["registers"] <= 255
            assert report["spill_bytes"] == 0
            assert report["shared_bytes"] <= report["shared_limit"] == ARCHS["sm_90"]

    def test_matrix_instructions_of_sm_90(self, sm_90: list[dict[str, Any]]) -> None:
        for report in sm_90:
            is_forward = report["kernel"].startswith("pack_forward")
            assert report["uses_mma"] == is_forward
            if is_forward:
                assert ("HGMMA" in report["instructions"]) == (report["block_m"] >= 64)

    def test_rows_arrive_by_wide_asynchronous_copies(self, sm_90: list[dict[str, Any]]) -> None:
        for report in sm_90:
            if report["kernel"].startswith("pack_forward"):
                widths = report["async_copy_bytes"]
                assert widths == [16] or (report["kv_dtype"] == "fp8_e4m3" and widths[0] == 8)

    @pytest.mark.parametrize(
        ("arch", "head_dim", "merge"),
        [("sm_80", 128, "in_kernel"), ("sm_90", 64, "launch"), ("sm_100", 128, "in_kernel")],
    )
    def test_other_shapes(self, arch: str, head_dim: int, merge: str) -> None:
        """The tiles for packs of any length; those for packs of 16 tokens do less."""
        variants = [
            variant
            for variant in kernel_variants(arch, head_dims=[head_dim], merges=[merge])
            if variant.tile.block_n != 16
        ]
        reports = list(compile_variants(variants, arch, jobs=JOBS))
        assert find_problems(reports) == []
        wide = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[arch]
        for report in reports:
            if report.variant.kernel == "pack_forward":
                name = wide if report.variant.tile.block_m >= 64 else "HMMA"
                assert name in report.instructions

    def test_every_stage_is_in_flight(self) -> None:
        """Shared memory grows by a KV tile with each stage, so the pipeline is as deep as asked."""
        tiles = [
            TileConfig(rows, 64, warps, stages)
            for rows, warps in ((16, 4), (64, 4))
            for stages in (2, 3, 4)
        ]
        reports = list(compile_variants(map(forward_variant, tiles), "sm_90", jobs=JOBS))
        assert all(report.async_copy_bytes == (16,) for report in reports)
        sizes = [report.shared_bytes for report in reports]
        kv_tile = 64 * (128 + 128) * 2
        for two, three, four in (sizes[:3], sizes[3:]):
            assert three - two == four - three == kv_tile

    def test_control_the_checks_can_fail(self) -> None:
        spilling, too_large = TileConfig(128, 64, 4, 2), TileConfig(16, 64, 4, 10)
        variants = [forward_variant(tile) for tile in (spilling, too_large)]
        reports = list(compile_variants(variants, "sm_90", jobs=JOBS))
        spill, size = find_problems(reports)
        assert spill.startswith("pack_forward bf16/bf16 head dim 128 128x64 spills")
        assert size.startswith("pack_forward bf16/bf16 head dim 128 16x64 uses")
        assert size.endswith(f"over {227 * 1024}")


class TestCommand:
    """Everything but the compiler."""

    @staticmethod
    def report(variant: KernelVariant, **changes: Any) -> KernelReport:
        report = KernelReport(variant, "sm_90", 128, 0, 1000, 2000, ("HMMA",), (16,))
        return replace(report, **changes)

    def test_occupancy_is_what_registers_and_shared_memory_allow(self) -> None:
        """On sm_90, 64 K registers and 228 KiB; a thread gets registers in eights."""
        variant = forward_variant(TileConfig(16, 64, 4, 2))
        for registers, shared, programs in (
            (128, 1000, 4),
            (129, 1000, 3),
            (255, 1000, 2),
            (32, 1000, 16),
            (128, 75 * 1024, 3),
            (128, 100 * 1024, 2),
            (128, 227 * 1024, 1),
        ):
            report = self.report(variant, registers=registers, shared_bytes=shared)
            assert report.programs_per_sm == programs
            assert report.as_dict()["programs_per_sm"] == programs

    @pytest.mark.parametrize(
        ("changes", "complaints"),
        [
            ({}, []),
            ({"shared_bytes": 2000}, []),
            ({"spill_bytes": 8}, ["head dim 128 16x64 spills 8 bytes"]),
            ({"shared_bytes": 2001}, ["2001 bytes of shared memory, over 2000", "head dim 256"]),
        ],
    )
    def test_status(
        self, changes: dict[str, int], complaints: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tile = TileConfig(16, 64, 4, 3)
        variants = [forward_variant(tile), forward_variant(tile, head_dim=256)]
        monkeypatch.setattr(
            compile_report,
            "compile_variants",
            lambda *_, **__: iter([self.report(variant, **changes) for variant in variants]),
        )
        done = CliRunner().invoke(app, ["kernels", "--arch", "sm_90", "--json"])
        assert done.exit_code == (1 if complaints else 0)
        assert [row["head_dim"] for row in json.loads(done.stdout)] == [128, 256]
        for complaint in complaints:
            assert complaint in done.stderr
        assert "head dim 256 16x64 spills" not in done.stderr
        assert "pack_forward" in done.stderr  # the table, which must not mix with JSON

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            (["--arch", "sm_70"], "--arch is sm_70; legal: sm_80, sm_90, sm_100"),
            (["--arch", "sm_90", "--head-dim", "77"], "--head-dim is 77; legal: 64, 80,"),
            (["--arch", "sm_90", "--merge", "no"], "--merge is no; legal: launch, arrival"),
            (["--arch", "sm_80", "--dtype", "bf16/fp8_e4m3"], "legal with --arch sm_80: bf16/bf16"),
        ],
    )
    def test_mistakes(self, options: list[str], complaint: str) -> None:
        done = CliRunner().invoke(app, ["kernels", *options])
        assert done.exit_code == 2
        assert complaint in done.stderr
        assert len(done.stderr.splitlines()) == 1
