"""``ModelRunner._decode_cuda_graph_runner_cls``: capture decode graphs under several labels.

Why: a graph freezes which attention it holds, and whether packing pays differs from batch to batch,
so each batch size is captured once with our kernels and once with the stock backend's, and the
graph is chosen at replay. SGLang has a hook for such variants from 0.5.20 on
(``attention_graph_variants``), but it decides before the batch is loaded and does not know the
model runner. Two methods of the graph runner do on every release what the hook does on some.

Releases: 0.5.17 to 0.5.23. Used of the runner class: ``capture_one_shape``, called once per batch
size; ``_make_graph_key``, called at capture and at the end of ``load_batch``, whose ``ShapeKey`` is
a frozen dataclass with ``variant_label``; ``capture``.
When it is gone: the backend factory refuses to start.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import torch

from prefix_patches.method_patch import is_patched, patch_method
from prefix_patches.schedule_context import schedule_context_of

_SYMBOL = "sglang.srt.model_executor.model_runner.ModelRunner._decode_cuda_graph_runner_cls"

logger = logging.getLogger(__name__)


def missing() -> list[str]:
    """What is not as we need it."""
    try:
        from sglang.srt.model_executor.model_runner import ModelRunner
        from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
        from sglang.srt.model_executor.runner.shape_key import ShapeKey
    except ImportError as error:
        return [f"{_SYMBOL} ({error})"]
    if "_decode_cuda_graph_runner_cls" not in vars(ModelRunner):
        return [f"{_SYMBOL} (no such method)"]
    names = ("capture", "capture_one_shape", "_make_graph_key")
    gone = [f"DecodeCudaGraphRunner.{n}" for n in names if n not in vars(DecodeCudaGraphRunner)]
    if "variant_label" not in {field.name for field in dataclasses.fields(ShapeKey)}:
        gone.append("ShapeKey.variant_label")
    return gone


def install() -> None:
    """Apply the patch."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    patch_method(ModelRunner, "_decode_cuda_graph_runner_cls", _runner_class)


def installed() -> bool:
    """Whether the patch is in place."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    return is_patched(ModelRunner, "_decode_cuda_graph_runner_cls")


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
            if not self.capture_forward_mode.is_decode():
                super().capture_one_shape(*args, **kwargs)
                return
            schedule = schedule_context_of(self.model_runner)
            assert schedule is not None
            for label in schedule.graph_labels:
                schedule.graph_label = label
                began, free = time.perf_counter(), _free_bytes()
                super().capture_one_shape(*args, **kwargs)
                cost = self._cost_of_label.setdefault(label, [0.0, 0.0])
                cost[0] += time.perf_counter() - began
                cost[1] += free - _free_bytes()

        def _make_graph_key(self, *args: Any, **kwargs: Any) -> Any:
            key = super()._make_graph_key(*args, **kwargs)
            if not self.capture_forward_mode.is_decode():
                return key
            schedule = schedule_context_of(self.model_runner)
            assert schedule is not None
            name = f"{key.variant_label or ''}/{schedule.graph_label}"
            return dataclasses.replace(key, variant_label=name)

    LabelledGraphRunner.__name__ = f"Labelled{runner_class.__name__}"
    return LabelledGraphRunner


def _free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
