"""Packing policies: pure functions from a forest to packs.

``pat`` is the one to use. The other three are the systems it is compared with, run on the same
kernels: ``node`` is the naive prefix-aware baseline, ``chunk`` is ChunkAttention's two phases,
``query`` shares nothing, like stock decode kernels.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.arguments import check_choice
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing.cost import CostModel
from sglang_prefix.packing.packs import Packs, PacksBuilder
from sglang_prefix.packing.pat import pack_pat

__all__ = ["POLICIES", "PackPolicy", "pack_chunk", "pack_node", "pack_query", "policy_named"]

IntArray = NDArray[np.int64]


class PackPolicy(Protocol):
    """From a forest to packs, with the query tokens [B] of each request, or None for one each."""

    def __call__(
        self, forest: PrefixForest, costs: CostModel, query_lens: IntArray | None = None
    ) -> Packs:
        """Pack the forest; the packs' queries are requests."""


# Tokens per chunk in ChunkAttention's benchmark (microsoft/chunk-attention).
CHUNK_TOKENS = 64


def pack_query(forest: PrefixForest, costs: CostModel, query_lens: IntArray | None = None) -> Packs:
    """One pack per request, nothing shared: what stock kernels do."""
    del costs, query_lens
    return PacksBuilder(forest.batch_size).build()


def pack_node(forest: PrefixForest, costs: CostModel, query_lens: IntArray | None = None) -> Packs:
    """One pack per node, one tail per request: the naive prefix-aware baseline."""
    del costs, query_lens
    builder = PacksBuilder(forest.batch_size)
    for node in range(forest.num_nodes):
        builder.add(
            int(forest.node_start[node]), int(forest.node_stop[node]), forest.node_requests(node)
        )
    builder.tail_start[:] = forest.shared_lens
    return builder.build()


def pack_chunk(forest: PrefixForest, costs: CostModel, query_lens: IntArray | None = None) -> Packs:
    """ChunkAttention's two-phase partition (arXiv 2402.15220, section 3.2).

    Positions are cut at multiples of :data:`CHUNK_TOKENS`. A full chunk that at least two
    requests share is one pack of all its readers (chunk first); everything after a request's last
    shared chunk is one pass of that request (sequence first). Ours differs in that partials are
    float32 and normalised, and that chunks are of slots, not of token ids.
    """
    del costs, query_lens
    builder = PacksBuilder(forest.batch_size)
    for node in range(forest.num_nodes):
        first = int(forest.node_start[node]) // CHUNK_TOKENS
        last = int(forest.node_stop[node]) // CHUNK_TOKENS
        requests = forest.node_requests(node)
        for chunk in range(first, last):
            # A chunk that begins in the parent is shared, whole, by this node's requests.
            builder.add(chunk * CHUNK_TOKENS, (chunk + 1) * CHUNK_TOKENS, requests)
        if last > first:
            builder.tail_start[requests] = last * CHUNK_TOKENS
    return builder.build()


POLICIES: dict[str, PackPolicy] = {
    "pat": pack_pat,
    "node": pack_node,
    "chunk": pack_chunk,
    "query": pack_query,
}


def policy_named(name: str) -> PackPolicy:
    """Look a policy up by name.

    Raises:
        ValueError: the name is unknown; the message lists the legal ones.
    """
    return POLICIES[check_choice("policy", name, POLICIES)]
