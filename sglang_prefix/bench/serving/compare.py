"""What `bench serving` concludes from its measurements: pure functions on plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from sglang_prefix.bench.serving.workloads import Workload

__all__ = ["METRICS", "MIN_PACKED_SHARE", "SIDES", "aggregate", "compare", "new_case", "step_delta"]

SIDES = ("stock", "prefix")
METRICS = ("ttft", "tpot", "itl")
# As in the demo: the first steps of a load may run before its requests are together.
MIN_PACKED_SHARE = 0.9
_TIMES = tuple(f"{name}_ms" for name in METRICS)
_RATES = ("output_tokens_per_s", "requests_per_s", "duration_s")
_PATHS = ("packed", "stock", "fallback")
_NO_RATIOS = dict.fromkeys((*METRICS, "throughput"))


def new_case(workload: Workload) -> dict[str, Any]:
    """A case of which nothing is measured yet."""
    return {
        "name": workload.name,
        "group": workload.group,
        "about": workload.about,
        "driver": workload.driver,
        "parameters": dict(workload.parameters),
        "requests": 0,
        "tokens_compared": 0,
        "tokens_equal": None,
        "requests_equal": None,
        "is_comparison": False,
        "why_not": "not run",
        "sides": {},
        "ratios": dict(_NO_RATIOS),
        "unpacked_ratios": None,
    }


def step_delta(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> Any:
    """What a run added to the backend's counters, None for stock.

    Returns:
        "steps" (decode steps by path), "kv_tokens_read" and "kv_tokens_logical" of the packed ones
        for one layer, "reasons" for steps that were not packed.
    """
    if before is None or after is None:
        return None
    reasons: dict[str, int] = {}
    for kind in ("stock_reasons", "fallback_reasons"):
        old = before.get(kind, {})
        for reason, count in after.get(kind, {}).items():
            if count > old.get(reason, 0):
                reasons[reason] = count - old.get(reason, 0)
    tokens = ("kv_tokens_read", "kv_tokens_logical")
    return {
        "steps": {p: after.get(f"{p}_steps", 0) - before.get(f"{p}_steps", 0) for p in _PATHS},
        **{name: after.get(name, 0) - before.get(name, 0) for name in tokens},
        "reasons": reasons,
    }


def aggregate(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One side of a case from its runs: the median over them of every time and rate.

    Args:
        runs: at least one; each with times, rates and "counters" from :func:`step_delta`.
    """
    side: dict[str, Any] = {}
    for name in _TIMES:
        found = [run[name] for run in runs if run[name] is not None]
        keys = ("median", "p99")
        side[name] = {k: median(one[k] for one in found) for k in keys} if found else None
    for name in _RATES:
        side[name] = median(run[name] for run in runs)
    deltas = [run["counters"] for run in runs]
    side |= {"steps": None, "packed_share": None, "kv_read_ratio": None, "reasons": {}}
    if all(delta is not None for delta in deltas):
        steps = {p: sum(delta["steps"][p] for delta in deltas) for p in _PATHS}
        read, logical = (
            sum(delta[name] for delta in deltas) for name in ("kv_tokens_read", "kv_tokens_logical")
        )
        reasons = {name for delta in deltas for name in delta["reasons"]}
        side["steps"] = steps
        side["packed_share"] = steps["packed"] / max(sum(steps.values()), 1)
        side["kv_read_ratio"] = read / logical if logical else None
        side["reasons"] = {r: sum(d["reasons"].get(r, 0) for d in deltas) for r in sorted(reasons)}
    side["raw"] = {"runs": [dict(run) for run in runs]}
    return side


def compare(
    case: dict[str, Any],
    outputs: Mapping[str, Mapping[str, Any]],
    *,
    repeats: int,
    min_equal: float,
) -> None:
    """Decide whether a case is a comparison, and if so compare.

    Args:
        case: with "sides"; the conclusions are written into it.
        outputs: by side "tokens", the ids of each answer, "texts", of each run the hash of each
            answer, and "fingerprint" of the requests.
        repeats: runs that a side must have.
        min_equal: share of the tokens that must come before the first difference of an answer, 0
            to 1. With 1 the answers of the timed runs must be equal as well.
    """
    sides = case["sides"]
    case |= {"is_comparison": False, "ratios": dict(_NO_RATIOS), "unpacked_ratios": None}
    missing = [s for s in SIDES if s not in sides or len(sides[s]["raw"]["runs"]) < repeats]
    if missing:
        case["why_not"] = f"not run to its end: {' and '.join(missing)}"
        return
    stock, prefix = (outputs[side] for side in SIDES)
    _compare_tokens(case, stock["tokens"], prefix["tokens"])
    case["why_not"] = _objection(case, stock, prefix, min_equal)
    if case["why_not"] is None:
        share = sides["prefix"]["packed_share"]
        ratios = _ratios(sides["stock"], sides["prefix"])
        if share < MIN_PACKED_SHARE:
            reasons = ", ".join(sides["prefix"]["reasons"]) or "no reason given"
            case["why_not"] = f"only {share:.0%} of the decode steps were packed ({reasons})"
            case["unpacked_ratios"] = ratios
        else:
            case |= {"is_comparison": True, "ratios": ratios}


def _compare_tokens(
    case: dict[str, Any], stock: Sequence[Sequence[int]], prefix: Sequence[Sequence[int]]
) -> None:
    pairs = list(zip(stock, prefix, strict=False))
    case["requests"] = len(stock)
    case["tokens_compared"] = sum(len(a) for a in stock)
    case["tokens_equal"] = sum(_common(a, b) for a, b in pairs)
    case["requests_equal"] = sum(a == b for a, b in pairs)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _objection(
    case: Mapping[str, Any], stock: Mapping[str, Any], prefix: Mapping[str, Any], min_equal: float
) -> str | None:
    """Why the sides cannot be compared, apart from what was packed."""
    requests = case["requests"]
    if stock["fingerprint"] != prefix["fingerprint"]:
        return "the sides did not get the same requests"
    if len(prefix["tokens"]) != requests:
        return f"{len(prefix['tokens'])} answers for {requests} requests"
    share = case["tokens_equal"] / max(case["tokens_compared"], 1)
    if share < min_equal or (min_equal == 1 and case["requests_equal"] < requests):
        unequal = requests - case["requests_equal"]
        return f"tokens differ in {unequal} of {requests} answers ({share:.0%} of tokens agree)"
    if min_equal == 1:
        runs = [texts for one in (stock, prefix) for texts in one["texts"]]
        unequal = sum(len(set(answers)) > 1 for answers in zip(*runs, strict=True))
        if unequal:
            return f"answers of the timed runs differ in {unequal} of {requests} requests"
    if case["sides"]["prefix"]["steps"] is None:
        return "the prefix server reported no counters"
    return None


def _ratios(stock: Mapping[str, Any], prefix: Mapping[str, Any]) -> dict[str, float | None]:
    """Prefix over stock; of times the medians."""
    found: dict[str, float | None] = {}
    for name in METRICS:
        a, b = stock[f"{name}_ms"], prefix[f"{name}_ms"]
        found[name] = b["median"] / a["median"] if a and b and a["median"] else None
    rate = stock["output_tokens_per_s"]
    found["throughput"] = prefix["output_tokens_per_s"] / rate if rate else None
    return found
