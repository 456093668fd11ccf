"""What packing is compared with: the cost of packs, every fold choice, and PAT's own rule.

Written from the documentation, not from ``sglang_prefix.packing``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import CostModel, Packs
from sglang_prefix.packing.packs import PacksBuilder

__all__ = ["cheapest_fold", "pack_cost", "pack_set", "pat_published_rule", "tail_requests"]


def pack_cost(packs: Packs, seq_lens: NDArray[np.integer], costs: CostModel) -> float:
    """Bytes of one layer: a pack's KV once, its queries and partials, its fixed cost; tails' KV.

    A query's share of the further row blocks that read a pack's KV is charged evenly.
    """
    s, device = costs.shape, costs.device
    token = s.num_kv_heads * (s.head_dim + s.v_head_dim) * s.kv_itemsize + 4
    partial = 2 * 4 * s.num_qo_heads * (s.v_head_dim + 1)
    query = s.num_qo_heads * s.head_dim * s.q_itemsize + partial
    group = s.num_qo_heads // s.num_kv_heads
    lengths = (packs.end - packs.start).tolist()
    readers = np.diff(packs.query_indptr).tolist()
    total = float((seq_lens - packs.tail_start).sum()) * token
    for length, n in zip(lengths, readers, strict=True):
        blocks = 1 + device.reread_cost * n * group / device.max_block_rows
        total += device.pack_bytes + length * token * blocks + n * query
    return total


def pack_set(packs: Packs) -> set[tuple[int, int, frozenset[int]]]:
    """Shared packs as (start, end, batch rows)."""
    bounds = zip(packs.query_indptr[:-1].tolist(), packs.query_indptr[1:].tolist(), strict=True)
    return {
        (start, end, frozenset(packs.queries[low:high].tolist()))
        for start, end, (low, high) in zip(
            packs.start.tolist(), packs.end.tolist(), bounds, strict=True
        )
    }


def children_of(forest: PrefixForest, node: int) -> list[int]:
    """Child nodes; -1 asks for the roots."""
    return [int(child) for child in np.flatnonzero(forest.node_parent == node)]


def tail_requests(forest: PrefixForest, node: int) -> list[int]:
    """Requests whose tail hangs on a node, in the order of the node's requests."""
    below = {b for child in children_of(forest, node) for b in forest.node_requests(child).tolist()}
    return [b for b in forest.node_requests(node).tolist() if b not in below]


def cheapest_fold(forest: PrefixForest, costs: CostModel) -> float:
    """Cost of the best of all fold choices, tried one by one.

    At every node, and for every place where the KV folded into it may begin, each child and each
    tail either reads the node's pack or reads that KV itself; a pack that nobody reads is left
    out.
    """

    def bare(start: int, end: int, readers: list[int], tails: list[int]) -> float:
        """Cost of one pack, or of folding it (no readers), and of tails that fold it."""
        starts = np.zeros(forest.batch_size, dtype=np.int64)
        lens = np.zeros(forest.batch_size, dtype=np.int64)
        lens[tails] = end - start
        builder = PacksBuilder(forest.batch_size)
        if readers:
            builder.add(start, end, np.asarray(readers))
        packs = builder.build()
        packs.tail_start[:] = starts
        return pack_cost(packs, lens, costs)

    @cache
    def best(node: int, start: int) -> float:
        stop = int(forest.node_stop[node])
        children, tails = children_of(forest, node), tail_requests(forest, node)
        options = []
        for folds in product([False, True], repeat=len(children) + len(tails)):
            child_folds = dict(zip(children, folds, strict=False))
            tail_folds = dict(zip(tails, folds[len(children) :], strict=True))
            readers = [b for b, fold in tail_folds.items() if not fold]
            for child, fold in child_folds.items():
                readers += [] if fold else forest.node_requests(child).tolist()
            cost = bare(start, stop, readers, [b for b, fold in tail_folds.items() if fold])
            cost += sum(best(child, start if f else stop) for child, f in child_folds.items())
            options.append(cost)
        return min(options)

    private = int((forest.seq_lens - forest.shared_lens).sum())
    token = pack_cost(PacksBuilder(1).build(), np.ones(1, dtype=np.int64), costs)
    return sum(best(root, 0) for root in children_of(forest, -1)) + private * token


def pat_published_rule(forest: PrefixForest, costs: CostModel, *, max_rows: int = 64) -> Packs:
    """PAT's greedy profit rule as published (flashserve/PAT), in tokens.

    Leaves are the requests' tails. Children are visited in the order of the forest.
    """
    cap = max(1, max_rows // costs.shape.group_size)
    builder = PacksBuilder(forest.batch_size)

    def passes(queries: int) -> int:
        return -(-queries // cap)

    def parts(node: int) -> Iterator[tuple[int, list[int]]]:
        for child in children_of(forest, node):
            yield child, forest.node_requests(child).tolist()
        for request in tail_requests(forest, node):
            yield -1, [request]

    def walk(node: int, start: int) -> None:
        stop = int(forest.node_stop[node])
        length = stop - start
        left = set(forest.node_requests(node).tolist())
        for child, readers in parts(node):
            q, remaining = len(readers), len(left)
            extra = passes(remaining) - passes(remaining - q) - passes(q)
            fold = q == remaining or extra * length + 4 * q >= 0
            if fold:
                left -= set(readers)
            if child >= 0:
                walk(child, start if fold else stop)
            else:
                builder.tail_start[readers] = start if fold else stop
        kept = [b for b in forest.node_requests(node).tolist() if b in left]
        for first in range(0, len(kept), cap):
            builder.add(start, stop, np.asarray(kept[first : first + cap]))

    for root in children_of(forest, -1):
        walk(root, 0)
    return builder.build()
