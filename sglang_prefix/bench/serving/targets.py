"""What the project has promised of served models, read off the cases that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang_prefix.bench.serving.loads import OURS

__all__ = ["NOT_MEASURED", "NOT_PACKED", "evaluate"]

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


def evaluate(cases: Cases) -> dict[str, dict[str, Any]]:
    """Every target with "status", its value and its meaning.

    The status is met, missed, not measured, or did not pack: the gate left the batch to stock.
    """
    return {
        **{name: _ratio(cases, *wanted) for name, wanted in _RATIOS.items()},
        "unrelated": _unrelated(cases),
        "host time": _host_time(cases),
        "kv pool": _pool(cases),
        "logprobs": _logprobs(cases),
        "no device sync": _no_sync(cases),
    }


def _target(meaning: str, value: float | None = None, is_met: bool | None = None) -> dict[str, Any]:
    """A target; ``is_met`` is None where what was measured does not tell."""
    status = {None: NOT_MEASURED, True: "met", False: "missed"}[is_met]
    return {"value": value, "status": status, "meaning": meaning}


def _ratio(cases: Cases, begins: str, limit: float) -> dict[str, Any]:
    """Backends of one load may lie in several cases."""
    meaning = f"TPOT over that of the best stock backend, at most {limit:.2f}"
    measured: dict[str, Any] = {}
    for case in cases:
        if case.get("measured") and case["load"]["name"].startswith(begins):
            measured |= case["measured"]
            meaning = f"{meaning.partition(';')[0]}; {case['load']['output_tokens']} tokens out"
    ours = measured.pop(OURS, None)
    if not ours or not measured:
        return _target(meaning)
    value = ours["tpot_us"] / min(stock["tpot_us"] for stock in measured.values())
    found = _target(meaning, value, value <= limit)
    return found if ours["packed"] else found | {"status": NOT_PACKED}


def _unrelated(cases: Cases) -> dict[str, Any]:
    meaning = (
        "median TPOT over stock's, interleaved; upper end of its 95% interval at most "
        f"{_UNRELATED_LIMIT}"
    )
    for case in cases:
        if "ratio_interval" in case:
            interval = case["ratio_interval"]
            enough = interval["coverage"] >= _INTERVAL and len(case["ratios"]) >= _ALTERNATIONS
            is_met = interval["high"] <= _UNRELATED_LIMIT if enough else None
            meaning += f"; {interval['low']:.3f} to {interval['high']:.3f}"
            return _target(meaning, case["ratio"], is_met)
    return _target(meaning)


def _host_time(cases: Cases) -> dict[str, Any]:
    """Ours alone: what the stock backend's own preparation takes is not subtracted."""
    meaning = f"host us per step spent on plans and on keeping them, at most {_HOST_US_LIMIT}"
    runs = [run for case in cases for run in case.get("rounds", [case.get("measured", {})])]
    worst = max((run[OURS]["host_us_per_step"] for run in runs if OURS in run), default=None)
    return _target(meaning, worst, None if worst is None else worst <= _HOST_US_LIMIT)


def _pool(cases: Cases) -> dict[str, Any]:
    """Tokens of the KV pools of engines that had the device for themselves, at equal flags."""
    meaning = "max_total_num_tokens over that of the stock backend it delegates to, within 1%"
    pools = {
        backend: described["max_total_num_tokens"]
        for case in cases
        for backend, described in case.get("engines", {}).items()
        if len(case["engines"]) == 1 and "max_total_tokens" not in described["arguments"]
    }
    ours = pools.pop(OURS, None)
    if not ours or not pools:
        return _target(meaning)
    value = ours / next(iter(pools.values()))
    return _target(meaning, value, abs(value - 1) <= _POOL_SHARE)


def _logprobs(cases: Cases) -> dict[str, Any]:
    meaning = "largest difference to stock; log probabilities equal within the limits"
    for case in cases:
        if case.get("kind") == "logprobs":
            return _target(meaning, case["difference"]["max"], case["status"] == "passed")
    return _target(meaning)


def _no_sync(cases: Cases) -> dict[str, Any]:
    meaning = "200 guarded decode steps with joins and leaves wait for nothing"
    for case in cases:
        if case.get("kind") == "churn" and case["status"] != "n/a":
            return _target(meaning, case["guarded_steps"], case["status"] == "passed")
    return _target(meaning)
