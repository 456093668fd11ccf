"""What packing is compared with: the cost of packs, every fold choice, and PAT's own rule.

Written from the documentation, not from ``sglang_prefix.packing``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import AttentionShape, CostModel, DeviceProfile, Packs, TileCost
from sglang_prefix.packing.packs import PacksBuilder

__all__ = [
    "GROUPS",
    "cheapest_fold",
    "cost_models",
    "pack_cost",
    "pack_set",
    "pat_published_rule",
    "splitting",
    "tail_requests",
]

GROUPS = (1, 2, 3, 4, 5, 7, 8, 16)


def splitting(profile: DeviceProfile, *, num_workers: int) -> DeviceProfile:
    """The profile with programs, for which packs are split in any number of tokens; nothing but a
    token takes time."""
    tile = TileCost(profile.max_block_rows, 1, 1.0, 0.0, token_us=1.0, lone_bytes_per_us=1e9)
    return replace(profile, num_sms=num_workers, read_bytes_per_us=1e9, tiles=(tile,))


@st.composite
def cost_models(draw: st.DrawFn, profiles: Sequence[DeviceProfile]) -> CostModel:
    """Hypothesis strategy for head shapes and item sizes on one of the profiles."""
    heads = draw(st.sampled_from([1, 2, 8]))
    dim, v_dim = draw(st.sampled_from([(64, 64), (128, 128), (192, 128), (256, 256)]))
    group, kv_itemsize = draw(st.sampled_from(GROUPS)), draw(st.sampled_from([1, 2, 4]))
    return CostModel(
        AttentionShape(heads * group, heads, dim, v_dim, max(2, kv_itemsize), kv_itemsize),
        draw(st.sampled_from(profiles)),
    )


def token_bytes(costs: CostModel, lone_rows: int = 0) -> float:
    """Bytes of K and V of one token, with its slot index; what its elements cost; and what
    multiplying them by the rows of a request that reads alone does."""
    s, device = costs.shape, costs.device
    elements = s.num_kv_heads * (s.head_dim + s.v_head_dim)
    arithmetic = device.element_cost + lone_rows * device.lone_row_cost
    return elements * (s.kv_itemsize + arithmetic) + 4


def lone_bytes(length: int, costs: CostModel, num_queries: int = 1) -> float:
    """Bytes of a segment that one request reads alone; queries after its first share the read."""
    others = (num_queries - 1) * length * row_bytes(costs)
    return length * token_bytes(costs, costs.shape.group_size) + others


def row_bytes(costs: CostModel) -> float:
    """Bytes of a token for one more query of those that read it: its rows' part of the further row
    blocks that read it, charged evenly, and their arithmetic."""
    s, device = costs.shape, costs.device
    elements = s.num_kv_heads * (s.head_dim + s.v_head_dim)
    rereads = device.reread_cost / device.max_block_rows * (elements * s.kv_itemsize + 4)
    return s.group_size * (rereads + elements * device.pack_row_cost)


def pack_bytes(length: int, readers: int, costs: CostModel) -> float:
    """Bytes of one shared pack: its fixed cost, its KV once, its rows, queries and partials."""
    s, device = costs.shape, costs.device
    query = s.num_qo_heads * (s.head_dim * s.q_itemsize + 2 * 4 * (s.v_head_dim + 1))
    token = token_bytes(costs) + readers * row_bytes(costs)
    fixed = float(device.pack_bytes)
    if device.tiles:  # an item per KV head, each of which takes a part of a multiprocessor
        tile = device.tiles[0]
        read_meanwhile = tile.item_us * device.read_bytes_per_us / device.num_sms
        fixed += s.num_kv_heads * tile.sm_share * read_meanwhile
    return fixed + length * token + readers * query * device.query_cost


def pack_cost(
    packs: Packs,
    seq_lens: NDArray[np.integer],
    costs: CostModel,
    query_lens: Sequence[int] | None = None,
) -> float:
    """Bytes of one layer: every shared pack, and the KV of the tails. ``packs`` name requests."""
    counts = np.ones(len(seq_lens), np.int64) if query_lens is None else np.asarray(query_lens)
    lengths = (packs.end - packs.start).tolist()
    bounds = packs.query_indptr.tolist()
    readers = [counts[packs.queries[low:high]].sum() for low, high in pairwise(bounds)]
    shared = sum(pack_bytes(n, int(q), costs) for n, q in zip(lengths, readers, strict=True))
    tails = zip((seq_lens - packs.tail_start).tolist(), counts.tolist(), strict=True)
    return shared + sum(lone_bytes(n, costs, q) for n, q in tails)


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


def cheapest_fold(
    forest: PrefixForest, costs: CostModel, query_lens: Sequence[int] | None = None
) -> float:
    """Cost of the best of all fold choices, tried one by one.

    At every node, and for every place where the KV folded into it may begin, each child and each
    tail either reads the node's pack or reads that KV itself; a pack that nobody reads is left
    out.
    """

    counts = [1] * forest.batch_size if query_lens is None else [*query_lens]

    @cache
    def best(node: int, start: int) -> float:
        stop = int(forest.node_stop[node])
        children, tails = children_of(forest, node), tail_requests(forest, node)
        parts = [forest.node_requests(child).tolist() for child in children]
        sizes = [sum(counts[b] for b in part) for part in [*parts, *([b] for b in tails)]]
        options = []
        for folds in product([False, True], repeat=len(sizes)):
            readers = sum(n for n, fold in zip(sizes, folds, strict=True) if not fold)
            cost = pack_bytes(stop - start, readers, costs) if readers else 0.0
            for b, fold in zip(tails, folds[len(children) :], strict=True):
                cost += lone_bytes(stop - start, costs, counts[b]) if fold else 0.0
            for child, fold in zip(children, folds, strict=False):
                cost += best(child, start if fold else stop)
            options.append(cost)
        return min(options)

    own = zip((forest.seq_lens - forest.shared_lens).tolist(), counts, strict=True)
    private = sum(lone_bytes(n, costs, q) for n, q in own)
    return sum(best(root, 0) for root in children_of(forest, -1)) + private


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
