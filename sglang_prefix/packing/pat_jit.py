"""The loops of the ``pat`` policy: candidate starts, the cheapest choice for each, the packs.

Nodes are in preorder, parents before children, with their requests at ``order[begin:end]``. Every
node has candidates: positions where the KV that its requests read together may begin. They stand
in flat arrays, node after node, a node's own start first.

``num_queries`` are the query tokens of each node's requests, one each unless a batch has more: a
pack's rows. Where a request reads KV alone, its first query is charged as one that does, and the
others as rows of a pack, which share what is read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sglang_prefix.jit import jit

__all__ = [
    "candidate_from",
    "candidate_starts",
    "cheapest_choices",
    "write_packs",
]

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


@jit
def candidate_starts(
    begin: IntArray,
    end: IntArray,
    num_queries: IntArray,
    start: IntArray,
    parent: IntArray,
    lone_token_bytes: float,
    pack_token_bytes: float,
    query_token_bytes: float,
    query_bytes: float,
    pack_bytes: float,
) -> tuple[IntArray, IntArray, IntArray]:
    """Where the KV that a node's requests read together may begin: its own start, or earlier.

    Segments that are too long to be worth reading again are left out. Folding one into one child
    saves that child's queries; folding it into all ``k`` children and tails saves the pack and
    every query, for ``k - 1`` more readers. Of ancestors far above only a few are tried, so that a
    long chain of tiny nodes costs no more than n log n: one that is ``d`` levels up is tried if its
    depth is a multiple of the largest power of two up to ``d / 2``.

    Returns:
        [N + 1] bounds of each node's candidates, and of each candidate its position and the
        parent's candidate that it is, -1 for a node's own start.
    """
    num_nodes = len(parent)
    units = _units(begin, end, parent)
    least_bytes = min(lone_token_bytes, pack_token_bytes)  # of a token, whoever reads it
    indptr = np.zeros(num_nodes + 1, dtype=np.int64)
    position = np.empty(2 * num_nodes, dtype=np.int64)
    origin, depth = np.empty_like(position), np.empty_like(position)
    count = 0
    for node in range(num_nodes):
        above = parent[node]
        low, high = (indptr[above], indptr[above + 1]) if above >= 0 else (0, 0)
        if count + 1 + high - low > len(position):
            position, origin, depth = _enlarged(position), _enlarged(origin), _enlarged(depth)
        own_depth = depth[low] + 1 if above >= 0 else 0
        position[count], origin[count], depth[count] = start[node], -1, own_depth
        count += 1
        if above >= 0:
            here, both = num_queries[node], num_queries[above]
            longest = max(
                _break_even(here * query_bytes, least_bytes - here * query_token_bytes),
                _break_even(
                    pack_bytes + both * query_bytes,
                    units[above] * least_bytes - pack_token_bytes - both * query_token_bytes,
                ),
            )
            for i in range(low, high):
                stride = 1
                while 4 * stride <= own_depth - depth[i]:
                    stride *= 2
                if start[node] - position[i] <= longest and depth[i] % stride == 0:
                    position[count], origin[count], depth[count] = position[i], i, depth[i]
                    count += 1
        indptr[node + 1] = count
    return indptr, position[:count], origin[:count]


@jit
def _enlarged(array: IntArray) -> IntArray:
    """The array with room for as much again behind it."""
    larger = np.empty(2 * len(array), dtype=np.int64)
    for i in range(len(array)):
        larger[i] = array[i]
    return larger


@jit
def _units(begin: IntArray, end: IntArray, parent: IntArray) -> IntArray:
    """[N] children and tails of each node: what its KV can be folded into."""
    units = np.empty_like(parent)
    for node in range(len(parent)):
        units[node] = end[node] - begin[node]
        if parent[node] >= 0:
            units[parent[node]] -= end[node] - begin[node] - 1
    return units


@jit
def _break_even(gain: float, loss_per_token: float) -> float:
    """Longest segment for which a fixed gain outweighs a loss that grows with its length."""
    return gain / loss_per_token if loss_per_token > 0 else np.inf


@jit
def cheapest_choices(
    begin: IntArray,
    end: IntArray,
    num_queries: IntArray,
    stop: IntArray,
    parent: IntArray,
    indptr: IntArray,
    position: IntArray,
    origin: IntArray,
    lone_token_bytes: float,
    pack_token_bytes: float,
    query_token_bytes: float,
    query_bytes: float,
    pack_bytes: float,
) -> tuple[BoolArray, BoolArray, BoolArray, FloatArray, FloatArray, FloatArray]:
    """For every node and candidate: keep a pack over the KV from there on, or fold it downwards.

    Bottom-up. A pack costs itself, its KV once, and for each child and tail the cheaper of a
    query in it and reading the KV itself; folding costs what reading it costs every child and
    tail, and is possible if each child has the candidate too.

    Returns:
        By candidate: whether a pack is kept; whether tails read the KV themselves; and whether the
        node, as a child, reads the KV of the parent's candidate ``origin`` itself. Then what was
        weighed, by candidate: the bytes of the subtree with a pack; without one, infinite if that
        is impossible; and with the node's requests in the parent's pack, against which a child
        that reads the KV itself was weighed.
    """
    num_nodes = len(parent)
    first_child, next_child, num_own = _children(begin, end, parent)
    own_queries = num_queries.copy()  # of requests whose tails hang on the node
    for node in range(num_nodes):
        if parent[node] >= 0:
            own_queries[parent[node]] -= num_queries[node]
    cost, pack_costs, fold_costs, join_costs = (
        np.empty(len(position)),
        np.empty(len(position)),
        np.full(len(position), np.inf),
        np.full(len(position), np.inf),
    )
    keeps, tails_fold = np.zeros(len(position), np.bool_), np.zeros(len(position), np.bool_)
    folds = np.zeros(len(position), np.bool_)
    for node in range(num_nodes - 1, -1, -1):
        for i in range(indptr[node], indptr[node + 1]):
            length = stop[node] - position[i]
            kept_query_bytes = query_bytes + length * query_token_bytes
            tails_kept, tails_folded = (
                own_queries[node] * kept_query_bytes,
                num_own[node] * length * lone_token_bytes
                + (own_queries[node] - num_own[node]) * length * query_token_bytes,
            )
            split_cost = pack_bytes + length * pack_token_bytes + min(tails_kept, tails_folded)
            fold_cost = tails_folded
            all_can_fold = True
            child = first_child[node]
            while child >= 0:
                own = indptr[child]
                kept = cost[own] + num_queries[child] * kept_query_bytes
                same = candidate_from(i, own + 1, indptr[child + 1], origin)
                if same < 0:
                    all_can_fold = False
                    split_cost += kept
                else:
                    fold_cost += cost[same]
                    join_costs[same] = kept
                    folds[same] = cost[same] < kept
                    split_cost += min(cost[same], kept)
                child = next_child[child]
            pack_costs[i] = split_cost
            if all_can_fold:
                fold_costs[i] = fold_cost
            if all_can_fold and fold_cost <= split_cost:
                cost[i], tails_fold[i] = fold_cost, True
            else:
                cost[i], keeps[i], tails_fold[i] = split_cost, True, tails_folded < tails_kept
    for i in range(len(position)):
        if origin[i] >= 0 and not keeps[origin[i]]:
            folds[i] = True
    return keeps, tails_fold, folds, pack_costs, fold_costs, join_costs


@jit
def _children(
    begin: IntArray, end: IntArray, parent: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """[N] first child and [N] next sibling of each node, -1 for none; [N] tails on each node."""
    first_child, next_child = np.full_like(parent, -1), np.full_like(parent, -1)
    num_own = np.empty_like(parent)
    for node in range(len(parent)):
        num_own[node] = end[node] - begin[node]
    for node in range(len(parent) - 1, -1, -1):
        if parent[node] >= 0:
            next_child[node] = first_child[parent[node]]
            first_child[parent[node]] = node
            num_own[parent[node]] -= end[node] - begin[node]
    return first_child, next_child, num_own


@jit
def candidate_from(source: int, low: int, high: int, origin: IntArray) -> int:
    """The candidate in [low, high) that is the parent's candidate ``source``; -1 for none."""
    for i in range(low, high):
        if origin[i] == source:
            return i
    return -1


