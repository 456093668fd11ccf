"""``Req.reset_for_retract``: note that a request gives up its slots.

Why: most retracted requests come back through a prefill, which ends every plan. On the decode side
of PD disaggregation they come back without a forward pass (``PREBUILT``), and after a pause that
retracts everybody the same requests may decode again, in the same order, on other slots.
Releases: 0.5.17 to 0.5.23, called for every retraction, as ``(self)``.
When it is gone: the backend factory refuses to start.
"""

from __future__ import annotations

from typing import Any

from prefix_patches.method_patch import is_patched, patch_method
from prefix_patches.schedule_context import note_retraction

_SYMBOL = "sglang.srt.managers.schedule_batch.Req.reset_for_retract"


def missing() -> list[str]:
    """What is not as we need it."""
    try:
        from sglang.srt.managers.schedule_batch import Req
    except ImportError as error:
        return [f"{_SYMBOL} ({error})"]
    return [] if "reset_for_retract" in vars(Req) else [f"{_SYMBOL} (no such method)"]


def install() -> None:
    """Apply the patch."""
    from sglang.srt.managers.schedule_batch import Req

    patch_method(Req, "reset_for_retract", _reset_for_retract)


def installed() -> bool:
    """Whether the patch is in place."""
    from sglang.srt.managers.schedule_batch import Req

    return is_patched(Req, "reset_for_retract")


def _reset_for_retract(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    note_retraction()
    return original(self, *args, **kwargs)
