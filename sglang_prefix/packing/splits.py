"""How many pieces each pack is cut into, so that the device is full and no piece works long."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sglang_prefix.packing.cost import CostModel

__all__ = ["choose_num_splits"]

IntArray = NDArray[np.int64]


def choose_num_splits(lengths: IntArray, num_queries: IntArray, costs: CostModel) -> IntArray:
    """Cut packs so that the pieces fill the device once, none much longer than the average.

    The work of the whole batch, in tokens walked by a program, is divided by the programs that
    run at the same time; a pack gets as many pieces as that share goes into it, but none shorter
    than ``min_split_tokens``. Example: 32 tails of 4,096 tokens, 8 KV heads, 264 workers: a share
    is 32 * 4096 * 8 / 264 = 3,972 tokens, hence two pieces each; 4 tails: 497 tokens, nine pieces.

    Args:
        lengths: [P] KV tokens of each pack.
        num_queries: [P] requests of each pack.
        costs: shape and device.

    Returns:
        [P] pieces per pack, at least 1.
    """
    device = costs.device
    if device.num_workers <= 1:
        return np.ones(len(lengths), dtype=np.int64)
    rows = num_queries * costs.shape.group_size
    blocks = -(-rows // device.max_block_rows)
    work = int((lengths * blocks).sum()) * costs.shape.num_kv_heads
    share = max(device.min_split_tokens, -(-work // device.num_workers))
    return np.maximum(1, -(-lengths // share))
