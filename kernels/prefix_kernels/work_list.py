"""From a plan to the list of work items that the pack-forward kernel takes its tiles from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.plan import PackPlan

__all__ = [
    "ITEM_FIELDS",
    "TILE_CLASS_FIELD",
    "TO_OUT",
    "TO_PARTIALS",
    "build_work_list",
    "tile_classes",
]

IntArray = NDArray[np.int64]
Int32Array = NDArray[np.int32]

# Fields of an item, in this order:
#   0  index in `queries` of the query that the block's first row belongs to
#   1  index of that query's partial in `partials`
#   2  grouped head of the block's first row; 0 if a group's heads fill a block, or several do
#   3  rows (query, grouped head) of the pack from that query's first head on
#   4  index of the pack's first slot in `kv_slots`
#   5  tokens of a shared pack; -1 - b for the tail of request b
#   6  split
#   7  splits of the pack
#   8  tile class
#   9  where its rows go: TO_OUT and TO_PARTIALS, added up
ITEM_FIELDS = 10
TILE_CLASS_FIELD = 8
TO_OUT, TO_PARTIALS = 1, 2


def tile_classes(qo_rows: IntArray, block_rows: list[int]) -> IntArray:
    """[P] tile class of each pack: the first that holds its rows, or the last.

    Args:
        qo_rows: [P] query rows of each pack.
        block_rows: rows of each tile class, ascending.
    """
    return np.minimum(np.searchsorted(block_rows, qo_rows), len(block_rows) - 1)


def build_work_list(
    plan: PackPlan, group_size: int, block_rows: list[int]
) -> tuple[Int32Array, Int32Array]:
    """List the row blocks of all splits of all packs, ready for the device.

    Args:
        plan: the plan.
        group_size: query heads per KV head.
        block_rows: rows of each tile class, ascending.

    Returns:
        The items [n, ITEM_FIELDS] of all tile classes together, the longest work first; and the
        plan's ``partial_index``, with -1 where the request has no other partial, so that its
        result goes straight to the output.
    """
    num_queries = plan.query_indptr[1:] - plan.query_indptr[:-1]
    rows = num_queries * group_size
    pack_class = tile_classes(rows, block_rows)
    block_m = np.asarray(block_rows, dtype=np.int64)[pack_class]
    row_blocks = -(-rows // block_m)
    lengths = plan.pack_end - plan.pack_start
    work = -(-lengths // plan.num_splits)

    # One entry per (pack, split, row block), packs by descending work. Row blocks of a split are
    # neighbours, so that the second finds the KV of the first in the L2 cache.
    order = np.argsort(-work, kind="stable")
    per_pack = (plan.num_splits * row_blocks)[order]
    pack = np.repeat(order, per_pack)
    within = np.arange(len(pack)) - np.repeat(np.cumsum(per_pack) - per_pack, per_pack)
    split = within // row_blocks[pack]
    block = within - split * row_blocks[pack]
    tokens = lengths.copy()
    tokens[plan.num_shared_packs :] = np.arange(-1, -1 - plan.batch_size, -1)
    items = np.empty((len(pack), ITEM_FIELDS), dtype=np.int32)
    first_row = block * block_m[pack]
    first_query, first_head = np.divmod(first_row, group_size)
    partial = plan.partial_indptr[pack] + split * num_queries[pack] + first_query
    items[:, 0] = plan.query_indptr[pack] + first_query
    items[:, 1] = partial
    items[:, 2] = first_head
    items[:, 3] = rows[pack] - first_row + first_head
    items[:, 4] = plan.slot_offset[pack]
    items[:, 5] = tokens[pack]
    items[:, 6] = split
    items[:, 7] = plan.num_splits[pack]
    items[:, TILE_CLASS_FIELD] = pack_class[pack]

    first_partial = plan.request_indptr[:-1]
    target = np.arange(plan.num_partials, dtype=np.int32)
    target[first_partial[plan.request_indptr[1:] - first_partial == 1]] = -1
    partials = target[plan.partial_index]
    end_row = np.minimum(first_row + block_m[pack], rows[pack])
    block_queries = -(-end_row // group_size) - first_query
    to_out = np.concatenate(([0], np.cumsum(partials < 0)))
    to_out = to_out[partial + block_queries] - to_out[partial]
    items[:, 9] = (to_out > 0) * TO_OUT + (to_out < block_queries) * TO_PARTIALS
    return items, partials
