"""SGLang's radix paths, cached by request and by node id."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import not_
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefix_patches.attributes import Request
from prefix_patches.radix_paths import (
    added_paths,
    owned_lengths,
    path_reader,
    tree_with_stable_ids,
)
from prefix_patches.schedule_context import ScheduleContext
from sglang_prefix.forest import PathTable

__all__ = ["FoundPaths", "PathCache", "limits_of"]

IntArray = NDArray[np.int64]

# The table is read anew when it has more paths than twice the batch and this.
_SPARE_PATHS = 256


class FoundPaths(NamedTuple):
    """Paths of the requests of a batch.

    Attributes:
        table: the paths; may hold others too.
        path_of: [B] path of each request in the table; -1 for an empty one.
        limits: [B] tokens at the start of each request's row that its path vouches for.
        newcomers: requests that have not settled, whose path is taken to be empty.
    """

    table: PathTable
    path_of: IntArray
    limits: IntArray
    newcomers: list[Request]


class PathCache:
    """What has been read of requests and of SGLang's tree, used until it may have changed.

    *Of a request*: the node that it holds, and the length of its row that the tree owns. SGLang
    sets both when it prefills the request and before its second decode step, that is before it
    settles. So they are read when it has. One that is prefilled again or retracted is no longer
    settled; it settles again with a plan, whose look-up has dropped what was known before. So a
    schedule has one cache.

    *Of the tree*: paths by node id. A node that a request holds now and that was in the tree when
    its path was read has been there in between, and so have all nodes above it. For such a node,
    these stay as they are:

    * *Its id.* Ids are handed out once, also across a reset of the tree; a cache of another tree
      is never asked. So equal ids are one node.
    * *Where it ends, and the tokens up to there.* A node changes only when an insert splits it, or
      one above it. The split puts a new node, with a new id, above the old one, which keeps its id
      and its end. Nodes are never joined or prolonged.

    So a split makes an old path shorter than a new one in nodes, not in tokens: the nodes that it
    names still end where it says, above the same request. What two requests have in common up to
    the end of the deepest node that both paths name depends on neither splits nor evictions.

    Therefore only nodes that the table lacks are asked for. What could be lost is what a newcomer
    shares with a request whose node it has split: the new path names the new parent, the older one
    does not. `radix_paths.added_paths` sees that this may be so; then everybody is asked for.

    Args:
        schedule: knows which requests have settled.
    """

    _table: PathTable
    _row_of: dict[int, int]
    _known: dict[Request, int]
    _named: set[int]

    def __init__(self, schedule: ScheduleContext) -> None:
        self._schedule = schedule
        self.forget()

    def look_up(self, tree_cache: Any, reqs: Sequence[Request]) -> FoundPaths | None:
        """Paths of the requests of a decode batch; None if the tree cannot be read.

        Reads the CPU only.
        """
        tree = tree_with_stable_ids(tree_cache)
        if tree is None:
            return self._read_all(tree_cache, reqs)
        if tree is not self._tree or len(self._row_of) > 2 * len(reqs) + _SPARE_PATHS:
            self.forget(tree)
        settled = self._schedule.settled(reqs)
        places = list(map(self._known.get, reqs))
        if not all(settled):  # what was known of the others is of before their prefill
            places = [
                place if is_one else None for place, is_one in zip(places, settled, strict=True)
            ]
        if None not in places:
            at = np.fromiter(places, np.int64, len(places))
            path_of, limits = self._path_of[at], self._limits[at]
            if len(reqs) < len(self._known):
                self._remember(reqs, path_of, limits)
            return FoundPaths(self._table, path_of, limits, [])
        rows = [row for row, place in enumerate(places) if place is None and settled[row]]
        new = [reqs[row] for row in rows]
        nodes = [req.last_node for req in new]
        if not self._add_paths(nodes):
            self.forget(tree)
            return self.look_up(tree_cache, reqs)
        # Place -1 is that of an empty path.
        at = np.asarray([-1 if place is None else place for place in places])
        path_of, limits = self._path_of[at], self._limits[at]
        if new:
            found = np.asarray([self._row_of.get(node, -1) for node in nodes])
            path_of[rows], limits[rows] = found, limits_of(new, self._table, found)
        self._remember(reqs, path_of, limits)
        newcomers = list(compress(reqs, map(not_, settled)))
        return FoundPaths(self._table, path_of, limits, newcomers)

    def _add_paths(self, nodes: Sequence[Any]) -> bool:
        """Make the table hold the paths of these nodes; False if it would hide what is shared.

        A streaming session's virtual node is no id and has no path.
        """
        unknown = [n for n in dict.fromkeys(nodes) if n not in self._row_of and type(n) is int]
        if not unknown:
            return True
        paths = added_paths(self._tree, unknown, self._named)
        if paths is None:
            return False
        first, added = len(self._table.lengths), PathTable.of(paths)
        self._row_of.update(zip(unknown, range(first, first + len(unknown)), strict=True))
        self._named.update(added.node_ids.tolist())
        self._table = self._table.joined(added)
        return True

    def _remember(self, reqs: Sequence[Request], path_of: IntArray, limits: IntArray) -> None:
        """Know the requests that have a path, and no others: who has left is forgotten."""
        self._path_of, self._limits = np.append(path_of, -1), np.append(limits, 0)
        self._known = dict(zip(reqs, range(len(reqs)), strict=True))
        for row in np.flatnonzero(path_of < 0):
            del self._known[reqs[row]]

    def forget(self, tree: Any = None) -> None:
        """Drop everything; what is read from now on is of ``tree``."""
        self._tree = tree  # whose paths these are
        self._row_of = {}
        self._named = set()  # nodes on the paths of the table
        self._table = PathTable.of(())
        # Of the requests of the newest batch, at these places.
        self._known = {}
        self._path_of, self._limits = np.full(1, -1), np.zeros(1, dtype=np.int64)

    def _read_all(self, tree_cache: Any, reqs: Sequence[Request]) -> FoundPaths | None:
        """Paths from a tree whose nodes have no lasting ids: nothing is kept."""
        self.forget()
        read = path_reader(tree_cache)
        if read is None:
            return None
        settled = self._schedule.settled(reqs)
        known = list(compress(reqs, settled))
        table = PathTable.of(read(known))
        path_of, limits = np.full(len(reqs), -1), np.zeros(len(reqs), dtype=np.int64)
        path_of[settled] = every = np.arange(len(known))
        limits[settled] = limits_of(known, table, every)
        newcomers = list(compress(reqs, map(not_, settled)))
        return FoundPaths(table, path_of, limits, newcomers)


def limits_of(reqs: Sequence[Request], table: PathTable, path_of: IntArray) -> IntArray:
    """Tokens that the tree owns, but no more than the path has: a session's row may hold more."""
    owned = np.fromiter(owned_lengths(reqs), np.int64, len(reqs))
    lengths = np.append(table.lengths, 0)  # of path -1, which is empty
    limits: IntArray = np.minimum(owned, lengths[path_of])
    return limits
