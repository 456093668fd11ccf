"""Why a batch is packed as it is: what decided, in numbers and for people.

The numbers of the ``pat`` policy are those of
:func:`sglang_prefix.packing.pat_jit.cheapest_choices`, the loop that decides; nothing is weighed a
second time in another way.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_prefix.explain.format import amount, plural, size
from sglang_prefix.explain.record import PlanRecord, ShapePlan, packs_of
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import CostModel, policy_named
from sglang_prefix.packing.pat import bytes_of
from sglang_prefix.packing.pat_jit import candidate_from, candidate_starts, cheapest_choices
from sglang_prefix.packing.splits import choose_num_splits

__all__ = ["NodeChoice", "leaves", "notes_of", "pat_choices", "reasons_of"]

_OTHER_POLICIES = {
    "node": "policy node: a pack for every node, a pass for every tail",
    "chunk": "policy chunk: whole chunks of 64 tokens that are shared",
    "query": "policy query: every request reads for itself",
}


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """What was weighed for a node: bytes moved for it and all nodes below, fixed costs included.

    Attributes:
        start: first position that the node's requests read together or each for themselves;
            before the node's own start if it reads tokens of nodes above itself.
        keeps: whether there is a pack from ``start`` on.
        pack_bytes, fold_bytes: with that pack; without it, None where that was no choice, because
            the node is too long for one below to be worth reading again.
        takes_over: whether the node reads the tokens from ``start`` on itself although its parent
            has a pack that it could join.
        own_bytes, join_bytes: the two sides of that; None where there is no such pack.
        tails_fold: whether requests that end here read the tokens from ``start`` on themselves.
        tail_fold_bytes, tail_join_bytes: the two sides of that, for one of them.
    """

    start: int
    keeps: bool
    pack_bytes: float
    fold_bytes: float | None
    takes_over: bool
    own_bytes: float | None
    join_bytes: float | None
    tails_fold: bool
    tail_fold_bytes: float
    tail_join_bytes: float


def pat_choices(forest: PrefixForest, costs: CostModel) -> list[NodeChoice]:
    """The choice for every node of a forest, as :func:`pack_pat` makes it."""
    tree = (forest.node_begin, forest.node_end)
    model = bytes_of(costs)
    token, _, query, reread = model
    candidates = candidate_starts(*tree, forest.node_start, forest.node_parent, *model)
    indptr, position, origin = candidates
    keeps, tails_fold, folds, pack_bytes, fold_bytes, join_bytes = cheapest_choices(
        *tree, forest.node_stop, forest.node_parent, *candidates, *model
    )
    chosen = indptr[:-1].copy()
    found = []
    for node in range(forest.num_nodes):
        above = int(forest.node_parent[node])
        joins = None
        if above >= 0:
            first, last = int(indptr[node]) + 1, int(indptr[node + 1])
            same = int(candidate_from(int(chosen[above]), first, last, origin))
            joins = same if same >= 0 and keeps[origin[same]] else None
            if same >= 0 and folds[same]:
                chosen[node] = same
        i = int(chosen[node])
        length = int(forest.node_stop[node] - position[i])
        own, join = None, None
        if joins is not None:
            own = float(min(pack_bytes[joins], fold_bytes[joins]))
            join = float(join_bytes[joins])
        found.append(
            NodeChoice(
                start=int(position[i]),
                keeps=bool(keeps[i]),
                pack_bytes=float(pack_bytes[i]),
                fold_bytes=float(fold_bytes[i]) if np.isfinite(fold_bytes[i]) else None,
                takes_over=joins is not None and bool(folds[joins]),
                own_bytes=own,
                join_bytes=join,
                tails_fold=bool(tails_fold[i]),
                tail_fold_bytes=length * token,
                tail_join_bytes=query + length * reread,
            )
        )
    return found


def leaves(forest: PrefixForest) -> NDArray[np.int64]:
    """[B] the deepest node of each request, -1 for none."""
    leaf = np.full(forest.batch_size, -1, dtype=np.int64)
    for node in range(forest.num_nodes):
        leaf[forest.node_requests(node)] = node
    return leaf


def reasons_of(forest: PrefixForest, shape_plan: ShapePlan) -> list[str]:
    """A reason for every node, then for every tail in the order of ``forest.order``."""
    plan, policy = shape_plan.plan, shape_plan.policy
    count = forest.num_nodes + forest.batch_size
    chosen = policy_named(policy)(forest, plan.costs)
    pairs = zip(astuple(chosen), astuple(packs_of(plan)), strict=True)
    if not all(np.array_equal(ours, theirs) for ours, theirs in pairs):
        return ["nothing is shared, so that the plan fits into the workspace"] * count
    if policy in _OTHER_POLICIES:
        return [_OTHER_POLICIES[policy]] * count
    choices, leaf = pat_choices(forest, plan.costs), leaves(forest)
    below = np.bincount(forest.node_parent[forest.node_parent >= 0], minlength=forest.num_nodes)
    below += np.bincount(leaf[leaf >= 0], minlength=forest.num_nodes)
    reasons = [
        _why_node(choice, int(start) - choice.start, int(count))
        for choice, start, count in zip(choices, forest.node_start, below, strict=True)
    ]
    for node in leaf[forest.order].tolist():
        if node < 0:
            reasons.append("shares nothing")
        else:
            choice = choices[node]
            reasons.append(_why_tail(choice, int(forest.node_stop[node]) - choice.start))
    return reasons


def _why_node(choice: NodeChoice, tokens_above: int, num_below: int) -> str:
    """Why ``pat`` packs a node or does not; ``num_below`` counts its children and tails."""
    pack = size(choice.pack_bytes)
    fold = None if choice.fold_bytes is None else size(choice.fold_bytes)
    if not choice.keeps:
        text = (
            f"no pack: {fold} moved if each of the {num_below} below reads it, {pack} with a pack"
        )
    elif fold is None:
        text = f"packed: {pack} moved; too long to be worth reading again below"
    else:
        text = f"packed: {pack} moved, against {fold} if each of the {num_below} below reads it"
    if choice.takes_over and choice.own_bytes is not None and choice.join_bytes is not None:
        text += (
            f"; reads {plural(tokens_above, 'token')} above itself: {size(choice.own_bytes)}, "
            f"against {size(choice.join_bytes)} in the pack above"
        )
    return text


def _why_tail(choice: NodeChoice, tokens_above: int) -> str:
    """Why a tail begins where it does under ``pat``; the choice is that of the node above it."""
    above = f"reads the {plural(tokens_above, 'token')} above itself"
    own, join = size(choice.tail_fold_bytes), size(choice.tail_join_bytes)
    if not choice.tails_fold:
        return f"joins the pack above: {join} more moved, against {own} to read its tokens alone"
    if choice.keeps:
        return f"{above}: {own} moved, against {join} more in the pack above"
    return f"{above}: there is no pack"


def notes_of(record: PlanRecord, shape_plan: ShapePlan) -> tuple[str, ...]:
    """What a reader of the plan must know, the record's own notes first."""
    plan, device = shape_plan.plan, shape_plan.plan.costs.device
    notes = list(record.notes)
    others = len(record.plans) - 1
    if others:
        notes.append(
            f"shown: the plan of {plural(shape_plan.num_layers, 'layer')}; {others} more for "
            "layers of another shape"
        )
    notes.append(f"splits: {_splits(shape_plan)}")
    most = plan.costs.row_blocks(int(np.diff(plan.query_indptr).max()))
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


def _splits(shape_plan: ShapePlan) -> str:
    plan, workers = shape_plan.plan, shape_plan.plan.costs.device.num_workers
    if (choose_num_splits(packs_of(plan), plan.seq_lens, plan.costs) != plan.num_splits).any():
        return "none, so that the plan fits into the workspace"
    if workers <= 1:
        return "none, one pass uses all of the device"
    share = f"an equal share of the work of {workers} programs"
    if (plan.num_splits == 1).all():
        return f"none, no pack is more than {share}"
    longest = int((-(-(plan.pack_end - plan.pack_start) // plan.num_splits)).max())
    return f"of up to {amount(longest)} tokens, no more than {share}"
