"""What the project has promised of kernels, read off the cases that were measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import truediv
from typing import Any

from sglang_prefix.bench.comparison import of_kind, our_provider, over, provider_of
from sglang_prefix.bench.tables import geomean

__all__ = ["evaluate", "us_per_layer"]

Case = Mapping[str, Any]
Provider = Mapping[str, Any]
Values = dict[str, float]  # by case

# Layers that share one plan, or one step's metadata: a usual depth.
_LAYERS = 32
_WIDE_BYTES = 256 << 20


def us_per_layer(provider: Provider, *, plans: bool = True) -> float:
    """Time of a layer with its share of what is done once per step, in us.

    Args:
        provider: of a result.
        plans: a new plan in every step; else, of ours, the last step's plan.
    """
    parts = [provider["append_ms"]]
    if plans or provider["kind"] != "ours":
        parts += [provider["plan_ms"], provider["copy_ms"]]
    per_step = sum(part or 0.0 for part in parts)
    return float(provider["kernel_us"] + per_step * 1e3 / _LAYERS)


def evaluate(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every target with "value", "status" and "meaning", and where it was read.

    Targets of a GPU where the result is one of a GPU, or of a dry run; of a CPU those that cases
    bring along.
    """
    ours = our_provider(data)
    targets = {}
    for case in data["cases"]:
        speedup = over(case, ours, "stock")
        if case["target"] is not None and speedup is not None:
            meaning = f"fastest stock over ours, at least {case['target']:g}"
            targets[case["name"]] = _target(meaning, speedup, speedup >= case["target"])
    if data["dry"] or data["environment"]["device"] == "cuda":
        targets |= _gpu_targets(data["cases"], ours)
    return targets


def _gpu_targets(cases: Sequence[Case], ours: str | None) -> dict[str, dict[str, Any]]:
    trees = [case for case in cases if case["group"] == "trees" and case["page_size"] == 1]
    alone = [case for case in cases if case["group"] in ("unrelated", "long")]
    small = [case for case in cases if _is_small(case)]
    bandwidth = {}
    for case in cases:
        mine, kv_bytes = provider_of(case, ours), case["bytes"]["ideal"]
        if mine and kv_bytes >= _WIDE_BYTES:
            bandwidth[case["name"]] = kv_bytes / case["bandwidth_gb_s"] / 1e3 / mine["kernel_us"]
    cost = {
        what: _of_both(small, ours, "stock", time, lambda theirs, mine: mine - theirs)
        for what, time in (("plan", us_per_layer), ("kept", _kept), ("kernel", _kernel))
    }
    return {
        "read bandwidth": _every(
            "unique KV bytes over kernel time, at least 0.80 of the bandwidth read in the same "
            "run, on every case with 256 MiB of unique KV or more",
            bandwidth,
            0.8,
        ),
        "sharing trees": _geomean(
            "geometric mean of fastest stock over ours, a plan per step included, at least 3 over "
            "the 18 sharing trees in 4 head configurations, page size 1",
            _of_both(trees, ours, "stock", us_per_layer),
            3,
            expected_cases=18 * 4,
            with_the_plan_kept=_geomean("", _of_both(trees, ours, "stock", _kept), 3),
        ),
        "cascade": _every(
            "FlashInfer's cascade over ours, kernels alone, at least 1 in every case",
            _of_both(cases, ours, "flashinfer-cascade", _kernel),
            1,
        ),
        "fasttree": _every(
            "FastTree over ours, kernels alone, at least 1 in every case",
            _of_both(cases, ours, "fasttree", _kernel),
            1,
        ),
        "nothing shared": _every(
            "fastest stock over ours, a plan per step included, at least 0.97",
            _of_both(alone, ours, "stock", us_per_layer),
            0.97,
            with_the_plan_kept=_every("", _of_both(alone, ours, "stock", _kept), 0.97),
        ),
        "fixed cost": _target(
            "ours with a plan per step, at most the fastest stock call with its metadata spread "
            "over 32 layers + 2 us, at batch 8, 512 shared, 1 KV head",
            max(cost["plan"].values(), default=None),
            all(us <= 2 for us in cost["plan"].values()),
            us_over_fastest_stock=cost,
        ),
    }


def _is_small(case: Case) -> bool:
    is_tiny = case["heads"]["kv"] == 1 and case["batch"] == 8
    return bool(case["group"] == "fixed" and case["page_size"] == 1 and is_tiny)


def _kernel(provider: Provider) -> float:
    return float(provider["kernel_us"])


def _kept(provider: Provider) -> float:
    return us_per_layer(provider, plans=False)


def _of_both(
    cases: Sequence[Case],
    ours: str | None,
    kind: str,
    time: Callable[[Provider], float],
    compare: Callable[[float, float], float] = truediv,
) -> Values:
    """Compare the time of the fastest of a kind with that of ours, on the cases that have both."""
    found = {}
    for case in cases:
        mine, theirs = provider_of(case, ours), of_kind(case, kind)
        if mine and theirs:
            found[case["name"]] = compare(min(map(time, theirs.values())), time(mine))
    return found


def _every(meaning: str, values: Values, least: float, **more: Any) -> dict[str, Any]:
    """Met if all are at least so large; the worst counts."""
    missed = {name: value for name, value in values.items() if value < least}
    worst = min(values.values(), default=None)
    return _target(meaning, worst, not missed, cases=len(values), missed=missed, **more)


def _geomean(meaning: str, ratios: Values, least: float, **more: Any) -> dict[str, Any]:
    """Met if the geometric mean is at least so large."""
    value = geomean(ratios.values())
    missed = {name: ratio for name, ratio in ratios.items() if ratio < 1}
    good = value is not None and value >= least
    return _target(meaning, value, good, cases=len(ratios), missed=missed, **more)


def _target(meaning: str, value: float | None, good: bool, **more: Any) -> dict[str, Any]:
    status = "not measured" if value is None else "met" if good else "missed"
    return {"value": value, "status": status, "meaning": meaning, **more}
