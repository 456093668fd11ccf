"""``ModelRunner.forward``: publish the schedule batch while its forward pass runs.

Why: the backend sees a copy of the forward batch without anything attached to it; this is the
last place that sees the original, and it encloses eager passes and graph replays alike.
Releases: 0.5.17 to 0.5.23, called as ``(self, forward_batch, ...)``.
When it is gone: the backend factory refuses to start.
"""

from __future__ import annotations

import inspect
from typing import Any

from prefix_patches.method_patch import is_patched, patch_method
from prefix_patches.schedule_context import schedule_context_of

_SYMBOL = "sglang.srt.model_executor.model_runner.ModelRunner.forward"


def missing() -> list[str]:
    """What is not as we need it."""
    try:
        from sglang.srt.model_executor.model_runner import ModelRunner
    except ImportError as error:
        return [f"{_SYMBOL} ({error})"]
    if "forward" not in vars(ModelRunner):
        return [f"{_SYMBOL} (no such method)"]
    if list(inspect.signature(ModelRunner.forward).parameters)[:2] != ["self", "forward_batch"]:
        return [f"{_SYMBOL} (other leading parameters than self, forward_batch)"]
    return []


def install() -> None:
    """Apply the patch."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    patch_method(ModelRunner, "forward", _forward)


def installed() -> bool:
    """Whether the patch is in place."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    return is_patched(ModelRunner, "forward")


def _forward(original: Any, self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    # Draft runners call this too, nested in the target's pass; they have no schedule.
    schedule = schedule_context_of(self)
    if schedule is None:
        return original(self, forward_batch, *args, **kwargs)
    previous = schedule.push(forward_batch)
    try:
        return original(self, forward_batch, *args, **kwargs)
    finally:
        schedule.pop(previous)
