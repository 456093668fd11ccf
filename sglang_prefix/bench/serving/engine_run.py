"""The run of `bench serving --engine`: offline engines, ours against SGLang's own backends.

Real engines with a model of Llama-3.1-8B's shape and random weights: time per output token at full
batch, log probabilities, size of the KV pool, and a guard against waiting for the device. Needs a
host where SGLang can be imported; this package need not be installed.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sglang_prefix.bench.results import (
    environment,
    load_resumable,
    new_result,
    same_environment,
)
from sglang_prefix.bench.run import Case, run_cases
from sglang_prefix.bench.serving.compare import compare_logprobs, decode_times, median_interval
from sglang_prefix.bench.serving.engines import DRY_STOCK, Engines
from sglang_prefix.bench.serving.loads import (
    OURS,
    Measurement,
    dry_measurements,
    measurements,
)
from sglang_prefix.bench.serving.model import LLAMA_8B, TINY, write_model, write_plugin
from sglang_prefix.bench.serving.targets import evaluate

__all__ = ["RESULT", "EnginePlan", "measure_case", "problems", "run_engines"]

KIND = "bench-engine"
RESULT = "engine.json"
# Stock backends with what must be imported for them; the one expected to be the fastest first.
_STOCK = {
    "fa3": ("sgl_kernel.flash_attn", "sgl_kernel.flash_ops"),
    "flashinfer": ("flashinfer",),
    "triton": ("sglang.srt.layers.attention.triton_backend",),
}
# Of one engine or of two side by side, until one has started: imports, weights, graphs.
_START_SECONDS = 100
_MODEL_SECONDS = 60
# What is running when the budget is used up may take so much longer.
_GRACE_SECONDS = 35
# Logits between 4 and 8 stand in steps of 2**-5 in bfloat16, so each side is off by up to 2**-6
# before anything else is. Attention rounds its output to 8 bits in each of 32 layers, which moves
# them again by about as much; the largest of thousands of differences is some times their mean.
_MEAN_LIMIT, _MAX_LIMIT = 0.03, 0.25
# Where the stock backend differs from itself, one request at a time, by more than half of that, the
# limit is so many times its own difference.
_OWN_NOISE_FACTOR = 2
_LEAST_GUARDED_STEPS = 200


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What is to be run.

    Attributes:
        out: folder for the result and the engines' logs.
        model: folder for the model, 15 GB; None for one in the temporary folder.
        long_output: tokens of the long rollouts.
        only: regular expression that the name of a case contains.
        budget_s: seconds after which no case begins.
        seed: of all prompts; None to draw one.
        dry: a tiny model on the CPU, which proves no speed.
        command: what the user typed.
    """

    out: Path
    model: Path | None
    long_output: int
    only: str
    budget_s: float
    seed: int | None
    dry: bool
    command: list[str]

    def measurements(self, stock: Sequence[str] = tuple(_STOCK)) -> list[Measurement]:
        """What is measured against some stock backends, in order."""
        return dry_measurements(DRY_STOCK) if self.dry else measurements(stock, self.long_output)


