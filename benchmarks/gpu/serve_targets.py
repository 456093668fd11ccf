"""What the project has promised of served models, read off the cells that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.report import NOT_RUN
from benchmarks.gpu.serve_cells import OURS

__all__ = ["NOT_PACKED", "by_load", "evaluate"]

Cells = Mapping[str, dict[str, Any]]

NOT_MEASURED = "not measured"
NOT_PACKED = "did not pack"
# The beginning of a load's name, and what its ratio to the best stock backend may be.
_RATIOS = {
    "64 x 8k": ("rollouts-64x8k", 0.45),
    "64 x 32k": ("rollouts-64x32k", 0.25),
    "16 x 2k": ("rollouts-16x2k", 0.95),
    "64 x 1k, long": ("rollouts-64x1k-out", 1.0),
}
_UNRELATED_LIMIT = 1.02
_HOST_US_LIMIT = 50
_POOL_SHARE = 0.01
_INTERVAL = 0.95
_ALTERNATIONS = 5


def by_load(cells: Cells) -> dict[str, dict[str, dict[str, Any]]]:
    """Measured decoding by load and backend, with the prompt and output tokens of the load."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in cells.values():
        for backend, measured in cell.get("measured", {}).items():
            row = found.setdefault(cell["load"]["name"], {})
            row[backend] = {**measured, "output_tokens": cell["load"]["output_tokens"]}
    return found


def evaluate(cells: Cells) -> dict[str, dict[str, Any]]:
    """Every target with "status", its value and its meaning.

    The status is met, missed, not measured, or did not pack: the gate left the batch to stock.
    """
    loads = by_load(cells)
    targets = {name: _ratio(loads, *wanted) for name, wanted in _RATIOS.items()}
    targets["unrelated"] = _unrelated(cells)
    targets["host time"] = _host_time(cells)
    targets["kv pool"] = _pool(cells)
    targets["logprobs"] = _verdict(
        cells, "logprobs", "largest difference to stock; log probabilities equal within the limits"
    )
    targets["no device sync"] = _verdict(
        cells, "churn", "200 guarded decode steps with joins and leaves wait for nothing"
    )
    return targets


def _ratio(loads: Mapping[str, Any], begins: str, limit: float) -> dict[str, Any]:
    meaning = f"TPOT over that of the best stock backend, at most {limit:.2f}"
    for name, row in loads.items():
        stock = {backend: m["tpot_us"] for backend, m in row.items() if backend != OURS}
        if not name.startswith(begins) or OURS not in row or not stock:
            continue
        ours, best = row[OURS], min(stock, key=stock.__getitem__)
        value = ours["tpot_us"] / stock[best]
        return {
            "status": _status(value <= limit) if ours["packed"] else NOT_PACKED,
            "value": value,
            "meaning": f"{meaning}; {ours['output_tokens']} tokens out",
            "best_stock": best,
            "ratios": {backend: ours["tpot_us"] / tpot for backend, tpot in stock.items()},
            "packed_share": ours["packed_share"],
            "not_packed_because": ours["not_packed_because"],
        }
    return {"status": NOT_MEASURED, "value": None, "meaning": meaning}


def _unrelated(cells: Cells) -> dict[str, Any]:
    meaning = (
        "median TPOT over stock's, interleaved; upper end of its 95% interval at most "
        f"{_UNRELATED_LIMIT}"
    )
    for cell in cells.values():
        if "ratio_interval" in cell:
            interval = cell["ratio_interval"]
            enough = interval["coverage"] >= _INTERVAL and len(cell["ratios"]) >= _ALTERNATIONS
            good = interval["high"] <= _UNRELATED_LIMIT
            return {
                "status": _status(good) if enough else NOT_MEASURED,
                "value": cell["ratio"],
                "meaning": f"{meaning}; {interval['low']:.3f} to {interval['high']:.3f}",
                "interval": interval,
                "stock": cell["stock"],
                "extra_us": cell["extra_us"],
                "extra_us_interval": cell["extra_us_interval"],
            }
    return {"status": NOT_MEASURED, "value": None, "meaning": meaning}


def _host_time(cells: Cells) -> dict[str, Any]:
    """Ours alone: what the stock backend's own preparation takes is not subtracted."""
    times = {
        name: cell["measured"][OURS]["host_us_per_step"]
        for name, cell in cells.items()
        if OURS in cell.get("measured", {})
    }
    for name, cell in cells.items():
        if "rounds" in cell:
            times[name] = max(one[OURS]["host_us_per_step"] for one in cell["rounds"])
    worst = max(times.values(), default=None)
    return {
        "status": NOT_MEASURED if worst is None else _status(worst <= _HOST_US_LIMIT),
        "value": worst,
        "meaning": f"host us per step spent on plans and on keeping them, at most {_HOST_US_LIMIT}",
        "us_per_step": times,
    }


def _pool(cells: Cells) -> dict[str, Any]:
    """Tokens of the KV pools of engines that had the device for themselves, at equal flags."""
    pools = {
        backend: described["max_total_num_tokens"]
        for cell in cells.values()
        for backend, described in cell.get("engines", {}).items()
        if len(cell["engines"]) == 1 and "max_total_tokens" not in described["arguments"]
    }
    meaning = "max_total_num_tokens over that of the stock backend it delegates to, within 1%"
    stock = [name for name in pools if name != OURS]
    if OURS not in pools or not stock:
        return {"status": NOT_MEASURED, "value": None, "meaning": meaning, "tokens": pools}
    value = pools[OURS] / pools[stock[0]]
    status = _status(abs(value - 1) <= _POOL_SHARE)
    return {"status": status, "value": value, "meaning": meaning, "tokens": pools}


def _verdict(cells: Cells, kind: str, meaning: str) -> dict[str, Any]:
    for cell in cells.values():
        if cell.get("kind") == kind and cell["status"] not in (NOT_RUN, "n/a"):
            value = cell["difference"]["max"] if kind == "logprobs" else cell["guarded_steps"]
            return {
                "status": _status(cell["status"] == "passed"),
                "value": value,
                "meaning": meaning,
            }
    return {"status": NOT_MEASURED, "value": None, "meaning": meaning}


def _status(good: bool) -> str:
    return "met" if good else "missed"
