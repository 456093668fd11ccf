"""An engine on the CPU whose device is elsewhere, with our part of each decode step on a clock.

SGLang's own decode graph runner runs, with graphs that do nothing: a replay hands back what the
capture left behind, and our kernels are not launched. So the scheduler, the graph runner and our
planning run as they would beside a GPU, and the CPU does not do the model's arithmetic, which would
take its caches. Answers mean nothing. The seconds of our part of each decode step go to the file
named by ``SGLANG_PREFIX_HOST_TIMES_FILE`` every few steps.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_prefix.bench.hooks import patch_after_import
from sglang_prefix.bench.hooks.cpu_graphs import GraphBackend, run_graphs_on_cpu
from sglang_prefix.files import write_file

__all__ = ["BATCH_VARIABLE", "FILE_VARIABLE"]

FILE_VARIABLE = "SGLANG_PREFIX_HOST_TIMES_FILE"
BATCH_VARIABLE = "SGLANG_PREFIX_HOST_TIMES_BATCH"
_WRITE_EVERY = 20


class AbsentGraphs(GraphBackend):
    """Remembers outputs."""

    def capture(self, shape_key: Any, forward_fn: Callable[[], Any]) -> Any:
        """What the graph's batch got at capture."""
        return forward_fn()

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        """The same again."""
        return self.captured[shape_key]


class StepClock:
    """Adds up what our functions take within a forward pass, and sorts decode steps."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds = 0.0
        self._is_decode = False
        self._reused_before = 0
        self._counters: Any = None
        self._steps: dict[str, list[float]] = {"reused": [], "planned": []}

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, on the clock."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds += time.perf_counter() - began

        return call

    def watch_backend(self, module: ModuleType) -> None:
        """Time what the graph runner calls before each replay; no graph holds a stock kernel."""
        backend = module.PrefixAttnBackend
        before_replay = self.timed(backend.init_forward_metadata_out_graph)

        def note_counters(self_: Any, *args: Any, **kwargs: Any) -> None:
            self._counters = self_.counters
            before_replay(self_, *args, **kwargs)

        backend.init_forward_metadata_out_graph = note_counters

    def watch_schedule(self, module: ModuleType) -> None:
        """Time the hook around each forward pass; a decode step ends with it."""
        schedule = module.ScheduleContext
        push, pop = self.timed(schedule.push), self.timed(schedule.pop)

        def begin(self_: Any, forward_batch: Any) -> Any:
            self._seconds = 0.0
            self._reused_before = self._counters.reused_plan_steps if self._counters else 0
            self._is_decode = forward_batch.forward_mode.is_decode()
            return push(self_, forward_batch)

        def end(self_: Any, previous: Any) -> None:
            pop(self_, previous)
            # Within a pass its batch is published once more, while the graph runner loads it.
            if self._is_decode and previous is None and self._counters is not None:
                reused = self._counters.reused_plan_steps > self._reused_before
                self._steps["reused" if reused else "planned"].append(self._seconds)
                if len(self._steps["reused"]) % _WRITE_EVERY == 1:
                    write_file(self._path, json.dumps(self._steps))

        schedule.push, schedule.pop = begin, end


def launch_nothing(module: ModuleType) -> None:
    """Launch no kernel of ours."""
    vars(module)["launch"] = lambda *args, **kwargs: None


if FILE_VARIABLE in os.environ:
    clock = StepClock(Path(os.environ[FILE_VARIABLE]))
    run_graphs_on_cpu(AbsentGraphs, [int(os.environ[BATCH_VARIABLE])])
    patch_after_import(
        {
            "sglang_prefix.backend.backend": clock.watch_backend,
            "prefix_patches.schedule_context": clock.watch_schedule,
            "prefix_kernels.launch": launch_nothing,
        }
    )
