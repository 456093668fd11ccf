"""The prefix forest: which requests of a decode batch share which segments of KV.

A forest comes from one of two sources and looks the same afterwards:

* radix paths, which the scheduler has on the CPU (:meth:`PrefixForest.from_paths`);
* slot rows of ``req_to_token`` (:meth:`PrefixForest.from_rows`), for any engine, and as a check.

Both put requests into an order in which equal prefixes are neighbours, and count the tokens that
neighbours have in common. The nodes are the intervals of these common lengths, as in the tree of a
suffix array and its LCP array. Nodes that the same requests pass through are one by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.arguments import (
    INT32_MAX,
    INT64_MAX,
    check_flag,
    check_integer,
    check_integers,
)
from sglang_prefix.forest_checks import check_forest, check_paths, check_rows, check_slots
from sglang_prefix.forest_jit import common_of_paths, nodes_of_neighbours

__all__ = [
    "PathTable",
    "PrefixForest",
    "RadixPath",
    "forest_of_neighbours",
    "forest_of_table",
]

IntArray = NDArray[np.int64]


class RadixPath(NamedTuple):
    """Nodes of one radix path from below the root down to a request's last node.

    ``node_ids[i]`` owns the positions from ``ends[i - 1]`` (0 for the first) to ``ends[i]``.
    """

    node_ids: tuple[int, ...]
    ends: tuple[int, ...]


class PathTable(NamedTuple):
    """``P`` radix paths as int64 arrays on the host: what several plans read without conversion.

    Attributes:
        indptr: [P + 1] bounds of each path in the next two.
        node_ids, ends: the nodes of the paths, path after path.
        lengths: [P] where each path ends; 0 for an empty one.
    """

    indptr: IntArray
    node_ids: IntArray
    ends: IntArray
    lengths: IntArray

    @classmethod
    def of(cls, paths: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> PathTable:
        """The table of ``paths``: each a :class:`RadixPath`, or a pair like it."""
        indptr = np.zeros(len(paths) + 1, dtype=np.int64)
        np.cumsum([len(ends) for _, ends in paths], out=indptr[1:])
        size = int(indptr[-1])
        node_ids = np.fromiter(chain.from_iterable([ids for ids, _ in paths]), np.int64, size)
        ends = np.fromiter(chain.from_iterable([ends for _, ends in paths]), np.int64, size)
        lengths = np.fromiter([ends[-1] if ends else 0 for _, ends in paths], np.int64, len(paths))
        return cls(indptr, node_ids, ends, lengths)

    def joined(self, other: PathTable) -> PathTable:
        """The table of these paths, and of ``other``'s behind them."""
        indptr = np.concatenate((self.indptr, self.indptr[-1] + other.indptr[1:]))
        rest = zip(self[1:], other[1:], strict=True)
        return PathTable(indptr, *map(np.concatenate, rest))


