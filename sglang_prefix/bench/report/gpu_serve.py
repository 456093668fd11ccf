"""Tables of a ``make gpu-serve`` file."""

from __future__ import annotations

from typing import Any

from sglang_prefix.bench.report.cells import NONE, across, gain, name, number, share, text
from sglang_prefix.bench.report.model import Cell, Column, Row, Table, Verdict
from sglang_prefix.bench.report.schema import GpuResult

__all__ = ["serve_tables", "serve_verdicts"]

_OURS = "prefix"
Loads = dict[str, dict[str, dict[str, Any]]]


def serve_verdicts(data: GpuResult) -> list[Verdict]:
    """Time per output token against the fastest stock backend, where ours packed."""
    gains, missing = {}, {}
    for load, row in _loads(data).items():
        over, why_not = _compare(row)
        if over is None:
            missing[load] = why_not
        else:
            gains[load] = over
    turns = {n: cell for n, cell in data["cells"].items() if "ratio" in cell}
    gains |= {n: 1 / cell["ratio"] for n, cell in turns.items()}
    stock = {backend for load, row in _loads(data).items() if load in gains for backend in row}
    stock |= {cell["stock"] for cell in turns.values() if "stock" in cell}
    said = "the fastest stock backend in TPOT"
    return [Verdict("the prefix backend", said, gains, missing, stock=sorted(stock - {_OURS}))]


def serve_tables(data: GpuResult) -> list[Table]:
    """Decoding by load and backend, and what alternating engines and checks found."""
    loads = _loads(data)
    tables = [_load_table(data, loads)] if loads else []
    return tables + _other_tables(data)


def _loads(data: GpuResult) -> Loads:
    """Measured decoding by load and backend: a load's backends may lie in several cells."""
    loads: Loads = {}
    for cell_name, cell in data["cells"].items():
        load = cell.get("load", {})
        for backend, found in cell.get("measured", {}).items():
            loads.setdefault(load.get("name", cell_name), {})[backend] = found
    return loads


def _compare(row: dict[str, dict[str, Any]]) -> tuple[float | None, str]:
    """Time of the fastest stock backend over ours, or why that says nothing."""
    stock = [found["tpot_us"] for backend, found in row.items() if backend != _OURS]
    if _OURS not in row or not stock:
        return None, f"{'no stock backend' if _OURS in row else 'ours'} was measured"
    if not row[_OURS].get("packed"):
        return None, f"ours did not pack: {row[_OURS].get('not_packed_because')}"
    return min(stock) / row[_OURS]["tpot_us"], ""


def _load_table(data: GpuResult, loads: Loads) -> Table:
    backends = sorted({b for row in loads.values() for b in row if b != _OURS})
    columns = [
        Column("load", is_text=True),
        *(Column(f"{b} us", "" if b != _OURS else "time per output token") for b in backends),
        Column("prefix us", "time per output token at full batch"),
        Column("packed", "share of decode steps that read shared prefixes once"),
        Column("KV read", "KV tokens read over KV tokens of all requests"),
        Column("host us", "per step, spent on plans and on keeping them"),
        Column("over stock", "time of the fastest stock backend over ours"),
    ]
    rows = []
    for load, row in loads.items():
        ours = row.get(_OURS, {})
        over, why_not = _compare(row)
        loses = over is not None and over < 1 and not data["dry"]
        found = [
            name(load, loses=loses),
            *(number(row[b]["tpot_us"]) if b in row else NONE for b in backends),
            number(ours.get("tpot_us")),
            share(ours.get("packed_share")),
            share(ours.get("counters", {}).get("kv_read_ratio")),
            number(ours.get("host_us_per_step")),
        ]
        if over is None:
            rows.append(across(found, f"not a comparison: {why_not}", len(columns)))
        else:
            shown = gain(over, counts=not data["dry"])
            rows.append(Row([*found, shown], "losing" if loses else ""))
    return Table("Decoding at full batch", columns, rows)


def _other_tables(data: GpuResult) -> list[Table]:
    """Cells that are not one load on one engine: engines in turn, log probabilities, churn."""
    columns = [
        Column("cell", is_text=True),
        Column("status", is_text=True),
        Column("what was found", is_text=True),
    ]
    rows = []
    for cell_name, cell in data["cells"].items():
        found: Any = cell
        if "ratio_interval" in found:
            low, high = (found["ratio_interval"][end] for end in ("low", "high"))
            said = (
                f"TPOT of ours over that of {found.get('stock')}, in turn: {found['ratio']:.3f}, "
                f"interval {low:.3f} to {high:.3f}"
            )
        elif "difference" in found:
            said = ", ".join(f"{key} {_short(value)}" for key, value in found["difference"].items())
            said = f"log probabilities against stock: {said}"
        elif "guarded_steps" in found:
            said = f"{found['guarded_steps']} decode steps, guarded against waits for the device"
        else:
            continue
        slower = found.get("ratio", 1) > 1 and not data["dry"]
        loses = slower or found["status"] == "failed"
        status = Cell(found["status"], found["status"], "losing" if loses else "")
        first = name(cell_name, loses=loses)
        rows.append(Row([first, status, text(said)], "losing" if loses else ""))
    return [Table("Comparisons in turn, and checks", columns, rows)] if rows else []


def _short(value: object) -> str:
    return number(value, 2).text if isinstance(value, int | float) else str(value)