def run_engines(
    plan: EnginePlan,
    *,
    resume: bool,
    finish: Callable[[Case, str | None], None] = lambda case, problem: None,
) -> dict[str, Any]:
    """Run what is left, in order, until the budget is used up; the file is whole after each case.

    Args:
        plan: what to run.
        resume: complete the result in the folder.
        finish: see :func:`~sglang_prefix.bench.run.run_cases`.

    Returns:
        The result; :func:`problems` says what is wrong in it.

    Raises:
        ValueError: no GPU, no stock backend, or a result that cannot be resumed.
    """
    import torch

    began = time.monotonic()
    if not plan.dry and not torch.cuda.is_available():
        raise ValueError("no GPU here; legal without one: --dry")
    absent = {} if plan.dry else {name: why for name in _STOCK if (why := _unavailable(name))}
    if len(absent) == len(_STOCK):
        raise ValueError(f"no backend of SGLang can be imported here: {absent}")
    chosen = plan.measurements([name for name in _STOCK if name not in absent])
    path = plan.out / RESULT
    data = _result(plan, chosen, path if resume else None) | {"absent": absent}
    plan.out.mkdir(parents=True, exist_ok=True)
    write_plugin(plan.out / "plugin")
    shape = TINY if plan.dry else LLAMA_8B
    default = plan.out if plan.dry else Path(tempfile.gettempdir(), f"sglang-prefix-{os.getuid()}")
    engines = Engines(
        plan.model or default / "model",
        shape["vocab_size"],
        chosen[0].backends[1],
        plan.out,
        data["seed"],
        dry=plan.dry,
        deadline=began + plan.budget_s + _GRACE_SECONDS,
    )

    def as_case(one: Measurement) -> Case:
        def measure() -> dict[str, Any]:
            device = torch.device("cpu" if plan.dry else "cuda")
            written = write_model(engines.model, shape, device)
            if not plan.dry:
                torch.cuda.empty_cache()
            return measure_case(one, engines) | {"model_written": written}

        def expected_s() -> float:
            if plan.dry:
                return 0
            start = 0 if engines.running(one.group) else _start_seconds(data)
            return one.seconds + start + (0 if engines.model.exists() else _MODEL_SECONDS)

        return Case(one.name, one.group, measure, expected_s)

    def conclude() -> None:
        data["targets"] = evaluate(data["cases"])
        for name in data["not_run"]:
            if not re.search(plan.only, name):
                data["not_run"][name] = f"not chosen by --only {plan.only}"

    try:
        run_cases(
            path,
            data,
            [as_case(one) for one in chosen if re.search(plan.only, one.name)],
            plan.budget_s,
            order=[one.name for one in chosen],
            began=began,
            finish=finish,
            conclude=conclude,
        )
    finally:
        engines.stop()
    return data


def problems(data: dict[str, Any]) -> list[str]:
    """Cases that failed, or found what must not be, each with the reason."""
    found = [f"{case['name']}: {case['reason']}" for case in data["cases"] if "reason" in case]
    return [*found, *(f"{name}: {why}" for name, why in data["failed"].items())]


def _result(plan: EnginePlan, chosen: Sequence[Measurement], old: Path | None) -> dict[str, Any]:
    here = environment("cpu" if plan.dry else None)
    options = {"long_output": plan.long_output, "order": [one.name for one in chosen]}
    if old is not None:
        same = {f"options.{name}": value for name, value in options.items()}
        return load_resumable(old, KIND, {"dry": plan.dry, **same, **same_environment(here)})
    seed = int.from_bytes(os.urandom(4)) >> 1 if plan.seed is None else plan.seed
    return new_result(
        KIND, command=plan.command, options=options, seed=seed, environment=here, dry=plan.dry
    )


def _start_seconds(data: dict[str, Any]) -> float:
    """As long as the slowest start so far took."""
    engines = [engine for case in data["cases"] for engine in case["engines"].values()]
    return max((engine["started_s"] for engine in engines), default=_START_SECONDS)


def _unavailable(name: str) -> str | None:
    """Why a stock backend cannot be used on this host; None if it can."""
    import torch

    from sglang_prefix.bench.providers.base import import_reason

    if name == "fa3" and torch.cuda.get_device_capability()[0] not in (8, 9):
        return "needs compute capability 8.x or 9.x"
    return import_reason(*_STOCK[name])


def measure_case(one: Measurement, engines: Engines) -> dict[str, Any]:
    """Run a case; engines that it leaves in an unknown state are stopped.

    Raises:
        NotRunError: there was no time for it.
    """
    try:
        described = engines.start(one.group, one.backends)
        for backend in one.backends:
            engines.call(backend, "prepare", asdict(one.load))
        result = _KINDS[one.kind](one, engines)
    except BaseException:
        engines.stop()  # the next case gets fresh ones
        raise
    return {
        **result,
        "kind": one.kind,
        "load": asdict(one.load),
        "shares": one.load.shares,
        "engines": described,
    }


