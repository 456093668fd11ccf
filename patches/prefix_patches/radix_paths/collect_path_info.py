"""Trees with ``tree_core.collect_path_info`` (0.5.22 and later, Rust and Python core).

``req.last_node`` is an integer id; the call returns, per id, records with ``node_id`` and
``path_end``, root excluded. An unknown id raises KeyError. When it is gone, the next adapter is
tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prefix_patches.radix_paths.tree_node import NO_PATH


def reader(tree_cache: Any) -> Callable[[Sequence[Any]], list[Any]] | None:
    """The adapter's reader, or None if this cache is of another kind."""
    collect = getattr(getattr(tree_cache, "tree_core", None), "collect_path_info", None)
    if collect is None:
        return None

    def read(reqs: Sequence[Any]) -> list[Any]:
        # A streaming session may hold a virtual node, which is no id and has no path.
        nodes = [req.last_node for req in reqs]
        ids = list({node for node in nodes if type(node) is int})
        found = {}
        for node, path in zip(ids, collect(ids), strict=True):
            found[node] = (
                tuple([part.node_id for part in path]),
                tuple([part.path_end for part in path]),
            )
        return [found.get(node, NO_PATH) if type(node) is int else NO_PATH for node in nodes]

    return read
