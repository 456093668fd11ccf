"""What `bench serving` concludes from its measurements: pure functions on plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import comb
from statistics import fmean, median
from typing import Any

from sglang_prefix.bench.engine import counter_difference
from sglang_prefix.bench.serving.workloads import Workload

__all__ = [
    "METRICS",
    "MIN_PACKED_SHARE",
    "SIDES",
    "aggregate",
    "compare",
    "compare_logprobs",
    "decode_times",
    "median_interval",
    "new_case",
    "step_delta",
]

SIDES = ("stock", "prefix")
METRICS = ("ttft", "tpot", "itl")
# As in the demo: the first steps of a load may run before its requests are together.
MIN_PACKED_SHARE = 0.9
_TIMES = tuple(f"{name}_ms" for name in METRICS)
_RATES = ("output_tokens_per_s", "requests_per_s", "duration_s")
_PATHS = ("packed", "stock", "fallback")
_KV_TOKENS = ("read", "logical")
_NO_RATIOS = dict.fromkeys((*METRICS, "throughput"))

_LogProbs = Sequence[Sequence[Mapping[str, float]]]


def new_case(workload: Workload) -> dict[str, Any]:
    """A case of which nothing is measured yet."""
    return {
        **asdict(workload),
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
        "steps" by path: decode steps, and verify passes, which decode where drafts are checked;
        "kv_tokens_read" and "kv_tokens_logical" of the packed ones for one layer; "reasons" for
        those that were not packed; "extends" by path.
    """
    if before is None or after is None:
        return None
    added = counter_difference(before, after)
    kinds = added, added.get("verify", {})
    reasons = [kind.get(f"{path}_reasons", {}) for kind in kinds for path in ("stock", "fallback")]

    def total(name: str) -> int:
        return sum(kind.get(name, 0) for kind in kinds)

    return {
        "steps": {path: total(f"{path}_steps") for path in _PATHS},
        **{f"kv_tokens_{name}": total(f"kv_tokens_{name}") for name in _KV_TOKENS},
        "reasons": dict(sum(map(Counter, reasons), Counter())),
        "extends": {path: added.get("extend", {}).get(f"{path}_steps", 0) for path in _PATHS},
    }


