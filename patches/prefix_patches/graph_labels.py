"""Decode graphs that are captured under several labels.

A graph freezes which attention it holds, and whether packing pays differs from batch to batch. So
each batch size is captured once with our kernels and once with the stock backend's, and the graph
is chosen at replay. SGLang has a hook for such variants from 0.5.20 on
(``attention_graph_variants``), but it decides before the batch is loaded and does not know the
model runner. A subclass of the graph runner does on every release what the hook does on some.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import torch

from prefix_patches.patch import RELEASES, Touch
from prefix_patches.schedule_context import ScheduleContext, schedule_context_of

__all__ = ["TOUCHED", "labelled"]

_RUNNER = "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner"

logger = logging.getLogger(__name__)


def _runner_class(original: Any, self: Any) -> Any:
    runner_class = original(self)
    schedule = schedule_context_of(self)
    if schedule is None or not schedule.graph_labels:
        return runner_class
    return labelled(runner_class)


def labelled(runner_class: type) -> type:
    """A decode graph runner that captures each shape once per label of the schedule."""

    class LabelledGraphRunner(runner_class):
        """Of two graphs for a batch size, replays the one whose label the backend has chosen."""

        def capture(self) -> None:
            self._cost_of_label: dict[str, list[float]] = {}
            super().capture()
            for label, (seconds, num_bytes) in self._cost_of_label.items():
                logger.info(
                    "prefix attention: graphs with label %s took %.1f s and %.0f MiB to capture",
                    label,
                    seconds,
                    num_bytes / 2**20,
                )

        def capture_one_shape(self, *args: Any, **kwargs: Any) -> None:
            schedule = self._labelling_schedule()
            if schedule is None:
                super().capture_one_shape(*args, **kwargs)
                return
            for label in schedule.graph_labels:
                schedule.graph_label = label
                began, free = time.perf_counter(), _free_bytes()
                super().capture_one_shape(*args, **kwargs)
                cost = self._cost_of_label.setdefault(label, [0.0, 0.0])
                cost[0] += time.perf_counter() - began
                cost[1] += free - _free_bytes()

        def _make_graph_key(self, *args: Any, **kwargs: Any) -> Any:
            key = super()._make_graph_key(*args, **kwargs)
            schedule = self._labelling_schedule()
            if schedule is None:
                return key
            name = f"{key.variant_label or ''}/{schedule.graph_label}"
            return dataclasses.replace(key, variant_label=name)

        def load_batch(self, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
            # Verify passes of EAGLE are loaded before the forward pass that replays them.
            schedule = schedule_context_of(self.model_runner)
            assert schedule is not None
            previous = schedule.publish(forward_batch)
            try:
                return super().load_batch(forward_batch, *args, **kwargs)
            finally:
                schedule.pop(previous)

        def _labelling_schedule(self) -> ScheduleContext | None:
            """What knows the labels; None where this runner captures another kind of pass."""
            schedule = schedule_context_of(self.model_runner)
            assert schedule is not None
            return schedule if self.capture_forward_mode.name in schedule.graph_modes else None

    LabelledGraphRunner.__name__ = f"Labelled{runner_class.__name__}"
    return LabelledGraphRunner


def _free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


TOUCHED = (
    Touch(
        "sglang.srt.model_executor.model_runner:ModelRunner._decode_cuda_graph_runner_cls",
        why="chooses the class of the graph runner",
        replacement=_runner_class,
    ),
    Touch(f"{_RUNNER}.capture", why="the cost of each label is told when it returns"),
    Touch(
        f"{_RUNNER}.capture_one_shape",
        why="captures one batch size",
        releases=f"{RELEASES}, called once per batch size",
    ),
    Touch(
        f"{_RUNNER}.load_batch",
        why="prepares a replay, for verify passes before the forward pass begins",
        parameters=("self", "forward_batch"),
    ),
    Touch(
        f"{_RUNNER}._make_graph_key",
        why="names the graph that is captured or replayed",
        releases=f"{RELEASES}, called at capture and at the end of `load_batch`",
    ),
    Touch(
        "sglang.srt.model_executor.runner.shape_key:ShapeKey",
        why="our label becomes part of it",
        releases=f"{RELEASES}, a frozen dataclass",
        keywords=("variant_label",),
    ),
)
