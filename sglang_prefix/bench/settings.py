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


def _tile(**changes: Any) -> dict[str, Any]:
    return {"tile_changes": changes}


SETTINGS: Mapping[str, Mapping[str, Any]] = {
    # What of a tile executes fewer instructions.
    "item-not-carried": _tile(carries_item=False),
    "tail-always-masked": _tile(branches_for_tail=False),
    # Wide and narrow programs beside each other on a multiprocessor.
    "all-registers": _tile(max_registers=255),
    "same-priority": {"wide_first": False},
    # Two programs of every tile on a multiprocessor, whatever its residency; lengths of splits.
    "two-programs": _profile(tiles=tuple(replace(t, sm_share=0.5) for t in GPU_PROFILE.tiles)),
    "splits-256": _profile(min_split_tokens=256),
    "splits-512": _profile(min_split_tokens=512),
    # Tile classes of a graph, beside the widest.
    "class-16": {"graph_rows": (16,)},
    "class-16-32-64": {"graph_rows": (16, 32, 64)},
    # The merge begins before the forward launch ends, where that is one.
    "merge-overlaps": {"mode": "fused", "merge": "launch", "overlap_merge": True},
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
