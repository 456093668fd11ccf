"""Changes of our kernels and plans that `bench kernel --setting` compares with what is in use.

On the same inputs, in the same rounds, each checked first: what is no faster on a card is left out
of it. A setting is what differs from the usual in the arguments of `PackedAttention`: a profile, or
options of the executor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sglang_prefix.packing import GPU_PROFILE

__all__ = ["SETTINGS", "chosen_settings"]


def _profile(**changes: Any) -> dict[str, Any]:
    return {"profile": replace(GPU_PROFILE, **changes)}


SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "splits-128": _profile(min_split_tokens=128),
    "splits-512": _profile(min_split_tokens=512),
}


def chosen_settings(names: Sequence[str]) -> list[str]:
    """Names of :data:`SETTINGS`, once each; all of them for "all".

    Raises:
        ValueError: one is unknown; one line.
    """
    for name in names:
        if name not in SETTINGS and name != "all":
            raise ValueError(f"--setting is {name!r}; legal: all, {', '.join(SETTINGS)}")
    return list(SETTINGS) if "all" in names else list(dict.fromkeys(names))
