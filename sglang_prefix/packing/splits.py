"""Into how many splits packs are cut, so that their work fills a GPU.

The kernels run a tile class with as many programs as the multiprocessors hold of it, its workers.
A worker takes every ``workers``-th item of a list, the longest first. More splits spread the work
more evenly; each costs an item's fixed time, and a partial result of every request.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.work_list import tile_classes
from sglang_prefix.jit import jit
from sglang_prefix.packing.cost import CostModel
from sglang_prefix.packing.packs import Packs

__all__ = ["ClassLoad", "choose_num_splits", "class_loads", "tile_table"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

# Limits that are tried: the longest pack of a class by these, and those that fill one round of the
# workers, two, and so on, from the least number of rounds on.
_PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
_ROUNDS_TRIED = 4
# Of the work of narrower classes, which begins later, what fills the time that a class leaves idle.
# By simulation (`tests/simulate.py`): of 0 to 0.4, that with the shortest makespans.
_FILLED_SHARE = 0.1
_ONE_EACH = np.zeros(0, dtype=np.int64)  # query tokens, to compiled loops


def choose_num_splits(
    packs: Packs, seq_lens: IntArray, costs: CostModel, query_lens: IntArray | None = None
) -> IntArray:
    """Cut packs so that each tile class takes the least time, in whole tiles of KV.

    Of each class the longest split is chosen, in tiles; a pack gets the fewest splits that are no
    longer. That stays so when a tail grows: splits are cut on the device into equal numbers of
    tokens, and ``ceil(ceil(tokens / splits) / tile)`` is ``ceil(ceil(tokens / tile) / splits)``.

    Example: 64 requests of group size 4 share 8,192 tokens, 8 KV heads, 132 workers for tiles of
    128 x 64. One split is two row blocks of 8 heads, 16 items. Nine splits of 911 tokens are 144
    items, two rounds of 15 tiles; eight of 1,024 are 128 items, one round of 16 tiles, and chosen.

    Args:
        packs: shared packs, of rows of q, and tail starts.
        seq_lens: [B] KV tokens of each request.
        costs: shape and device.
        query_lens: [B] query tokens of each request; None for one each.

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
        _ONE_EACH if query_lens is None else query_lens,
        costs.shape.group_size,
        costs.shape.num_kv_heads,
        costs.device.min_split_tokens,
        tile_table(costs),
    )


@lru_cache(maxsize=64)
def tile_table(costs: CostModel) -> FloatArray:
    """[C, 9] of each tile class: rows and KV tokens of a tile; multiprocessors, programs of one.
    Then microseconds: of an item without its KV; for a token, of a program that reads alone and of
    the instructions on a multiprocessor; of the whole device, for reading a token, and for writing
    and merging the partial result of a row.
    """
    device, shape = costs.device, costs.shape
    head_bytes = shape.kv_token_bytes / shape.num_kv_heads
    row_bytes = shape.partial_bytes / shape.num_qo_heads
    return np.array(
        [
            (
                tile.rows,
                tile.tokens,
                device.num_sms,
                tile.programs,
                tile.item_us,
                head_bytes / tile.lone_bytes_per_us,
                tile.token_us,
                head_bytes / device.read_bytes_per_us,
                row_bytes / device.read_bytes_per_us,
            )
            for tile in device.tiles
        ]
    )


@dataclass(frozen=True, slots=True)
class ClassLoad:
    """How the work of a plan's packs of one tile class lies on its workers.

    Attributes:
        rows: of a tile.
        num_items: work items, a tile's KV head each.
        num_workers: programs of the class that the device runs at a time.
        even_us, fullest_us: estimated time of a worker if all have equal parts, and of the fullest,
            while all are busy.
    """

    rows: int
    num_items: int
    num_workers: int
    even_us: float
    fullest_us: float

    @property
    def waves(self) -> float:
        """Rounds in which the items are given out; of the last only a part, if it is no integer."""
        return self.num_items / self.num_workers


