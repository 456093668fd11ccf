"""How many splits each pack is cut into, so that the device is full and no split works long."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sglang_prefix.jit import jit
from sglang_prefix.packing.cost import CostModel
from sglang_prefix.packing.packs import Packs

__all__ = ["choose_num_splits", "count_splits"]

IntArray = NDArray[np.int64]


def choose_num_splits(packs: Packs, seq_lens: IntArray, costs: CostModel) -> IntArray:
    """Cut packs so that the splits fill the device once, none much longer than the average.

    The work of the whole batch, in tokens walked by a program, is divided by the programs that
    run at the same time; a pack gets as many splits as that share goes into it, but none shorter
    than ``min_split_tokens``. Example: 32 tails of 4,096 tokens, 8 KV heads, 264 workers: a share
    is 32 * 4096 * 8 / 264 = 3,972 tokens, hence two splits each; 4 tails: 497 tokens, nine splits.

    Args:
        packs: shared packs and tail starts.
        seq_lens: [B] KV tokens of each request.
        costs: shape and device.

    Returns:
        [S + B] splits of each shared pack, then of each tail; at least 1.
    """
    device = costs.device
    if device.num_workers <= 1:
        return np.ones(len(packs.start) + len(seq_lens), dtype=np.int64)
    return count_splits(
        packs.start,
        packs.end,
        packs.query_indptr,
        packs.tail_start,
        seq_lens,
        costs.shape.group_size,
        costs.shape.num_kv_heads,
        device.max_block_rows,
        device.num_workers,
        device.min_split_tokens,
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
    max_block_rows: int,
    num_workers: int,
    min_split_tokens: int,
) -> IntArray:
    """The loop behind :func:`choose_num_splits`."""
    shared, batch = len(start), len(seq_lens)
    lengths = np.empty(shared + batch, dtype=np.int64)
    tail_blocks = -(-group_size // max_block_rows)
    work = 0
    for pack in range(shared):
        rows = (query_indptr[pack + 1] - query_indptr[pack]) * group_size
        lengths[pack] = end[pack] - start[pack]
        work += lengths[pack] * -(-rows // max_block_rows)
    for request in range(batch):
        lengths[shared + request] = seq_lens[request] - tail_start[request]
        work += lengths[shared + request] * tail_blocks
    share = max(min_split_tokens, -(-work * num_kv_heads // num_workers))
    num_splits = np.empty_like(lengths)
    for pack in range(shared + batch):
        num_splits[pack] = max(1, -(-lengths[pack] // share))
    return num_splits
