"""Batches as prefix trees: what is shared, as slot rows, as radix paths and as levels.

Imports numpy and our forest only, so that the GPU benchmarks can use it on a host without SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sglang_prefix.forest import PathTable, PrefixForest, RadixPath, forest_of_table

__all__ = ["Tree", "TreeBatch", "pat_tree", "random_tree", "shared_then_private"]

IntArray = NDArray[np.int64]

# What a level of a tree in PAT's notation must stay below: nodes, and tokens down to it. Slots are
# numbered with 32 bits.
_MAX_NODES, _MAX_TOKENS = 1 << 16, 1 << 31
_MAX_LEVELS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """Who shares what, without slots. Parents stand before their children.

    Attributes:
        parent: [N] node above each node, -1 for a root.
        length: [N] KV tokens of each node.
        leaf: [B] node that each request ends in.
        cut: [B] tokens at the end of that node which the request does not have.
    """

    parent: IntArray
    length: IntArray
    leaf: IntArray
    cut: IntArray

    @property
    def seq_lens(self) -> IntArray:
        """[B] tokens of each request."""
        return _ends(self)[self.leaf] - self.cut

    def path(self, request: int) -> list[int]:
        """Nodes of a request from the root down."""
        nodes = []
        node = int(self.leaf[request])
        while node >= 0:
            nodes.append(node)
            node = int(self.parent[node])
        return nodes[::-1]

    def undivided_by(self, page_size: int) -> int | None:
        """Tokens of a node with children that is not whole pages; None if all are."""
        lengths = self.length[self.parent[self.parent >= 0]]
        return next(iter(lengths[lengths % page_size > 0].tolist()), None)

    def shrunk(self, page_size: int) -> Tree:
        """A tree of the same form with three requests and short nodes, for the interpreter.

        Args:
            page_size: tokens per page, of which every node keeps one to three.
        """
        last = len(self.leaf) - 1
        keep = np.unique([0, min(1, last), last])
        used = np.unique(np.concatenate([self.path(b) for b in keep.tolist()]))
        index = np.full(len(self.parent) + 1, -1)  # the last entry is the parent of roots
        index[used] = np.arange(len(used))
        length = (1 + self.length[used] % 3) * page_size
        leaf = index[self.leaf[keep]]
        cut = np.minimum(np.sign(self.cut[keep]), length[leaf] - 1)
        return Tree(index[self.parent[used]], length, leaf, cut)


@dataclass(frozen=True, eq=False)
class TreeBatch:
    """A tree laid out on pages of a KV pool, one row per request, in batch order.

    Attributes:
        tree: what is shared.
        page_size: tokens per page; nodes with children are whole pages.
        table: [B, context] int32 slot of every position; 0, the padding slot, past the lengths.
        seq_lens: [B] tokens of each request.
        growth_slots: [B, growth] free slots for tokens to come.
        num_slots: slots of the pool, those before the first used one included.
    """

    tree: Tree
    page_size: int
    table: NDArray[np.int32]
    seq_lens: IntArray
    growth_slots: IntArray
    num_slots: int

    @classmethod
    def lay_out(
        cls,
        tree: Tree,
        *,
        page_size: int = 1,
        growth: int = 0,
        seed: int = 0,
        scattered: bool = True,
        first_slot: int = 0,
    ) -> TreeBatch:
        """Give every node pages of its own; page 0 is never used.

        Args:
            tree: what is shared; nodes with children are whole pages.
            page_size: tokens per page.
            growth: tokens that every request may grow by.
            seed: of the order of pages.
            scattered: pages in random order instead of one after another.
            first_slot: is added to every used slot, and is whole pages.
        """
        if tree.undivided_by(page_size):
            raise ValueError(f"a node with children is not whole pages of {page_size} tokens")
        batch, growth_pages = len(tree.leaf), -(-growth // page_size)
        pages = np.append(-(-tree.length // page_size), np.full(batch, growth_pages))
        first = np.concatenate(([1], 1 + np.cumsum(pages)))
        place = np.arange(first[-1])
        if scattered:
            place[1:] = 1 + np.random.default_rng(seed).permutation(first[-1] - 1)
        slots = (place[:, None] * page_size + np.arange(page_size)).ravel() + first_slot
        ends = _ends(tree)
        lens = tree.seq_lens
        table = np.zeros((batch, int(lens.max()) + growth), dtype=np.int32)
        for b in range(batch):
            at = 0
            for node in tree.path(b):
                stop = min(int(ends[node]), int(lens[b]))
                begin = int(first[node]) * page_size
                table[b, at:stop] = slots[begin : begin + stop - at]
                at = stop
        begin = int(first[len(tree.parent)]) * page_size
        free = slots[begin:].reshape(batch, growth_pages * page_size)[:, :growth]
        return cls(tree, page_size, table, lens, free, len(slots) + first_slot)

    @property
    def batch_size(self) -> int:
        """Number of requests."""
        return len(self.seq_lens)

    def used_slots(self) -> IntArray:
        """Slots that a request has or may grow into, in ascending order."""
        own = [self.table[b, :length] for b, length in enumerate(self.seq_lens.tolist())]
        return np.unique(np.concatenate([*own, self.growth_slots.ravel()])).astype(np.int64)

    @cached_property
    def paths(self) -> list[RadixPath]:
        """[B] what an engine's radix tree says of each request."""
        ends = _ends(self.tree).tolist()
        nodes = [tuple(self.tree.path(b)) for b in range(self.batch_size)]
        return [RadixPath(own, tuple(ends[node] for node in own)) for own in nodes]

    def forest(self) -> PrefixForest:
        """The forest, as the backend finds it from radix paths that it has looked up before."""
        every, lens = np.arange(self.batch_size), self.seq_lens
        return forest_of_table(self._path_table, every, lens, lens, page_size=self.page_size)

    @cached_property
    def _path_table(self) -> PathTable:
        return PathTable.of(self.paths)

    def levels(self) -> list[IntArray] | None:
        """Per level the node of each request; None unless all requests have all levels whole.

        Requests of a node are then consecutive, as FlashInfer's cascade wrapper asks for.
        """
        depth = {len(path.node_ids) for path in self.paths}
        if len(depth) > 1 or self.tree.cut.any():
            return None
        levels = list(np.asarray([path.node_ids for path in self.paths], dtype=np.int64).T)
        whole = all((np.diff(level) >= 0).all() for level in levels)
        return levels if whole else None


