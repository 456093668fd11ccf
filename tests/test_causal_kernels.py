"""Kernels for several query tokens of a request, compiled: what they cost beside the others."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prefix_kernels import compile_report, kernel_cache
from prefix_kernels.compile_report import KernelVariant, compile_variants, kernel_variants
from prefix_kernels.kernel_report import find_problems
from prefix_kernels.launches import LAUNCH_MODES, MERGE_MODES
from prefix_kernels.server_launches import ServedLayers, launch_all
from prefix_kernels.tiles import ROW_CLASSES
from sglang_prefix.cli.kernel_figures import compare_figures, read_figures
from sglang_prefix.cli.main import app

COMMITTED = Path(__file__).parents[1] / "docs" / "results" / "compiled"
MAIN: dict[str, Any] = {
    "head_dims": [128],
    "dtypes": [("bf16", "bf16")],
    "kv_lengths": [4096],
    "causal": True,
}
ONE_WAY: dict[str, Any] = {"modes": LAUNCH_MODES[:1], "merges": MERGE_MODES[:1]}
RENEW = "a kernel changed: look at it, then `make kernels-audit` renews the file"
# By which the loop may be longer than that of one query token each: the mask, which a branch skips
# but for the tiles at the end of a tail.
MOST = 1.07


def figures(name: str, version: str) -> list[Any]:
    file = COMMITTED / f"{name}-triton-{version}.json"
    found: list[Any] = read_figures(file, version, "sm_90")["variants"]
    return found


def versions() -> set[str]:
    return {file.stem.rpartition("-")[2] for file in COMMITTED.glob("sm_90-causal-*")}


def test_the_committed_files_hold_each_kernel_with_a_mask() -> None:
    """Nothing spills, an SM has as many programs, and a loop is a few instructions longer."""
    assert versions() == {compile_report.triton_version(), "3.6.0"}
    for version in versions():
        plain = {
            (row["kernel"], row["merge"], row["tile"]["block_m"]): row
            for row in figures("sm_90", version)
            if row["head_dim"] == 128 and row["kv_dtype"] == "bf16"
        }
        rows = figures("sm_90-causal", version)
        forward = [row for row in rows if row["kernel"] != "append_slots"]
        assert all(row["causal"] for row in rows)
        assert len(forward) == len(rows) - 1 == len(MERGE_MODES) * (len(ROW_CLASSES) + 1)
        for row in forward:
            before = plain[row["kernel"], row["merge"], row["tile"]["block_m"]]
            assert row["spill_bytes"] == 0
            assert row["programs_per_sm"] == before["programs_per_sm"]
            for tile, other in zip(row["tiles"], before["tiles"], strict=True):
                assert tile["loop_instructions"] <= MOST * other["loop_instructions"]


@pytest.mark.parametrize(
    "rows", [16, *(pytest.param(n, marks=pytest.mark.extended) for n in (64,))]
)
def test_no_loop_has_grown(rows: int) -> None:
    variants = kernel_variants("sm_90", **MAIN, merges=["launch"])
    asked = [one for one in variants if one.tile.block_m == rows]
    reports = list(compile_variants(asked, "sm_90", jobs=2))
    assert find_problems(reports) == []
    committed = figures("sm_90-causal", compile_report.triton_version())
    found = compare_figures(committed, [report.as_dict() for report in reports])
    assert found.num_compared == len(reports) > 0, RENEW
    assert [change for change in found.changes if change.is_loop_growth] == [], RENEW


@pytest.mark.extended
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_other_architectures(arch: str) -> None:
    reports = list(compile_variants(kernel_variants(arch, **MAIN), arch, jobs=2))
    assert len(reports) == 1 + len(MERGE_MODES) * (len(ROW_CLASSES) + 1)
    assert find_problems(reports) == []


def test_the_command_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[KernelVariant] = []

    def compile_nothing(variants: Iterable[KernelVariant], *_: Any, **__: Any) -> tuple[()]:
        asked.extend(variants)
        return ()

    monkeypatch.setattr(compile_report, "compile_variants", compile_nothing)
    command = ["kernels", "--arch", "sm_90", "--head-dim", "128", "--dtype", "bf16/bf16"]
    done = CliRunner().invoke(app, [*command, "--kv-length", "4096", "--causal"])
    assert done.exit_code == 0, done.output
    assert asked == list(kernel_variants("sm_90", **MAIN))
    assert {one.kernel for one in asked} == {"pack_forward", "pack_forward_fused", "append_slots"}


def test_a_cache_has_them_beside_the_others() -> None:
    def launches(causal: bool) -> list[dict[str, Any]]:
        layers = [ServedLayers(2, 1, 16, 16, "fp16", "fp16", causal=causal)]
        found = kernel_cache.collect_launches(partial(launch_all, layers, "sm_90", **ONE_WAY))
        return [{"name": one.name, **dict(one.arguments)} for one in found]

    few, all_ = launches(False), launches(True)
    assert not any(one.get("CAUSAL") for one in few)
    added = [one for one in all_ if one.get("CAUSAL")]
    assert [one for one in all_ if one not in added] == few
    masked = [one for one in few if "CAUSAL" in one]
    assert len(added) == len(masked) > 0
    assert all(one | {"CAUSAL": True} in added for one in masked)
