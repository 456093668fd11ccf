"""``Scheduler.get_internal_state``: show the backend's counters in the server's own status.

Why: a user must be able to see whether the backend runs. ``GET /server_info`` and
``Engine.get_server_info()`` list each scheduler's internal state; the counters join it under
:data:`STATE_KEY`.
Releases: 0.5.17 to 0.5.23; the result holds a dict ``internal_state`` of plain values.
When it is gone: the backend factory refuses to start. Processes that run a model without a
scheduler (``sglang.benchmark.one_batch``) have not imported it, and are left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from prefix_patches.method_patch import is_patched, patch_method

STATE_KEY = "sglang_prefix"

_MODULE = "sglang.srt.managers.scheduler"
_reporters: list[Callable[[], dict[str, Any]]] = []


def report_with(reporter: Callable[[], dict[str, Any]]) -> None:
    """Add a callable whose dict of plain values is shown; one per backend of the process."""
    _reporters.append(reporter)


def missing() -> list[str]:
    """What is not as we need it."""
    module = sys.modules.get(_MODULE)
    if module is None or hasattr(module.Scheduler, "get_internal_state"):
        return []
    return [f"{_MODULE}.Scheduler.get_internal_state (no such method)"]


def install() -> None:
    """Apply the patch."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        patch_method(module.Scheduler, "get_internal_state", _get_internal_state)


def installed() -> bool:
    """Whether the patch is in place, or nothing is there to patch."""
    module = sys.modules.get(_MODULE)
    return module is None or is_patched(module.Scheduler, "get_internal_state")


def _get_internal_state(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    result.internal_state[STATE_KEY] = [reporter() for reporter in _reporters]
    return result
