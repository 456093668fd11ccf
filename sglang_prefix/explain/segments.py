"""A plan seen from the tree: every node of the forest, and what each request holds alone."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_prefix.explain.format import amount, plural, why_node, why_tail
from sglang_prefix.explain.reasons import pat_choices
from sglang_prefix.explain.record import PlanRecord, ShapePlan, packs_of
from sglang_prefix.explain.tiles import pack_tiles
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import policy_named
from sglang_prefix.packing.layout import CostedPlan, PlanStats
from sglang_prefix.packing.splits import choose_num_splits

__all__ = ["Explanation", "Part", "explain"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
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
        num_splits: pieces that it is cut into.
        tile: rows and KV tokens of the tile that computes it; None where there are no tiles.
        tokens_read: reads of the tokens of this part, by whichever packs.
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
        """Tokens of this part."""
        return self.stop - self.start

    @property
    def num_readers(self) -> int:
        """Requests that need its tokens."""
        return self.end - self.begin

    @property
    def takes_over(self) -> int:
        """Tokens above this part that its own pack reads."""
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
    """A record, part by part.

    Attributes:
        record: the record.
        shape_plan: of its plans, the one that is shown: that of the most layers.
        parts: nodes, parents first, then tails in the order of ``forest.order``.
        stats: of that plan.
        notes: what a reader must know, for people.
    """

    record: PlanRecord
    shape_plan: ShapePlan
    parts: tuple[Part, ...]
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
            "nodes": [part.as_dict() for part in self.parts if part.is_node],
            "tails": [part.as_dict() for part in self.parts if not part.is_node],
        }
        return self.record.as_dict() | {"explanation": explanation}


def explain(record: PlanRecord) -> Explanation:
    """Say of every part how it is read and why.

    Raises:
        ValueError: the plan claims sharing that the forest does not have.
    """
    shape_plan = max(record.plans, key=lambda plan: plan.num_layers)
    forest, plan = record.forest, shape_plan.plan
    leaf = _leaves(forest)
    owners = _owners(forest, plan, leaf)
    reads = _tokens_read(forest, plan, owners)
    tiles = pack_tiles(record, plan)
    why = _reasons(forest, shape_plan, owners, leaf)
    token_bytes = plan.costs.shape.kv_token_bytes

    places = _places(forest, leaf)
    packs_of: list[list[int]] = [[] for _ in places]
    for pack, owner in enumerate(owners.tolist()):
        packs_of[owner].append(pack)
    parts = []
    for part, (parent, start, stop, begin, end) in enumerate(places):
        is_node = part < forest.num_nodes
        packs = packs_of[part]
        first = packs[0] if packs else -1
        logical = (stop - start) * (end - begin)
        parts.append(
            Part(
                is_node=is_node,
                index=part if is_node else int(forest.order[begin]),
                parent=parent,
                start=start,
                stop=stop,
                begin=begin,
                end=end,
                packs=tuple(packs),
                pack_start=int(plan.pack_start[first]) if first >= 0 else start,
                pack_readers=len(plan.pack_queries(first)) if first >= 0 else 0,
                num_splits=int(plan.num_splits[first]) if first >= 0 else 0,
                tile=tiles[first] if first >= 0 else None,
                tokens_read=int(reads[part]),
                bytes_read=int(reads[part]) * token_bytes,
                bytes_saved=(logical - int(reads[part])) * token_bytes,
                why=why[part],
            )
        )
    return Explanation(record, shape_plan, tuple(parts), plan.stats(), _notes(record, shape_plan))


def _leaves(forest: PrefixForest) -> IntArray:
    """[B] the deepest node of each request, -1 for none."""
    leaf = np.full(forest.batch_size, -1, dtype=np.int64)
    for node in range(forest.num_nodes):
        leaf[forest.node_requests(node)] = node
    return leaf


def _places(forest: PrefixForest, leaf: IntArray) -> list[tuple[int, int, int, int, int]]:
    """Parent, start, stop, begin and end of every part."""
    columns = (forest.node_parent, forest.node_start, forest.node_stop)
    nodes = zip(*(c.tolist() for c in (*columns, forest.node_begin, forest.node_end)), strict=True)
    tails = [
        (int(leaf[b]), int(forest.shared_lens[b]), int(forest.seq_lens[b]), i, i + 1)
        for i, b in enumerate(forest.order.tolist())
    ]
    return [*nodes, *tails]


def _owners(forest: PrefixForest, plan: CostedPlan, leaf: IntArray) -> IntArray:
    """[P] the part that each pack ends in."""
    place = np.empty(forest.batch_size, dtype=np.int64)
    place[forest.order] = np.arange(forest.batch_size)
    owners = np.empty(plan.num_packs, dtype=np.int64)
    owners[plan.num_shared_packs :] = forest.num_nodes + place
    for pack in range(plan.num_shared_packs):
        queries, end = plan.pack_queries(pack), plan.pack_end[pack]
        node = int(leaf[queries[0]])
        while node >= 0 and forest.node_start[node] >= end:
            node = int(forest.node_parent[node])
        at = place[queries]
        if (
            node < 0
            or end > forest.node_stop[node]
            or (at < forest.node_begin[node]).any()
            or (at >= forest.node_end[node]).any()
        ):
            raise ValueError(f"pack {pack} claims sharing that the forest does not have")
        owners[pack] = node
    return owners


def _tokens_read(forest: PrefixForest, plan: CostedPlan, owners: IntArray) -> IntArray:
    """[parts] how often the tokens of each part are read, row block by row block."""
    reads = np.zeros(forest.num_nodes + forest.batch_size, dtype=np.int64)
    above = [*forest.node_parent.tolist(), *_leaves(forest)[forest.order].tolist()]
    starts = [*forest.node_start.tolist(), *forest.shared_lens[forest.order].tolist()]
    stops = [*forest.node_stop.tolist(), *forest.seq_lens[forest.order].tolist()]
    for pack, owner in enumerate(owners.tolist()):
        start, end = int(plan.pack_start[pack]), int(plan.pack_end[pack])
        blocks = plan.costs.row_blocks(len(plan.pack_queries(pack)))
        part = owner
        while part >= 0 and start < stops[part]:
            reads[part] += blocks * (min(end, stops[part]) - max(start, starts[part]))
            part = above[part]
    return reads


def _reasons(
    forest: PrefixForest, shape_plan: ShapePlan, owners: IntArray, leaf: IntArray
) -> list[str]:
    """A reason for every part, from what decided."""
    plan, policy = shape_plan.plan, shape_plan.policy
    names = forest.num_nodes + forest.batch_size
    if not _is_policys(forest, shape_plan):
        return ["nothing is shared, so that the plan fits into the workspace"] * names
    if policy != "pat":
        text = {
            "node": "policy node: a pack for every node, a pass for every tail",
            "chunk": "policy chunk: whole chunks of 64 tokens that are shared",
            "query": "policy query: every request reads for itself",
        }[policy]
        return [text] * names
    choices = pat_choices(forest, plan.costs)
    below = np.bincount(forest.node_parent[forest.node_parent >= 0], minlength=forest.num_nodes)
    below += np.bincount(leaf[leaf >= 0], minlength=forest.num_nodes)
    reasons = [why_node(choices, forest, node, int(below[node])) for node in range(len(choices))]
    ends_in = leaf[forest.order].tolist()
    reasons += [why_tail(choices, forest, node) for node in ends_in]
    return reasons


def _is_policys(forest: PrefixForest, shape_plan: ShapePlan) -> bool:
    """Whether the packs are what the policy chooses, without the workspace's bound."""
    chosen = policy_named(shape_plan.policy)(forest, shape_plan.plan.costs)
    return all(
        np.array_equal(ours, theirs)
        for ours, theirs in zip(astuple(chosen), astuple(packs_of(shape_plan.plan)), strict=True)
    )


