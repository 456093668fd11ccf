"""The loops behind a prefix forest: a trie of radix paths, and nodes in their canonical order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sglang_prefix.jit import jit

__all__ = ["common_of_paths", "nodes_of_neighbours"]

IntArray = NDArray[np.int64]


@jit
def common_of_paths(
    indptr: IntArray,
    node_ids: IntArray,
    ends: IntArray,
    path_of: IntArray,
    caps: IntArray,
    by_cap: IntArray,
) -> tuple[IntArray, IntArray]:
    """Put equal paths side by side: a walk over their trie, requests with a low cap first.

    Requests that stop in one node share as far as the lower cap; others as far as the node ends
    in which their paths part, or the lower cap if that comes first.

    Args:
        indptr: [P + 1] bounds of each path in the next two.
        node_ids, ends: the paths' nodes, from below the root down, and where each of them ends.
        path_of: [B] path of each request; -1 for an empty one.
        caps: [B] positions at or past the cap are private.
        by_cap: [B] batch rows by ascending cap.

    Returns:
        [B] batch rows with equal prefixes side by side, and [B - 1] common tokens of neighbours.
    """
    parent, end, home = _trie(indptr, node_ids, ends, path_of, caps)
    first_child, next_child = np.zeros_like(parent), np.zeros_like(parent)
    for node in range(1, len(parent)):
        next_child[node] = first_child[parent[node]]
        first_child[parent[node]] = node
    first_request, next_request = np.full_like(parent, -1), np.full_like(caps, -1)
    for row in by_cap[::-1]:
        next_request[row] = first_request[home[row]]
        first_request[home[row]] = row

    num_requests = len(caps)
    order = np.empty(num_requests, dtype=np.int64)
    common = np.empty(max(num_requests - 1, 0), dtype=np.int64)
    emitted = 0
    node = 0
    meeting_end = end[0]  # of the node in which the next path parts from the last one
    while True:
        row = first_request[node]
        while row >= 0:
            order[emitted] = row
            if emitted:
                lower_cap = min(caps[order[emitted - 1]], caps[row])
                common[emitted - 1] = min(meeting_end, lower_cap)
            emitted += 1
            meeting_end = end[node]
            row = next_request[row]
        if first_child[node]:
            node = first_child[node]
        else:
            while node and not next_child[node]:
                node = parent[node]
            if not node:
                return order, common
            node = next_child[node]
        meeting_end = min(meeting_end, end[parent[node]])


@jit
def _trie(
    indptr: IntArray, node_ids: IntArray, ends: IntArray, path_of: IntArray, caps: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Insert paths into a trie whose node 0 is the root, up to the node that a cap falls into.

    A child is found by (parent, node id) in a hash table with linear probing, at most half full.

    Returns:
        [T] parent and [T] end of each trie node, and [B] the trie node that each request stops in.
    """
    size = 4
    while size < 2 * len(node_ids):
        size *= 2
    table = np.zeros(size, dtype=np.int64)  # of trie nodes; the root is nobody's child
    parent = np.zeros(len(node_ids) + 1, dtype=np.int64)
    node_id = np.zeros(len(node_ids) + 1, dtype=np.int64)
    end = np.zeros(len(node_ids) + 1, dtype=np.int64)
    home = np.zeros(len(caps), dtype=np.int64)
    count = 1
    for request in range(len(caps)):
        node, start, path = 0, 0, path_of[request]
        if path < 0:
            continue
        for i in range(indptr[path], indptr[path + 1]):
            if start >= caps[request]:
                break
            start = ends[i]
            # Fibonacci hashing of 31 bits, so that no product leaves 63.
            key = (node_ids[i] + 40_503 * node) & 0x7FFF_FFFF
            place = (key * 2_654_435_769 >> 20) & (size - 1)
            child = table[place]
            while child and (parent[child] != node or node_id[child] != node_ids[i]):
                place = (place + 1) & (size - 1)
                child = table[place]
            if not child:
                child = count
                count += 1
                table[place] = child
                parent[child], node_id[child], end[child] = node, node_ids[i], start
            node = child
        home[request] = node
    return parent[:count], end[:count], home


