"""Sections of the files of ``make gpu-bench``, ``gpu-serve``, ``gpu-tune`` and ``gpu-check``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sglang_prefix.bench.report.cells import across, gain, name, number, text
from sglang_prefix.bench.report.frame import moment
from sglang_prefix.bench.report.gpu_bench import bench_tables, bench_verdicts
from sglang_prefix.bench.report.gpu_serve import serve_tables, serve_verdicts
from sglang_prefix.bench.report.model import (
    Cell,
    Column,
    Row,
    Section,
    Table,
    Verdict,
    folded,
)
from sglang_prefix.bench.report.schema import GpuResult
from sglang_prefix.bench.report.sources import Source

__all__ = ["gpu_section"]

_TITLES = {
    "gpu-bench": "Attention kernels on a GPU",
    "gpu-serve": "Served models on a GPU",
    "gpu-tune": "Tiles of the forward kernel",
    "gpu-check": "Checks of the kernels against the oracle",
}
_GOOD = ("done", "passed")


def gpu_section(source: Source) -> Section:
    """What the file says; a dry run's numbers are shown, and counted nowhere."""
    data: GpuResult = source.data
    tables, verdicts = _RENDERERS[source.kind](data)
    return Section(
        kind=source.kind,
        title=_TITLES[source.kind],
        source=source.name,
        facts=_facts(data),
        warnings=_warnings(data),
        verdicts=[] if data["dry"] else verdicts,
        tables=[folded(table) for table in [*_target_table(data), *tables, *_left_table(data)]],
    )


def _facts(data: GpuResult) -> dict[str, str]:
    found = data["runs"][-1]["environment"]
    clocks = found.get("clocks_before") or {}
    packages = ("sglang", "torch", "triton", "cuda", "flashinfer-python", "sglang-kernel", "numpy")
    facts = {
        "device": clocks.get("name") or data["device"],
        "driver": clocks.get("driver_version"),
        "versions": ", ".join(f"{n} {found[n]}" for n in packages if found.get(n)),
        "Python": found.get("python"),
        "commit": data["commit"],
        "measured": ", ".join(moment(run["environment"].get("time", "")) for run in data["runs"]),
        "seed": data.get("seed"),
    }
    return {fact: str(value) for fact, value in facts.items() if value is not None}


def _warnings(data: GpuResult) -> list[str]:
    warnings = []
    if data["dry"]:
        warnings.append("Dry run on tiny shapes without a GPU: the times mean nothing.")
    if absent := _absent(data):
        reasons = "; ".join(f"{baseline}: {reason}" for baseline, reason in absent.items())
        warnings.append(f"Absent baselines: {reasons}.")
    left = [cell for cell, found in data["cells"].items() if found["status"] == "not run"]
    if left:
        warnings.append(f"Not run: {len(left)} of {len(data['cells'])} cells: {', '.join(left)}.")
    return warnings


def _absent(data: GpuResult) -> dict[str, str]:
    """Baselines that no run could import."""
    seen = [{**run.get("baselines", {}), **run.get("absent", {})} for run in data["runs"]]
    return {
        baseline: reason
        for baseline, reason in seen[-1].items()
        if all(run.get(baseline) != "available" for run in seen)
    }


def _target_table(data: GpuResult) -> list[Table]:
    targets = {n: t for n, t in data.get("targets", {}).items() if isinstance(t, Mapping)}
    if not targets:
        return []
    columns = [
        Column("target", is_text=True),
        Column("status", is_text=True),
        Column("value"),
        Column("what it asks for", is_text=True),
        Column("cells that miss it", is_text=True),
    ]
    return [Table("Targets", columns, [_target_row(n, t, data) for n, t in targets.items()])]


def _target_row(target: str, found: Mapping[str, Any], data: GpuResult) -> Row:
    status = str(found.get("status"))
    missed = status == "missed" and not data["dry"]
    value = found.get("value")
    cells = found.get("missed")
    shown = ", ".join(f"{c} ({_number(v)})" for c, v in cells.items()) if cells else None
    return Row(
        [
            name(target, loses=missed),
            Cell(status, status, "losing" if missed else ""),
            number(value if isinstance(value, int | float) else None),
            text(found.get("meaning")),
            text(shown),
        ],
        "losing" if missed else "",
    )


def _number(value: object) -> str:
    return number(value).text if isinstance(value, int | float) else str(value)


def _left_table(data: GpuResult) -> list[Table]:
    """Cells without a result: a missing row would look like a run that never meant to have it."""
    columns = [Column("cell", is_text=True), Column("why there is no number", is_text=True)]
    rows = [
        across([name(cell)], ": ".join(filter(None, (found["status"], found.get("reason")))), 2)
        for cell, found in data["cells"].items()
        if found["status"] not in _GOOD
    ]
    return [Table("Not run, failed or not applicable", columns, rows)] if rows else []


def _check_tables(data: GpuResult) -> list[Table]:
    columns = [
        Column("cell", is_text=True),
        Column("status", is_text=True),
        Column("ways", "policies and launch and merge modes on these inputs"),
        Column("largest error", "relative, against the float64 oracle"),
    ]
    rows = []
    for cell, found in data["cells"].items():
        errors = found.get("errors", {})
        failed = found["status"] == "failed"
        row = [
            name(cell, loses=failed),
            Cell(found["status"], found["status"], "losing" if failed else ""),
            number(len(errors) or None),
            number(max(errors.values(), default=None), 2),
        ]
        rows.append(Row(row, "losing" if failed else ""))
    return [Table("Checks", columns, rows)]


def _tune_tables(data: GpuResult) -> list[Table]:
    columns = [
        Column("shape", is_text=True),
        Column("tile of the formula", is_text=True),
        Column("us"),
        Column("fastest tile", is_text=True),
        Column("fastest us"),
        Column("gain", "time of the formula's tile over that of the fastest"),
    ]
    rows = []
    for cell, found in data["cells"].items():
        tiles = {
            tile: candidate["kernel_us"]
            for tile, candidate in found.get("candidates", {}).items()
            if candidate.get("status") == "done" and "kernel_us" in candidate
        }
        if not tiles:
            continue
        formula = found.get("formula", "")
        fastest = min(tiles, key=tiles.__getitem__)
        before = tiles.get(formula)
        rows.append(
            Row(
                [
                    name(cell),
                    text(formula),
                    number(before),
                    text(fastest),
                    number(tiles[fastest]),
                    gain(before / tiles[fastest] if before else None, counts=not data["dry"]),
                ]
            )
        )
    return [Table("Tiles", columns, rows)] if rows else []


_RENDERERS: dict[str, Callable[[GpuResult], tuple[list[Table], list[Verdict]]]] = {
    "gpu-bench": lambda data: (bench_tables(data), bench_verdicts(data)),
    "gpu-serve": lambda data: (serve_tables(data), serve_verdicts(data)),
    "gpu-tune": lambda data: (_tune_tables(data), []),
    "gpu-check": lambda data: (_check_tables(data), []),
}
