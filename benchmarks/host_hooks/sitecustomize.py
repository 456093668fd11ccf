"""An engine on the CPU whose device is elsewhere; Python imports this file at start-up.

SGLang's own decode graph runner runs, with graphs that do nothing: a replay hands back what the
capture left behind, and kernels of ours are not launched. So the scheduler, the graph runner and
our planning run as they would beside a GPU, and the CPU does no model's arithmetic, which would
take its caches. Answers mean nothing. What our part of each decode step took goes to the file
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

from benchmarks.graphs_on_cpu import GraphBackend, graph_runner_patches
from benchmarks.import_patches import patch_after_import

WRITE_EVERY = 20


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
        self._kept_before = 0
        self._counters: Any = None
        self._steps: dict[str, list[float]] = {"kept": [], "planned": []}

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
        """Time what the graph runner calls before each replay; there is no stock graph in it."""
        backend = module.PrefixAttnBackend
        before_replay = self.timed(backend.init_forward_metadata_out_graph)

        def note_counters(backend_: Any, *args: Any, **kwargs: Any) -> None:
            self._counters = backend_.counters
            before_replay(backend_, *args, **kwargs)

        backend.init_forward_metadata_out_graph = note_counters

    def watch_handover(self, module: ModuleType) -> None:
        """Time the hook around each forward pass; a decode step ends with it."""
        schedule = module.ScheduleContext
        enter, leave = self.timed(schedule.push), self.timed(schedule.pop)

        def begin(handover_: Any, forward_batch: Any) -> Any:
            self._seconds = 0.0
            self._kept_before = self._counters.reused_plan_steps if self._counters else 0
            self._is_decode = forward_batch.forward_mode.is_decode()
            return enter(handover_, forward_batch)

        def end(handover_: Any, previous: Any) -> None:
            leave(handover_, previous)
            if self._is_decode and self._counters is not None:
                kept = self._counters.reused_plan_steps > self._kept_before
                self._steps["kept" if kept else "planned"].append(self._seconds)
                if len(self._steps["kept"]) % WRITE_EVERY == 1:
                    self._path.write_text(json.dumps(self._steps))

        schedule.push, schedule.pop = begin, end


def launch_nothing(module: ModuleType) -> None:
    """In the modules that launch kernels."""
    vars(module)["launch"] = lambda *args, **kwargs: None


if "SGLANG_PREFIX_HOST_TIMES_FILE" in os.environ:
    clock = StepClock(Path(os.environ["SGLANG_PREFIX_HOST_TIMES_FILE"]))
    size = int(os.environ["SGLANG_PREFIX_HOST_TIMES_BATCH"])
    patches = graph_runner_patches(AbsentGraphs, [size])
    say_captured = patches.pop("sglang_prefix.backend.backend")

    def backend_patch(module: ModuleType) -> None:
        """Both that concern our backend."""
        say_captured(module)
        clock.watch_backend(module)

    patch_after_import(
        patches
        | {
            "sglang_prefix.backend.backend": backend_patch,
            "prefix_patches.schedule_context": clock.watch_handover,
            "prefix_kernels.triton_executor": launch_nothing,
            "prefix_kernels.plan_buffers": launch_nothing,
        }
    )
