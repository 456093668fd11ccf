"""The default policy: pack or fold, decided over the whole tree by what moves the fewest bytes.

PAT (arXiv 2511.22333; flashserve/PAT) walks the tree from the root. Per child it either keeps the
parent's KV in a pack of its own, or folds it into the child's packs, so that the child's queries
read that KV a second time but write one partial less. Its rule compares ``4 * queries`` with the
passes over the parent's KV that a fold adds.

Five things are different here:

* *Units.* One partial costs ``num_qo_heads * (v_head_dim + 1)`` float32 values, written and read,
  and its query is read once more; one KV token costs ``num_kv_heads * kv_row_size`` elements
  of the cache's dtype. PAT's 4 is their quotient near a group size of 2 with 16-bit KV;
  it is four times too small at 8, eight times with an 8-bit cache. Here the quotient is computed.
* *Whole tree.* PAT decides greedily, child by child, in hash order, one level deep. Here the
  cheapest choice for every subtree is computed bottom-up for every place at which the KV folded
  into it may begin, so the result depends neither on the order of children nor on their number.
* *Tails.* A short shared segment may also be folded into the tails of its requests. PAT does not
  consider that.
* *Caches.* A further row block of one pack reads KV that was just read; it is charged the
  device's ``reread_cost``, not a full pass. Packs may hold any number of rows.
* *Fixed cost.* A pack has one, so a few shared tokens are not worth a pack.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing.cost import CostModel
from sglang_prefix.packing.packs import Packs
from sglang_prefix.packing.pat_jit import candidate_starts, cheapest_choices, write_packs

__all__ = ["bytes_of", "pack_pat", "queries_of_nodes"]

IntArray = NDArray[np.int64]


def pack_pat(forest: PrefixForest, costs: CostModel, query_lens: IntArray | None = None) -> Packs:
    """Pack the forest with the fewest bytes moved under ``costs``; see the module text.

    Args:
        forest: who shares what.
        costs: shape and device.
        query_lens: [B] query tokens of each request; None for one each.
    """
    begin, end, stop, parent = (
        forest.node_begin,
        forest.node_end,
        forest.node_stop,
        forest.node_parent,
    )
    model = bytes_of(costs)
    tree = begin, end, queries_of_nodes(forest, query_lens)
    candidates = candidate_starts(*tree, forest.node_start, parent, *model)
    choices = cheapest_choices(*tree, stop, parent, *candidates, *model)[:3]
    return Packs(*write_packs(forest.order, begin, end, stop, parent, *candidates, *choices))


def queries_of_nodes(forest: PrefixForest, query_lens: IntArray | None) -> IntArray:
    """[N] query tokens of each node's requests; ``query_lens`` as of :func:`pack_pat`."""
    if query_lens is None:
        return forest.node_end - forest.node_begin
    before = np.append(0, np.cumsum(query_lens[forest.order]))
    return np.asarray(before[forest.node_end] - before[forest.node_begin])


def bytes_of(costs: CostModel) -> tuple[float, float, float, float, float]:
    """Bytes of a KV token that a request reads alone, of one that a pack reads, and of each of its
    queries for that token; of a query in a pack, and of a pack.
    """
    return (
        float(costs.lone_token_bytes),
        float(costs.pack_token_bytes),
        float(costs.query_token_bytes),
        float(costs.query_bytes),
        float(costs.pack_bytes),
    )
