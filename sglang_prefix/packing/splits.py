"""Into how many splits packs are cut, so that their work fills the device.

The kernels run each tile class with as many programs as the multiprocessors hold of it, its workers.
A worker takes every ``workers``-th item of a list, the longest first. So if all items of a class
are given out in ``k`` rounds, none of its workers has more than ``k`` of the longest, nor more than
the average and one of the longest.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sglang_prefix.jit import jit
from sglang_prefix.packing.cost import CostModel
from sglang_prefix.packing.packs import Packs

__all__ = ["choose_num_splits", "tile_table"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

# Numbers of rounds that are tried, from the fewest on. The average and one item is 12% more than the
# average at eight rounds; fixed costs and partial results decide long before more would pay.
_ROUNDS_TRIED = 8


def choose_num_splits(packs: Packs, seq_lens: IntArray, costs: CostModel) -> IntArray:
    """Cut packs so that the fullest worker of each tile class has the least to do.

    For every number of rounds ``k``, the shortest split (in whole tiles of KV) with which the items
    of a class fit into ``k`` rounds of its workers; of these the one with the least bound on the
    time of the fullest worker, its fixed costs included, and on that of the merge. A pack gets the
    fewest splits that are none longer than that. In tiles that stays so when a tail grows:
    ``ceil(ceil(tokens / splits) / tile)`` is ``ceil(tiles / splits)``, whatever the tokens.

    Example: 64 requests of group size 4 share 8,192 tokens, 8 KV heads, 132 workers for tiles of
    128 x 64. One split is two row blocks of 8 heads, 16 items. Nine splits of 911 tokens are 144
    items, two rounds of 15 tiles; eight of 1,024 are 128 items, one round of 16 tiles.

    Args:
        packs: shared packs and tail starts.
        seq_lens: [B] KV tokens of each request.
        costs: shape and device.

    Returns:
        [S + B] splits of each shared pack, then of each tail; at least 1.
    """
    if not costs.device.tiles:
        return np.ones(len(packs.start) + len(seq_lens), dtype=np.int64)
    return count_splits(
        packs.start,
        packs.end,
        packs.query_indptr,
        packs.tail_start,
        seq_lens,
        costs.shape.group_size,
        costs.shape.num_kv_heads,
        costs.device.min_split_tokens,
        tile_table(costs),
        _ROUNDS_TRIED,
    )


@lru_cache(maxsize=64)
def tile_table(costs: CostModel) -> FloatArray:
    """[C, 7] of each tile class: rows, KV tokens, workers; microseconds of a worker for an item, for
    a KV token and for a row's partial result, while all workers are busy; and of the device for
    writing and merging the partial result of a row.
    """
    device, shape = costs.device, costs.shape
    head_bytes = shape.kv_token_bytes / shape.num_kv_heads
    partial_bytes = shape.partial_size / shape.num_qo_heads
    return np.array(
        [
            (
                tile.rows,
                tile.tokens,
                device.num_sms * tile.programs,
                tile.item_us,
                tile.programs * max(tile.token_us, head_bytes / device.sm_bytes_per_us),
                tile.programs * partial_bytes / device.sm_bytes_per_us,
                2 * partial_bytes / device.read_bytes_per_us,
            )
            for tile in device.tiles
        ]
    )


@jit
def count_splits(
    start: IntArray,
    end: IntArray,
    query_indptr: IntArray,
    tail_start: IntArray,
    seq_lens: IntArray,
    group_size: int,
    num_kv_heads: int,
    min_split_tokens: int,
    table: FloatArray,
    rounds_tried: int,
) -> IntArray:
    """The loop behind :func:`choose_num_splits`."""
    shared, batch = len(start), len(seq_lens)
    num_splits = np.ones(shared + batch, dtype=np.int64)
    tiles, items, member = (
        np.empty(shared + batch),
        np.empty(shared + batch),
        np.empty(shared + batch, dtype=np.int64),
    )
    for tile_class in range(len(table)):
        block_rows, tokens, workers, item_us, token_us, row_us, merge_us = table[tile_class]
        below = table[tile_class - 1, 0] if tile_class > 0 else 0.0
        is_widest = tile_class == len(table) - 1
        count, work_us, all_rows = 0, 0.0, 0.0
        for pack in range(shared + batch):
            if pack < shared:
                rows = (query_indptr[pack + 1] - query_indptr[pack]) * group_size
                length = end[pack] - start[pack]
            else:
                rows = group_size
                length = seq_lens[pack - shared] - tail_start[pack - shared]
            if rows <= below or (rows > block_rows and not is_widest):
                continue
            member[count] = pack
            tiles[count] = max(1.0, np.ceil(length / tokens))
            items[count] = num_kv_heads * np.ceil(rows / block_rows)
            work_us += items[count] * length * token_us
            all_rows += num_kv_heads * rows
            count += 1
        if count == 0:
            continue
        rows_of_item = min(block_rows, all_rows / items[:count].sum())
        fixed_us = item_us + row_us * rows_of_item
        extra_us = fixed_us / workers + merge_us * rows_of_item
        longest = tiles[:count].max()
        shortest = min(longest, max(1.0, np.ceil(min_split_tokens / tokens)))
        best_us, best, limit = np.inf, longest, longest
        first = np.ceil(items_of(tiles, items, count, longest) / workers)
        for rounds in range(first, first + rounds_tried):
            limit = finest_limit(tiles, items, count, rounds * workers, shortest, limit)
            num_items = items_of(tiles, items, count, limit)
            worst_us = fixed_us + limit * tokens * token_us
            mean_us = work_us / workers + num_items * fixed_us / workers
            bound_us = min(rounds * worst_us, mean_us + worst_us)
            bound_us += num_items * merge_us * rows_of_item
            if bound_us < best_us:
                best_us, best = bound_us, limit
            if limit == shortest:
                break
        for i in range(count):
            num_splits[member[i]] = np.ceil(tiles[i] / best)
    return num_splits


@jit
def items_of(tiles: FloatArray, items: FloatArray, count: int, limit: float) -> float:
    """Work items if no split has more than ``limit`` tiles of KV."""
    total = 0.0
    for i in range(count):
        total += items[i] * np.ceil(tiles[i] / limit)
    return total


@jit
def finest_limit(
    tiles: FloatArray, items: FloatArray, count: int, room: float, low: float, high: float
) -> float:
    """The shortest limit in [low, high] with which there are at most ``room`` items; ``high`` if
    there is none."""
    while low < high:
        middle = np.floor((low + high) / 2)
        if items_of(tiles, items, count, middle) <= room:
            high = middle
        else:
            low = middle + 1
    return high
