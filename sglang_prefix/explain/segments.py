"""A plan seen from the tree: every node of the forest, and what each request holds alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.plan import AttentionShape
from prefix_kernels.tiles import PlanFacts, TileShape, choose_launches, row_classes
from prefix_kernels.work_list import tile_classes
from sglang_prefix.explain.reasons import leaves, notes_of, reasons_of
from sglang_prefix.explain.record import PlanRecord, ShapePlan
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing.layout import CostedPlan, PlanStats

__all__ = ["Explanation", "Segment", "explain", "tile_shape"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
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
    packs: tuple[int, ...]
    pack_start: int
    pack_readers: int
    num_splits: int
    tile: tuple[int, int] | None
    tokens_read: int
    bytes_read: int
    bytes_saved: int
    why: str

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
        return asdict(self) | {
            "packs": list(self.packs),
            "tile": list(self.tile) if self.tile else None,
            "tokens": self.tokens,
            "readers": self.num_readers,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """A record, segment by segment.

    Attributes:
        record: the record.
        shape_plan: of its plans, the one that is shown: that of the most layers.
        segments: nodes, parents first, then tails in the order of ``forest.order``.
        stats: of that plan.
        notes: what a reader must know, for people.
    """

    record: PlanRecord
    shape_plan: ShapePlan
    segments: tuple[Segment, ...]
    stats: PlanStats
    notes: tuple[str, ...]

    @property
    def forest(self) -> PrefixForest:
        """Who shares what."""
        return self.record.forest

    @property
    def plan(self) -> CostedPlan:
        """The plan that is shown."""
        return self.shape_plan.plan

    def as_dict(self) -> dict[str, Any]:
        """The record with what was found out about it; readable as a record."""
        explanation = {
            "stats": asdict(self.stats),
            "kv_token_bytes": self.plan.costs.shape.kv_token_bytes,
            "notes": list(self.notes),
            "nodes": [segment.as_dict() for segment in self.segments if segment.is_node],
            "tails": [segment.as_dict() for segment in self.segments if not segment.is_node],
        }
        return self.record.as_dict() | {"explanation": explanation}


class _Place(NamedTuple):
    """Where a segment lies; as in :class:`Segment`."""

    parent: int
    start: int
    stop: int
    begin: int
    end: int


def explain(record: PlanRecord) -> Explanation:
    """Say of every segment how it is read and why.

    Raises:
        ValueError: the plan claims sharing that the forest does not have.
    """
    shape_plan = max(record.plans, key=lambda plan: plan.num_layers)
    forest, plan = record.forest, shape_plan.plan
    places = _places(forest)
    owners = _owners(forest, plan, places)
    reads = _tokens_read(plan, owners, places)
    tiles = _tiles(record, plan)
    why = reasons_of(forest, shape_plan)
    token_bytes = plan.costs.shape.kv_token_bytes
    packs_in: list[list[int]] = [[] for _ in places]
    for pack, owner in enumerate(owners):
        packs_in[owner].append(pack)
    segments = []
    for number, (place, packs) in enumerate(zip(places, packs_in, strict=True)):
        is_node = number < forest.num_nodes
        first = packs[0] if packs else -1
        logical = (place.stop - place.start) * (place.end - place.begin)
        segments.append(
            Segment(
                is_node,
                number if is_node else int(forest.order[place.begin]),
                *place,
                packs=tuple(packs),
                pack_start=int(plan.pack_start[first]) if packs else place.start,
                pack_readers=len(plan.pack_queries(first)) if packs else 0,
                num_splits=int(plan.num_splits[first]) if packs else 0,
                tile=tiles[first] if packs else None,
                tokens_read=reads[number],
                bytes_read=reads[number] * token_bytes,
                bytes_saved=(logical - reads[number]) * token_bytes,
                why=why[number],
            )
        )
    notes = notes_of(record, shape_plan)
    return Explanation(record, shape_plan, tuple(segments), plan.stats(), notes)


def _places(forest: PrefixForest) -> list[_Place]:
    """Of every node, then of every tail."""
    leaf, order = leaves(forest), forest.order
    place = np.arange(forest.batch_size)
    columns = (
        (forest.node_parent, leaf[order]),
        (forest.node_start, forest.shared_lens[order]),
        (forest.node_stop, forest.seq_lens[order]),
        (forest.node_begin, place),
        (forest.node_end, place + 1),
    )
    return [_Place(*row) for row in np.stack([*map(np.concatenate, columns)], axis=1).tolist()]


def _owners(forest: PrefixForest, plan: CostedPlan, places: list[_Place]) -> list[int]:
    """[P] the segment that each pack ends in."""
    place_of = np.empty(forest.batch_size, dtype=np.int64)
    place_of[forest.order] = np.arange(forest.batch_size)
    owners = []
    for pack in range(plan.num_shared_packs):
        at, end = place_of[plan.pack_queries(pack)], plan.pack_end[pack]
        node = places[forest.num_nodes + int(at[0])].parent
        while node >= 0 and places[node].start >= end:
            node = places[node].parent
        if (
            node < 0
            or end > places[node].stop
            or (at < places[node].begin).any()
            or (at >= places[node].end).any()
        ):
            raise ValueError(f"pack {pack} claims sharing that the forest does not have")
        owners.append(node)
    return owners + (forest.num_nodes + place_of).tolist()


def _tokens_read(plan: CostedPlan, owners: list[int], places: list[_Place]) -> list[int]:
    """How often the tokens of each segment are read, row block by row block."""
    reads = [0] * len(places)
    for pack, owner in enumerate(owners):
        start, end = int(plan.pack_start[pack]), int(plan.pack_end[pack])
        blocks = plan.costs.row_blocks(len(plan.pack_queries(pack)))
        segment = owner
        while segment >= 0 and start < places[segment].stop:
            place = places[segment]
            reads[segment] += blocks * (min(end, place.stop) - max(start, place.start))
            segment = place.parent
    return reads


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
