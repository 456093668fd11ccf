"""What the project has promised of kernels, read off the cases that were measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import exp, log
from typing import Any

from sglang_prefix.bench.comparison import of_kind, our_provider, over

__all__ = ["evaluate", "us_per_layer"]

Case = Mapping[str, Any]
# (case, ours, theirs): both in us per layer.
Pairs = list[tuple[str, float, float]]

# Layers that share one plan, or one step's metadata: a usual depth.
_LAYERS = 32
_WIDE_BYTES = 256 << 20
_ALONE = ("unrelated", "long")


def us_per_layer(provider: Mapping[str, Any], *, plans: bool = True) -> float:
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
    targets = _own_targets(data, ours)
    if data["dry"] or data["environment"]["device"] == "cuda":
        targets |= _gpu_targets(data["cases"], ours)
    return targets


def _own_targets(data: Mapping[str, Any], ours: str | None) -> dict[str, dict[str, Any]]:
    targets = {}
    for case in data["cases"]:
        speedup = over(case, ours, "stock")
        if case["target"] is not None and speedup is not None:
            targets[case["name"]] = {
                "value": speedup,
                "status": "met" if speedup >= case["target"] else "missed",
                "meaning": f"fastest stock over ours, at least {case['target']:g}",
            }
    return targets


def _gpu_targets(cases: list[Case], ours: str | None) -> dict[str, dict[str, Any]]:
    def pairs(wanted: Callable[[Case], bool], kind: str, *, plans: bool | None = None) -> Pairs:
        """Ours and the fastest of a kind, on the cases that have both; kernels alone for None."""

        def time(found: Mapping[str, Any]) -> float:
            kernel: float = found["kernel_us"]
            return kernel if plans is None else us_per_layer(found, plans=plans)

        both = [(c["name"], of_kind(c, ours or ""), of_kind(c, kind)) for c in cases if wanted(c)]
        return [
            (name, time(mine[ours or ""]), min(map(time, theirs.values())))
            for name, mine, theirs in both
            if mine and theirs
        ]

    targets = {
        "read bandwidth": _bandwidth(cases, ours),
        "sharing trees": _geomean(3.0, pairs(_is_tree, "stock", plans=True), expected=72),
        "cascade": _every(1.0, pairs(_any, "flashinfer-cascade")),
        "fasttree": _every(1.0, pairs(_any, "fasttree")),
        "nothing shared": _every(0.97, pairs(_is_alone, "stock", plans=True)),
        "fixed cost": _fixed_cost(
            {
                name: pairs(_is_fixed, "stock", plans=plans)
                for name, plans in (("plan", True), ("kept", False), ("kernel", None))
            }
        ),
    }
    kept = {
        "sharing trees": _geomean(3.0, pairs(_is_tree, "stock", plans=False), expected=72),
        "nothing shared": _every(0.97, pairs(_is_alone, "stock", plans=False)),
    }
    meaning = {
        "read bandwidth": "unique KV bytes over kernel time, at least 0.80 of the bandwidth read "
        "in the same run, on every case with 256 MiB of unique KV or more",
        "sharing trees": "geometric mean of fastest stock over ours, a plan per step included, at "
        "least 3 over the 18 sharing trees in 4 head configurations, page size 1",
        "cascade": "FlashInfer's cascade over ours, kernels alone, at least 1 in every case",
        "fasttree": "FastTree over ours, kernels alone, at least 1 in every case",
        "nothing shared": "fastest stock over ours, a plan per step included, at least 0.97",
        "fixed cost": "ours with a plan per step, at most the fastest stock call with its metadata "
        "spread over 32 layers + 2 us, at batch 8, 512 shared, 1 KV head",
    }
    for name, target in targets.items():
        target |= {"meaning": meaning[name], "ours": ours}
        if name in kept:
            target["with_the_plan_kept"] = kept[name]
    return targets


def _any(case: Case) -> bool:
    return True


def _is_tree(case: Case) -> bool:
    return bool(case["group"] == "trees" and case["page_size"] == 1)


def _is_alone(case: Case) -> bool:
    return case["group"] in _ALONE


def _is_fixed(case: Case) -> bool:
    small = case["heads"]["kv"] == 1 and case["batch"] == 8
    return bool(case["group"] == "fixed" and case["page_size"] == 1 and small)


def _every(least: float, pairs: Pairs) -> dict[str, Any]:
    """Theirs over ours is at least ``least`` in every case."""
    return _all_at_least(least, {name: theirs / ours for name, ours, theirs in pairs})


def _all_at_least(least: float, values: Mapping[str, float]) -> dict[str, Any]:
    missed = {name: value for name, value in values.items() if value < least}
    return {
        "value": min(values.values(), default=None),
        "status": _status(values, not missed),
        "cases": len(values),
        "missed": missed,
    }


def _geomean(least: float, pairs: Pairs, expected: int) -> dict[str, Any]:
    ratios = {name: theirs / ours for name, ours, theirs in pairs}
    value = exp(sum(map(log, ratios.values())) / len(ratios)) if ratios else None
    return {
        "value": value,
        "status": _status(ratios, value is not None and value >= least),
        "cases": len(ratios),
        "expected_cases": expected,
        "missed": {name: ratio for name, ratio in ratios.items() if ratio < 1},
    }


def _bandwidth(cases: list[Case], ours: str | None) -> dict[str, Any]:
    shares = {}
    for case in cases:
        kv_bytes = case["bytes"]["ideal"]
        if (mine := of_kind(case, ours or "")) and kv_bytes >= _WIDE_BYTES:
            at_bandwidth = kv_bytes / case["bandwidth_gb_s"] / 1e3
            shares[case["name"]] = at_bandwidth / mine[ours or ""]["kernel_us"]
    return _all_at_least(0.8, shares)


def _fixed_cost(pairs: Mapping[str, Pairs]) -> dict[str, Any]:
    over = {
        what: {name: ours - theirs for name, ours, theirs in found} for what, found in pairs.items()
    }
    every_step = over["plan"]
    return {
        "value": max(every_step.values(), default=None),
        "status": _status(every_step, all(us <= 2 for us in every_step.values())),
        "us_over_fastest_stock": over,
    }


def _status(measured: Mapping[str, float], good: bool) -> str:
    if not measured:
        return "not measured"
    return "met" if good else "missed"
