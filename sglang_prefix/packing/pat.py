"""The default policy: pack or fold, decided over the whole tree by bytes moved.

PAT (arXiv 2511.22333; flashserve/PAT) walks the tree from the root. Per child it either keeps the
parent's KV in a pack of its own, or folds it into the child's packs, so that the child's queries
read that KV a second time but write one partial less. Its rule compares ``4 * queries`` with the
passes over the parent's KV that a fold adds.

That rule is improved on in five ways :

* *Units.* One partial costs ``num_qo_heads * (v_head_dim + 1)`` float32 values, written and read,
  and its query is read once more; one KV token costs ``num_kv_heads * (head_dim + v_head_dim)``
  elements of the cache's dtype. PAT's 4 is their quotient near a group size of 2 with 16-bit KV;
  it is four times too small at 8, eight times with an 8-bit cache. Here the quotient is computed.
* *Whole tree.* PAT decides greedily, child by child, in hash order, one level deep. Here the
  cheapest choice for every subtree is computed bottom-up for every place at which the KV folded
  into it may begin, so the result depends neither on the order of children nor on their number.
* *Tails take part.* Whether a request's tail swallows a short shared stretch is the same question
  at a leaf, and PAT does not ask it.
* *Caches.* A further row block of one pack reads KV that was just read; it is charged the
  device's ``reread_cost``, not a full pass. Packs may hold any number of rows.
* *Fixed cost.* A pack has one, so a few shared tokens are not worth a pack.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing.cost import CostModel
from sglang_prefix.packing.packs import Packs, PacksBuilder

__all__ = ["pack_pat"]


class _Bytes(NamedTuple):
    """The cost model's figures, looked up once per plan."""

    token: float  # one KV token, read
    pack: float  # fixed cost of a pack
    query: float  # one more query in a pack: its q and its partial
    reread: float  # one more query in a pack, per KV token, through the row blocks it adds


class _Choice(NamedTuple):
    """Cheapest way to serve a node's requests from a given start on."""

    cost: float
    keeps_pack: bool
    folded: frozenset[int]  # children that read the node's KV themselves
    tails_folded: bool


class _Tree(NamedTuple):
    """The forest as plain Python lists, which the planner walks faster than arrays."""

    start: list[int]
    stop: list[int]
    num_requests: list[int]
    num_own: list[int]  # requests whose tail hangs on this node
    children: list[list[int]]
    parent: list[int]


def pack_pat(forest: PrefixForest, costs: CostModel) -> Packs:
    """Pack the forest with the fewest bytes moved under ``costs``; see the module text."""
    tree = _tree_of(forest)
    cost = _Bytes(
        costs.shape.kv_token_bytes, costs.device.pack_bytes, costs.query_bytes, costs.reread_bytes
    )
    starts = _candidate_starts(tree, cost)
    choices: list[dict[int, _Choice]] = [{} for _ in tree.start]
    for node in range(len(tree.start) - 1, -1, -1):  # children come after their parents
        for start, _ in starts[node]:
            choices[node][start] = _best_choice(tree, node, start, choices, cost)
    return _emit(forest, tree, choices)


def _tree_of(forest: PrefixForest) -> _Tree:
    parents = forest.node_parent.tolist()
    num_requests = (forest.node_end - forest.node_begin).tolist()
    num_own = list(num_requests)
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
            num_own[parent] -= num_requests[node]
    return _Tree(
        forest.node_start.tolist(),
        forest.node_stop.tolist(),
        num_requests,
        num_own,
        children,
        parents,
    )


