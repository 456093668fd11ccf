"""Radix paths of requests, read on the CPU: one reader per kind of tree.

A path is ``(node_ids, ends)``: the ids of the nodes from below the root down to the request's last
node, and the position at which each of them ends. The reader is found by the methods that a cache
has, not by its class, since caches are wrapped and renamed between releases.

====================================  =================================================
read by                               releases
====================================  =================================================
``tree_core.collect_path_info``       0.5.22 and later, Rust and Python tree core
``tree_core.node_by_id``              0.5.19 and later with the Python tree core
``TreeNode.parent``                   0.5.17, 0.5.18
none: rows are compared, or stock     0.5.21 with its Rust core
====================================  =================================================

When one is gone, the next is tried.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from typing import Any

from prefix_patches.attributes import PathRecord, Request

__all__ = [
    "NO_PATH",
    "Path",
    "added_paths",
    "owned_lengths",
    "path_reader",
    "tree_with_stable_ids",
]

Path = tuple[tuple[int, ...], tuple[int, ...]]
PathReader = Callable[[Sequence[Request]], list[Path]]

# Of a request that holds no node of a tree.
NO_PATH: Path = ((), ())


def path_reader(tree_cache: Any) -> PathReader | None:
    """A function from requests to their paths, or None where the tree cannot tell."""
    if not hasattr(tree_cache, "tree_core"):
        return _read_linked_nodes
    core = tree_cache.tree_core
    collect = getattr(core, "collect_path_info", None)
    if collect is not None:
        return lambda reqs: _collect_paths(collect, reqs)
    look_up = getattr(core, "node_by_id", None)
    if look_up is None:
        return None
    try:
        core.root_node  # noqa: B018 - the Rust core of 0.5.21 has both names, and both raise
    except (AttributeError, NotImplementedError):
        return None
    return lambda reqs: [_path_of(look_up(n)) if type(n) is int else NO_PATH for n in _nodes(reqs)]


def _nodes(reqs: Sequence[Request]) -> list[Any]:
    """Of each request its last node: an id where there is a tree core, else the node itself.

    A streaming session may hold a virtual node, which is no id and has no path. A cache without a
    tree (radix cache off) leaves None, or a root without a parent: an empty path.
    """
    return [req.last_node for req in reqs]


def _collect_paths(collect: Callable[[list[int]], Any], reqs: Sequence[Request]) -> list[Path]:
    """Per id, ``collect`` returns records without the root's.

    An unknown id raises KeyError.
    """
    nodes = _nodes(reqs)
    ids = list({node for node in nodes if type(node) is int})
    found = dict(zip(ids, map(_path_of_records, collect(ids)), strict=True))
    return [found.get(node, NO_PATH) if type(node) is int else NO_PATH for node in nodes]


def _path_of_records(path: Sequence[PathRecord]) -> Path:
    return tuple([part.node_id for part in path]), tuple([part.path_end for part in path])


def added_paths(core: Any, nodes: list[int], named: Collection[int]) -> list[Path] | None:
    """Paths of nodes, to be used beside older paths, which name the nodes ``named``.

    None where an older path may lack a node that a new one names: a node that came by a split since
    then. Downwards from such a node there is one, itself or a lower one, that no older path names,
    and whose child towards the older path's end is named or on no new path. So it has more
    children than new paths have unnamed ones of it.

    Args:
        core: a :func:`tree_with_stable_ids`.
        nodes: ids, each once; an unknown one raises KeyError.
        named: ids of all nodes on older paths; none if there are no such paths.
    """
    paths: Sequence[Sequence[PathRecord]] = core.collect_path_info(nodes)
    if named:
        on_paths = {part.node_id: part for path in paths for part in path}
        added = [part for part in on_paths.values() if part.node_id not in named]
        children = Counter([part.parent_id for part in added])
        if any(getattr(part, "num_children", math.inf) > children[part.node_id] for part in added):
            return None
    return list(map(_path_of_records, paths))


def _read_linked_nodes(reqs: Sequence[Request]) -> list[Path]:
    return [_path_of(node) for node in _nodes(reqs)]


def _path_of(node: Any) -> Path:
    """Path of a node with ``parent``, ``key`` and ``id``, from below the root down.

    Raises:
        TypeError: it is an id, whose tree cannot be asked for the node.
    """
    if type(node) is int:
        raise TypeError(f"node {node} is an id, and SGLang's tree has no tree_core to ask for it")
    ids: list[int] = []
    lengths: list[int] = []
    while getattr(node, "parent", None) is not None:
        ids.append(node.id)
        lengths.append(len(node.key))
        node = node.parent
    return tuple(reversed(ids)), tuple(accumulate(reversed(lengths)))


def tree_with_stable_ids(tree_cache: Any) -> Any:
    """The tree core whose integer node ids are handed out once and outlive splits, else None.

    Of the releases whose cores were read for this: both cores of 0.5.22 and 0.5.23.
    """
    core = getattr(tree_cache, "tree_core", None)
    return core if hasattr(core, "collect_path_info") else None


def owned_lengths(reqs: Sequence[Request]) -> list[int]:
    """Tokens at the start of each request's row that the tree owns.

    ``req.kv.cache_protected_len`` from 0.5.19 on; ``req.cache_protected_len`` before, where
    ``req.kv`` holds other things. All requests of a process are of one release.
    """
    if reqs and hasattr(reqs[0].kv, "cache_protected_len"):
        return [req.kv.cache_protected_len for req in reqs]
    return [req.cache_protected_len for req in reqs]
