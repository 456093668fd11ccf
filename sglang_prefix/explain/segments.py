"""A plan seen from the tree: every node of the forest, and what each request holds alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from prefix_kernels.plan import AttentionShape
from prefix_kernels.tiles import PlanFacts, TileShape, choose_launches, row_classes
from prefix_kernels.work_list import tile_classes
from sglang_prefix.explain.reasons import leaves, notes_of, reasons_of
from sglang_prefix.explain.record import PlanRecord, ShapePlan
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing.layout import CostedPlan, PlanStats

__all__ = ["Explanation", "Segment", "explain", "tile_shape"]


@dataclass(slots=True)
class Segment:
    """A node, which several requests share, or the tail that one request holds alone.

    Attributes:
        is_node: whether it is a node.
        index: number of the node, or batch row of the request.
        parent: the node above it, -1 for none.
        start, stop: its positions.
        begin, end: its requests are ``forest.order[begin:end]``.
        packs: the packs that end in it; empty if others below read its tokens.
        pack_start: where the first of them begins; before ``start`` if it reads tokens of nodes
            above, too.
        pack_readers: requests in the first of them.
        num_splits: splits of the first of them.
        tile: rows and KV tokens of the tile that computes it; None where there are no tiles.
        tokens_read: reads of the tokens of this segment, by whichever packs.
        bytes_read, bytes_saved: of K, V and slot indices in one layer; saved against every
            request reading for itself.
        why: why it is packed so, for people.
    """

    is_node: bool
    index: int
    parent: int
    start: int
    stop: int
    begin: int
    end: int
    packs: list[int] = field(default_factory=list)
    pack_start: int = 0
    pack_readers: int = 0
    num_splits: int = 0
    tile: tuple[int, int] | None = None
    tokens_read: int = 0
    bytes_read: int = 0
    bytes_saved: int = 0
    why: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of this segment."""
        return self.stop - self.start

    @property
    def num_readers(self) -> int:
        """Requests that need its tokens."""
        return self.end - self.begin

    @property
    def takes_over(self) -> int:
        """Tokens above this segment that its own pack reads."""
        return max(0, self.start - self.pack_start) if self.packs else 0

    def as_dict(self) -> dict[str, Any]:
        """As values that JSON has."""
        return asdict(self) | {"tokens": self.tokens, "readers": self.num_readers}


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """A record, segment by segment.

    Attributes:
        record: the record.
        forest: who shares what.
        shape_plan: of its plans, the one that is shown: that of the most layers.
        plan: that plan.
        segments: nodes, parents first, then tails in the order of ``forest.order``.
        stats: of that plan.
        notes: what a reader must know, for people.
    """

    record: PlanRecord
    forest: PrefixForest
    shape_plan: ShapePlan
    plan: CostedPlan
    segments: list[Segment]
    stats: PlanStats
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The record with what was found out about it; readable as a record."""
        plan = self.plan
        packs = [
            {
                "start": int(plan.pack_start[pack]),
                "end": int(plan.pack_end[pack]),
                "num_splits": int(plan.num_splits[pack]),
                "requests": plan.pack_queries(pack).tolist(),
            }
            for pack in range(plan.num_packs)
        ]
        explanation = {
            "stats": asdict(self.stats),
            "kv_token_bytes": plan.costs.shape.kv_token_bytes,
            "notes": self.notes,
            "packs": packs,
            "nodes": [segment.as_dict() for segment in self.segments if segment.is_node],
            "tails": [segment.as_dict() for segment in self.segments if not segment.is_node],
        }
        return self.record.as_dict() | {"explanation": explanation}


def explain(record: PlanRecord) -> Explanation:
    """Plan a batch again, and say of every segment how it is read and why.

    Raises:
        ValueError: it was not planned, because the workspace has no room for so many requests.
    """
    shape_plan = max(record.plans, key=lambda plan: plan.num_layers)
    forest = record.neighbours.forest()
    try:
        plan = shape_plan.plan(forest)
    except ValueError as error:
        raise ValueError(f"the last batch was not planned: {error}") from None
    has_bound = shape_plan.max_partials is not None
    ample = replace(shape_plan, max_partials=None).plan(forest) if has_bound else plan
    segments = _segments(forest)
    _add_packs(segments, forest, plan, _tiles(record, plan))
    token_bytes = plan.costs.shape.kv_token_bytes
    reasons = reasons_of(forest, shape_plan.policy, plan, ample)
    for segment, why in zip(segments, reasons, strict=True):
        segment.bytes_read = segment.tokens_read * token_bytes
        logical = segment.tokens * segment.num_readers
        segment.bytes_saved = (logical - segment.tokens_read) * token_bytes
        segment.why = why
    notes = notes_of(record, shape_plan, plan, ample)
    return Explanation(record, forest, shape_plan, plan, segments, plan.stats(), notes)


def _segments(forest: PrefixForest) -> list[Segment]:
    """Every node, then every tail, as yet without packs."""
    order, place = forest.order, np.arange(forest.batch_size)
    columns = (
        (np.arange(forest.num_nodes), order),
        (forest.node_parent, leaves(forest)[order]),
        (forest.node_start, forest.shared_lens[order]),
        (forest.node_stop, forest.seq_lens[order]),
        (forest.node_begin, place),
        (forest.node_end, place + 1),
    )
    rows: list[list[int]] = np.stack([*map(np.concatenate, columns)], axis=1).tolist()
    segments = []
    for number, (index, parent, start, stop, begin, end) in enumerate(rows):
        is_node = number < forest.num_nodes
        segments.append(Segment(is_node, index, parent, start, stop, begin, end, pack_start=start))
    return segments


def _add_packs(
    segments: list[Segment],
    forest: PrefixForest,
    plan: CostedPlan,
    tiles: list[tuple[int, int] | None],
) -> None:
    """Give every pack to the segment that it ends in, and count what it reads on its way up."""
    place = np.argsort(forest.order)
    for pack, tile in enumerate(tiles):
        start, end = int(plan.pack_start[pack]), int(plan.pack_end[pack])
        queries = plan.pack_queries(pack)
        number = forest.num_nodes + int(place[queries[0]])
        if pack < plan.num_shared_packs:
            number = segments[number].parent
            while segments[number].start >= end:
                number = segments[number].parent
        segment = segments[number]
        if not segment.packs:
            segment.pack_start, segment.pack_readers, segment.tile = start, len(queries), tile
            segment.num_splits = int(plan.num_splits[pack])
        segment.packs.append(pack)
        blocks = plan.costs.row_blocks(len(queries))
        while number >= 0 and start < segments[number].stop:
            segment = segments[number]
            read = min(end, segment.stop) - max(start, segment.start)
            segment.tokens_read += blocks * read
            number = segment.parent


def tile_shape(shape: AttentionShape, gpu: str | None) -> TileShape:
    """What the choice of a tile depends on, on a device with Hopper's matrix units or later.

    Raises:
        ValueError: heads are too wide for any tile.
    """
    found = TileShape.of(shape, gpu)
    if not row_classes(found):
        raise ValueError(f"no tile of the Triton kernels is for v_head_dim {shape.v_head_dim:,}")
    return found


def _tiles(record: PlanRecord, plan: CostedPlan) -> list[tuple[int, int] | None]:
    """[P] rows and KV tokens of each pack's tile; None for an executor that has no tiles."""
    if plan.costs.device.name == "cpu":
        return [None] * plan.num_packs
    shape, group_size = tile_shape(plan.costs.shape, record.gpu), plan.costs.shape.group_size
    if record.graph_rows is None:
        facts = PlanFacts.of(plan, group_size)
    else:
        facts = PlanFacts.of_every_plan(record.graph_rows, group_size)
    launches = choose_launches(facts, shape, record.launch_mode)
    tiles = [tile for launch in launches for tile in launch.tiles]
    qo_rows = np.diff(plan.query_indptr) * group_size
    chosen = tile_classes(qo_rows, [tile.block_m for tile in tiles])
    return [(tiles[i].block_m, tiles[i].block_n) for i in chosen.tolist()]
