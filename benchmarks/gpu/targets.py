"""What the project has promised of a GPU, read off the cells that were measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import exp, log
from typing import Any

__all__ = ["default_way", "evaluate"]

Cells = Mapping[str, dict[str, Any]]
# (cell name, ours, theirs or a limit): both in us per layer.
Pairs = list[tuple[str, float, float]]

NOT_MEASURED = "not measured"
_WIDE_BYTES = 256 << 20
_ALONE = ("unrelated", "long")


def default_way(cells: Cells) -> str | None:
    """The one launch and merge mode of policy pat that is fastest over all measured cells."""
    times: dict[str, list[float]] = {}
    for cell in _measured(cells).values():
        ways = {n: c for n, c in _of(cell, "ours").items() if c["policy"] == "pat" and c["fixed"]}
        for name, candidate in ways.items():
            times.setdefault(name, []).append(log(candidate["kernel_us"]))
    most = max(map(len, times.values()), default=0)
    means = {name: sum(logs) / most for name, logs in times.items() if len(logs) == most}
    return min(means, key=means.__getitem__) if means else None


def evaluate(cells: Cells) -> dict[str, Any]:
    """Every target with "status" met, missed or not measured, its value and where it was read.

    Ours is policy pat in the way of :func:`default_way`, the same in all cells.
    """
    way = default_way(cells)
    targets: dict[str, dict[str, Any]] = {
        "read bandwidth": _bandwidth(cells, way),
        "sharing trees": _geomean(
            3.0, _pairs(cells, way, _is_tree, "stock", "total_us"), expected=18 * 4
        ),
        "cascade": _every(1.0, _pairs(cells, way, _any, "flashinfer-cascade", "kernel_us")),
        "fasttree": _every(1.0, _pairs(cells, way, _any, "fasttree", "kernel_us")),
        "nothing shared": _every(0.97, _pairs(cells, way, _is_alone, "stock", "total_us")),
        "fixed cost": _fixed_cost(cells, way),
    }
    beside = {
        "sharing trees": _geomean(3.0, _pairs(cells, way, _is_tree, "stock", "total_kept_us"), 72),
        "nothing shared": _every(0.97, _pairs(cells, way, _is_alone, "stock", "total_kept_us")),
    }
    meaning = {
        "read bandwidth": "unique KV bytes over kernel time, at least 0.80 of the bandwidth read "
        "in the same run, on every cell with 256 MiB of unique KV or more",
        "sharing trees": "geometric mean of fastest stock over ours, a plan per step included, at "
        "least 3 over the 18 sharing trees in 4 head configurations, page size 1",
        "cascade": "FlashInfer's cascade over ours, kernels alone, at least 1 in every cell",
        "fasttree": "FastTree over ours, kernels alone, at least 1 in every cell",
        "nothing shared": "fastest stock over ours, a plan per step included, at least 0.97",
        "fixed cost": "ours with a plan per step, at most the fastest stock call with its metadata "
        "spread over 32 layers + 2 us, at batch 8, 512 shared, 1 KV head",
    }
    for name, target in targets.items():
        target["meaning"] = meaning[name]
        if name in beside:
            target["with_the_plan_kept"] = beside[name]
    return {"ours": way, **targets}


def _measured(cells: Cells) -> dict[str, dict[str, Any]]:
    return {name: cell for name, cell in cells.items() if "candidates" in cell}


def _of(cell: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """Candidates of a kind, or the one of that name, that were timed."""
    return {
        name: candidate
        for name, candidate in cell["candidates"].items()
        if candidate["status"] == "done" and kind in (name, candidate["kind"])
    }


def _any(cell: dict[str, Any]) -> bool:
    return True


def _is_tree(cell: dict[str, Any]) -> bool:
    shape = cell["shape"]
    return bool(shape["group"] == "trees" and shape["page_size"] == 1)


def _is_alone(cell: dict[str, Any]) -> bool:
    return cell["shape"]["group"] in _ALONE


def _pairs(
    cells: Cells, way: str | None, wanted: Callable[[dict[str, Any]], bool], kind: str, time: str
) -> Pairs:
    """Ours and the fastest of a kind, on the cells that have both."""
    pairs = []
    for name, cell in _measured(cells).items():
        ours, theirs = _of(cell, way or ""), _of(cell, kind)
        if wanted(cell) and ours and theirs:
            fastest = min(candidate[time] for candidate in theirs.values())
            pairs.append((name, ours[way or ""][time], fastest))
    return pairs


def _every(least: float, pairs: Pairs) -> dict[str, Any]:
    """Theirs over ours is at least ``least`` in every cell."""
    ratios = {name: theirs / ours for name, ours, theirs in pairs}
    missed = {name: ratio for name, ratio in ratios.items() if ratio < least}
    return {
        "status": _status(ratios, not missed),
        "value": min(ratios.values(), default=None),
        "cells": len(ratios),
        "missed": missed,
    }


def _geomean(least: float, pairs: Pairs, expected: int) -> dict[str, Any]:
    ratios = {name: theirs / ours for name, ours, theirs in pairs}
    value = exp(sum(map(log, ratios.values())) / len(ratios)) if ratios else None
    return {
        "status": _status(ratios, value is not None and value >= least),
        "value": value,
        "cells": len(ratios),
        "expected_cells": expected,
        "missed": {name: ratio for name, ratio in ratios.items() if ratio < 1},
    }


def _bandwidth(cells: Cells, way: str | None) -> dict[str, Any]:
    shares = {}
    for name, cell in _measured(cells).items():
        ours, kv_bytes = _of(cell, way or ""), cell["shape"]["kv_bytes_unique"]
        if ours and kv_bytes >= _WIDE_BYTES:
            # bytes_us is what the least bytes take at the bandwidth of the run.
            at_bandwidth = cell["floor"]["bytes_us"] * kv_bytes / cell["floor"]["bytes"]
            shares[name] = at_bandwidth / ours[way or ""]["kernel_us"]
    missed = {name: share for name, share in shares.items() if share < 0.8}
    return {
        "status": _status(shares, not missed),
        "value": min(shares.values(), default=None),
        "cells": len(shares),
        "missed": missed,
    }


def _fixed_cost(cells: Cells, way: str | None) -> dict[str, Any]:
    def wanted(cell: dict[str, Any]) -> bool:
        shape = cell["shape"]
        named = shape["group"] == "fixed" and shape["page_size"] == 1
        return bool(named and shape["kv"] == 1 and shape["batch"] == 8)

    over = {
        time: {
            name: ours - theirs for name, ours, theirs in _pairs(cells, way, wanted, "stock", time)
        }
        for time in ("total_us", "total_kept_us", "kernel_us")
    }
    every_step = over["total_us"]
    return {
        "status": _status(every_step, all(us <= 2 for us in every_step.values())),
        "value": max(every_step.values(), default=None),
        "us_over_fastest_stock": over,
    }


def _status(measured: Mapping[str, float], good: bool) -> str:
    if not measured:
        return NOT_MEASURED
    return "met" if good else "missed"
