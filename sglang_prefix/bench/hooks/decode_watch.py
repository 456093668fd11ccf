"""Says who runs the passes of an engine, and clocks the attention of each decode step.

``SGLANG_PREFIX_DECODE_WATCH`` names a folder. A file ``mode`` in it says who runs passes from the
next one on; without it, our backend does:

========  ==================================================================================
stock     the backend hands every pass to SGLang's own, as its gate does with what gains nothing
zeros     packed decode gives zeros: whoever claims that equal tokens show a correct attention
          must show that a broken one changes them
========  ==================================================================================

``steps.jsonl`` has a line for each decode step: the mode, the number of requests, seconds of the
model's forward pass, and those of them that our backend had, SGLang's attention included.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

from sglang_prefix.bench.hooks import patch_after_import

__all__ = ["FOLDER_VARIABLE", "mode_file", "step_times"]

FOLDER_VARIABLE = "SGLANG_PREFIX_DECODE_WATCH"
_STEPS = "steps.jsonl"
_MODES = ("prefix", "stock", "zeros")


def mode_file(folder: Path) -> Path:
    """The file that says who decodes."""
    return folder / "mode"


def step_times(folder: Path, mode: str) -> Mapping[str, float]:
    """Medians over the steps of a mode that had all requests: "step_ms", "attention_ms"."""
    lines = map(json.loads, (folder / _STEPS).read_text().splitlines())
    steps = [step for step in lines if step[0] == mode]
    most = max(step[1] for step in steps)
    of_all = [step for step in steps if step[1] == most]
    return {
        "step_ms": 1e3 * median(step[2] for step in of_all),
        "attention_ms": 1e3 * median(step[3] for step in of_all),
    }


class DecodeWatch:
    """The mode of the step under way, and its clock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mode = _MODES[0]
        self._attention_s = self._began = 0.0
        self._batch_size = 0  # of a decode step, else 0

    def clock_backend(self, module: ModuleType) -> None:
        """Clock what our backend prepares and runs, be it its own or the stock backend's."""
        backend = module.PrefixAttnBackend
        for name in ("init_forward_metadata", "forward_decode"):
            setattr(backend, name, self._clocked(getattr(backend, name)))

    def clock_step(self, module: ModuleType) -> None:
        """Clock the forward pass, which the backend's schedule encloses."""
        schedule = module.ScheduleContext
        push, pop = schedule.push, schedule.pop

        def begin(self_: Any, forward_batch: Any) -> Any:
            decodes = forward_batch.forward_mode.is_decode()
            self._batch_size = forward_batch.batch_size if decodes else 0
            self._mode = self._read_mode()
            self._attention_s, self._began = 0.0, time.perf_counter()
            return push(self_, forward_batch)

        def end(self_: Any, previous: Any) -> None:
            pop(self_, previous)
            if self._batch_size:
                seconds = time.perf_counter() - self._began
                step = (self._mode, self._batch_size, seconds, self._attention_s)
                with (self._folder / _STEPS).open("a") as file:
                    print(json.dumps(step), file=file)

        schedule.push, schedule.pop = begin, end

    def choose_stock(self, module: ModuleType) -> None:
        """Mode "stock", for decode steps."""
        prepare = module.DecodePlanner.prepare

        def prepare_or_not(self_: Any, batch: Any, **options: Any) -> Any:
            return "gate-no-gain" if self._mode == "stock" else prepare(self_, batch, **options)

        module.DecodePlanner.prepare = prepare_or_not

    def choose_stock_extends(self, module: ModuleType) -> None:
        """Mode "stock", for extends."""
        prepare = module.ExtendPlanner.prepare

        def prepare_or_not(self_: Any, batch: Any) -> Any:
            return None if self._mode == "stock" else prepare(self_, batch)

        module.ExtendPlanner.prepare = prepare_or_not

    def break_run(self, module: ModuleType) -> None:
        """Mode "zeros"."""
        run = module.PlanExecutor.run

        def broken(
            self_: Any, q: Any, k_cache: Any, v_cache: Any, out: Any, *args: Any, **kwargs: Any
        ) -> None:
            run(self_, q, k_cache, v_cache, out, *args, **kwargs)
            if self._mode == "zeros" and self._batch_size:
                out.zero_()

        module.PlanExecutor.run = broken

    def _read_mode(self) -> str:
        try:
            mode = mode_file(self._folder).read_text()
        except FileNotFoundError:
            mode = _MODES[0]
        if mode not in _MODES:
            raise ValueError(f"mode is {mode!r}; legal: {', '.join(_MODES)}")
        return mode

    def _clocked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._attention_s += time.perf_counter() - began

        return call


if FOLDER_VARIABLE in os.environ:
    watch = DecodeWatch(Path(os.environ[FOLDER_VARIABLE]))
    patch_after_import(
        {
            "sglang_prefix.backend.backend": watch.clock_backend,
            "sglang_prefix.backend.decode_planner": watch.choose_stock,
            "sglang_prefix.backend.extend_planner": watch.choose_stock_extends,
            "prefix_patches.schedule_context": watch.clock_step,
            "prefix_kernels.executor": watch.break_run,
        }
    )