def _ends(tree: Tree) -> IntArray:
    """[N] position behind each node's last token."""
    ends = tree.length.copy()
    for node, parent in enumerate(tree.parent.tolist()):
        if parent >= 0:
            ends[node] += ends[parent]
    return ends


def pat_tree(text: str) -> Tree:
    """A tree in PAT's notation ``n1,n2,.._l1,l2,..``: level k has ``n_k`` nodes of ``l_k`` tokens.

    The last level is the batch; children are dealt out to parents evenly (flashserve/PAT,
    benchmark/run_kernel_bench.sh).

    Raises:
        ValueError: the text is malformed; one line that says what is legal.
    """
    words = [part.split(",") for part in text.split("_")]
    # Not int() alone, which takes " 1" and digits of other scripts; and not too many of them.
    good = len(words) == 2 and len(words[0]) <= _MAX_LEVELS
    good = good and all(w.isascii() and w.isdigit() and len(w) < 12 for part in words for w in part)
    counts, lengths = ([int(word) for word in part] for part in words) if good else ([0], [0])
    good = len(counts) == len(lengths) and counts[0] > 0 and counts == sorted(counts)
    if not (good and counts[-1] < _MAX_NODES and min(lengths) > 0 and sum(lengths) < _MAX_TOKENS):
        raise ValueError(
            f"--tree is {text!r}; legal: nodes of each level, never fewer than above, '_', and "
            f"tokens of each level, as in '1,8,512_512,512,256'; up to {_MAX_LEVELS} levels, "
            f"{_MAX_NODES - 1} nodes in one, {_MAX_TOKENS - 1} tokens of a request"
        )
    parents, at = [np.full(counts[0], -1)], 0
    for above, count in pairwise(counts):
        parents.append(at + np.arange(count) * above // count)
        at += above
    batch = counts[-1]
    length = np.repeat(lengths, counts).astype(np.int64)
    return Tree(np.concatenate(parents), length, at + np.arange(batch), np.zeros(batch, np.int64))


def shared_then_private(batch: int, shared: int, private: int) -> Tree:
    """One prefix that all requests share, then a tail each; 0 shared tokens for none."""
    return pat_tree(f"1,{batch}_{shared},{private}" if shared else f"{batch}_{private}")


def random_tree(
    seed: int, *, num_requests: int, max_tokens: int, page_size: int = 1, num_nodes: int = 6
) -> Tree:
    """An uneven forest: many roots, mixed depths, ragged tails, all from a seed.

    Requests are unrelated to any other, end inside a shared node, end with it (an empty tail), or
    have a tail of one token, a few, or many.
    """
    rng = np.random.default_rng(seed)
    parent, length = [], []
    for node in range(num_nodes):
        parent.append(int(rng.integers(-1, node)) if node else -1)
        length.append(int(rng.integers(1, max(2, max_tokens // (2 * page_size)))) * page_size)
    leaf, cut = [], []
    for _ in range(num_requests):
        above = int(rng.integers(0, num_nodes))
        kind = rng.choice(["alone", "inside", "end", "one", "few", "many"])
        if kind in ("inside", "end"):
            leaf.append(above)
            cut.append(int(rng.integers(0, length[above])) if kind == "inside" else 0)
            continue
        own = {"one": 1, "few": int(rng.integers(2, 9))}.get(
            str(kind), int(rng.integers(1, max_tokens))
        )
        parent.append(-1 if kind == "alone" else above)
        length.append(own)
        leaf.append(len(parent) - 1)
        cut.append(0)
    return Tree(*(np.asarray(part, dtype=np.int64) for part in (parent, length, leaf, cut)))
