"""What the compiler makes of the kernels for architectures that are not here.

By default the tiles of head dim 128 in bf16 are compiled for sm_90; all else is extended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from prefix_kernels import compile_report, plan_buffers, triton_executor
from prefix_kernels.compile_report import (
    ALL_ARCHS,
    LATENT_DIMS,
    KernelVariant,
    compile_variants,
    kernel_variants,
    triton_version,
)
from prefix_kernels.kernel_report import AMD_ARCHS, KernelReport, TileReport, find_problems
from prefix_kernels.tiles import ARCHS, ROW_CLASSES, TileConfig, TileShape, formula_tile
from sglang_prefix.cli.main import app
from tests.attention import SPLITS, TRITON, WAYS, load, make_case
from tests.forests import Fork, build_batch

JOBS = 2
DTYPE_NAMES = {
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


@pytest.mark.parametrize(
    ("head_dim", "sinks", "causal"),
    [(64, None, False), (64, torch.float32, False), (576, None, False), (64, None, True)],
)
@pytest.mark.parametrize("way", TRITON)
def test_every_launch_is_a_variant(
    way: str,
    head_dim: int,
    sinks: torch.dtype | None,
    causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The report covers what is launched, down to the types of the arguments."""
    mode, merge = WAYS[way].values()
    variants = list(kernel_variants("sm_90", head_dims=[head_dim], dtypes=[("fp16", "fp16")]))
    if causal:
        theirs = {"head_dims": [head_dim], "dtypes": [("fp16", "fp16")], "causal": True}
        plain = [one for one in variants if one.kernel in ("merge", "copy_slots")]
        variants = [*plain, *kernel_variants("sm_90", **theirs)]  # type: ignore[arg-type]
    seen = set()
    for name, arguments in launches_of(way, head_dim, sinks, causal, monkeypatch):
        variant = variant_of(name, arguments, merge)
        assert replace(variant, sinks=None) in variants
        if variant.head_dim:
            assert variant.sinks == (sinks and DTYPE_NAMES[sinks])
        seen.add((variant.kernel, variant.tile.block_m))
        _, pointers, constants = compile_report._arguments(variant)
        absent = {key for key, value in arguments.items() if value is None}
        assert set(constants) == {key for key in arguments if key.isupper()} | absent
        for key, value in arguments.items():
            if isinstance(value, torch.Tensor):
                expected = pointers.get(key.removesuffix("_ptr"), "i32")
                assert DTYPE_NAMES[value.dtype] == expected, key
    launched = {("copy_slots", 1), ("append_slots", 1)}
    launched |= {("merge", 4 if head_dim == 64 else 16)} if merge == "launch" else set()
    if mode == "streams":
        classes = ROW_CLASSES if head_dim == 64 else (16, 32, 64)
        launched |= {("pack_forward", rows) for rows in classes}
    else:
        launched |= {("pack_forward_fused", 64)}
    assert seen == launched


