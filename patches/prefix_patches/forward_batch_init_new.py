"""``ForwardBatch.init_new``: note the schedule batch on the forward batch made from it.

Why: the forward batch carries no requests and no tree, and the radix paths hang on those.
Releases: 0.5.17 to 0.5.23, a classmethod called as ``(cls, batch, model_runner, **options)``.
When it is gone: the backend factory refuses to start.
"""

from __future__ import annotations

import inspect
from typing import Any

from prefix_patches.method_patch import is_patched, patch_method
from prefix_patches.schedule_context import BATCH_ATTRIBUTE

_SYMBOL = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"


def missing() -> list[str]:
    """What is not as we need it."""
    try:
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    except ImportError as error:
        return [f"{_SYMBOL} ({error})"]
    if not isinstance(vars(ForwardBatch).get("init_new"), classmethod):
        return [f"{_SYMBOL} (not a classmethod of ForwardBatch)"]
    if list(inspect.signature(ForwardBatch.init_new).parameters)[:2] != ["batch", "model_runner"]:
        return [f"{_SYMBOL} (other leading parameters than batch, model_runner)"]
    return []


def install() -> None:
    """Apply the patch."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    patch_method(ForwardBatch, "init_new", _init_new, classmethod_=True)


def installed() -> bool:
    """Whether the patch is in place."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    return is_patched(ForwardBatch, "init_new")


def _init_new(original: Any, cls: type, batch: Any, *args: Any, **kwargs: Any) -> Any:
    forward_batch = original(cls, batch, *args, **kwargs)
    setattr(forward_batch, BATCH_ATTRIBUTE, batch)
    return forward_batch
