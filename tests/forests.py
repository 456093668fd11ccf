"""Batches to test with, beyond those of `sglang_prefix.bench.workloads.trees`.

A batch is grown request by request: each forks from an earlier one at some position and adds
tokens of its own. That reaches many roots, mixed depths, ragged tails, requests that end inside a
node that others continue, identical rows, lone requests, one-token tails, pages shared in part and
stale rows, and it shrinks well. `trees` draws radix trees instead, which know their paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from sglang_prefix.bench.workloads.trees import Tree, TreeBatch
from sglang_prefix.forest import PrefixForest

__all__ = [
    "PAT_TREES",
    "Batch",
    "Fork",
    "batches",
    "brute_force_sharing",
    "build_batch",
    "comb_batch",
    "common_lengths",
    "random_batch",
    "trees",
]

IntArray = NDArray[np.int64]

_PAGE_ORDERS = ("contiguous", "scattered", "mixed")

# PAT's benchmark trees (flashserve/PAT, benchmark/run_kernel_bench.sh) and the ratio
# of KV tokens read once per request to KV tokens stored.
PAT_TREES = {
    "1,10_4096,416": 5.47,
    "1,256_256,32": 8.73,
    "1,1024_2048,32": 61.18,
    "1,2,64_1024,256,256": 5.49,
    "1,4,256_32,256,32": 8.86,
    "1,8,512_32,512,256": 3.03,
    "1,8,512_32,2048,256": 8.11,
    "1,8,512_512,512,256": 4.83,
    "1,4,8,256_32,256,256,32": 13.05,
    "1,4,16,512_1024,256,128,32": 36.00,
    "1,4,16,64,256,1024_256,32,256,64,32,256": 3.29,
    "1,16,32,64,128,1024_256,128,64,32,32,32": 12.88,
    "1,16,32,64,256,1024_256,128,64,32,32,32": 11.76,
    "1,8,16,32,64,128,1024_256,128,64,32,32,32,32": 13.96,
    "1,8,16,32,64,256,1024_256,128,64,32,32,32,32": 12.73,
    "2,8,16,256_256,256,32,32": 13.09,
    "4,16,256,512_512,32,128,32": 6.97,
    "8,16,32,256_512,512,256,32": 11.71,
    "256_1024": 1.00,
    "256_4096": 1.00,
}


@dataclass(frozen=True, slots=True)
class Fork:
    """A request that has the first ``at`` tokens of request ``parent``, then ``own`` new ones.

    With ``same_page`` and nothing of its own it also shares the page that it ends inside.
    """

    parent: int
    at: int
    own: int
    same_page: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Slot rows as an engine holds them. ``growth_slots`` [B, growth] are free for new tokens.

    Positions at or past a request's length hold stale slots: those of the request it forked from
    where that one goes on, else anything.
    """

    req_to_token: NDArray[np.int32]
    req_pool_indices: IntArray
    seq_lens: IntArray
    growth_slots: IntArray
    page_size: int
    num_slots: int

    @property
    def rows(self) -> NDArray[np.int32]:
        """[B, context] the batch's own rows."""
        return self.req_to_token[self.req_pool_indices]

    def forest(self) -> PrefixForest:
        """The forest of the rows."""
        return PrefixForest.from_rows(self.rows, self.seq_lens, page_size=self.page_size)


