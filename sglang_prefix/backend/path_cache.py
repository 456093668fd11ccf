"""SGLang's radix paths, cached by node id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefix_patches.attributes import Request
from prefix_patches.radix_paths import path_reader, tree_with_stable_ids
from sglang_prefix.forest import PathTable

__all__ = ["FoundPaths", "PathCache"]

IntArray = NDArray[np.int64]


class FoundPaths(NamedTuple):
    """Paths of some requests.

    Attributes:
        table: the paths; may hold others too.
        path_of: [requests] path of each request in the table.
    """

    table: PathTable
    path_of: IntArray


class PathCache:
    """One answer of SGLang's path call, used until a request's node is not in it.

    All paths that a plan sees come from one call, so from one state of the tree; they are never
    mixed with those of another call. What the tree has gone through since then does not matter.
    A node that a request holds now and that was in the tree at the call has been there in between,
    and so have all nodes above it. For such a node, these stay as they are:

    * *Its id.* Ids are handed out once, also across a reset of the tree; a cache of another tree
      is never asked. So equal ids are one node.
    * *Where it ends, and the tokens up to there.* A node changes only when an insert splits it, or
      one above it. The split puts a new node, with a new id, above the old one, which keeps its id
      and its end. Nodes are never joined or prolonged.

    So a split makes an old path shorter than a new one in nodes, not in tokens: the nodes that it
    names still end where it says, above the same request. The tokens that two requests have in
    common, up to the end of the deepest node that both paths name, depend on neither splits nor
    evictions, and the forest from an old answer is the forest from a new one. Mixing the two would
    be right as well, but would lose what a request shares with a newcomer whose insert split its
    node: the old path does not name the new parent, the newcomer's does.

    Hence a batch that loses requests, and the first step of one that gains some, which plans
    without them, make no call; the second step of a newcomer makes one for everybody.
    """

    def __init__(self) -> None:
        self._tree: Any = None  # whose paths these are; None if they must not be used again
        self._row_of: dict[int, int] = {}
        self._table = PathTable.of(())

    def look_up(self, tree_cache: Any, reqs: Sequence[Request]) -> FoundPaths | None:
        """Paths of requests that hold nodes of a tree; None if the tree cannot be read.

        Reads the CPU only.
        """
        nodes = [req.last_node for req in reqs]
        tree = tree_with_stable_ids(tree_cache)
        if tree is not None and tree is self._tree:
            rows = list(map(self._row_of.get, nodes))
            if None not in rows:
                return FoundPaths(self._table, np.fromiter(rows, np.int64, len(rows)))
        read = path_reader(tree_cache)
        if read is None:
            return None
        paths = read(reqs)
        self._tree = tree
        self._table = PathTable.of(paths)
        # A streaming session's virtual node is no id, and is asked for each time.
        self._row_of = {node: row for row, node in enumerate(nodes) if type(node) is int}
        return FoundPaths(self._table, np.arange(len(paths)))
