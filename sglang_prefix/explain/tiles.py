"""Which tile of the Triton kernels computes a pack."""

from __future__ import annotations

import numpy as np

from prefix_kernels.tiles import (
    TileShape,
    choose_classes,
    choose_fused_tiles,
    choose_tile,
    row_classes,
)
from sglang_prefix.explain.record import PlanRecord
from sglang_prefix.packing import AttentionShape
from sglang_prefix.packing.layout import CostedPlan

__all__ = ["pack_tiles", "tile_shape"]

# Where a tile must do for packs of all lengths, because a graph holds the launch.
_ANY_LENGTH = 1 << 30


def tile_shape(shape: AttentionShape, gpu: str | None) -> TileShape:
    """What the choice of a tile depends on, on a device with Hopper's matrix units or later.

    Raises:
        ValueError: heads are too wide for any tile.
    """
    itemsizes = shape.q_itemsize, shape.kv_itemsize
    found = TileShape(shape.head_dim, shape.v_head_dim, *itemsizes, device=gpu)
    if not row_classes(found):
        raise ValueError(f"no tile of the Triton kernels is for v_head_dim {shape.v_head_dim:,}")
    return found


def pack_tiles(record: PlanRecord, plan: CostedPlan) -> list[tuple[int, int] | None]:
    """[P] rows and KV tokens of each pack's tile; None for an executor that has no tiles."""
    if plan.costs.device.name == "cpu":
        return [None] * plan.num_packs
    shape, fixed = tile_shape(plan.costs.shape, record.gpu), record.graph_rows is not None
    group_size = plan.costs.shape.group_size
    rows = np.diff(plan.query_indptr) * group_size
    widest = [record.graph_rows * group_size] if record.graph_rows else np.unique(rows).tolist()
    classes = choose_classes(widest, shape, mode=record.launch_mode, fixed=fixed)
    lengths = plan.pack_end - plan.pack_start
    lengths[plan.num_shared_packs :] += plan.reserved_tail_slots
    length = _ANY_LENGTH if fixed else int(lengths.max())
    tiles = [choose_tile(number, length, shape) for number in classes]
    if record.launch_mode == "fused" and len(classes) > 1:
        tiles = [*choose_fused_tiles(length, shape)]
    # A pack takes the smallest class that holds its rows, or the largest.
    index = np.minimum(np.searchsorted(classes, rows), len(classes) - 1)
    return [(tiles[i].block_m, tiles[i].block_n) for i in index.tolist()]
