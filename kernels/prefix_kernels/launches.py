"""Which launches, and which tiles in them, compute a plan: pure functions decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from prefix_kernels.plan import PackPlan
from prefix_kernels.tiles import (
    MIN_BLOCK_N,
    ROW_CLASSES,
    TileConfig,
    TileShape,
    formula_tile,
    measured_tile,
    row_classes,
)

__all__ = [
    "AUTO",
    "FUSED_ROWS",
    "GRAPH_ROWS",
    "LAUNCH_MODES",
    "MERGE_MODES",
    "SMALL_BATCH",
    "LaunchConfig",
    "LaunchSetting",
    "PlanFacts",
    "choose_launches",
    "choose_modes",
    "warm_up_sizes",
    "widest_block",
]

# How a plan is launched and merged, see `TritonExecutor`; "auto" is for `choose_modes` to resolve.
LAUNCH_MODES = ("streams", "fused")
MERGE_MODES = ("launch", "in_kernel")
AUTO = "auto"
# The two classes of a fused launch: the most frequent one, and the least one for wgmma.
FUSED_ROWS = (16, 64)
# The classes of a graph, beside that of its batch's most rows: those of a fused launch. A pack of
# 17 to 64 rows in the tile of 128 would take most of an SM and almost twice the instructions
# (docs/kernels.md).
GRAPH_ROWS = FUSED_ROWS
# Requests of a batch that is small: where no pack has more rows than a fused launch's wide tile,
# one launch that merges, too, is one node of a graph instead of three. With more requests programs
# have several items each, and pay for the count of arrivals at the end of every one.
SMALL_BATCH = 16
# Triton's interpreter runs programs one after another. A few show that the loop over items works.
_INTERPRETED_PROGRAMS = 8


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """What of a plan decides its launches.

    Attributes:
        qo_rows: query rows (requests times group size) of the packs, every number once; of every
            plan of a batch, the rows that there must be a tile for.
        kv_length: tokens of the longest pack, once its tail has grown. None if the launches must
            serve every plan of a batch, because a graph holds them.
    """

    qo_rows: tuple[int, ...]
    kv_length: int | None

    @classmethod
    def of(cls, plan: PackPlan, group_size: int) -> PlanFacts:
        """Of one plan."""
        rows = np.unique(np.diff(plan.query_indptr)) * group_size
        lengths = plan.pack_end - plan.pack_start
        lengths[plan.num_shared_packs :] += plan.reserved_tail_slots
        return cls(tuple(rows.tolist()), int(lengths.max()))

    @classmethod
    def of_every_plan(
        cls, padded_batch_size: int, group_size: int, graph_rows: tuple[int, ...] = GRAPH_ROWS
    ) -> PlanFacts:
        """Of every plan of a batch of this size.

        A class more is a launch more, which ends at once where it finds nothing to do. So there are
        those of ``graph_rows`` that the batch can outgrow, and the one that holds all of its rows.
        """
        most = padded_batch_size * group_size
        return cls((*(rows for rows in graph_rows if rows < most), most), None)


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """One launch of the forward stage: a work list, and the tile or tiles that take its items.

    Attributes:
        work_list: which of the plan's work lists.
        tile: the tile; of a fused launch the narrow one.
        wide_tile: the second tile of a fused launch.
    """

    work_list: int
    tile: TileConfig
    wide_tile: TileConfig | None = None

    @property
    def tiles(self) -> tuple[TileConfig, ...]:
        """Its tiles, by ascending rows."""
        return (self.tile,) if self.wide_tile is None else (self.tile, self.wide_tile)

    def merging(self) -> LaunchConfig:
        """The same launch of a kernel that merges, too."""
        wide = self.wide_tile and self.wide_tile.merging()
        return replace(self, tile=self.tile.merging(), wide_tile=wide)

    def with_tiles(self, changes: Mapping[str, Any]) -> LaunchConfig:
        """The same launch with other values of fields of its tiles."""
        wide = self.wide_tile and replace(self.wide_tile, **changes)
        return replace(self, tile=replace(self.tile, **changes), wide_tile=wide)

    def num_programs(self, shape: TileShape, num_sms: int, num_tiles: int | None) -> int:
        """Programs to launch: as many as run at a time, or fewer if there are fewer tiles.

        Args:
            shape: as in :func:`choose_launches`.
            num_sms: multiprocessors; 0 in the interpreter.
            num_tiles: work items times KV heads; None where the launch must not depend on it.
        """
        resident = num_sms * self.tiles[-1].resident_programs(shape) or _INTERPRETED_PROGRAMS
        return resident if num_tiles is None else max(1, min(num_tiles, resident))


class LaunchSetting(NamedTuple):
    """What an executor's launches depend on beside the plan.

    Attributes:
        shape: as in :func:`choose_launches`.
        group_size: query heads per KV head.
        num_sms: multiprocessors; 0 in the interpreter.
        mode: one of :data:`LAUNCH_MODES`, or :data:`AUTO`.
        is_fixed: whether the launches serve every plan of a padded batch size, as in a graph.
        graph_rows: of fixed launches, see :meth:`PlanFacts.of_every_plan`.
    """

    shape: TileShape
    group_size: int
    num_sms: int
    mode: str = AUTO
    is_fixed: bool = True
    graph_rows: tuple[int, ...] = GRAPH_ROWS

    def launches(self, padded_batch_size: int | None = None) -> list[LaunchConfig]:
        """Those of every long plan of a padded batch size; None for that of any large batch."""
        if padded_batch_size is None:
            mode = "streams" if self.mode == AUTO else self.mode
            return choose_launches(PlanFacts(row_classes(self.shape), None), self.shape, mode)
        v_in_k = self.shape.v_in_k
        mode, _ = choose_modes(padded_batch_size, self.group_size, self.mode, v_in_k=v_in_k)
        rows = self.graph_rows if self.is_fixed else ROW_CLASSES
        facts = PlanFacts.of_every_plan(padded_batch_size, self.group_size, rows)
        return choose_launches(facts, self.shape, mode)


def choose_launches(facts: PlanFacts, shape: TileShape, mode: str) -> list[LaunchConfig]:
    """Choose the launches of a plan. Nothing else decides what the forward stage launches.

    A pack takes the smallest tile that holds its rows; more rows than the largest tile has are
    taken in several blocks. "streams" has a launch for each row class in use, "fused" has one
    launch of up to two tiles.

    Args:
        facts: of the plan, or of every plan that a graph must serve.
        shape: head dims, item sizes, the matrix unit and the device.
        mode: one of :data:`LAUNCH_MODES`.

    Returns:
        By ascending rows; a launch's place is the number of its work list.
    """
    if mode == "fused":
        if max(facts.qo_rows) > FUSED_ROWS[0]:
            return [LaunchConfig(0, *_fused_tiles(facts.kv_length, shape))]
        return [LaunchConfig(0, _choose_tile(FUSED_ROWS[0], facts.kv_length, shape))]
    classes = {_row_class(rows, shape) for rows in facts.qo_rows}
    return [
        LaunchConfig(i, _choose_tile(rows, facts.kv_length, shape))
        for i, rows in enumerate(sorted(classes))
    ]


def choose_modes(
    padded_batch_size: int,
    group_size: int,
    mode: str = AUTO,
    merge: str = AUTO,
    *,
    v_in_k: bool = False,
) -> tuple[str, str]:
    """Choose how the plans of a batch size are launched and merged.

    It depends on what a graph knows, the size of the batch, and not on the plan.

    Args:
        padded_batch_size: rows of q, which are requests where each has one query token, padding
            included.
        group_size: query heads per KV head.
        mode: one of :data:`LAUNCH_MODES`, which wins, or :data:`AUTO`.
        merge: one of :data:`MERGE_MODES`, which wins, or :data:`AUTO`.
        v_in_k: as of :class:`~prefix_kernels.plan.AttentionShape`. Beside the accumulator of the
            wide tile there are no registers then for what a fused launch and a merge add, so a
            batch is small if the narrow tile holds its rows.

    Returns:
        One of :data:`LAUNCH_MODES` and one of :data:`MERGE_MODES`.
    """
    fits_fused = padded_batch_size * group_size <= FUSED_ROWS[0 if v_in_k else -1]
    is_small = fits_fused and padded_batch_size <= SMALL_BATCH
    chosen = ("fused", "in_kernel") if is_small else ("streams", "launch")
    return (chosen[0] if mode == AUTO else mode), (chosen[1] if merge == AUTO else merge)


def warm_up_sizes(group_size: int, most: int) -> set[int]:
    """Batch sizes, up to ``most``, that between them make a server launch every kernel it has.

    Launches follow from the batch size: their mode, and the class of the widest tile. The smallest
    batch of each.
    """
    smallest = {1, SMALL_BATCH + 1, *(rows // group_size + 1 for rows in ROW_CLASSES)}
    return {min(size, most) for size in smallest}


def widest_block(mode: str, shape: TileShape) -> int:
    """Rows of the widest tile that a launch mode, or "auto", has for head dims."""
    return _row_class(FUSED_ROWS[-1], shape) if mode == "fused" else row_classes(shape)[-1]


def _row_class(qo_rows: int, shape: TileShape) -> int:
    """Rows of the smallest tile that holds ``qo_rows``; of the largest one where none does."""
    legal = row_classes(shape)
    return next((rows for rows in legal if rows >= qo_rows), legal[-1])


def _choose_tile(block_m: int, kv_length: int | None, shape: TileShape) -> TileConfig:
    """The tile of a row class that was fastest on ``shape.device``, else the formula's."""
    return _for_length(measured_tile(block_m, shape) or formula_tile(block_m, shape), kv_length)


