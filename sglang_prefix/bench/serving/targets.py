"""What the project has promised of served models, read off the cases that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang_prefix.bench.serving.loads import OURS

__all__ = ["NOT_MEASURED", "NOT_PACKED", "by_load", "evaluate"]

Cases = Sequence[Mapping[str, Any]]

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


def by_load(cases: Cases) -> dict[str, dict[str, dict[str, Any]]]:
    """Measured decoding by load and backend, with the output tokens of the load."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for case in cases:
        for backend, measured in case.get("measured", {}).items():
            row = found.setdefault(case["load"]["name"], {})
            row[backend] = {**measured, "output_tokens": case["load"]["output_tokens"]}
    return found


def evaluate(cases: Cases) -> dict[str, dict[str, Any]]:
    """Every target with "status", its value and its meaning.

    The status is met, missed, not measured, or did not pack: the gate left the batch to stock.
    """
    loads = by_load(cases)
    return {
        **{name: _ratio(loads, *wanted) for name, wanted in _RATIOS.items()},
        "unrelated": _unrelated(cases),
        "host time": _host_time(cases),
        "kv pool": _pool(cases),
        "logprobs": _logprobs(cases),
        "no device sync": _no_sync(cases),
    }


def _target(value: float | None, is_met: bool | None, meaning: str, **more: Any) -> dict[str, Any]:
    """A target; ``is_met`` is None where what was measured does not tell."""
    status = {None: NOT_MEASURED, True: "met", False: "missed"}[is_met]
    return {"value": value, "status": status, "meaning": meaning, **more}


def _ratio(loads: Mapping[str, Any], begins: str, limit: float) -> dict[str, Any]:
    meaning = f"TPOT over that of the best stock backend, at most {limit:.2f}"
    for name, row in loads.items():
        stock = {backend: m["tpot_us"] for backend, m in row.items() if backend != OURS}
        if not name.startswith(begins) or OURS not in row or not stock:
            continue
        ours, best = row[OURS], min(stock, key=stock.__getitem__)
        value = ours["tpot_us"] / stock[best]
        found = _target(
            value,
            value <= limit,
            f"{meaning}; {ours['output_tokens']} tokens out",
            best_stock=best,
            ratios={backend: ours["tpot_us"] / tpot for backend, tpot in stock.items()},
            packed_share=ours["packed_share"],
            not_packed_because=ours["not_packed_because"],
        )
        return found if ours["packed"] else found | {"status": NOT_PACKED}
    return _target(None, None, meaning)


def _unrelated(cases: Cases) -> dict[str, Any]:
    meaning = (
        "median TPOT over stock's, interleaved; upper end of its 95% interval at most "
        f"{_UNRELATED_LIMIT}"
    )
    for case in cases:
        if "ratio_interval" in case:
            interval = case["ratio_interval"]
            enough = interval["coverage"] >= _INTERVAL and len(case["ratios"]) >= _ALTERNATIONS
            return _target(
                case["ratio"],
                interval["high"] <= _UNRELATED_LIMIT if enough else None,
                f"{meaning}; {interval['low']:.3f} to {interval['high']:.3f}",
                interval=interval,
                stock=case["stock"],
                extra_us=case["extra_us"],
                extra_us_interval=case["extra_us_interval"],
            )
    return _target(None, None, meaning)


def _host_time(cases: Cases) -> dict[str, Any]:
    """Ours alone: what the stock backend's own preparation takes is not subtracted."""
    times: dict[str, float] = {}
    for case in cases:
        runs = case.get("rounds", [case.get("measured", {})])
        if found := [run[OURS]["host_us_per_step"] for run in runs if OURS in run]:
            times[case["name"]] = max(found)
    worst = max(times.values(), default=None)
    meaning = f"host us per step spent on plans and on keeping them, at most {_HOST_US_LIMIT}"
    is_met = None if worst is None else worst <= _HOST_US_LIMIT
    return _target(worst, is_met, meaning, us_per_step=times)


def _pool(cases: Cases) -> dict[str, Any]:
    """Tokens of the KV pools of engines that had the device for themselves, at equal flags."""
    pools = {
        backend: described["max_total_num_tokens"]
        for case in cases
        for backend, described in case.get("engines", {}).items()
        if len(case["engines"]) == 1 and "max_total_tokens" not in described["arguments"]
    }
    stock = [tokens for backend, tokens in pools.items() if backend != OURS]
    value = pools[OURS] / stock[0] if OURS in pools and stock else None
    is_met = None if value is None else abs(value - 1) <= _POOL_SHARE
    meaning = "max_total_num_tokens over that of the stock backend it delegates to, within 1%"
    return _target(value, is_met, meaning, tokens=pools)


def _logprobs(cases: Cases) -> dict[str, Any]:
    meaning = "largest difference to stock; log probabilities equal within the limits"
    for case in cases:
        if case.get("kind") == "logprobs":
            return _target(case["difference"]["max"], case["status"] == "passed", meaning)
    return _target(None, None, meaning)


def _no_sync(cases: Cases) -> dict[str, Any]:
    meaning = "200 guarded decode steps with joins and leaves wait for nothing"
    for case in cases:
        if case.get("kind") == "churn" and case["status"] != "n/a":
            return _target(case["guarded_steps"], case["status"] == "passed", meaning)
    return _target(None, None, meaning)