def build_batch(
    forks: Sequence[Fork],
    *,
    page_size: int = 1,
    order: str = "contiguous",
    growth: int = 0,
    seed: int = 0,
) -> Batch:
    """Lay requests out on pages; ``seed`` decides page order, pool rows and stale entries."""
    rng = np.random.default_rng(seed)
    pages: list[list[int]] = []
    lens: list[int] = []
    parents: list[int] = []
    num_pages = 1  # page 0 is never used, as in SGLang's pools
    for b, fork in enumerate(forks):
        parent = fork.parent if fork.parent < b else b
        at = min(fork.at, lens[parent]) if parent < b else 0
        own = fork.own or int(at == 0)
        shared = at // page_size + (fork.same_page and own == 0 and at % page_size > 0)
        needed = -(-(at + own) // page_size) - shared
        inherited = pages[parent][:shared] if parent < b else []
        pages.append([*inherited, *range(num_pages, num_pages + needed)])
        num_pages += needed
        lens.append(at + own)
        parents.append(parent)
    growth_pages = -(-growth // page_size)
    moved = _page_order(num_pages + len(forks) * growth_pages, order, rng)
    context = max(lens) + growth + 3
    num_rows = len(forks) + 3
    table = rng.integers(1, len(moved) * page_size, (num_rows, context)).astype(np.int32)
    pool = rng.permutation(num_rows)[: len(forks)]
    offsets = np.arange(page_size)
    for b, own_pages in enumerate(pages):
        slots = (moved[own_pages][:, None] * page_size + offsets).ravel()
        if parents[b] < b:
            table[pool[b]] = table[pool[parents[b]]]
        table[pool[b], : lens[b]] = slots[: lens[b]]
    free = moved[num_pages:].reshape(len(forks), growth_pages, 1) * page_size + offsets
    return Batch(
        table,
        pool.astype(np.int64),
        np.asarray(lens, dtype=np.int64),
        free.reshape(len(forks), growth_pages * page_size)[:, :growth],
        page_size,
        len(moved) * page_size,
    )


def _page_order(num_pages: int, order: str, rng: np.random.Generator) -> IntArray:
    """Where each page lies in the pool: in order, anywhere, or in order with some displaced."""
    moved = np.arange(num_pages)
    if order == "contiguous":
        return moved
    some = (
        moved[1:] if order == "scattered" else 1 + np.flatnonzero(rng.random(num_pages - 1) < 0.01)
    )
    moved[some] = rng.permutation(some)
    return moved


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    max_requests: int = 12,
    max_tokens: int = 160,
    page_sizes: Sequence[int] = (1, 4, 16),
    growth: int = 0,
) -> Batch:
    """Hypothesis strategy for batches of one to ``max_requests`` uneven requests."""
    everything = st.just(max_requests * max_tokens)  # of the parent: continues or equals its row
    forks = [
        Fork(
            draw(st.integers(0, b)),
            draw(st.integers(0, max_tokens) | everything | st.integers(0, 3)),
            draw(st.integers(0, max_tokens) | st.integers(0, 3)),
            draw(st.booleans()),
        )
        for b in range(draw(st.integers(1, max_requests)))
    ]
    return build_batch(
        forks,
        page_size=draw(st.sampled_from(page_sizes)),
        order=draw(st.sampled_from(_PAGE_ORDERS)),
        growth=growth,
        seed=draw(st.integers(0, 1 << 16)),
    )


@st.composite
def trees(draw: st.DrawFn) -> TreeBatch:
    """Hypothesis strategy for radix trees: chains, lone nodes, requests that end inside a node."""
    page_size = draw(st.sampled_from((1, 4, 16)))
    parent, length = [], []
    for node in range(draw(st.integers(1, 12))):
        parent.append(draw(st.integers(-1, node - 1)))
        length.append(draw(st.integers(1, 5)) * page_size)
    ends = st.tuples(st.integers(0, len(parent) - 1), st.integers(0, 3 * page_size))
    requests = draw(st.lists(ends, min_size=1, max_size=12))
    leaf = [node for node, _ in requests]
    cut = [min(cut, length[node] - 1) for node, cut in requests]
    tree = Tree(*(np.asarray(part, dtype=np.int64) for part in (parent, length, leaf, cut)))
    return TreeBatch.lay_out(tree, page_size=page_size, seed=draw(st.integers(0, 1 << 16)))


def random_batch(
    seed: int,
    *,
    num_requests: int,
    max_tokens: int,
    page_size: int = 1,
    order: str = "mixed",
    growth: int = 0,
) -> Batch:
    """A larger uneven batch from a seed: most requests fork from one of the first few."""
    rng = np.random.default_rng(seed)
    forks = []
    for b in range(num_requests):
        long = int(rng.integers(max_tokens // 2, max_tokens))
        own = long if b < 6 else int(rng.choice([0, 1, int(rng.integers(2, 9)), long]))
        inside = int(rng.integers(1, max_tokens))
        at = int(rng.choice([0, inside, 2 * max_tokens], p=[0.2, 0.5, 0.3]))
        forks.append(Fork(int(rng.integers(0, min(b, 8) + 1)), at, own, bool(rng.integers(2))))
    return build_batch(forks, page_size=page_size, order=order, growth=growth, seed=seed)


def comb_batch(num_nodes: int, *, step: int = 1) -> Batch:
    """A chain of nodes of ``step`` tokens at each of which one request leaves."""
    forks = [Fork(0, 0, (num_nodes + 1) * step)]
    forks += [Fork(0, (i + 1) * step, step) for i in range(num_nodes)]
    return build_batch(forks)


def common_lengths(
    rows: NDArray[np.integer], caps: NDArray[np.integer], page_size: int
) -> list[list[int]]:
    """[B][B] tokens that two rows have in common below both caps, in whole pages: by walking."""
    table, limits = rows.tolist(), caps.tolist()
    common = [[0] * len(table) for _ in table]
    for a in range(len(table)):
        for b in range(a):
            at = 0
            while at < min(limits[a], limits[b]) and table[a][at] == table[b][at]:
                at += 1
            common[a][b] = common[b][a] = at // page_size * page_size
    return common


def brute_force_sharing(common: list[list[int]]) -> set[tuple[int, int, frozenset[int]]]:
    """What :meth:`PrefixForest.sharing` means, from every pair: runs with the same readers."""
    found = set()
    for a, lengths in enumerate(common):
        bounds = sorted({0, *lengths})
        for start, stop in pairwise(bounds):
            readers = frozenset(b for b, n in enumerate(lengths) if n >= stop or b == a)
            found.add((start, stop, readers))
    return found
