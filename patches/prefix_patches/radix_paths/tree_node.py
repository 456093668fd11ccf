"""Trees of linked nodes: ``TreeNode`` with ``parent``, ``key`` and ``id`` (0.5.17, 0.5.18).

``req.last_node`` is the node itself. A cache without a tree (radix cache off) leaves it None, or
at a root without a parent: an empty path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# Of a request that holds no node of a tree.
NO_PATH: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


def reader(tree_cache: Any) -> Callable[[Sequence[Any]], list[Any]] | None:
    """The adapter's reader, or None if this cache is of another kind."""
    if hasattr(tree_cache, "tree_core"):
        return None

    def read(reqs: Sequence[Any]) -> list[Any]:
        return [path_of(req.last_node) for req in reqs]

    return read


def path_of(node: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Path of a linked node, from below the root down."""
    ids: list[int] = []
    lengths: list[int] = []
    while getattr(node, "parent", None) is not None:
        ids.append(node.id)
        lengths.append(len(node.key))
        node = node.parent
    ends: list[int] = []
    for length in reversed(lengths):
        ends.append(length + (ends[-1] if ends else 0))
    return tuple(reversed(ids)), tuple(ends)
