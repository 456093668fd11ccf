"""The run of `bench serving --engine`: offline engines, ours against SGLang's own backends.

Real engines with a model of Llama-3.1-8B's shape and random weights: time per output token at full
batch, log probabilities, size of the KV pool, and a guard against waiting for the device. Needs a
host where SGLang can be imported; this package need not be installed.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from sglang_prefix.bench.cases import compile_pattern
from sglang_prefix.bench.child import ChildError
from sglang_prefix.bench.engine import EngineProcess, engine_environment, write_plugin
from sglang_prefix.bench.run import BenchRun, Case, NotRunError
from sglang_prefix.bench.serving.compare import compare_logprobs, decode_times, median_interval
from sglang_prefix.bench.serving.loads import (
    LLAMA_8B,
    OURS,
    STOCK,
    SYNC,
    TINY,
    Load,
    Measurement,
    engine_arguments,
    measurements,
    prompts,
)
from sglang_prefix.bench.serving.sync_guard import SYNC_FILE
from sglang_prefix.bench.serving.targets import evaluate
from sglang_prefix.files import read_json
from sglang_prefix.tiny_model import build_once

__all__ = ["EngineRun"]

_CALLS = "sglang_prefix.bench.serving.engine_calls"
_GUARD = "sglang_prefix.bench.serving.sync_guard"
# Of one engine or of two side by side, until one has started: imports, weights, graphs.
_START_SECONDS = 100
_MODEL_SECONDS = 60
# What is running when the budget is used up may take so much longer.
_GRACE_SECONDS = 35
# The driver frees what a killed process had a while later.
_MEMORY_WAITS = 60
_MEMORY_SLACK = 64 << 20
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

    The engines of one group of cases are alive together, from its first case to the next group's.

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
        self._dry = dry
        self._only = compile_pattern("--only", only, "one that names of cases hold")
        super().__init__(
            folder,
            command=command,
            options={"long_output": long_output},
            seed=int.from_bytes(os.urandom(4)) >> 1 if seed is None else seed,
            dry=dry,
            resume=resume,
        )
        self._folder, self._sync_file = folder, folder / "sync.json"
        shared = Path(tempfile.gettempdir(), f"sglang-prefix-{os.getuid()}")
        self._model = model or (folder if dry else shared) / "model"
        self._shape = TINY if dry else LLAMA_8B
        self._deadline = float("inf")
        self._alive: dict[str, EngineProcess] = {}
        self._group = ""
        self._starts = 0
        self._free_bytes = 0
        self._broken: dict[str, str] = {}  # groups that did not start

    def use(self, options: Mapping[str, Any]) -> None:
        """Read the length of the long rollouts."""
        self._long_output = options["long_output"]
        self._measurements = measurements(long_output=self._long_output, dry=self._dry)
        if not any(self._only.search(name) for name in self.order):
            names = ", ".join(self.order)
            raise ValueError(f"--only is {self._only.pattern}; legal: a part of one of {names}")

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
        present = [name for name in STOCK if name not in absent]
        self._measurements = measurements(present, long_output=self._long_output, dry=self._dry)
        write_plugin(self._folder / "plugin")

    def cases(self) -> list[Case]:
        """Those that ``only`` chooses."""
        return [
            Case(one.name, one.group, partial(self._measure, one), partial(self._expected_s, one))
            for one in self._measurements
            if self._only.search(one.name)
        ]

    def run(
        self, budget_s: float, begin: Callable[[str], None], progress: Callable[[str], None]
    ) -> None:
        """See :class:`BenchRun`; the engines end with it."""
        self._deadline = self._began + budget_s + _GRACE_SECONDS
        try:
            super().run(budget_s, begin, progress)
        finally:
            self._stop()

    def conclude(self) -> None:
        """Evaluate the targets."""
        self.data["targets"] = evaluate(self.data["cases"])
        for name in self.data["not_run"]:
            if not self._only.search(name):
                self.data["not_run"][name] = f"not chosen by --only {self._only.pattern}"

    def own_failures(self, case: Mapping[str, Any]) -> Mapping[str, str]:
        """What a check found."""
        return {"check": case["reason"]} if "reason" in case else {}

    def _expected_s(self, one: Measurement) -> float:
        if self._dry:
            return 0
        # Starts take as long as the slowest so far.
        starts = [e["started_s"] for case in self.data["cases"] for e in case["engines"].values()]
        is_running = self._alive and one.group == self._group
        start = 0 if is_running else max(starts, default=_START_SECONDS)
        return one.seconds + start + (0 if self._model.exists() else _MODEL_SECONDS)

    def _measure(self, one: Measurement) -> dict[str, Any]:
        """Measure a case.

        Raises:
            NotRunError, TimeoutError: it cannot be run, or there was no time for it.
            ChildError: an engine failed.
        """
        import torch

        measure = {
            "decode": self._decode,
            "alternate": self._alternate,
            "logprobs": self._logprobs,
            "churn": self._churn,
        }[one.kind]
        self.progress("model")
        build_once(self._model, self._shape, "cpu" if self._dry else "cuda")
        if not self._dry:
            torch.cuda.empty_cache()
        self.progress(one.kind)
        try:
            self._start(one)
            for backend in one.backends:
                self._call(backend, "prepare", one.load)
            result = measure(one)
        except BaseException:
            self._stop()  # their state is unknown: the next case gets fresh ones
            raise
        return {
            **result,
            "kind": one.kind,
            "load": asdict(one.load),
            "engines": {name: self._alive[name].description for name in one.backends},
        }

    def _start(self, one: Measurement) -> None:
        """Have the engines of a case running, started side by side; those of other groups end."""
        if one.group in self._broken:
            why = self._broken[one.group]
            raise NotRunError(f"engines {one.group} did not start before: {why}")
        if one.group != self._group:
            self._stop()
        self._group = one.group
        if not self._alive and not self._dry:
            self._wait_for_memory()
        try:
            for name in one.backends:
                if name not in self._alive:
                    self._alive[name] = self._engine(name)
            for name in one.backends:
                self._alive[name].wait_until_ready(self._deadline)
        except ChildError as error:
            self._broken[one.group] = error.summary
            raise

    def _engine(self, backend: str) -> EngineProcess:
        self._starts += 1
        settings = {"HF_HUB_OFFLINE": "1", "SGLANG_PREFIX": "0"}  # the name says which is ours
        hooks = []
        if self._dry:
            settings["OMP_NUM_THREADS"] = "1"
        if backend == OURS:
            settings["SGLANG_PREFIX_STOCK_BACKEND"] = self._measurements[0].backends[1]
            if self._group == SYNC or self._dry:
                hooks = [_GUARD]
                settings[SYNC_FILE] = str(self._sync_file)
        return EngineProcess(
            engine_arguments(self._model, backend, self._group, dry=self._dry),
            environment=engine_environment(
                settings, hooks=hooks, paths=[self._folder / "plugin"], base=os.environ
            ),
            log=self._folder / f"{self._starts}-{self._group}-{backend}.log",
        )

    def _wait_for_memory(self) -> None:
        """Wait until the device is as empty as it was: pools are sized by what is free."""
        import torch

        for _ in range(_MEMORY_WAITS):
            free, _total = torch.cuda.mem_get_info()
            if free >= self._free_bytes - _MEMORY_SLACK:
                break
            time.sleep(0.5)
        self._free_bytes = max(self._free_bytes, free)

    def _stop(self) -> None:
        for engine in self._alive.values():
            engine.stop()
        self._alive = {}

    def _call(self, backend: str, function: str, load: Load, **more: Any) -> Any:
        """Have an engine run a function of `engine_calls` on a load."""
        return self._alive[backend].ask(
            f"{_CALLS}:{function}",
            self._deadline,
            prompts=prompts(load, self._shape.vocab_size, self.data["seed"]),
            tokens=load.output_tokens,
            **more,
        )

    def _decode_once(self, backend: str, one: Measurement) -> dict[str, Any]:
        return decode_times(self._call(backend, "decode", one.load), ours=backend == OURS)

    def _decode(self, one: Measurement) -> dict[str, Any]:
        measured = {name: self._decode_once(name, one) for name in one.backends}
        return {"status": "done", "measured": measured}

    def _alternate(self, one: Measurement) -> dict[str, Any]:
        rounds = []
        for number in range(one.rounds):
            order = one.backends[:: 1 if number % 2 else -1]
            rounds.append({name: self._decode_once(name, one) for name in order})
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

    def _logprobs(self, one: Measurement) -> dict[str, Any]:
        load = one.load
        ours, stock = one.backends
        found = {name: self._call(name, "logprobs", load, together=True) for name in one.backends}
        answers = {name: each["answers"] for name, each in found.items()}
        alone = self._call(stock, "logprobs", load, together=False)["answers"]
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

    def _churn(self, one: Measurement) -> dict[str, Any]:
        if not self._sync_file.exists():
            raise RuntimeError("the guard was not loaded: did Python start without sitecustomize?")
        before = read_json(self._sync_file)
        found = self._call(OURS, "churn", one.load)
        seen = read_json(self._sync_file)
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


def _unavailable(name: str) -> str | None:
    """Why a stock backend cannot be used on this host; None if it can."""
    import torch

    from sglang_prefix.bench.providers.base import import_reason

    if name == "fa3" and torch.cuda.get_device_capability()[0] not in (8, 9):
        return "needs compute capability 8.x or 9.x"
    return import_reason(*STOCK[name])
