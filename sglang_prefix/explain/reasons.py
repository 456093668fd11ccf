"""Why the ``pat`` policy packed a node or did not: both sides of what it compared.

The numbers are those of :func:`sglang_prefix.packing.pat_jit.cheapest_choices`, the loop that
decides; nothing is weighed a second time in another way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import CostModel
from sglang_prefix.packing.pat import bytes_of
from sglang_prefix.packing.pat_jit import candidate_from, candidate_starts, cheapest_choices

__all__ = ["NodeChoice", "pat_choices"]


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """What was weighed for a node: bytes moved for it and all nodes below, fixed costs included.

    Attributes:
        start: first position that the node's requests read together or each for themselves;
            before the node's own start if it reads tokens of nodes above itself.
        keeps: whether there is a pack from ``start`` on.
        pack_bytes, fold_bytes: with that pack; without it, None where that was no choice, because
            it is too long a stretch for one below to be worth reading again.
        takes_over: whether the node reads the tokens from ``start`` on itself although its parent
            has a pack that it could join.
        own_bytes, join_bytes: the two sides of that; None where there is no such pack.
        tails_fold: whether requests that end here read the stretch themselves.
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
        found.append(
            NodeChoice(
                start=int(position[i]),
                keeps=bool(keeps[i]),
                pack_bytes=float(pack_bytes[i]),
                fold_bytes=float(fold_bytes[i]) if np.isfinite(fold_bytes[i]) else None,
                takes_over=joins is not None and bool(folds[joins]),
                own_bytes=None
                if joins is None
                else float(min(pack_bytes[joins], fold_bytes[joins])),
                join_bytes=None if joins is None else float(join_bytes[joins]),
                tails_fold=bool(tails_fold[i]),
                tail_fold_bytes=length * token,
                tail_join_bytes=query + length * reread,
            )
        )
    return found
