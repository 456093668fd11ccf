"""Trees whose nodes can be looked up: ``tree_core.node_by_id`` (0.5.19 on, Python core).

``req.last_node`` is an integer id, a node has ``parent`` and ``key``. The Rust core has the method
too, but it raises NotImplementedError; then this is not the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prefix_patches.radix_paths.tree_node import NO_PATH, path_of


def reader(tree_cache: Any) -> Callable[[Sequence[Any]], list[Any]] | None:
    """The adapter's reader, or None if this cache is of another kind."""
    core: Any = getattr(tree_cache, "tree_core", None)
    look_up = getattr(core, "node_by_id", None)
    if look_up is None:
        return None
    try:
        core.root_node  # noqa: B018 - the Rust core's property raises
    except (AttributeError, NotImplementedError):
        return None

    def read(reqs: Sequence[Any]) -> list[Any]:
        nodes = [req.last_node for req in reqs]
        return [path_of(look_up(node)) if type(node) is int else NO_PATH for node in nodes]

    return read
