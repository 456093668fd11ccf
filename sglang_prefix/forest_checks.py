"""Checks of what forests are made from, and of forests that somebody else made.

Compiled loops read these arrays without looking at bounds, so what a caller brings is looked at
before. Planners inside the backend have theirs from SGLang and skip this.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.arguments import INT32_MAX, INT64_MAX, check_integers, refusal

if TYPE_CHECKING:
    from sglang_prefix.forest import PrefixForest

__all__ = ["check_forest", "check_paths", "check_rows", "check_slots"]

IntArray = NDArray[np.int64]
Pairs = list[tuple[tuple[int, ...], tuple[int, ...]]]


def check_rows(rows: Any, num_rows: int, width: int) -> NDArray[np.integer]:
    """Slot rows: integers, one row per request, none shorter than the positions to compare."""
    legal = "a two-dimensional array of integers on the host"
    try:
        found = np.asarray(rows)
    except Exception:  # ragged; or a tensor on a device
        raise refusal("rows", rows, legal) from None
    if found.dtype.kind not in "iu" and found.size:
        raise refusal("rows", rows, legal)
    if found.ndim != 2 or found.shape[0] != num_rows or found.shape[1] < width:
        raise ValueError(
            f"rows has shape {found.shape}; legal for these seq_lens: [{num_rows}, at least "
            f"{width}]"
        )
    if found.dtype.kind != "i":
        check_slots(found, np.full(num_rows, width))
        return found.astype(np.int64)
    return found


def check_slots(rows: NDArray[np.integer], caps: IntArray, name: str = "rows") -> None:
    """What stands below the cap [B] of each row are slots; what stands behind it is nobody's."""
    if int(rows.min(initial=0)) >= 0 and int(rows.max(initial=0)) <= INT32_MAX:
        return
    compared = np.arange(rows.shape[1])[None, :] < caps[:, None]
    bad = np.argwhere(compared & ((rows < 0) | (rows > INT32_MAX)))
    if len(bad):
        b, position = bad[0]
        raise ValueError(
            f"{name} holds {rows[b, position]} at position {position} of request {b}; legal: 0 to "
            f"{INT32_MAX}"
        )


def check_paths(paths: Any) -> Pairs:
    """Each path is a pair: node ids, and where the nodes end, which never goes back."""
    try:
        pairs = [tuple(map(tuple, path)) for path in paths]
    except (TypeError, ValueError):
        raise refusal("paths", paths, "a sequence of RadixPath") from None
    checked: Pairs = []
    for b, pair in enumerate(pairs):
        if len(pair) != 2:
            raise ValueError(f"paths[{b}] has {len(pair)} parts; legal: node_ids and ends")
        node_ids, ends = pair
        size = len(check_integers(f"paths[{b}].node_ids", node_ids, -INT64_MAX, INT64_MAX))
        found = check_integers(f"paths[{b}].ends", ends, 0, INT32_MAX, size=size)
        if (np.diff(found) < 0).any():
            raise ValueError(f"paths[{b}].ends goes back; legal: ascending positions")
        checked.append((node_ids, ends))
    return checked


def check_forest(forest: PrefixForest) -> None:
    """Every array of a forest fits the others, as it does where a constructor made it.

    Raises:
        ValueError: it does not; the message names the forest, the array and the entry.
    """
    arrays = [(field.name, getattr(forest, field.name)) for field in fields(forest)]
    for name, array in arrays:
        is_array = isinstance(array, np.ndarray) and array.ndim == 1
        if not is_array or array.dtype != np.int64 or not array.flags.c_contiguous:
            raise _misfit(name, "is no dense int64 array")
    sizes = [forest.batch_size] * 3 + [forest.num_nodes] * 5
    for (name, array), size in zip(arrays, sizes, strict=True):
        if len(array) != size:
            raise _misfit(name, f"has {len(array)} entries, not {size}")
    begin, end, parent = forest.node_begin, forest.node_end, forest.node_parent
    start, stop = forest.node_start, forest.node_stop
    batch, has_parent = forest.batch_size, parent >= 0
    _require("seq_lens", (forest.seq_lens >= 0) & (forest.seq_lens <= INT32_MAX))
    _require("order", np.sort(forest.order) == np.arange(batch))
    _require("node_end", (begin >= 0) & (end <= batch) & (end - begin >= 2))
    _require("node_parent", (parent >= -1) & (parent < np.arange(len(parent))))
    _require("node_start", start == np.where(has_parent, stop[parent], 0))
    _require("node_stop", stop > start)
    # In preorder, inside their parents, and beside their siblings.
    inside = (begin >= begin[parent]) & (end <= end[parent])
    smaller = end - begin < end[parent] - begin[parent]
    _require("node_parent", ~has_parent | (inside & smaller))
    _require("node_begin", np.diff(begin) >= 0)
    siblings = np.argsort(parent, kind="stable")
    same = parent[siblings[1:]] == parent[siblings[:-1]]
    _require("node_begin", ~same | (begin[siblings[1:]] >= end[siblings[:-1]]))
    covered = np.zeros(batch + 1, dtype=np.int64)
    np.add.at(covered, begin, stop - start)
    np.subtract.at(covered, end, stop - start)
    _require("shared_lens", forest.shared_lens[forest.order] == np.cumsum(covered[:-1]))
    _require("shared_lens", forest.shared_lens <= forest.seq_lens)


def _require(name: str, holds: NDArray[np.bool_]) -> None:
    if not holds.all():
        raise _misfit(name, f"does not fit the others at entry {int(holds.argmin())}")


def _misfit(name: str, what: str) -> ValueError:
    return ValueError(
        f"{name} of the forest {what}; legal: a forest of PrefixForest.from_rows, from_paths or "
        "from_neighbours"
    )
