"""A plan seen from the tree: every node of the forest, and what each request holds alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.launches import PlanFacts, choose_launches, choose_modes
from prefix_kernels.plan import AttentionShape
from prefix_kernels.tiles import TileShape, row_classes
from prefix_kernels.work_list import tile_classes
from sglang_prefix.explain.reasons import leaves, notes_of, reasons_of
from sglang_prefix.explain.record import PlanRecord, ShapePlan
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing.layout import CostedPlan, PlanStats
from sglang_prefix.packing.pat import queries_of_nodes

__all__ = ["Explanation", "Pack", "Segment", "explain", "tile_shape"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack of the plan.

    Attributes:
        index: its number there.
        start, end: the positions that it reads.
        requests: batch rows that read them together.
        num_queries: query tokens of these requests.
        num_splits: splits that it is cut into.
        tile: rows and KV tokens of the tile that computes it; None where there are no tiles.
    """

    index: int
    start: int
    end: int
    requests: list[int]
    num_queries: int
    num_splits: int
    tile: tuple[int, int] | None


@dataclass(slots=True)
class Segment:
    """A node, which several requests share, or the tail that one request holds alone.

    Attributes:
        is_node: whether it is a node.
        index: number of the node, or batch row of the request.
        parent: the node above it, -1 for none.
        start, stop: its positions.
        begin, end: its requests are ``forest.order[begin:end]``.
        num_queries: query tokens of these requests.
        packs: those that end in it; empty if others below read its tokens.
        tokens_read: reads of the tokens of this segment, by all packs.
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
    num_queries: int
    packs: list[Pack] = field(default_factory=list)
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
    def pack_start(self) -> int:
        """Where its first pack begins; before ``start`` if it reads tokens of nodes above, too."""
        return self.packs[0].start if self.packs else self.start

    @property
    def takes_over(self) -> int:
        """Tokens above this segment that its first pack reads."""
        return max(0, self.start - self.pack_start)


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """A record, segment by segment.

    Attributes:
        record: the record.
        forest: who shares what; query tokens nobody, where requests have several.
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
        explanation = {
            "stats": asdict(self.stats),
            "notes": self.notes,
            "segments": [asdict(segment) for segment in self.segments],
        }
        return self.record.as_dict() | {"explanation": explanation}


def explain(record: PlanRecord) -> Explanation:
    """Plan a batch again, and say of every segment how it is read and why.

    Raises:
        ValueError: it was not planned, because the workspace has no room for so many requests.
    """
    shape_plan = max(record.plans, key=lambda plan: plan.num_layers)
    forest, query_lens = record.forest(), record.queries
    try:
        plan = shape_plan.plan(forest, query_lens)
    except ValueError as error:
        raise ValueError(f"the batch cannot be planned: {error}") from None
    has_bound = shape_plan.max_partials is not None
    ample = plan
    if has_bound:
        ample = replace(shape_plan, max_partials=None).plan(forest, query_lens)
    segments = _segments(forest, plan.query_lens)
    _add_packs(segments, forest, plan, _packs(record, plan))
    token_bytes = plan.costs.shape.kv_token_bytes
    reasons = reasons_of(forest, shape_plan.policy, plan, ample)
    for segment, why in zip(segments, reasons, strict=True):
        segment.bytes_read = segment.tokens_read * token_bytes
        logical = segment.tokens * segment.num_readers
        segment.bytes_saved = (logical - segment.tokens_read) * token_bytes
        segment.why = why
    notes = notes_of(record, shape_plan, plan, ample)
    return Explanation(record, forest, shape_plan, plan, segments, plan.stats(), notes)


def _segments(forest: PrefixForest, query_lens: IntArray | None) -> list[Segment]:
    """Every node, then every tail, as yet without packs."""
    order, place = forest.order, np.arange(forest.batch_size)
    queries = np.ones_like(order) if query_lens is None else query_lens[order]
    columns = (
        (np.arange(forest.num_nodes), order),
        (forest.node_parent, leaves(forest)[order]),
        (forest.node_start, forest.shared_lens[order]),
        (forest.node_stop, forest.seq_lens[order]),
        (forest.node_begin, place),
        (forest.node_end, place + 1),
        (queries_of_nodes(forest, query_lens), queries),
    )
    rows: list[list[int]] = np.stack([*map(np.concatenate, columns)], axis=1).tolist()
    segments = []
    for number, (index, parent, start, stop, begin, end, num_queries) in enumerate(rows):
        is_node = number < forest.num_nodes
        segments.append(Segment(is_node, index, parent, start, stop, begin, end, num_queries))
    return segments


def _add_packs(
    segments: list[Segment], forest: PrefixForest, plan: CostedPlan, packs: list[Pack]
) -> None:
    """Give every pack to the segment that it ends in, and count what it reads on its way up."""
    place = np.argsort(forest.order)
    for pack in packs:
        number = forest.num_nodes + int(place[pack.requests[0]])
        if pack.index < plan.num_shared_packs:
            number = segments[number].parent
            while segments[number].start >= pack.end:
                number = segments[number].parent
        segments[number].packs.append(pack)
        blocks = plan.costs.row_blocks(pack.num_queries)
        while number >= 0 and pack.start < segments[number].stop:
            segment = segments[number]
            read = min(pack.end, segment.stop) - max(pack.start, segment.start)
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


def _packs(record: PlanRecord, plan: CostedPlan) -> list[Pack]:
    """The packs of a plan, in its order."""
    numbers = range(plan.num_packs)
    columns = (plan.pack_start, plan.pack_end, plan.num_splits)
    starts, ends, splits = (column.tolist() for column in columns)
    queries = [plan.pack_queries(pack) for pack in numbers]
    rows = [*map(len, queries)]
    if plan.query_lens is not None:  # those of a request stand together
        request_of = np.repeat(np.arange(plan.batch_size), plan.query_lens)
        queries = [
            found[np.diff(found, prepend=-1) != 0] for found in map(request_of.take, queries)
        ]
    requests = [found.tolist() for found in queries]
    return [*map(Pack, numbers, starts, ends, requests, rows, splits, _tiles(record, plan))]


def _tiles(record: PlanRecord, plan: CostedPlan) -> list[tuple[int, int] | None]:
    """[P] rows and KV tokens of each pack's tile; None for an executor that has no tiles."""
    if plan.costs.device.name == "cpu":
        return [None] * plan.num_packs
    shape, group_size = tile_shape(plan.costs.shape, record.gpu), plan.costs.shape.group_size
    if record.graph_rows is None:
        facts = PlanFacts.of(plan, group_size)
    else:
        facts = PlanFacts.of_every_plan(record.graph_rows, group_size)
    num_rows = record.graph_rows or plan.num_rows
    mode, _ = choose_modes(num_rows, group_size, record.launch_mode, v_in_k=shape.v_in_k)
    launches = choose_launches(facts, shape, mode)
    tiles = [tile for launch in launches for tile in launch.tiles]
    qo_rows = np.diff(plan.query_indptr) * group_size
    chosen = tile_classes(qo_rows, [tile.block_m for tile in tiles])
    return [(tiles[i].block_m, tiles[i].block_n) for i in chosen.tolist()]