def aggregate(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One side of a case from its runs: the median over them of every time and rate.

    Args:
        raw: "fingerprint" of the requests; "tokens", of each answer its ids in a line; "runs", at
            least one, each with times, rates, "texts", the hash of each answer, and "counters"
            from :func:`step_delta`.
    """
    runs = raw["runs"]
    side: dict[str, Any] = {}
    for name in _TIMES:
        found = [run[name] for run in runs if run[name] is not None]
        keys = ("median", "p99")
        side[name] = {k: median(one[k] for one in found) for k in keys} if found else None
    for name in _RATES:
        side[name] = median(run[name] for run in runs)
    side |= {
        "steps": None,
        "extends": None,
        "packed_share": None,
        "kv_read_ratio": None,
        "reasons": {},
        "raw": raw,
    }
    deltas = [run["counters"] for run in runs]
    if all(delta is not None for delta in deltas):
        steps = {p: sum(delta["steps"][p] for delta in deltas) for p in _PATHS}
        read, logical = (sum(d[f"kv_tokens_{name}"] for d in deltas) for name in _KV_TOKENS)
        side["steps"] = steps
        if all("extends" in delta for delta in deltas):  # files of before have none
            side["extends"] = {p: sum(delta["extends"][p] for delta in deltas) for p in _PATHS}
        side["packed_share"] = steps["packed"] / max(sum(steps.values()), 1)
        side["kv_read_ratio"] = read / logical if logical else None
        side["reasons"] = dict(sum((Counter(d["reasons"]) for d in deltas), Counter()))
    return side


def compare(case: dict[str, Any], *, repeats: int, min_equal: float) -> None:
    """Decide whether a case is a comparison, and if so compare.

    Args:
        case: with "sides" from :func:`aggregate`; the conclusions are written into it.
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
    case["why_not"] = _objection(case, min_equal)
    if case["why_not"] is None:
        share = sides["prefix"]["packed_share"]
        ratios = _ratios(sides["stock"], sides["prefix"])
        if share < MIN_PACKED_SHARE:
            reasons = ", ".join(sides["prefix"]["reasons"]) or "no reason given"
            case["why_not"] = f"only {share:.0%} of the decode steps were packed ({reasons})"
            case["unpacked_ratios"] = ratios
        else:
            case |= {"is_comparison": True, "ratios": ratios}


def _objection(case: dict[str, Any], min_equal: float) -> str | None:
    """Compare the answers; why the sides cannot be compared, apart from what was packed."""
    stock, prefix = (case["sides"][side]["raw"] for side in SIDES)
    answers = [[line.split() for line in raw["tokens"]] for raw in (stock, prefix)]
    pairs = list(zip(*answers, strict=False))
    requests = len(stock["tokens"])
    case["requests"] = requests
    case["tokens_compared"] = sum(map(len, answers[0]))
    case["tokens_equal"] = sum(_common(a, b) for a, b in pairs)
    case["requests_equal"] = sum(a == b for a, b in pairs)
    if stock["fingerprint"] != prefix["fingerprint"]:
        return "the sides did not get the same requests"
    texts = [run["texts"] for raw in (stock, prefix) for run in raw["runs"]]
    wrong = [len(one) for one in (prefix["tokens"], *texts) if len(one) != requests]
    if wrong:
        return f"{wrong[0]} answers for {requests} requests"
    share = case["tokens_equal"] / max(case["tokens_compared"], 1)
    unequal = requests - case["requests_equal"]
    if share < min_equal or (min_equal == 1 and unequal):
        return f"tokens differ in {unequal} of {requests} answers ({share:.0%} of tokens agree)"
    unequal = sum(len(set(said)) > 1 for said in zip(*texts, strict=True))
    if min_equal == 1 and unequal:
        return f"answers of the timed runs differ in {unequal} of {requests} requests"
    if case["sides"]["prefix"]["steps"] is None:
        return "the prefix server reported no counters"
    return None


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    pairs = zip(a, b, strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _ratios(stock: Mapping[str, Any], prefix: Mapping[str, Any]) -> dict[str, float | None]:
    """Prefix over stock; of times the medians."""
    found: dict[str, float | None] = {}
    for name in METRICS:
        a, b = stock[f"{name}_ms"], prefix[f"{name}_ms"]
        found[name] = b["median"] / a["median"] if a and b and a["median"] else None
    rate = stock["output_tokens_per_s"]
    found["throughput"] = prefix["output_tokens_per_s"] / rate if rate else None
    return found


def decode_times(answer: dict[str, Any], *, ours: bool) -> dict[str, Any]:
    """Times per output token from `engine_calls.decode`; for ours also who served the steps.

    Raises:
        ValueError: all requests never decoded at once.
    """
    steps = answer["step_us"]
    if not steps:
        raise ValueError("at no time did all requests decode")
    found = {"tpot_us": fmean(steps), "median_step_us": median(steps), "num_steps": len(steps)}
    if ours:
        counters = answer["counters"]
        total = max(sum(counters[f"{path}_steps"] for path in _PATHS), 1)
        share = counters["packed_steps"] / total
        host = counters["plan_seconds"] + counters["reused_plan_seconds"]
        found |= {
            "packed_share": share,
            "packed": share >= MIN_PACKED_SHARE,
            "not_packed_because": counters["stock_reasons"] | counters["fallback_reasons"],
            "host_us_per_step": host / total * 1e6,
        }
    return found | answer


def compare_logprobs(first: _LogProbs, second: _LogProbs) -> dict[str, Any]:
    """Differences of decoded tokens, request by request up to the first token that differs.

    At that place the two still follow the same text. The first token of all is prefill's.

    Args:
        first, second: by request and position log probabilities by token, the chosen token first.
    """
    deltas: list[float] = []
    num_positions = num_equal = 0
    for ours, theirs in zip(first, second, strict=True):
        for position, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if position:
                num_positions += 1
                deltas += [abs(a[token] - b[token]) for token in a.keys() & b.keys()]
            if next(iter(a)) != next(iter(b)):
                break
        else:
            num_equal += 1
    return {
        "requests": len(first),
        "requests_equal": num_equal,
        "positions": num_positions,
        "values": len(deltas),
        "mean": fmean(deltas) if deltas else 0.0,
        "max": max(deltas, default=0.0),
    }


def median_interval(values: list[float]) -> dict[str, float]:
    """An interval for the median that assumes nothing of the distribution, and what it covers.

    Its ends are values of the sample, as far inside as at least 95% allow. Fewer than six values
    cannot cover as much.
    """
    ordered, count = sorted(values), len(values)
    # Probability that at most `rank` of the values lie below the median, twice.
    outside = [sum(comb(count, i) for i in range(rank + 1)) / 2**count * 2 for rank in range(count)]
    rank = max((r for r, p in enumerate(outside) if p <= 0.05), default=0)
    return {
        "low": ordered[rank],
        "high": ordered[count - 1 - rank],
        "coverage": max(0.0, 1 - outside[rank]),
    }
