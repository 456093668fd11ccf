"""What a kernel case says of ours against others: pure functions on cases of result files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_prefix.bench.tables import geomean

__all__ = ["fastest", "of_kind", "our_provider", "over", "over_unshared", "provider_of"]

Case = Mapping[str, Any]

_DEFAULT_POLICY, _UNSHARED = "pat", "query"
# Where it can be compiled, it serves, and torch's is there for comparison.
_SERVING = "native"


def our_provider(data: Case) -> str | None:
    """The one of ours with the run's first policy, on the executor that serves where both ran.

    If that leaves several, as launch modes on a GPU, the fastest over most cases. One for all
    cases: the best of ours in each case would be chosen with its result in hand.
    """
    policy = next(iter(data.get("options", {}).get("policies", [])), _DEFAULT_POLICY)
    ours = [pair for case in data["cases"] for pair in of_kind(case, "ours").items()]
    default = [(n, p) for n, p in ours if p.get("policy") == policy]
    default = [(n, p) for n, p in default if p["executor"] == _SERVING] or default
    times: dict[str, list[float]] = {}
    for name, provider in default or ours:
        times.setdefault(name, []).append(provider["kernel_us"] or provider["ms"])
    most = max(map(len, times.values()), default=0)
    means = {name: geomean(us) or 0.0 for name, us in times.items() if len(us) == most}
    return min(means, key=means.__getitem__) if means else None


def provider_of(case: Case, name: str | None) -> Case:
    """What a provider reached in a case; empty where it was not measured."""
    found: Case = case["providers"].get(name or "", {})
    return found


def of_kind(case: Case, kind: str) -> dict[str, Case]:
    """Providers of a kind ("ours", "stock", "peer"), or the one of that name."""
    return {n: p for n, p in case["providers"].items() if kind in (n, p["kind"])}


def fastest(case: Case, kind: str, time: str = "ms") -> str | None:
    """The fastest provider of a kind by a time that it has, or None."""
    found = {n: p[time] for n, p in of_kind(case, kind).items() if p.get(time) is not None}
    return min(found, key=found.__getitem__, default=None)


def over(case: Case, ours: str | None, kind: str, time: str = "ms") -> float | None:
    """How many times ours is faster than the fastest of a kind; None if either was not timed."""
    mine = provider_of(case, ours).get(time)
    theirs = provider_of(case, fastest(case, kind, time)).get(time)
    return theirs / mine if mine and theirs else None


def over_unshared(case: Case, ours: str | None) -> float | None:
    """How many times ours is faster than its own executor without sharing, policy ``query``.

    None where ours is just that.
    """
    mine = provider_of(case, ours)
    if not mine or mine.get("policy") == _UNSHARED:
        return None
    same = ("executor", "mode", "merge")
    for other in of_kind(case, "ours").values():
        if other.get("policy") == _UNSHARED and all(other.get(k) == mine.get(k) for k in same):
            return float(other["ms"] / mine["ms"])
    return None
