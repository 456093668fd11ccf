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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from sglang_prefix.bench.run import BenchRun, Case
from sglang_prefix.bench.serving.compare import compare_logprobs, decode_times, median_interval
from sglang_prefix.bench.serving.engines import LLAMA_8B, TINY, Engines, write_plugin
from sglang_prefix.bench.serving.loads import (
    OURS,
    STOCK,
    Measurement,
    dry_measurements,
    measurements,
)
from sglang_prefix.bench.serving.targets import evaluate
from sglang_prefix.tiny_model import build_once

__all__ = ["EngineRun", "measure_case"]

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


class EngineRun(BenchRun):
    """The run of `bench serving --engine`, best cases first.

    Args:
        folder, command, dry, resume: of :class:`BenchRun`; a dry run has a tiny model on the CPU.
        long_output: tokens of the long rollouts.
        model: folder for the model, 15 GB; None for one in the temporary folder.
        only: regular expression that the name of a case contains.
        seed: of all prompts; None to draw one.
    """

    kind, file_name = "bench-engine", "engine.json"

    def __init__(
        self,
        folder: Path,
        *,
        command: Sequence[str],
        long_output: int,
        model: Path | None = None,
        only: str = "",
        seed: int | None = None,
        dry: bool = False,
        resume: bool = False,
    ) -> None:
        self._model, self._only, self._dry = model, only, dry
        super().__init__(
            folder,
            command=command,
            options={"long_output": long_output},
            seed=int.from_bytes(os.urandom(4)) >> 1 if seed is None else seed,
            dry=dry,
            resume=resume,
        )

    def use(self, options: Mapping[str, Any]) -> None:
        """Read the length of the long rollouts."""
        self._long_output = options["long_output"]
        self._measurements = self._measured_against(tuple(STOCK))

    def _measured_against(self, stock: Sequence[str]) -> list[Measurement]:
        return dry_measurements() if self._dry else measurements(stock, self._long_output)

    @property
    def order(self) -> list[str]:
        """All of them, chosen or not."""
        return [one.name for one in self._measurements]

    def prepare(self) -> None:
        """Look for stock backends, and write the plugin.

        Raises:
            ValueError: no GPU, or no stock backend.
        """
        import torch

        if not self._dry and not torch.cuda.is_available():
            raise ValueError("no GPU here; legal without one: --dry")
        absent = {} if self._dry else {name: why for name in STOCK if (why := _unavailable(name))}
        if len(absent) == len(STOCK):
            raise ValueError(f"no backend of SGLang can be imported here: {absent}")
        self.data["absent"] = absent
        self._measurements = self._measured_against([n for n in STOCK if n not in absent])
        folder = self.path.parent
        write_plugin(folder / "plugin")
        self._shape = TINY if self._dry else LLAMA_8B
        shared = Path(tempfile.gettempdir(), f"sglang-prefix-{os.getuid()}")
        self._engines = Engines(
            self._model or (folder if self._dry else shared) / "model",
            self._shape.vocab_size,
            self._measurements[0].backends[1],
            folder,
            self.data["seed"],
            self._dry,
        )

    def cases(self) -> list[Case]:
        """Those that ``only`` chooses."""
        return [
            Case(one.name, one.group, partial(self._measure, one), partial(self._expected_s, one))
            for one in self._measurements
            if re.search(self._only, one.name)
        ]

    def run(
        self, budget_s: float, begin: Callable[[str], None], progress: Callable[[str], None]
    ) -> None:
        """See :class:`BenchRun`; the engines end with it."""
        self._engines.deadline = self._began + budget_s + _GRACE_SECONDS
        try:
            super().run(budget_s, begin, progress)
        finally:
            self._engines.stop()

    def conclude(self) -> None:
        """Evaluate the targets."""
        self.data["targets"] = evaluate(self.data["cases"])
        for name in self.data["not_run"]:
            if not re.search(self._only, name):
                self.data["not_run"][name] = f"not chosen by --only {self._only}"

    def own_failures(self, case: Mapping[str, Any]) -> Mapping[str, str]:
        """What a check found."""
        return {"check": case["reason"]} if "reason" in case else {}

    def _measure(self, one: Measurement) -> dict[str, Any]:
        import torch

        self.progress("model")
        build_once(self._engines.model, self._shape, "cpu" if self._dry else "cuda")
        if not self._dry:
            torch.cuda.empty_cache()
        self.progress(one.kind)
        return measure_case(one, self._engines)

    def _expected_s(self, one: Measurement) -> float:
        if self._dry:
            return 0
        # Starts take as long as the slowest so far.
        starts = [e["started_s"] for case in self.data["cases"] for e in case["engines"].values()]
        start = 0 if self._engines.running(one.group) else max(starts, default=_START_SECONDS)
        return one.seconds + start + (0 if self._engines.model.exists() else _MODEL_SECONDS)


def _unavailable(name: str) -> str | None:
    """Why a stock backend cannot be used on this host; None if it can."""
    import torch

    from sglang_prefix.bench.providers.base import import_reason

    if name == "fa3" and torch.cuda.get_device_capability()[0] not in (8, 9):
        return "needs compute capability 8.x or 9.x"
    return import_reason(*STOCK[name])


def measure_case(one: Measurement, engines: Engines) -> dict[str, Any]:
    """Run a case; engines that it leaves in an unknown state are stopped.

    Raises:
        NotRunError, TimeoutError: it cannot be run, or there was no time for it.
        ChildError: an engine failed.
    """
    try:
        described = engines.start(one.group, one.backends)
        for backend in one.backends:
            engines.call(backend, "prepare", one.load)
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
    return decode_times(engines.call(backend, "decode", one.load), ours=backend == OURS)


def _alternate(one: Measurement, engines: Engines) -> dict[str, Any]:
    rounds = []
    for number in range(one.rounds):
        order = one.backends[:: 1 if number % 2 else -1]
        rounds.append({name: _decode_once(engines, name, one) for name in order})
    ours, stock = one.backends
    ratios = [found[ours]["tpot_us"] / found[stock]["tpot_us"] for found in rounds]
    return {
        "status": "done",
        "rounds": rounds,
        "stock": stock,
        "ratios": ratios,
        "ratio": median(ratios),
        "ratio_interval": median_interval(ratios),
    }


def _logprobs(one: Measurement, engines: Engines) -> dict[str, Any]:
    load = one.load
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
    found = engines.call(OURS, "churn", one.load)
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
