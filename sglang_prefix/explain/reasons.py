"""Why a batch is packed as it is: what decided, in numbers and for people.

The numbers of the ``pat`` policy are those of
:func:`sglang_prefix.packing.pat_jit.cheapest_choices`, the loop that decides; nothing is weighed a
second time in another way.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglang_prefix.explain.format import plural, size
from sglang_prefix.explain.record import PlanRecord, ShapePlan
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import CostModel
from sglang_prefix.packing.layout import CostedPlan
from sglang_prefix.packing.pat import bytes_of, queries_of_nodes
from sglang_prefix.packing.pat_jit import candidate_from, candidate_starts, cheapest_choices

__all__ = ["NodeChoice", "leaves", "notes_of", "pat_choices", "reasons_of"]

IntArray = NDArray[np.int64]

_OTHER_POLICIES = {
    "node": "policy node: a pack for every node, a pass for every tail",
    "chunk": "policy chunk: whole chunks of 64 tokens that are shared",
    "query": "policy query: every request reads for itself",
}


class NodeChoice(NamedTuple):
    """What was weighed for a node: bytes moved for it and all nodes below, all costs included.

    Attributes:
        start: first position that the node's requests read together or each for themselves;
            before the node's own start if it reads tokens of nodes above itself.
        pack_bytes, fold_bytes: with a pack from ``start`` on; without it, infinite where that was
            no choice, because the node is too long for one below to be worth reading again.
        own_bytes, join_bytes: if the node reads the tokens from ``start`` on itself, or joins its
            parent's pack over them; NaN where the parent has none.
        tail_own_bytes, tail_join_bytes: the same for one request that ends here, and the pack from
            ``start`` on; the mean of those that do, where they have several query tokens.
    """

    start: int
    pack_bytes: float
    fold_bytes: float
    own_bytes: float
    join_bytes: float
    tail_own_bytes: float
    tail_join_bytes: float

    @property
    def keeps(self) -> bool:
        """Whether there is a pack from ``start`` on."""
        return self.pack_bytes < self.fold_bytes

    @property
    def takes_over(self) -> bool:
        """Whether the node reads tokens above itself although it could join a pack over them."""
        return self.own_bytes < self.join_bytes


def pat_choices(
    forest: PrefixForest, costs: CostModel, query_lens: IntArray | None = None
) -> list[NodeChoice]:
    """The choice for every node of a forest, as :func:`pack_pat` makes it from the same."""
    num_queries = queries_of_nodes(forest, query_lens)
    queries_here = _mean_queries(forest, query_lens)
    tree = (forest.node_begin, forest.node_end, num_queries)
    model = bytes_of(costs)
    lone_token, _, query_token, query, _ = model
    candidates = candidate_starts(*tree, forest.node_start, forest.node_parent, *model)
    indptr, position, origin = candidates
    keeps, _, folds, pack_bytes, fold_bytes, join_bytes = cheapest_choices(
        *tree, forest.node_stop, forest.node_parent, *candidates, *model
    )
    chosen = indptr[:-1].copy()
    found = []
    for node, above in enumerate(forest.node_parent.tolist()):
        own = join = np.nan
        if above >= 0:
            first, last = int(indptr[node]) + 1, int(indptr[node + 1])
            same = int(candidate_from(int(chosen[above]), first, last, origin))
            if same >= 0 and keeps[origin[same]]:
                own, join = min(pack_bytes[same], fold_bytes[same]), join_bytes[same]
            if same >= 0 and folds[same]:
                chosen[node] = same
        i = int(chosen[node])
        length = int(forest.node_stop[node] - position[i])
        pack = float(pack_bytes[i]), float(fold_bytes[i])
        here = queries_here[node]
        tail = (
            length * (lone_token + (here - 1) * query_token),
            here * (query + length * query_token),
        )
        found.append(NodeChoice(int(position[i]), *pack, own, join, *tail))
    return found


def _mean_queries(forest: PrefixForest, query_lens: IntArray | None) -> list[float]:
    """[N] query tokens of a request that ends in the node, in the mean; 1 where none does."""
    if query_lens is None:
        return [1.0] * forest.num_nodes
    leaf = leaves(forest) + 1
    total, count = (np.bincount(leaf, w, forest.num_nodes + 1)[1:] for w in (query_lens, None))
    found: list[float] = np.where(count > 0, total / np.maximum(count, 1), 1.0).tolist()
    return found


def leaves(forest: PrefixForest) -> IntArray:
    """[B] the deepest node of each request, -1 for none."""
    leaf = np.full(forest.batch_size, -1, dtype=np.int64)
    for node in range(forest.num_nodes):
        leaf[forest.node_requests(node)] = node
    return leaf


def reasons_of(forest: PrefixForest, policy: str, plan: CostedPlan, ample: CostedPlan) -> list[str]:
    """A reason for every node, then for every tail in the order of ``forest.order``.

    Args:
        forest: who shares what.
        policy: the packing policy.
        plan: what came of it.
        ample: what comes of it without a bound on partials.
    """
    leaf = leaves(forest)[forest.order]
    if plan.num_shared_packs < ample.num_shared_packs:
        same = "nothing is shared, so that the plan fits into the workspace"
    elif policy in _OTHER_POLICIES:
        same = _OTHER_POLICIES[policy]
    else:
        choices = pat_choices(forest, plan.costs, plan.query_lens)
        below = np.bincount(np.append(forest.node_parent, leaf) + 1, minlength=len(choices) + 1)
        above = (forest.node_start - [choice.start for choice in choices]).tolist()
        reasons = list(map(_why_node, choices, above, below[1:].tolist()))
        above = (forest.node_stop - [choice.start for choice in choices]).tolist()
        tails = [_why_tail(choice, tokens) for choice, tokens in zip(choices, above, strict=True)]
        return reasons + [tails[node] if node >= 0 else "shares nothing" for node in leaf.tolist()]
    return [same] * (forest.num_nodes + forest.batch_size)


def _why_node(choice: NodeChoice, tokens_above: int, num_below: int) -> str:
    """Why ``pat`` packs a node or does not; ``num_below`` counts its children and tails."""
    pack, fold = size(choice.pack_bytes), size(choice.fold_bytes)
    if not choice.keeps:
        text = (
            f"no pack: {fold} moved if each of the {num_below} below reads it, {pack} with a pack"
        )
    elif np.isinf(choice.fold_bytes):
        text = f"packed: {pack} moved; too long to be worth reading again below"
    else:
        text = f"packed: {pack} moved, against {fold} if each of the {num_below} below reads it"
    if choice.takes_over:
        text += (
            f"; reads {plural(tokens_above, 'token')} above itself: {size(choice.own_bytes)}, "
            f"against {size(choice.join_bytes)} in the pack above"
        )
    return text


def _why_tail(choice: NodeChoice, tokens_above: int) -> str:
    """Why a tail begins where it does under ``pat``; the choice is that of the node above it."""
    above = f"reads the {plural(tokens_above, 'token')} above itself"
    own, join = size(choice.tail_own_bytes), size(choice.tail_join_bytes)
    if not choice.keeps:
        return f"{above}: there is no pack"
    if choice.tail_own_bytes < choice.tail_join_bytes:
        return f"{above}: {own} moved, against {join} more in the pack above"
    return f"joins the pack above: {join} more moved, against {own} to read its tokens alone"


def notes_of(
    record: PlanRecord, shape_plan: ShapePlan, plan: CostedPlan, ample: CostedPlan
) -> list[str]:
    """What a reader of the plan must know, the record's own notes first; see :func:`reasons_of`."""
    device, notes = plan.costs.device, list(record.notes)
    others = len(record.plans) - 1
    if others:
        notes.append(
            f"shown: the plan of {plural(shape_plan.num_layers, 'layer')}; {others} more for "
            "layers of another shape"
        )
    if plan.num_partials < ample.num_partials:
        splits = "none, so that the plan fits into the workspace"
    elif not device.tiles:
        splits = "none, one pass uses all of the device"
    elif (plan.num_splits == 1).all():
        splits = "none, more would cost more time than they save"
    else:
        longest = (-(-(plan.pack_end - plan.pack_start) // plan.num_splits)).max()
        splits = f"of up to {longest:,} tokens, which take the least time by estimated costs"
    notes.append(f"splits: {splits}")
    for load in plan.loads():
        notes.append(
            f"tiles of {load.rows} rows: {plural(load.num_items, 'work item')} on "
            f"{load.num_workers:,} programs, {load.waves:.2f} waves, "
            f"balance {load.even_us / load.fullest_us:.2f}"
        )
    if plan.query_lens is not None:
        notes.append(
            "query tokens are the newest of their request: all of them see all of a shared pack, "
            "which needs no mask, and in a tail each sees the positions up to its own"
        )
    most = plan.costs.row_blocks(int(np.diff(plan.query_indptr).max()))
    if most > 1:
        notes.append(
            f"a pack is read once per {device.max_block_rows} rows of query heads, which is what "
            f"the widest tile holds: up to {most} times"
        )
    if shape_plan.policy == "pat" and any(record.neighbours.common):
        notes.append(
            "bytes moved, in reasons: by a node and all nodes below it, with partial results, and "
            "with arithmetic and fixed costs as the bytes that could be read in that time"
        )
    return notes