def _decode(one: Measurement, engines: Engines) -> dict[str, Any]:
    measured = {name: _decode_once(engines, name, one) for name in one.backends}
    return {"status": "done", "measured": measured}


def _decode_once(engines: Engines, backend: str, one: Measurement) -> dict[str, Any]:
    return decode_times(engines.call(backend, "decode", asdict(one.load)), ours=backend == OURS)


def _alternate(one: Measurement, engines: Engines) -> dict[str, Any]:
    rounds = []
    for number in range(one.rounds):
        order = one.backends[:: 1 if number % 2 else -1]
        rounds.append({name: _decode_once(engines, name, one) for name in order})
    ours, stock = one.backends
    ratios = [found[ours]["tpot_us"] / found[stock]["tpot_us"] for found in rounds]
    extra = [found[ours]["tpot_us"] - found[stock]["tpot_us"] for found in rounds]
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


def _logprobs(one: Measurement, engines: Engines) -> dict[str, Any]:
    load = asdict(one.load)
    ours, stock = one.backends
    found = {name: engines.call(name, "logprobs", load, together=True) for name in one.backends}
    answers = {name: each["answers"] for name, each in found.items()}
    alone = engines.call(stock, "logprobs", load, together=False)["answers"]
    difference = compare_logprobs(answers[ours], answers[stock])
    noise = compare_logprobs(answers[stock], alone)
    limits = {
        "mean": max(_MEAN_LIMIT, _OWN_NOISE_FACTOR * noise["mean"]),
        "max": max(_MAX_LIMIT, _OWN_NOISE_FACTOR * noise["max"]),
    }
    within = all(difference[key] <= limit for key, limit in limits.items())
    wrong = [] if within and difference["values"] else [f"differences {difference}, {limits=}"]
    return {
        **_verdict(wrong),
        "difference": difference,
        "stock_against_itself_one_by_one": noise,
        "limits": limits,
        "counters": {key: found[ours]["counters"][key] for key in ("packed_steps", "plans")},
        "answers": {**answers, f"{stock} one by one": alone},
    }


def _churn(one: Measurement, engines: Engines) -> dict[str, Any]:
    if not engines.sync_file.exists():
        raise RuntimeError("the guard was not loaded: did Python start without sitecustomize?")
    before = json.loads(engines.sync_file.read_text())
    found = engines.call(OURS, "churn", asdict(one.load))
    seen = json.loads(engines.sync_file.read_text())
    steps, counters = seen["steps"] - before["steps"], found["counters"]
    wrong = list(seen["raised"])
    if "error" in counters["fallback_reasons"]:
        wrong.append(f"planning failed in {counters['fallback_reasons']['error']} steps")
    if seen["on_gpu"]:
        if seen["control"] is not True:
            wrong.append("a planted wait did not raise, so the guard proves nothing")
        if steps < _LEAST_GUARDED_STEPS:
            wrong.append(f"only {steps} steps were guarded; at least {_LEAST_GUARDED_STEPS}")
        if not counters["packed_steps"]:
            wrong.append("no step was packed")
    status = {} if wrong or seen["on_gpu"] else {"status": "n/a"}
    return {**_verdict(wrong), **status, "guarded_steps": steps, "guard": seen, **found}


def _verdict(wrong: Sequence[str]) -> dict[str, Any]:
    return {"status": "failed", "reason": "; ".join(wrong)} if wrong else {"status": "passed"}


_KINDS: dict[str, Callable[[Measurement, Engines], dict[str, Any]]] = {
    "decode": _decode,
    "alternate": _alternate,
    "logprobs": _logprobs,
    "churn": _churn,
}