@dataclass(frozen=True, slots=True, eq=False)
class PrefixForest:
    """Shared KV of a batch of ``B`` requests as ``N`` nodes, parents before children.

    A node is a maximal run of positions whose slots are the same for at least two requests; what
    one request holds alone is its tail, from ``shared_lens`` on. All arrays are int64 on the host.

    The constructors below make forests; one that is put together by hand is checked.

    Attributes:
        seq_lens: [B] KV tokens of each request, the newest token included.
        shared_lens: [B] positions below it are covered by the nodes on the request's path.
        order: [B] the batch rows, arranged so that every node's requests are consecutive.
        node_begin, node_end: [N] a node's requests are ``order[node_begin:node_end]``.
        node_start, node_stop: [N] a node's positions are ``[node_start, node_stop)``.
        node_parent: [N] index of the parent node, -1 for a root.

    Raises:
        ValueError: the arrays do not fit together; the message names one.
    """

    seq_lens: IntArray
    shared_lens: IntArray
    order: IntArray
    node_begin: IntArray
    node_end: IntArray
    node_start: IntArray
    node_stop: IntArray
    node_parent: IntArray

    def __post_init__(self) -> None:
        check_forest(self)

    @property
    def batch_size(self) -> int:
        """Number of requests."""
        return len(self.seq_lens)

    @property
    def num_nodes(self) -> int:
        """Number of nodes that at least two requests share."""
        return len(self.node_start)

    @property
    def unique_tokens(self) -> int:
        """KV tokens of the batch when every shared one is counted once."""
        shared = (self.node_stop - self.node_start) * (self.node_end - self.node_begin - 1)
        return int(self.seq_lens.sum() - shared.sum())

    def node_requests(self, node: int) -> IntArray:
        """Batch rows of the requests that pass through ``node``."""
        return self.order[self.node_begin[node] : self.node_end[node]]

    def sharing(self) -> set[tuple[int, int, frozenset[int]]]:
        """Every node as (start, stop, batch rows): equal for two forests that share alike."""
        return {
            (
                int(self.node_start[n]),
                int(self.node_stop[n]),
                frozenset(self.node_requests(n).tolist()),
            )
            for n in range(self.num_nodes)
        }

    def limited_to(self, limits: IntArray) -> PrefixForest:
        """The forest in which positions at or past ``limits`` [B] are private to their request.

        Nodes are cut where a request ends sooner, so that those of a request end at its limit. That
        is what queries of several tokens need: see :class:`prefix_kernels.plan.PackPlan`.

        Args:
            limits: [B] int64, of which nothing is checked.
        """
        if (self.shared_lens <= limits).all():
            return self
        paths: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]  # behind it, one a node
        path_of = np.zeros(self.batch_size, dtype=np.int64)
        spans = zip(self.node_parent.tolist(), self.node_stop.tolist(), strict=True)
        for node, (parent, stop) in enumerate(spans):
            ids, ends = paths[parent + 1]
            paths.append(((*ids, node), (*ends, stop)))
            path_of[self.node_requests(node)] = node + 1  # until a node further down has it
        caps = np.clip(limits, 0, self.shared_lens)
        return forest_of_table(PathTable.of(paths), path_of, caps, self.seq_lens, page_size=1)

    @classmethod
    def from_rows(
        cls,
        rows: NDArray[np.integer],
        seq_lens: Sequence[int] | NDArray[np.integer],
        *,
        limits: Sequence[int] | NDArray[np.integer] | None = None,
        page_size: int = 1,
        prefix_closed: bool = False,
    ) -> PrefixForest:
        """Find the forest by comparing slot rows: exact for every content of the rows.

        Args:
            rows: [B, >= max(seq_lens)] KV slot of each position, one row per request.
            seq_lens: [B] valid positions of each row.
            limits: [B] positions at or past ``limits[b]`` count as private to request ``b``;
                None stands for ``seq_lens``.
            page_size: only whole pages are shared; a node ends on a multiple of it.
            prefix_closed: the caller vouches that equal slots at one position mean equal slots at
                every earlier one, which SGLang's pools guarantee. Common lengths are then found by
                binary search instead of comparing every position.

        Raises:
            ValueError: an argument is not legal, there is not one row and one limit per length,
                or the rows are shorter than the positions to compare.
        """
        page_size = check_integer("page_size", page_size)
        prefix_closed = check_flag("prefix_closed", prefix_closed)
        lens = check_integers("seq_lens", seq_lens, 0, INT32_MAX)
        caps = lens
        if limits is not None:
            limits = check_integers("limits", limits, 0, INT64_MAX)
            if len(limits) != len(lens):
                raise ValueError(
                    f"limits has {len(limits)} entries; legal: {len(lens)}, as seq_lens has"
                )
            caps = np.minimum(limits, lens)
        width = int(caps.max(initial=0))
        rows = check_rows(rows, len(lens), width)[:, :width]
        check_slots(rows, caps)
        if width == 0 or len(lens) < 2:
            nothing = np.zeros(max(len(lens) - 1, 0), dtype=np.int64)
            return forest_of_neighbours(np.arange(len(lens)), nothing, lens)
        # A private position gets a value of its own, one that no row holds.
        lowest = int(rows.min(initial=0))
        if lowest - len(lens) < np.iinfo(rows.dtype).min:
            rows = rows.astype(np.int64)
        alone = lowest - 1 - np.arange(len(lens), dtype=rows.dtype)[:, None]
        keys = np.ascontiguousarray(
            np.where(np.arange(width)[None, :] < caps[:, None], rows, alone)
        )
        # Any order of the elements puts equal prefixes side by side, so bytes may be compared.
        order = np.argsort(keys.view(np.dtype((np.void, keys.itemsize * width))).ravel())
        keys = keys[order]
        common = _common_by_search(keys) if prefix_closed else _common_by_scan(keys)
        return forest_of_neighbours(order, common // page_size * page_size, lens)

    @classmethod
    def from_paths(
        cls,
        paths: Sequence[RadixPath],
        limits: Sequence[int],
        seq_lens: Sequence[int] | NDArray[np.integer],
        *,
        page_size: int = 1,
    ) -> PrefixForest:
        """Build the forest from radix paths, without looking at any slot.

        Args:
            paths: [B] path of each request; requests with the same node ids share their slots.
            limits: [B] positions that the tree vouches for; 0 for a request whose row may not
                have been rewritten to the tree's slots yet.
            seq_lens: [B] KV tokens of each request.
            page_size: only whole pages are shared.

        Raises:
            ValueError: an argument is not legal, or the three do not have one entry per request.
        """
        page_size = check_integer("page_size", page_size)
        lens = check_integers("seq_lens", seq_lens, 0, INT32_MAX)
        caps = check_integers("limits", limits, 0, INT64_MAX)
        checked = check_paths(paths)
        if not len(checked) == len(caps) == len(lens):
            raise ValueError(
                f"paths and limits have {len(checked)} and {len(caps)} entries; legal: "
                f"{len(lens)}, as seq_lens has"
            )
        every = np.arange(len(checked))
        return forest_of_table(PathTable.of(checked), every, caps, lens, page_size=page_size)

    @classmethod
    def from_neighbours(
        cls,
        order: Sequence[int] | NDArray[np.integer],
        common: Sequence[int] | NDArray[np.integer],
        seq_lens: Sequence[int] | NDArray[np.integer],
    ) -> PrefixForest:
        """Build the forest from neighbours' common lengths.

        Args:
            order: [B] batch rows with equal prefixes side by side.
            common: [B - 1] tokens that ``order[i]`` and ``order[i + 1]`` have in common.
            seq_lens: [B] KV tokens by batch row.

        Raises:
            ValueError: ``order`` does not name every row once, or two neighbours have more in
                common than one of them has.
        """
        lens = check_integers("seq_lens", seq_lens, 0, INT32_MAX)
        order = check_integers("order", order, 0, INT32_MAX)
        common = check_integers("common", common, 0, INT32_MAX)
        for name, found, size in (("order", order, len(lens)), ("common", common, len(lens) - 1)):
            if len(found) != max(size, 0):
                raise ValueError(
                    f"{name} has {len(found)} entries; legal: {max(size, 0)} for {len(lens)} "
                    "seq_lens"
                )
        wrong = np.flatnonzero(np.sort(order) != np.arange(len(lens)))
        if len(wrong):
            raise ValueError(f"order does not name row {wrong[0]} once; legal: every row once")
        most = np.minimum(lens[order[1:]], lens[order[:-1]])
        bad = np.flatnonzero(common > most)
        if len(bad):
            raise ValueError(
                f"common[{bad[0]}]={common[bad[0]]}; legal: 0 to {most[bad[0]]} by seq_lens"
            )
        return forest_of_neighbours(order, common, lens)


def forest_of_table(
    table: PathTable,
    path_of: IntArray,
    limits: IntArray,
    seq_lens: IntArray,
    *,
    page_size: int,
) -> PrefixForest:
    """Build the forest from radix paths that several plans use; see `PrefixForest.from_paths`.

    For planners, which have all this from SGLang: nothing is checked, and compiled loops go wrong
    on arrays that do not belong together.

    Args:
        table: the paths.
        path_of: [B] path of each request in the table; -1 for an empty one.
        limits, seq_lens, page_size: as in :meth:`PrefixForest.from_paths`, int64 arrays.
    """
    caps = np.minimum(limits, seq_lens)
    by_cap = np.argsort(caps, kind="stable")
    order, common = common_of_paths(table.indptr, table.node_ids, table.ends, path_of, caps, by_cap)
    if page_size > 1:
        common = common // page_size * page_size
    return forest_of_neighbours(order, common, seq_lens)


def forest_of_neighbours(order: IntArray, common: IntArray, seq_lens: IntArray) -> PrefixForest:
    """`PrefixForest.from_neighbours` for planners: int64 arrays, of which nothing is checked."""
    lens = seq_lens.copy()  # callers add to theirs
    shared_lens, *nodes = nodes_of_neighbours(
        np.ascontiguousarray(order), np.ascontiguousarray(common)
    )
    forest = object.__new__(PrefixForest)  # past the checks
    for name, array in zip(PrefixForest.__slots__, (lens, shared_lens, *nodes), strict=True):
        object.__setattr__(forest, name, array)
    return forest


def _common_by_scan(keys: NDArray[np.integer]) -> IntArray:
    """Common length of each row with the next, by comparing all positions."""
    differ = keys[1:] != keys[:-1]
    first = differ.argmax(axis=1)
    return np.where(differ[np.arange(len(first)), first], first, keys.shape[1])


def _common_by_search(keys: NDArray[np.integer]) -> IntArray:
    """Common length of each row with the next, by binary search on equality at one position."""
    pairs = np.arange(len(keys) - 1)
    low = np.zeros(len(pairs), dtype=np.int64)  # positions known to be equal
    high = np.full(len(pairs), keys.shape[1], dtype=np.int64)  # first position that may differ
    while (low < high).any():
        probe = np.minimum((low + high) // 2, keys.shape[1] - 1)
        equal = keys[pairs, probe] == keys[pairs + 1, probe]
        active = low < high
        low = np.where(active & equal, probe + 1, low)
        high = np.where(active & ~equal, probe, high)
    return low
