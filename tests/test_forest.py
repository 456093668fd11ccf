"""The prefix forest: exact against a pairwise walk over the rows, from rows and from paths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sglang_prefix.bench.workloads.trees import TreeBatch, random_tree
from sglang_prefix.forest import PathTable, PrefixForest, RadixPath, forest_of_table
from tests.forests import (
    Batch,
    Fork,
    batches,
    brute_force_sharing,
    build_batch,
    comb_batch,
    common_lengths,
    random_batch,
    trees,
)

Node = tuple[int, int, set[int]]
IntArray = NDArray[np.int64]


def check_invariants(forest: PrefixForest, page_size: int = 1) -> None:
    """What every consumer of a forest relies on, whatever it was made from."""
    covered = np.zeros(forest.batch_size, dtype=np.int64)
    assert sorted(forest.order.tolist()) == list(range(forest.batch_size))
    assert (forest.shared_lens <= forest.seq_lens).all()
    for array in (forest.seq_lens, forest.shared_lens, forest.order, forest.node_parent):
        assert array.dtype == np.int64
    begins, ends = forest.node_begin.tolist(), forest.node_end.tolist()
    starts, stops = forest.node_start.tolist(), forest.node_stop.tolist()
    for node, parent in enumerate(forest.node_parent.tolist()):
        assert ends[node] - begins[node] >= 2
        assert 0 <= starts[node] < stops[node]
        assert starts[node] % page_size == stops[node] % page_size == 0
        covered[forest.node_requests(node)] += stops[node] - starts[node]
        if parent < 0:
            assert starts[node] == 0
        else:
            assert parent < node
            assert starts[node] == stops[parent]
            assert begins[parent] <= begins[node] < ends[node] <= ends[parent]
            assert ends[node] - begins[node] < ends[parent] - begins[parent], "a chain is one node"
        sisters = [n for n in range(node) if forest.node_parent[n] == parent]
        assert all(ends[sister] <= begins[node] for sister in sisters)
    assert (covered == forest.shared_lens).all(), "a path covers [0, shared_len)"


def check_exact(
    forest: PrefixForest, rows: NDArray[np.integer], caps: IntArray, page_size: int
) -> None:
    """The forest is the one that comparing every pair of rows gives."""
    common = common_lengths(rows, caps, page_size)
    assert forest.sharing() == brute_force_sharing(common)
    assert forest.shared_lens.tolist() == [max(lengths) for lengths in common]
    # Exactly: each (position, what is at it and before it) counts once.
    shared = sum((stop - start) * (len(who) - 1) for start, stop, who in forest.sharing())
    assert forest.unique_tokens == int(forest.seq_lens.sum()) - shared
    check_invariants(forest, page_size)


def assert_shares(forest: PrefixForest, *nodes: Node) -> None:
    assert forest.sharing() == {(start, stop, frozenset(who)) for start, stop, who in nodes}
    check_invariants(forest)


@given(batches(), st.data())
def test_from_rows_is_exact(batch: Batch, data: st.DataObject) -> None:
    """By scan and by search, whole rows and positions below a limit."""
    limits = [data.draw(st.integers(0, n + 2)) for n in batch.seq_lens.tolist()]
    for caps in (None, np.asarray(limits)):
        for closed in (False, True):
            forest = PrefixForest.from_rows(
                batch.rows,
                batch.seq_lens,
                limits=caps,
                page_size=batch.page_size,
                prefix_closed=closed,
            )
            bounds = batch.seq_lens if caps is None else np.minimum(caps, batch.seq_lens)
            check_exact(forest, batch.rows, bounds, batch.page_size)


@given(st.data())
def test_from_rows_is_exact_for_rows_that_are_not_prefix_closed(data: st.DataObject) -> None:
    """Equal slots at one position after unequal ones share nothing."""
    num_requests, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 12))
    values = st.integers(0, data.draw(st.integers(0, 3)))
    row = st.lists(values, min_size=width, max_size=width)
    rows = data.draw(st.lists(row, min_size=num_requests, max_size=num_requests))
    lens = data.draw(st.lists(st.integers(0, width), min_size=num_requests, max_size=num_requests))
    page_size = data.draw(st.sampled_from([1, 2, 4]))
    table = np.asarray(rows, dtype=data.draw(st.sampled_from([np.int32, np.int64])))
    forest = PrefixForest.from_rows(table, lens, page_size=page_size)
    check_exact(forest, table, np.asarray(lens), page_size)


@given(trees(), st.data())
def test_from_paths_finds_what_the_rows_show(batch: TreeBatch, data: st.DataObject) -> None:
    """Limit 0 (unsettled), inside a node, at the end, past it; and paths that end early."""
    assert (
        batch.forest().sharing()
        == PrefixForest.from_rows(batch.table, batch.seq_lens, page_size=batch.page_size).sharing()
    )
    check_exact(batch.forest(), batch.table, batch.seq_lens, batch.page_size)
    paths, limits = [], []
    for path, length in zip(batch.paths, batch.seq_lens.tolist(), strict=True):
        known = data.draw(st.just(len(path.ends)) | st.integers(0, len(path.ends)))
        paths.append(RadixPath(path.node_ids[:known], path.ends[:known]))
        somewhere = st.integers(0, length + 2 * batch.page_size)
        limits.append(data.draw(st.sampled_from([0, length]) | somewhere))
    forest = PrefixForest.from_paths(paths, limits, batch.seq_lens, page_size=batch.page_size)
    ends = [path.ends[-1] if path.ends else 0 for path in paths]
    caps = np.minimum(np.minimum(limits, ends), batch.seq_lens)
    check_exact(forest, batch.table, caps, batch.page_size)


@given(st.lists(st.lists(st.integers(-(1 << 62), 1 << 62), max_size=3), min_size=1, max_size=40))
def test_node_ids_may_be_any_numbers(ids: list[list[int]]) -> None:
    """The table that finds them takes 31 bits, and its places collide."""
    paths = [RadixPath(tuple(path), tuple(range(1, len(path) + 1))) for path in ids]
    rows = np.full((len(ids), 4), -1, dtype=np.int64)
    for row, path in zip(rows, ids, strict=True):
        row[: len(path)] = path
    lens = [len(path) for path in ids]
    forest = PrefixForest.from_paths(paths, lens, [n + 1 for n in lens])
    assert forest.sharing() == brute_force_sharing(common_lengths(rows, np.asarray(lens), 1))


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("seed", range(4))
def test_large_uneven_batches(seed: int, page_size: int) -> None:
    batch = random_batch(seed, num_requests=70, max_tokens=300, page_size=page_size)
    check_exact(batch.forest(), batch.rows, batch.seq_lens, page_size)
    tree = random_tree(seed, num_requests=70, max_tokens=300, page_size=page_size, num_nodes=20)
    by_path = TreeBatch.lay_out(tree, page_size=page_size, seed=seed)
    check_exact(by_path.forest(), by_path.table, by_path.seq_lens, page_size)
    for forest in (batch.forest(), by_path.forest()):
        assert forest.num_nodes > 5, "the generator shares too little to test anything"


@pytest.mark.parametrize(
    ("forks", "page_size", "nodes", "unique"),
    [
        pytest.param([Fork(0, 0, 5)], 1, [], 5, id="alone"),
        pytest.param(
            [Fork(0, 0, 10), Fork(0, 6, 0), Fork(0, 10, 2)],
            1,
            [(0, 6, {0, 1, 2}), (6, 10, {0, 2})],
            12,
            id="one ends inside a node that others continue",
        ),
        pytest.param([Fork(0, 0, 7)] + [Fork(0, 7, 0)] * 2, 1, [(0, 7, {0, 1, 2})], 7, id="equal"),
        pytest.param(
            [Fork(0, 0, 7), Fork(0, 7, 0, same_page=True)],
            4,
            [(0, 4, {0, 1})],
            10,
            id="the last partial page is private",
        ),
        pytest.param(
            [Fork(r * 3, 8 if i else 0, i or 8) for r in range(5) for i in range(3)],
            1,
            [(0, 8, {3 * r, 3 * r + 1, 3 * r + 2}) for r in range(5)],
            55,
            id="many roots",
        ),
    ],
)
def test_batches_worked_out_by_hand(
    forks: list[Fork], page_size: int, nodes: list[Node], unique: int
) -> None:
    batch = build_batch(forks, page_size=page_size, order="scattered")
    assert_shares(batch.forest(), *nodes)
    assert batch.forest().unique_tokens == unique


def test_an_empty_batch_has_an_empty_forest() -> None:
    for forest in (
        PrefixForest.from_rows(np.zeros((0, 4), dtype=np.int32), []),
        PrefixForest.from_paths([], [], []),
    ):
        assert (forest.batch_size, forest.num_nodes, forest.unique_tokens) == (0, 0, 0)


def test_a_comb_has_a_node_for_every_request_that_leaves() -> None:
    forest = comb_batch(255).forest()
    assert forest.num_nodes == 255
    assert forest.node_parent.tolist() == list(range(-1, 254))
    assert (forest.node_stop - forest.node_start == 1).all()


def test_paths_worked_out_by_hand() -> None:
    path = RadixPath((3, 9), (4, 8))
    unsettled = PrefixForest.from_paths([path] * 3, [0, 8, 8], [8, 9, 9])
    assert_shares(unsettled, (0, 8, {1, 2}))
    assert_shares(PrefixForest.from_paths([path] * 2, [0, 0], [8, 8]))
    chain = RadixPath((5, 0, 7), (2, 3, 9))  # passed by the same requests: one node
    assert_shares(PrefixForest.from_paths([chain] * 2, [9, 9], [9, 9]), (0, 9, {0, 1}))
    # One id below two parents is two nodes.
    paths = [RadixPath(ids, (4, 9)) for ids in ((1, 3), (2, 3), (1, 3))]
    assert_shares(PrefixForest.from_paths(paths, [9] * 3, [9] * 3), (0, 9, {0, 2}))


def test_a_table_of_paths_serves_many_requests_and_those_without_a_path() -> None:
    table = PathTable.of([RadixPath((1, 2), (4, 9)), RadixPath((), ()), RadixPath((1,), (4,))])
    assert table.lengths.tolist() == [9, 0, 4]
    path_of = np.asarray([0, -1, 2, 0, 1])
    forest = forest_of_table(
        table, path_of, np.asarray([9, 9, 4, 7, 9]), np.full(5, 10), page_size=1
    )
    assert_shares(forest, (0, 4, {0, 2, 3}), (4, 7, {0, 3}))


def test_the_inputs_are_left_alone_and_their_order_does_not_matter() -> None:
    batch = random_batch(5, num_requests=30, max_tokens=80)
    rows, lens = batch.rows, batch.seq_lens.copy()
    moved = np.random.default_rng(0).permutation(30)
    there = PrefixForest.from_rows(rows[moved], lens[moved], limits=lens[moved]).sharing()
    back = {(start, stop, frozenset(moved[list(who)].tolist())) for start, stop, who in there}
    assert back == batch.forest().sharing()
    PrefixForest.from_rows(rows, lens, limits=lens // 2)
    assert np.array_equal(rows, batch.rows)
    assert np.array_equal(lens, batch.seq_lens)


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        *[("page_size", n, f"page_size={n}; legal: an int") for n in (0, -1, 2.5, True, 10**30)],
        ("seq_lens", [3, -2], r"seq_lens\[1\]=-2; legal: 0 to 2147483647"),
        ("seq_lens", [3.0, 2.0], "seq_lens is a list; legal: a sequence of integers"),
        ("seq_lens", [3, 4], r"rows has shape \(2, 3\); legal for these seq_lens: \[2, at least 4"),
        ("limits", [-1, 3], r"limits\[0\]=-1; legal: 0 to"),
        ("limits", [1.5, 3], "limits is a list; legal: a sequence of integers"),
        ("rows", [[1, 2, 3], [1, 2]], "rows is a list; legal: a two-dimensional array"),
        ("rows", np.zeros((2, 3)), "rows is a ndarray; legal: a two-dimensional array of integers"),
        ("rows", [[1, 2, -3], [1, 2, 9]], "rows holds -3 at position 2 of request 0; legal: 0 to"),
        ("rows", [[1, 2, 3], [2**31, 2, 9]], "rows holds 2147483648 at position 0 of request 1"),
        ("prefix_closed", 1, "prefix_closed=1; legal: True or False"),
    ],
)
def test_rows_and_lengths_that_are_none(argument: str, value: object, says: str) -> None:
    right = {"rows": np.arange(6).reshape(2, 3), "seq_lens": [3, 3], argument: value}
    with pytest.raises(ValueError, match=says):
        PrefixForest.from_rows(**right)  # type: ignore[arg-type]


def test_what_stands_behind_a_row_is_nobodys() -> None:
    rows = np.asarray([[4, 5, -1, 2**40], [4, 5, 6, -(2**40)]])
    assert_shares(PrefixForest.from_rows(rows, [2, 3]), (0, 2, {0, 1}))


def test_inputs_that_do_not_belong_together_are_refused() -> None:
    table = np.zeros((2, 3), dtype=np.int32)
    for rows, lens in ((table, [4, 2]), (table, [3]), (table[0], [3])):
        with pytest.raises(ValueError, match=r"rows has shape .*; legal for these"):
            PrefixForest.from_rows(rows, lens)
    with pytest.raises(ValueError, match="limits has 1 entries; legal: 2"):
        PrefixForest.from_rows(table, [3, 3], limits=[3])
    with pytest.raises(ValueError, match="order does not name row 1 once; legal: every row once"):
        PrefixForest.from_neighbours([0, 0], [1], [4, 4])
    with pytest.raises(ValueError, match=r"common\[0\]=5; legal: 0 to 4 by seq_lens"):
        PrefixForest.from_neighbours([1, 0], [5], [4, 9])
    with pytest.raises(ValueError, match=r"paths\[1\].ends goes back; legal: ascending"):
        PrefixForest.from_paths([RadixPath((), ()), RadixPath((1, 2), (4, 3))], [4] * 2, [4] * 2)
    whole = PrefixForest.from_neighbours([0, 1, 2], [4, 2], [5, 5, 5])
    for field, change in (("order", [0, 1, 3]), ("node_parent", [-1, 1]), ("shared_lens", [4] * 3)):
        with pytest.raises(ValueError, match=f"{field} of the forest does not fit .*; legal: a fo"):
            replace(whole, **{field: np.asarray(change)})
    with pytest.raises(ValueError, match="paths and limits have"):
        PrefixForest.from_paths([RadixPath((1,), (4,))], [4, 4], [4, 4])
