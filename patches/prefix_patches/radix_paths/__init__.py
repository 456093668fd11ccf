"""Radix paths of requests, read on the CPU: one adapter per kind of tree.

A path is ``(node_ids, ends)``: the ids of the nodes from below the root down to the request's last
node, and the position at which each of them ends. The adapters are found by the methods that a
cache has, not by its class, since caches are wrapped and renamed between releases.

====================================  =================================================
adapter                               releases
====================================  =================================================
``collect_path_info``                 0.5.22 and later, Rust and Python tree core
``node_by_id``                        0.5.19 and later with the Python tree core
``tree_node``                         0.5.17, 0.5.18 (``TreeNode.parent``)
none: rows are compared, or stock     0.5.21 with its Rust core
====================================  =================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prefix_patches.radix_paths import collect_path_info, node_by_id, tree_node
from prefix_patches.radix_paths.tree_node import NO_PATH

__all__ = ["NO_PATH", "Path", "owned_lengths", "path_reader", "tree_with_stable_ids"]

Path = tuple[tuple[int, ...], tuple[int, ...]]
PathReader = Callable[[Sequence[Any]], list[Path]]


def path_reader(tree_cache: Any) -> PathReader | None:
    """A function from requests to their paths, or None where the tree cannot tell."""
    for adapter in (collect_path_info, node_by_id, tree_node):
        reader: PathReader | None = adapter.reader(tree_cache)
        if reader is not None:
            return reader
    return None


def tree_with_stable_ids(tree_cache: Any) -> Any:
    """The tree core whose integer node ids are handed out once and outlive splits, else None.

    Of the releases whose cores were read for this: both cores of 0.5.22 and 0.5.23.
    """
    core = getattr(tree_cache, "tree_core", None)
    return core if hasattr(core, "collect_path_info") else None


def owned_lengths(reqs: Sequence[Any]) -> list[int]:
    """Tokens at the start of each request's row that the tree owns.

    ``req.kv.cache_protected_len`` from 0.5.19 on; ``req.cache_protected_len`` before, where
    ``req.kv`` holds other things. All requests of a process are of one release.
    """
    if reqs and hasattr(getattr(reqs[0], "kv", None), "cache_protected_len"):
        return [req.kv.cache_protected_len for req in reqs]
    return [req.cache_protected_len for req in reqs]
