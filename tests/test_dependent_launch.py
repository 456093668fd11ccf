"""The launch of the merge that begins before the forward stage ends: its code, and when it is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefix_kernels import triton_executor
from prefix_kernels.compile_report import KernelVariant, compile_variants
from prefix_kernels.tiles import TileConfig, TileShape, formula_tile
from prefix_kernels.triton_executor import TritonExecutor
from tests.attention import SPLITS, load, make_case
from tests.forests import Fork, build_batch

TILE = formula_tile(16, TileShape(128, 128, 2, 2))
FORWARD = KernelVariant("pack_forward", 128, "bf16", "bf16", TILE)
MERGE = KernelVariant("merge", 128, "bf16", "fp32", TileConfig(4, 1, 4, 3, 0))
PARTIALS = re.compile(r"ld\.global\.cg")


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_100", marks=pytest.mark.extended)])
def test_grid_dependency_control_is_compiled_where_it_is_asked_for(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward kernel lets the merge begin; the merge waits before it reads a partial."""
    ptx = {}
    for overlaps, variants in ((True, (FORWARD, MERGE)), (False, (MERGE,))):
        cache = tmp_path / str(overlaps)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
        asked = [replace(one, overlaps_merge=overlaps) for one in variants]
        reports = list(compile_variants(asked, arch, jobs=1))
        assert not any(report.spill_bytes for report in reports)
        for one in variants:
            (file,) = cache.rglob(f"{one.kernel}_kernel.ptx")
            ptx[one.kernel, overlaps] = file.read_text()
    launch, wait = "griddepcontrol.launch_dependents", "griddepcontrol.wait"
    assert {key: (text.count(launch), text.count(wait)) for key, text in ptx.items()} == {
        ("pack_forward", True): (1, 0),
        ("merge", True): (0, 1),
        ("merge", False): (0, 0),
    }
    before, _, after = ptx["merge", True].partition(wait)
    assert "ld.global" in before  # which partials there are
    assert not PARTIALS.search(before)
    assert PARTIALS.search(after)


@pytest.mark.parametrize(
    ("options", "overlaps"),
    [
        ({"merge": "launch", "overlap_merge": True, "mode": "fused"}, True),
        ({"merge": "launch", "overlap_merge": True, "mode": "streams"}, False),  # two launches
        ({"merge": "in_kernel", "overlap_merge": True, "mode": "fused"}, False),
        ({"merge": "launch", "mode": "fused"}, False),
    ],
)
def test_the_merge_overlaps_one_launch_where_the_device_can(
    options: dict[str, Any], overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tails of one request, and a pack of 20 rows beside them."""
    launched: list[dict[str, Any]] = []
    monkeypatch.setattr(
        triton_executor, "launch", lambda kernel, grid, **arguments: launched.append(arguments)
    )
    batch = build_batch([Fork(0, 0, 30), *(Fork(0, 20, 5) for _ in range(9))])
    case = make_case(batch, group=2, head_dim=16)
    for major in (9, 8, 0):
        monkeypatch.setattr(triton_executor, "_major_of", lambda device, major=major: major)
        executor = TritonExecutor(case.shape, torch.device("cpu"), **options)
        launched.clear()
        load(case, "triton-streams-launch", "node", SPLITS, executor=executor).run()
        expected = overlaps and major == 9
        assert [one["OVERLAPS_MERGE"] for one in launched] == [expected] * len(launched)
        assert len(launched) == (
            1 if options["merge"] == "in_kernel" else 2 + (options["mode"] == "streams")
        )
        asked = [one.get("launch_pdl", False) for one in launched]
        assert asked == [False] * (len(launched) - 1) + [expected]