@jit
def nodes_of_neighbours(
    order: IntArray, common: IntArray
) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, IntArray]:
    """Nodes in preorder, siblings by their lowest batch row, so that a forest has one form only.

    What puts equal prefixes side by side, node ids or slots, says nothing about which of two
    siblings comes first; plans made from either are to be the same.

    Args:
        order: [B] batch rows, equal prefixes side by side.
        common: [B - 1] common tokens of neighbours.

    Returns:
        ``shared_lens``, ``order`` and the five node arrays of :class:`PrefixForest`.
    """
    stops, parents, deepest = _intervals(order, common)
    num_nodes, num_requests = len(stops), len(order)
    first, following = _items_by_lowest_row(parents, deepest)

    shared_lens = np.zeros(num_requests, dtype=np.int64)
    for row in range(num_requests):
        if deepest[row] >= 0:
            shared_lens[row] = stops[deepest[row]]
    arranged = np.empty(num_requests, dtype=np.int64)
    begin, end = np.empty(num_nodes, dtype=np.int64), np.empty(num_nodes, dtype=np.int64)
    start, stop = np.zeros(num_nodes, dtype=np.int64), np.empty(num_nodes, dtype=np.int64)
    parent = np.full(num_nodes, -1, dtype=np.int64)
    number = np.empty(num_nodes, dtype=np.int64)  # of each node, in preorder
    position, count = 0, 0
    open_nodes = np.empty(num_nodes, dtype=np.int64)
    depth = 0
    item = first[num_nodes]
    while item >= 0 or depth:
        if item < 0:
            depth -= 1
            node = open_nodes[depth]
            end[number[node]] = position
            item = following[node]
        elif item >= num_nodes:
            arranged[position] = item - num_nodes
            position += 1
            item = following[item]
        else:
            number[item] = count
            begin[count], stop[count] = position, stops[item]
            if parents[item] >= 0:
                start[count], parent[count] = stops[parents[item]], number[parents[item]]
            count += 1
            open_nodes[depth] = item
            depth += 1
            item = first[item]
    return shared_lens, arranged, begin, end, start, stop, parent


@jit
def _intervals(order: IntArray, common: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Nodes as the intervals of the common lengths, by a stack of those that are open.

    Returns:
        [N] stop and [N] parent of each node, in the order in which they open, and [B] by batch
        row, the deepest node of each request; -1 stands for none.
    """
    num_requests = len(order)
    stops = np.empty(num_requests, dtype=np.int64)
    parents = np.full(num_requests, -1, dtype=np.int64)
    deepest = np.full(num_requests, -1, dtype=np.int64)
    open_nodes = np.empty(num_requests, dtype=np.int64)
    depth, count = 0, 0
    for i in range(num_requests):
        length = common[i] if i < num_requests - 1 else 0
        if depth:
            deepest[order[i]] = open_nodes[depth - 1]
        closed = -1
        while depth and stops[open_nodes[depth - 1]] > length:
            depth -= 1
            closed = open_nodes[depth]
        around = open_nodes[depth - 1] if depth else -1
        if length > (stops[around] if depth else 0):
            stops[count], parents[count] = length, around
            if closed >= 0:  # it turns out to lie inside the one that opens now
                parents[closed] = count
            else:
                deepest[order[i]] = count
            open_nodes[depth] = count
            depth += 1
            count += 1
    return stops[:count], parents[:count], deepest


@jit
def _items_by_lowest_row(parents: IntArray, deepest: IntArray) -> tuple[IntArray, IntArray]:
    """What hangs on each node, by ascending lowest row: child nodes and requests of its own.

    Rows are taken in ascending order, and each brings along the nodes above it that have not
    been seen yet. Items are numbered: the N nodes first, then the B requests.

    Returns:
        [N + 1] first item of each node, of the root last, and [N + B] the item after each; -1
        stands for none.
    """
    num_nodes, num_requests = len(parents), len(deepest)
    first = np.full(num_nodes + 1, -1, dtype=np.int64)
    last = np.full(num_nodes + 1, -1, dtype=np.int64)
    following = np.full(num_nodes + num_requests, -1, dtype=np.int64)
    for row in range(num_requests):
        item, node = num_nodes + row, deepest[row]
        while True:
            owner = node if node >= 0 else num_nodes
            seen = first[owner] >= 0
            if seen:
                following[last[owner]] = item
            else:
                first[owner] = item
            last[owner] = item
            if seen or node < 0:
                break
            item, node = node, parents[node]
    return first, following