def _fused_tiles(kv_length: int | None, shape: TileShape) -> tuple[TileConfig, TileConfig]:
    """The narrow and the wide tile of a launch that has both.

    One kernel has one number of warps, stages and registers: those of the wide tile, which its
    accumulator needs, and the fewer stages, which both have room for. Tiles that were measured
    alone say nothing about such a pair, so the formula chooses.
    """
    narrow, wide = (
        _for_length(formula_tile(_row_class(rows, shape), shape), kv_length) for rows in FUSED_ROWS
    )
    wide = replace(wide, num_stages=min(narrow.num_stages, wide.num_stages))
    return replace(wide, block_m=narrow.block_m, block_n=narrow.block_n), wide


def _for_length(tile: TileConfig, kv_length: int | None) -> TileConfig:
    """The narrowest KV tile for packs that fit into one, with nothing to load ahead.

    All other lengths get the one width. What a tile has past the end of a pack repeats the last
    slot: its copies pass by the L1 cache (`LDGSTS.BYPASS` in the binary), so they cost traffic of
    the L2 cache, and none of main memory. Every width more would be a kernel that the first short
    batch waits seconds for.
    """
    if kv_length is None or kv_length > MIN_BLOCK_N:
        return tile
    return replace(tile, block_n=MIN_BLOCK_N, num_stages=2)
