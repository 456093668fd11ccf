"""Tables of a ``make gpu-bench`` file."""

from __future__ import annotations

from typing import Any

from sglang_prefix.bench.report.cells import NONE, gain, name, number, text
from sglang_prefix.bench.report.model import Cell, Column, Row, Table, Verdict
from sglang_prefix.bench.report.schema import GpuCell, GpuResult

__all__ = ["bench_tables", "bench_verdicts"]

_MIB = 2**20
# Baselines of the targets beside the fastest stock backend, which is measured with its plan.
_PEERS = ("flashinfer-cascade", "fasttree")


def bench_verdicts(data: GpuResult) -> list[Verdict]:
    """Against the fastest stock backend with plans, and against two peers without."""
    way = _way(data)
    if way is None:
        return []
    measured = _measured(data)
    left = {n: "not run" for n, cell in data["cells"].items() if cell["status"] == "not run"}
    verdicts = []
    for baseline, said, time in (
        ("stock", "the fastest stock backend, a plan per step included", "total_us"),
        *((peer, f"{peer}, kernels alone", "kernel_us") for peer in _PEERS),
    ):
        gains = {n: _over(cell, way, baseline, time) for n, cell in measured.items()}
        found = {n: value for n, value in gains.items() if value is not None}
        missing = {n: f"{baseline} was not measured" for n in gains if n not in found}
        theirs = [_done(measured[n], "stock") for n in found] if baseline == "stock" else []
        stock = sorted({_fastest(each, time) for each in theirs})
        verdicts.append(Verdict(way, said, found, missing | left, stock=stock))
    return verdicts


def bench_tables(data: GpuResult) -> list[Table]:
    """Ours against all others, every candidate's time, and the chains of empty launches."""
    measured = _measured(data)
    tables = [_ours_table(data, measured), _time_table(data, measured)] if measured else []
    return tables + _chain_tables(data)


def _way(data: GpuResult) -> str | None:
    """What of ours the file itself judges the targets by."""
    way = data.get("targets", {}).get("ours")
    return way if isinstance(way, str) else None


def _measured(data: GpuResult) -> dict[str, GpuCell]:
    return {n: cell for n, cell in data["cells"].items() if "candidates" in cell}


def _done(cell: GpuCell, kind: str | None) -> dict[str, Any]:
    """Candidates of a kind, or the one of that name, that were timed."""
    return {
        n: candidate
        for n, candidate in cell.get("candidates", {}).items()
        if candidate.get("status") == "done" and kind in (n, candidate.get("kind"))
    }


def _fastest(candidates: dict[str, Any], time: str) -> str:
    return min(candidates, key=lambda n: float(candidates[n][time]))


def _over(cell: GpuCell, way: str | None, baseline: str, time: str) -> float | None:
    ours, theirs = _done(cell, way), _done(cell, baseline)
    if way is None or not ours or not theirs:
        return None
    return float(min(candidate[time] for candidate in theirs.values()) / ours[way][time])


def _ours_table(data: GpuResult, measured: dict[str, GpuCell]) -> Table:
    way, counts = _way(data), not data["dry"]
    columns = [
        Column("cell", is_text=True),
        Column("over stock", "the fastest, plans of both included"),
        Column("kernels over stock", "the fastest, kernels alone"),
        *(Column(f"over {peer}", "kernels alone") for peer in _PEERS),
        Column("group", is_text=True, folds=True),
        Column("batch", folds=True),
        Column("dtype", is_text=True, folds=True),
        Column("page", folds=True),
        Column("MiB", "KV of all tokens, each once"),
        Column("floor us", "what no kernel can beat: bytes, operations, one launch"),
        Column("ours us", "kernels alone, per layer"),
        Column("with plan us", "with a plan per step, spread over the layers"),
        Column("over floor", "ours us / floor us"),
        Column("fastest stock", is_text=True),
        Column("stock us"),
    ]
    rows = []
    for cell_name, cell in measured.items():
        shape = cell.get("shape", {})
        ours: Any = _done(cell, way).get(way or "", {})
        stock = _done(cell, "stock")
        fastest = min(stock, key=lambda n: stock[n]["kernel_us"], default=None)
        gains = [_over(cell, way, "stock", "total_us")]
        gains += [_over(cell, way, other, "kernel_us") for other in ("stock", *_PEERS)]
        loses = counts and any(value is not None and value < 1 for value in gains)
        mib = shape["kv_bytes_unique"] / _MIB if "kv_bytes_unique" in shape else None
        rows.append(
            Row(
                [
                    name(cell_name, loses=loses),
                    *(gain(value, counts=counts) for value in gains),
                    *(text(shape.get("group")), number(shape.get("batch"))),
                    *(text(shape.get("dtype")), number(shape.get("page_size")), number(mib)),
                    number(cell.get("floor", {}).get("us")),
                    *(number(ours.get(key)) for key in ("kernel_us", "total_us", "over_floor")),
                    text(fastest),
                    number(stock[fastest]["kernel_us"] if fastest else None),
                ],
                "losing" if loses else "",
            )
        )
    return Table(f"{way}, per layer" if way else "Cells, per layer", columns, rows)


def _time_table(data: GpuResult, measured: dict[str, GpuCell]) -> Table:
    names = list(dict.fromkeys(n for cell in measured.values() for n in cell["candidates"]))
    columns = [Column("cell", is_text=True), *(Column(n) for n in names)]
    rows = [
        Row([name(n), *(_time_cell(cell["candidates"].get(c)) for c in names)])
        for n, cell in measured.items()
    ]
    reasons = {
        f"{candidate}: {found['status']}: {found['reason']}"
        for cell in measured.values()
        for candidate, found in cell["candidates"].items()
        if "reason" in found
    }
    return Table("All candidates, kernel us per layer", columns, rows, sorted(reasons))


def _time_cell(candidate: dict[str, Any] | None) -> Cell:
    if candidate is None:
        return NONE
    if "kernel_us" not in candidate:
        return Cell(str(candidate.get("status")), tone="absent")
    return number(candidate["kernel_us"])


def _chain_tables(data: GpuResult) -> list[Table]:
    columns = [
        Column("cell", is_text=True),
        Column("launch mode / merge / tile classes in use", is_text=True),
        Column("us per layer"),
    ]
    rows = [
        Row([name(n), text(chain), number(found.get("us_per_layer"))])
        for n, cell in data["cells"].items()
        for chain, found in cell.get("chains", {}).items()
    ]
    return [Table("Price of launches", columns, rows)] if rows else []
