"""One cell of `serve`: what is asked of the engines, and what is made of their answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import comb
from statistics import fmean, median
from typing import Any

from benchmarks.gpu.report import NOT_RUN
from benchmarks.gpu.serve_cells import OURS, Cell
from benchmarks.gpu.serve_engine import CallIsOverError, EngineProcess, Engines

__all__ = ["compare_logprobs", "measure_cell", "median_interval", "summarise"]

Answers = list[list[dict[str, float]]]

# A comparison that claims sharing needs at least this share of packed steps.
_PACKED_SHARE = 0.9
# Logits between 4 and 8 stand in steps of 2**-5 in bfloat16, so each side is off by up to 2**-6
# before anything else is. Attention rounds its output to 8 bits in each of 32 layers, which moves
# them again by about as much; the largest of thousands of differences is some times their mean.
MEAN_LIMIT, MAX_LIMIT = 0.03, 0.25
# Where the stock backend differs from itself, one request at a time, by more than half of that, the
# limit is so many times its own difference.
_OWN_NOISE_FACTOR = 2
_LEAST_GUARDED_STEPS = 200


def measure_cell(cell: Cell, engines: Engines) -> dict[str, Any]:
    """Run a cell; one that the time of the call did not suffice for is as if not begun."""
    try:
        alive = engines.get(cell.group, cell.backends)
        result = _KINDS[cell.kind](cell, engines, alive)
    except CallIsOverError as error:
        engines.stop()
        return {"status": NOT_RUN, "reason": str(error)}
    except Exception:
        engines.stop()  # whatever is wrong with them, the next cell gets fresh ones
        raise
    return {
        **result,
        "kind": cell.kind,
        "load": asdict(cell.load),
        "shares": cell.load.shares,
        "engines": {name: engine.description for name, engine in alive.items()},
    }


def _decode(cell: Cell, engines: Engines, alive: Mapping[str, EngineProcess]) -> dict[str, Any]:
    measured = {}
    for name, engine in alive.items():
        engine.ask("prepare", engines.deadline, load=asdict(cell.load))
        answer = engine.ask("decode", engines.deadline, load=asdict(cell.load))
        measured[name] = summarise(answer, ours=name == OURS)
    return {"status": "done", "measured": measured}


def _alternate(cell: Cell, engines: Engines, alive: Mapping[str, EngineProcess]) -> dict[str, Any]:
    load = asdict(cell.load)
    for engine in alive.values():
        engine.ask("prepare", engines.deadline, load=load)
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(cell.rounds):
        order = list(alive)[:: 1 if number % 2 else -1]
        rounds.append(
            {
                name: summarise(
                    alive[name].ask("decode", engines.deadline, load=load), ours=name == OURS
                )
                for name in order
            }
        )
    ours, stock = cell.backends
    ratios = [one[ours]["tpot_us"] / one[stock]["tpot_us"] for one in rounds]
    extra = [one[ours]["tpot_us"] - one[stock]["tpot_us"] for one in rounds]
    return {
        "status": "done",
        "rounds": rounds,
        "stock": stock,
        "ratios": ratios,
        "ratio": median(ratios),
        "ratio_interval": median_interval(ratios),
        "extra_us": median(extra),
        "extra_us_interval": median_interval(extra),
    }


def _logprobs(cell: Cell, engines: Engines, alive: Mapping[str, EngineProcess]) -> dict[str, Any]:
    load = asdict(cell.load)
    ours, stock = cell.backends
    answers: dict[str, Answers] = {}
    counters: dict[str, Any] = {}
    for name, engine in alive.items():
        engine.ask("prepare", engines.deadline, load=load)
        before = engine.ask("counters", engines.deadline)
        answers[name] = engine.ask("logprobs", engines.deadline, load=load, together=True)
        if name == ours:
            after = engine.ask("counters", engines.deadline)
            counters = {key: after[key] - before[key] for key in ("packed_steps", "plans")}
    alone = alive[stock].ask("logprobs", engines.deadline, load=load, together=False)
    found = compare_logprobs(answers[ours], answers[stock])
    noise = compare_logprobs(answers[stock], alone)
    limits = {
        "mean": max(MEAN_LIMIT, _OWN_NOISE_FACTOR * noise["mean"]),
        "max": max(MAX_LIMIT, _OWN_NOISE_FACTOR * noise["max"]),
    }
    passed = found["values"] > 0 and all(found[key] <= limit for key, limit in limits.items())
    return {
        "status": "passed" if passed else "failed",
        **({} if passed else {"reason": f"differences {found}, limits {limits}"}),
        "difference": found,
        "stock_against_itself_one_by_one": noise,
        "limits": limits,
        "counters": counters,
        "answers": {**answers, f"{stock} one by one": alone},
    }


def _churn(cell: Cell, engines: Engines, alive: Mapping[str, EngineProcess]) -> dict[str, Any]:
    load = asdict(cell.load)
    engine = alive[OURS]
    engine.ask("prepare", engines.deadline, load=load)
    if not engines.sync_file.exists():
        raise RuntimeError("the guard was not loaded: did Python start without sitecustomize?")
    before = json.loads(engines.sync_file.read_text())
    found = engine.ask("churn", engines.deadline, load=load)
    seen = json.loads(engines.sync_file.read_text())
    steps = seen["steps"] - before["steps"]
    counters = found["counters"]
    problems = list(seen["raised"])
    if "error" in counters["fallback_reasons"]:
        problems.append(f"planning failed in {counters['fallback_reasons']['error']} steps")
    if seen["on_gpu"]:
        if seen["control"] is not True:
            problems.append("a planted wait did not raise, so the guard proves nothing")
        if steps < _LEAST_GUARDED_STEPS:
            problems.append(f"only {steps} steps were guarded; at least {_LEAST_GUARDED_STEPS}")
        if not counters["packed_steps"]:
            problems.append("no step was packed")
    return {
        "status": "failed" if problems else "passed" if seen["on_gpu"] else "n/a",
        **({"reason": "; ".join(problems)} if problems else {}),
        "guarded_steps": steps,
        "guard": seen,
        **found,
    }


_Kind = Callable[[Cell, Engines, Mapping[str, EngineProcess]], dict[str, Any]]
_KINDS: dict[str, _Kind] = {
    "decode": _decode,
    "alternate": _alternate,
    "logprobs": _logprobs,
    "churn": _churn,
}


def summarise(answer: dict[str, Any], *, ours: bool) -> dict[str, Any]:
    """Times per output token from `serve_worker.Worker.decode`, and for ours who served the steps.

    Raises:
        ValueError: all requests never decoded at once.
    """
    steps = answer["step_us"]
    if not steps:
        raise ValueError("at no time did all requests decode")
    found = {"tpot_us": fmean(steps), "median_step_us": median(steps), "num_steps": len(steps)}
    if ours:
        counters = answer["counters"]
        reasons = counters["stock_reasons"] | counters["fallback_reasons"]
        total = counters["packed_steps"] + counters["stock_steps"] + counters["fallback_steps"]
        share = counters["packed_steps"] / max(total, 1)
        host = counters["plan_seconds"] + counters["reused_plan_seconds"]
        found |= {
            "packed_share": share,
            "packed": share >= _PACKED_SHARE,
            "not_packed_because": reasons,
            "host_us_per_step": host / max(total, 1) * 1e6,
        }
    return found | answer


def compare_logprobs(first: Answers, second: Answers) -> dict[str, Any]:
    """Differences of what decode said, request by request up to the first token that differs.

    At that place the two still stand before the same text. The first token of all is prefill's.

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