def launches_of(
    way: str,
    head_dim: int,
    sinks: torch.dtype | None,
    causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> list[tuple[str, dict[str, Any]]]:
    """What an executor launches, but does not run, for packs of 1 to 60 requests by 4 heads.

    By 16 heads, of one KV head, where v is in k. With ``causal`` the first has two query tokens.
    """
    heads: dict[str, Any] = {"num_kv_heads": 8, "group": 4, "head_dim": head_dim}
    if head_dim in LATENT_DIMS:
        heads |= {"num_kv_heads": 1, "group": 16, "v_in_k": True}
        heads["v_head_dim"] = LATENT_DIMS[head_dim]
    launches: list[tuple[str, dict[str, Any]]] = []
    for module in (plan_buffers, triton_executor):
        monkeypatch.setattr(
            module,
            "launch",
            lambda kernel, grid, **arguments: launches.append((kernel.__name__, arguments)),
        )
    for scale in (1, 10, 100):  # packs of all lengths
        forks = [Fork(0, 0, 8 * scale), *(Fork(0, 4 * scale, 4 * scale) for _ in range(41))]
        for parent, size in ((1, 6), (2, 12), (3, 1)):
            forks += [Fork(parent, 7 * scale, scale)] * size
        batch = build_batch(forks, growth=4)
        counts = [2, *[1] * (len(forks) - 1)] if causal else None
        case = make_case(batch, **heads, dtype=torch.float16, sinks=sinks, query_lens=counts)
        case.req_pool_indices = case.req_pool_indices.long()
        loaded = load(case, way, "node", SPLITS)
        loaded.run()
        loaded.executor.append(case.seq_lens.long(), torch.zeros(len(case.q), dtype=torch.int64))
    return launches


def variant_of(name: str, arguments: dict[str, Any], merge: str) -> KernelVariant:
    """The variant that a launch asks for, written down from its arguments; takes the options."""
    kernel = name.removesuffix("_kernel")
    defaults = {"num_warps": 4, "num_stages": 3, "maxnreg": 0}
    options = [arguments.pop(key, default) for key, default in defaults.items()]
    switches = [arguments[key] for key in TileConfig(1, 1, 1, 1).switches if key in arguments]
    if "BLOCK" in arguments:
        tile = TileConfig(1, arguments["BLOCK"], *options)
        causal = arguments.get("CAUSAL", False)
        return KernelVariant(kernel, 0, "int32", "int32", tile, causal=causal)
    given = arguments["sinks_ptr"]
    group, v_in_k = arguments["GROUP_SIZE"], arguments["V_HEAD_DIM"] == 512
    layer: dict[str, Any] = {"group_size": group, "v_in_k": v_in_k}
    layer["sinks"] = None if given is None else DTYPE_NAMES[given.dtype]
    head_dim = 576 if v_in_k else 64
    if kernel == "merge":
        tile = TileConfig(group, 1, *options)
        return KernelVariant(kernel, head_dim, "fp16", "fp32", tile, **layer)
    layer["causal"] = arguments["CAUSAL"]
    tile = TileConfig(arguments["BLOCK_M"], arguments["BLOCK_N"], *options, *switches)
    narrow = None
    if arguments["WIDE_BLOCK_M"]:
        kernel, narrow = "pack_forward_fused", tile
        rows, tokens = arguments["WIDE_BLOCK_M"], arguments["WIDE_BLOCK_N"]
        tile = TileConfig(rows, tokens, *options, *switches)
    return KernelVariant(kernel, head_dim, "fp16", "fp16", tile, narrow, merge, **layer)


def test_an_architecture_has_the_formats_of_8_bits_that_it_converts() -> None:
    formats = {"sm_80": set(), "gfx942": {"fp8_e4m3fnuz"}}
    for arch in ALL_ARCHS:
        dtypes = {variant.kv_dtype for variant in kernel_variants(arch)}
        assert {n for n in dtypes if n.startswith("fp8")} == formats.get(arch, {"fp8_e4m3"})


@pytest.mark.parametrize("arch", AMD_ARCHS)
def test_tiles_for_amd(arch: str) -> None:
    """Waves have 64 threads; there is no bound on registers; 64 KiB of LDS hold two stages."""
    launched = list(kernel_variants(arch, head_dims=[128, 256]))
    for one in launched:
        if one.kernel.startswith("pack_forward"):
            for tile in (one.tile, one.narrow_tile or one.tile):
                assert (tile.num_warps, tile.num_stages, tile.max_registers) == (4, 2, 0)
    rows = {one.tile.block_m for one in launched if one.head_dim == 128}
    assert rows == {4, *ROW_CLASSES}  # 4: those of the merge


# Compiled.


def forward_variant(tile: TileConfig, **changes: Any) -> KernelVariant:
    return replace(KernelVariant("pack_forward", 128, "bf16", "bf16", tile), **changes)


def compiled(variants: Iterable[KernelVariant], arch: str = "sm_90") -> list[KernelReport]:
    return list(compile_variants(variants, arch, jobs=JOBS))


@pytest.mark.parametrize(
    "dtype", ["bf16/bf16", pytest.param("bf16/fp8_e4m3", marks=pytest.mark.extended)]
)
def test_sm_90(dtype: str) -> None:
    """The command's own JSON; TRITON_INTERPRET must not matter to it.

    Nothing spills, tiles of 64 rows and more use wgmma, and rows of KV arrive by asynchronous
    copies of 16 bytes where they can.
    """
    options = ["--head-dim", "128", "--merge", "in_kernel", "--dtype", dtype, "--json"]
    command = [sys.executable, "-m", "sglang_prefix.cli.main", "kernels", "--arch", "sm_90"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, *options, "--jobs", str(JOBS)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    reports: list[dict[str, Any]] = json.loads(done.stdout)["variants"]
    kernels = {"pack_forward", "pack_forward_fused", "copy_slots", "append_slots"}
    assert {report["kernel"] for report in reports} == kernels
    assert {report["kv_dtype"] for report in reports} == {dtype.split("/")[1], "int32"}
    for report in reports:
        assert 0 < report["registers"] <= 255
        assert report["spill_bytes"] == 0
        assert report["shared_bytes"] <= report["shared_limit"] == ARCHS["sm_90"]
        is_forward = report["kernel"].startswith("pack_forward")
        assert bool(report["instructions"]) == is_forward
        if is_forward:
            assert ("HGMMA" in report["instructions"]) == (report["tile"]["block_m"] >= 64)
            widths = report["async_copy_bytes"]
            assert widths == [16] or (report["kv_dtype"] == "fp8_e4m3" and widths[0] == 8)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("arch", "head_dim", "merge"),
    [("sm_80", 128, "in_kernel"), ("sm_90", 64, "launch"), ("sm_100", 128, "in_kernel")],
)
def test_other_shapes(arch: str, head_dim: int, merge: str) -> None:
    """The tiles for packs of any length; those for packs of 16 tokens do less."""
    variants = kernel_variants(arch, head_dims=[head_dim], merges=[merge])
    reports = compiled((variant for variant in variants if variant.tile.block_n != 16), arch)
    assert find_problems(reports) == []
    wide = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[arch]
    for report in reports:
        if report.variant.kernel == "pack_forward":
            name = wide if report.variant.tile.block_m >= 64 else "HMMA"
            assert name in report.instructions


@pytest.mark.parametrize("arch", AMD_ARCHS)
def test_amd(arch: str) -> None:
    """They compile, with the matrix unit, into the LDS that there is. None has ever run."""
    variants = kernel_variants(arch, head_dims=[128], kv_lengths=[4096], merges=["launch"])
    chosen = [v for v in variants if v.tile.block_m in (16, 64) and v.kv_dtype == "bf16"]
    assert [v.kernel for v in chosen] == ["pack_forward", "pack_forward", "pack_forward_fused"]
    reports = compiled(chosen[:2], arch)
    assert find_problems(reports) == []
    for report in reports:
        assert all(name.startswith("v_mfma_f32") for name in report.instructions)
        assert 0 < report.shared_bytes <= report.shared_limit == AMD_ARCHS[arch]
        (tile,) = report.tiles
        assert tile.loop_instructions_by_kind["matrix"] > 0
        assert report.programs_per_sm > 0


@pytest.mark.extended
@pytest.mark.parametrize("arch", AMD_ARCHS)
def test_amd_whole(arch: str) -> None:
    variants = kernel_variants(arch, head_dims=[128], kv_lengths=[4096])
    assert find_problems(compiled(variants, arch)) == []


def test_sinks_are_left_out_of_the_loop() -> None:
    """As gpt-oss has them: they add to the end of an item, and to no kernel without them."""
    tile = formula_tile(16, TileShape(64, 64, 2, 2))
    without = KernelVariant("pack_forward", 64, "bf16", "bf16", tile, group_size=8)
    plain, sunk = compiled((without, replace(without, sinks="bf16")))
    assert find_problems([plain, sunk]) == []
    (before,), (after,) = plain.tiles, sunk.tiles
    assert sunk.num_instructions > plain.num_instructions
    assert abs(after.loop_instructions - before.loop_instructions) < 8
    assert sunk.programs_per_sm == plain.programs_per_sm


@pytest.mark.extended
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_latents(arch: str) -> None:
    """No spills in any mode; sm_90 is among the committed figures."""
    variants = kernel_variants(arch, head_dims=[576], kv_lengths=[4096])
    reports = [one for one in compiled(variants, arch) if one.tiles]
    assert {one.variant.tile.block_m for one in reports} == {16, 32}
    assert find_problems(reports) == []
    assert [one.spill_bytes for one in reports] == [0] * len(reports)


@pytest.mark.extended
def test_every_stage_is_in_flight() -> None:
    """Shared memory grows by a KV tile with each stage, so the pipeline is as deep as asked."""
    kv_tile = 64 * (128 + 128) * 2
    for rows in (16, 64):
        reports = compiled(forward_variant(TileConfig(rows, 64, 4, n)) for n in (2, 3, 4))
        assert all(report.async_copy_bytes == (16,) for report in reports)
        two, three, four = (report.shared_bytes for report in reports)
        assert three - two == four - three == kv_tile


@pytest.mark.extended
def test_a_wide_tile_compiles() -> None:
    """128 tokens wide, without spilling, where the formula stops at 64."""
    tile, shape = TileConfig(16, 128, 4, 2, 168), TileShape(128, 128, 2, 2)
    reports = compiled(forward_variant(tile, merge=merge) for merge in ("launch", "in_kernel"))
    assert find_problems(reports) == []
    for report in reports:
        estimate = tile.shared_bytes(shape)
        assert report.shared_bytes <= estimate <= report.shared_bytes + 8 * 1024
        assert report.programs_per_sm >= tile.resident_programs(shape) == 3


@pytest.mark.extended
def test_control_the_checks_can_fail() -> None:
    spilling, too_large = TileConfig(128, 64, 4, 2), TileConfig(16, 64, 4, 10)
    spill, size = find_problems(compiled(map(forward_variant, (spilling, too_large))))
    assert spill.startswith("pack_forward bf16/bf16 head dim 128 128x64 spills")
    assert size.startswith("pack_forward bf16/bf16 head dim 128 16x64 uses")
    assert size.endswith(f"over {227 * 1024}")


# Everything but the compiler.


def report_of(variant: KernelVariant, **changes: Any) -> KernelReport:
    tile = TileReport(
        variant.tile.block_m, variant.tile.block_n, 1 << 15, 400, {"matrix": 400}, 300
    )
    report = KernelReport(
        variant, "sm_90", "3.0", 128, 0, 1000, 2000, ("HMMA",), (16,), 1500, (tile,)
    )
    return replace(report, **changes)


def test_occupancy_is_what_registers_and_shared_memory_allow() -> None:
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
        report = report_of(variant, registers=registers, shared_bytes=shared)
        assert report.as_dict()["programs_per_sm"] == report.programs_per_sm == programs
        # One of the two stages is ahead.
        assert report.as_dict()["kv_bytes_in_flight"] == programs * report.tiles[0].kv_bytes


def test_occupancy_of_amd() -> None:
    """A SIMD has 512 registers per lane, in eights, and eight waves; LDS is as the arch has it."""
    for registers, shared, warps, programs in (
        (128, 1000, 4, 4),
        (129, 1000, 4, 3),
        (257, 1000, 4, 1),
        (32, 1000, 4, 8),
        (128, 1000, 8, 2),
        (128, 20 * 1024, 4, 3),
        (128, 64 * 1024, 4, 1),
        (32, 0, 4, 8),
    ):
        variant = forward_variant(TileConfig(16, 64, warps, 2))
        changes = {"arch": "gfx942", "shared_limit": 64 * 1024}
        report = report_of(variant, registers=registers, shared_bytes=shared, **changes)
        assert report.programs_per_sm == programs


@pytest.mark.parametrize(
    ("merge", "kind", "is_wrong"),
    [("launch", "integer", False), ("launch", "local", True), ("in_kernel", "local", False)],
)
def test_latents_do_not_spill_within_their_loop(merge: str, kind: str, is_wrong: bool) -> None:
    variant = forward_variant(TileConfig(64, 64, 8, 2), head_dim=576, v_in_k=True, merge=merge)
    tiles = (TileReport(64, 64, 73728, 400, {"matrix": 399, kind: 1}, 300),)
    problems = find_problems([report_of(variant, spill_bytes=16, tiles=tiles)])
    expected = "pack_forward bf16/bf16 head dim 576 64x64 spills within its KV loop"
    assert problems == [expected] * is_wrong


@pytest.mark.parametrize(
    ("changes", "complaints"),
    [
        ({}, []),
        ({"shared_bytes": 2000}, []),
        ({"spill_bytes": 8}, ["head dim 128 16x64 spills 8 bytes"]),
        ({"shared_bytes": 2001}, ["2001 bytes of shared memory, over 2000", "head dim 256"]),
        ({"tiles": ()}, ["head dim 256 16x64 has no KV loop"]),
    ],
)
def test_status_of_the_command(
    changes: dict[str, Any], complaints: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = TileConfig(16, 64, 4, 3)
    variants = [forward_variant(tile), forward_variant(tile, head_dim=256)]
    reports = [report_of(variant, **changes) for variant in variants]
    monkeypatch.setattr(compile_report, "compile_variants", lambda *_, **__: iter(reports))
    done = CliRunner().invoke(app, ["kernels", "--arch", "sm_90", "--json"])
    assert done.exit_code == (1 if complaints else 0)
    written = json.loads(done.stdout)
    assert [row["head_dim"] for row in written["variants"]] == [128, 256]
    assert (written["arch"], written["triton"]) == ("sm_90", triton_version())
    for complaint in complaints:
        assert complaint in done.stderr
    assert "head dim 256 16x64 spills" not in done.stderr
    assert "pack_forward" in done.stderr  # the table, which must not mix with JSON


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--arch", "sm_70"], "--arch is sm_70; legal: sm_80, sm_90, sm_100, gfx942, gfx950"),
        (["--arch", "sm_90", "--head-dim", "77"], "--head-dim is 77; legal: 64, 80,"),
        (["--arch", "sm_90", "--merge", "no"], "--merge is no; legal: launch, in_kernel"),
        (["--arch", "sm_80", "--dtype", "bf16/fp8_e4m3"], "legal with --arch sm_80: bf16/bf16"),
    ],
)
def test_mistakes(options: list[str], complaint: str) -> None:
    done = CliRunner().invoke(app, ["kernels", *options])
    assert done.exit_code == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