@jit
def write_packs(
    order: IntArray,
    begin: IntArray,
    end: IntArray,
    stop: IntArray,
    parent: IntArray,
    indptr: IntArray,
    position: IntArray,
    origin: IntArray,
    keeps: BoolArray,
    tails_fold: BoolArray,
    folds: BoolArray,
) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    """Walk the choices from the roots down and write the packs out, parents first.

    A pack is read by the node's requests in their order, without those of children that fold and
    without tails that fold.

    Returns:
        The five arrays of :class:`Packs`.
    """
    num_nodes = len(parent)
    first_child, next_child, _ = _children(begin, end, parent)
    chosen = np.empty_like(parent)
    size = 0
    for node in range(num_nodes):
        chosen[node] = indptr[node]  # its own start, unless its parent chooses another one
        size += end[node] - begin[node]
    pack_start, pack_end = np.empty_like(parent), np.empty_like(parent)
    query_indptr = np.zeros(num_nodes + 1, dtype=np.int64)
    queries = np.empty(size, dtype=np.int64)
    tail_start = np.zeros(len(order), dtype=np.int64)
    num_packs, num_queries = 0, 0
    for node in range(num_nodes):
        choice = chosen[node]
        tail = position[choice] if tails_fold[choice] else stop[node]
        at, child = begin[node], first_child[node]
        while at < end[node]:
            if child < 0 or at < begin[child]:
                tail_start[order[at]] = tail
                upto, reads_pack = at + 1, not tails_fold[choice]
            else:
                same = candidate_from(choice, indptr[child] + 1, indptr[child + 1], origin)
                upto, reads_pack = end[child], same < 0 or not folds[same]
                if not reads_pack:
                    chosen[child] = same
                child = next_child[child]
            if reads_pack and keeps[choice]:
                for place in range(at, upto):
                    queries[num_queries] = order[place]
                    num_queries += 1
            at = upto
        if num_queries > query_indptr[num_packs]:
            pack_start[num_packs], pack_end[num_packs] = position[choice], stop[node]
            num_packs += 1
            query_indptr[num_packs] = num_queries
    return (
        pack_start[:num_packs],
        pack_end[:num_packs],
        query_indptr[: num_packs + 1],
        queries[:num_queries],
        tail_start,
    )