def _candidate_starts(tree: _Tree, cost: _Bytes) -> list[list[tuple[int, int]]]:
    """Where the KV that a node's requests read together may begin: its own start, or earlier.

    Each with the depth of the node that begins there, the node's own first.

    A stretch that is too long to be worth reading again need not be tried. Folding it into one
    child saves that child's queries; folding it into all ``k`` children and tails saves the pack
    and every query, for ``k - 1`` more readers. Of ancestors far above only a few are tried, so
    that a long chain of tiny nodes costs no more than n log n: one that is ``d`` levels up counts
    if its depth is a multiple of the largest power of two up to ``d / 2``.
    """
    starts: list[list[tuple[int, int]]] = []
    for node, parent in enumerate(tree.parent):
        begin = tree.start[node]
        if parent < 0:
            starts.append([(begin, 0)])
            continue
        here, both = tree.num_requests[node], tree.num_requests[parent]
        units = len(tree.children[parent]) + tree.num_own[parent]
        longest = max(
            _break_even(here * cost.query, cost.token - here * cost.reread),
            _break_even(
                cost.pack + both * cost.query, (units - 1) * cost.token - both * cost.reread
            ),
        )
        depth = starts[parent][0][1] + 1
        inherited = [
            (start, above)
            for start, above in starts[parent]
            if begin - start <= longest and above % _power_of_two_up_to((depth - above) // 2) == 0
        ]
        starts.append([(begin, depth), *inherited])
    return starts


def _power_of_two_up_to(number: int) -> int:
    return 1 << max(number.bit_length() - 1, 0)


def _break_even(gain: float, loss_per_token: float) -> float:
    """Longest stretch for which a fixed gain outweighs a loss that grows with its length."""
    return gain / loss_per_token if loss_per_token > 0 else float("inf")


def _best_choice(
    tree: _Tree, node: int, start: int, choices: list[dict[int, _Choice]], cost: _Bytes
) -> _Choice:
    """Compare keeping a pack over ``[start, stop)`` with folding it into all that hangs below."""
    stop = tree.stop[node]
    stretch_bytes = (stop - start) * cost.token
    kept_query_bytes = cost.query + (stop - start) * cost.reread

    own = tree.num_own[node]
    tails_kept, tails_folded = own * kept_query_bytes, own * stretch_bytes
    split_cost = cost.pack + stretch_bytes + min(tails_kept, tails_folded)
    fold_cost: float = tails_folded
    folded = []
    all_can_fold = True
    for child in tree.children[node]:
        options = choices[child]
        kept = options[stop].cost + tree.num_requests[child] * kept_query_bytes
        inherited = options.get(start)
        if inherited is None:
            all_can_fold = False
            split_cost += kept
            continue
        fold_cost += inherited.cost
        if inherited.cost < kept:
            folded.append(child)
            split_cost += inherited.cost
        else:
            split_cost += kept
    if all_can_fold and fold_cost <= split_cost:
        return _Choice(fold_cost, False, frozenset(tree.children[node]), True)
    return _Choice(split_cost, True, frozenset(folded), tails_folded < tails_kept)


def _emit(forest: PrefixForest, tree: _Tree, choices: list[dict[int, _Choice]]) -> Packs:
    """Walk the choices from the roots down and write the packs out, parents first."""
    builder = PacksBuilder(forest.batch_size)
    begins, ends = forest.node_begin.tolist(), forest.node_end.tolist()
    chosen_start: list[int] = [0] * len(tree.start)
    for node, parent in enumerate(tree.parent):
        if parent < 0:
            chosen_start[node] = tree.start[node]
        start, stop = chosen_start[node], tree.stop[node]
        choice = choices[node][start]
        for child in tree.children[node]:
            chosen_start[child] = start if child in choice.folded else stop
        kept, own = _split_requests(forest, tree, node, choice, begins, ends)
        builder.tail_start[own] = start if choice.tails_folded else stop
        if choice.keeps_pack and len(kept):
            builder.add(start, stop, kept)
    return builder.build()


def _split_requests(
    forest: PrefixForest,
    tree: _Tree,
    node: int,
    choice: _Choice,
    begins: list[int],
    ends: list[int],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Batch rows that stay in the node's pack, and those whose tail hangs on the node."""
    begin, end = begins[node], ends[node]
    children = tree.children[node]
    if not children:
        requests = forest.order[begin:end]
        return (requests[:0] if choice.tails_folded else requests), requests
    if not tree.num_own[node] and not choice.folded:
        return forest.order[begin:end], forest.order[:0]
    is_own = np.ones(end - begin, dtype=bool)
    is_kept = np.full(end - begin, not choice.tails_folded)
    for child in children:
        span = slice(begins[child] - begin, ends[child] - begin)
        is_own[span] = False
        is_kept[span] = child not in choice.folded
    requests = forest.order[begin:end]
    return requests[is_kept], requests[is_own]