def _notes(record: PlanRecord, shape_plan: ShapePlan) -> tuple[str, ...]:
    plan, device = shape_plan.plan, shape_plan.plan.costs.device
    notes = list(record.notes)
    others = len(record.plans) - 1
    if others:
        notes.append(
            f"shown: the plan of {plural(shape_plan.num_layers, 'layer')}; {others} more for "
            "layers of another shape"
        )
    lengths, queries = plan.pack_end - plan.pack_start, np.diff(plan.query_indptr)
    chosen = choose_num_splits(packs_of(plan), plan.seq_lens, plan.costs)
    if (chosen != plan.num_splits).any():
        notes.append("splits: none, so that the plan fits into the workspace")
    elif device.num_workers <= 1:
        notes.append("splits: none, one pass uses all of the device")
    else:
        longest = int((-(-lengths // plan.num_splits)).max())
        pieces = f"pieces of up to {amount(longest)} tokens, no more than"
        if (plan.num_splits == 1).all():
            pieces = "none, no pack is more than"
        notes.append(
            f"splits: {pieces} an equal share of the work of {device.num_workers} programs"
        )
    most = plan.costs.row_blocks(int(queries.max()))
    if most > 1:
        notes.append(
            f"a pack is read once per {device.max_block_rows} rows of query heads, which is what "
            f"the widest tile holds: up to {most} times"
        )
    if shape_plan.policy == "pat" and record.forest.num_nodes:
        notes.append(
            "bytes moved, in reasons: by a node and all nodes below it, with partial results, and "
            "with fixed costs as the bytes that could be read in that time"
        )
    return tuple(notes)
