"""Which tile of the Triton kernels computes a pack."""

from __future__ import annotations

import numpy as np

from prefix_kernels.tiles import PlanFacts, TileShape, choose_launches
from prefix_kernels.work_list import tile_classes
from sglang_prefix.explain.record import PlanRecord
from sglang_prefix.packing import AttentionShape
from sglang_prefix.packing.layout import CostedPlan

__all__ = ["pack_tiles", "tile_shape"]


def tile_shape(shape: AttentionShape, gpu: str | None) -> TileShape:
    """What the choice of a tile depends on, on a device with Hopper's matrix units or later."""
    return TileShape.of(shape, gpu)


def pack_tiles(record: PlanRecord, plan: CostedPlan) -> list[tuple[int, int] | None]:
    """[P] rows and KV tokens of each pack's tile; None for an executor that has no tiles."""
    if plan.costs.device.name == "cpu":
        return [None] * plan.num_packs
    shape, group_size = tile_shape(plan.costs.shape, record.gpu), plan.costs.shape.group_size
    if record.graph_rows is None:
        facts = PlanFacts.of(plan, group_size)
    else:
        facts = PlanFacts.of_every_plan(record.graph_rows, group_size)
    launches = choose_launches(facts, shape, record.launch_mode)
    tiles = [tile for one in launches for tile in one.tiles]
    num_queries = np.diff(plan.query_indptr)
    chosen = tile_classes(num_queries * group_size, [tile.block_m for tile in tiles])
    return [(tiles[i].block_m, tiles[i].block_n) for i in chosen.tolist()]