def class_loads(
    qo_rows: IntArray, lengths: IntArray, num_splits: IntArray, costs: CostModel
) -> list[ClassLoad]:
    """Of each tile class in use, the widest last.

    Args:
        qo_rows: [P] query rows of each pack.
        lengths: [P] its KV tokens.
        num_splits: [P] its splits.
        costs: shape and device; there are none where it has no tile classes.
    """
    found = []
    tiles = costs.device.tiles
    classes = tile_classes(qo_rows, [tile.rows for tile in tiles]) if tiles else qo_rows
    for number, tile in enumerate(tiles):
        mine = np.flatnonzero(classes == number)
        if not len(mine):
            continue
        _, _, num_sms, programs, item_us, *_ = row = tile_table(costs)[number]
        workers = int(num_sms * programs)
        us = item_us + workers * even_token_us(row) * -(-lengths[mine] // num_splits[mine])
        items = costs.shape.num_kv_heads * num_splits[mine] * -(-qo_rows[mine] // tile.rows)
        # The list has the longest first; the first worker takes the first item of every round.
        order = np.argsort(-us, kind="stable")
        rounds = np.diff(-(-np.cumsum(items[order]) // workers), prepend=0)
        even_us, fullest_us = us @ items / workers, us[order] @ rounds
        found.append(
            ClassLoad(tile.rows, int(items.sum()), workers, float(even_us), float(fullest_us))
        )
    return found


@jit
def count_splits(
    start: IntArray,
    end: IntArray,
    query_indptr: IntArray,
    tail_start: IntArray,
    seq_lens: IntArray,
    query_lens: IntArray,
    group_size: int,
    num_kv_heads: int,
    min_split_tokens: int,
    table: FloatArray,
) -> IntArray:
    """The loop behind :func:`choose_num_splits`, class by class, the narrowest first.

    ``query_lens`` is empty for one query token of each request.
    """
    shared, size, widest = len(start), len(start) + len(seq_lens), len(table) - 1
    num_splits, tile_class = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    tiles, items = np.empty(size), np.empty(size)  # of KV of each pack; of it without splits
    sums = np.zeros((len(table), 3))  # of its items: number, rows, KV tokens
    for pack in range(size):
        if pack < shared:
            rows = (query_indptr[pack + 1] - query_indptr[pack]) * group_size
            length = end[pack] - start[pack]
        else:
            request = pack - shared
            rows, length = group_size, seq_lens[request] - tail_start[request]
            if len(query_lens):
                rows *= query_lens[request]
        number = 0
        while number < widest and table[number, 0] < rows:
            number += 1
        tile_class[pack] = number
        tiles[pack] = max(1.0, np.ceil(length / table[number, 1]))
        items[pack] = num_kv_heads * np.ceil(rows / table[number, 0])
        sums[number, 0] += items[pack]
        sums[number, 1] += num_kv_heads * rows
        sums[number, 2] += items[pack] * length
    behind_us = 0.0
    for number in range(len(table)):
        if sums[number, 0] == 0:
            continue
        mine = np.flatnonzero(tile_class == number)
        limit, class_us = choose_limit(
            tiles[mine], items[mine], sums[number], table[number], min_split_tokens, behind_us
        )
        behind_us += class_us
        for pack in mine:
            num_splits[pack] = np.ceil(tiles[pack] / limit)
    return num_splits


@jit
def choose_limit(
    tiles: FloatArray,
    items: FloatArray,
    sums: FloatArray,
    costs: FloatArray,
    min_split_tokens: int,
    behind_us: float,
) -> tuple[float, float]:
    """The most tiles of KV in a split of one class, and the time of the class with its work spread
    evenly.

    Args:
        tiles, items: [n] of the packs: tiles of KV, and work items without splits.
        sums: of the packs: items without splits, rows and KV tokens of all of them.
        costs: a row of :func:`tile_table`.
        min_split_tokens: of a split.
        behind_us: time of the classes that are launched behind this one.
    """
    longest = tiles.max()
    shortest = min(longest, max(1.0, np.ceil(min_split_tokens / costs[1])))
    workers = costs[2] * costs[3]
    least_rounds = np.ceil(sums[0] / workers)
    limit = longest
    best_us, best, best_even_us = np.inf, longest, 0.0
    for step in range(_ROUNDS_TRIED + len(_PARTS)):
        if step < _ROUNDS_TRIED:
            room = (least_rounds + step) * workers
            limit = finest_limit(tiles, items, room, shortest, limit)
            tried = limit
        else:
            tried = max(shortest, np.ceil(longest / _PARTS[step - _ROUNDS_TRIED]))
        num_items = items_of(tiles, items, tried)
        even_us, idle_us = class_times(num_items, tried, sums, costs)
        us = even_us + max(0.0, idle_us - _FILLED_SHARE * behind_us)
        if us < best_us:
            best_us, best, best_even_us = us, tried, even_us
    return best, best_even_us


@jit
def class_times(
    num_items: float, limit: float, sums: FloatArray, costs: FloatArray
) -> tuple[float, float]:
    """Time of a class with its work spread evenly over the workers, and what it takes longer where
    there are not enough items for all of them: in the last round, and for the longest item."""
    unsplit, rows, all_tokens = sums
    _, tile_tokens, num_sms, programs, item_us, lone_us, issue_us, _, row_us = costs
    workers = num_sms * programs
    even_us = num_items * (item_us / workers + rows / unsplit * row_us)
    even_us += all_tokens * even_token_us(costs)
    # Of programs that begin together, those on one multiprocessor share its instructions.
    neighbours = np.ceil(num_items / num_sms) if num_items <= workers else 1.0
    token_us = max(lone_us, neighbours * issue_us)
    average_us = item_us + all_tokens / num_items * token_us
    longest_us = item_us + limit * tile_tokens * token_us
    last_round = num_items - (np.ceil(num_items / workers) - 1) * workers
    idle_us = max(0.0, average_us - even_us * last_round / num_items)
    return even_us, idle_us + longest_us - average_us


@jit
def even_token_us(costs: FloatArray) -> float:
    """Time of the whole device for one token with all workers busy; of a row of the table."""
    num_sms, programs, _, lone_us, issue_us, read_us = costs[2:8]
    us: float = max(read_us, issue_us / num_sms, lone_us / (num_sms * programs))
    return us


@jit
def items_of(tiles: FloatArray, items: FloatArray, limit: float) -> float:
    """Work items if no split has more than ``limit`` tiles of KV."""
    total = 0.0
    for i in range(len(tiles)):
        total += items[i] * np.ceil(tiles[i] / limit)
    return total


@jit
def finest_limit(
    tiles: FloatArray, items: FloatArray, room: float, low: float, high: float
) -> float:
    """The shortest limit in [low, high] with which there are at most ``room`` items; ``high`` if
    there is none."""
    while low < high:
        middle = np.floor((low + high) / 2)
        if items_of(tiles, items, middle) <= room:
            high = middle
        else:
            low = middle + 1
    return high
