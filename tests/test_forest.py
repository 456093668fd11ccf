"""The prefix forest: exact against a pairwise walk over the rows, from rows and from paths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sglang_prefix.forest import PathTable, PrefixForest, RadixPath
from tests.forests import (
    Batch,
    Fork,
    batches,
    brute_force_sharing,
    build_batch,
    comb_batch,
    common_lengths,
    radix_paths,
    random_batch,
)

NOBODY_SHARES: set[tuple[int, int, frozenset[int]]] = set()


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
    forest: PrefixForest, rows: NDArray[np.integer], caps: NDArray[np.integer], page_size: int
) -> None:
    """The forest is the one that comparing every pair of rows gives."""
    common = common_lengths(rows, caps, page_size)
    assert forest.sharing() == brute_force_sharing(common)
    assert forest.shared_lens.tolist() == [max(lengths) for lengths in common]
    # Exactly: each (position, what is at it and before it) counts once.
    shared = sum((stop - start) * (len(who) - 1) for start, stop, who in forest.sharing())
    assert forest.unique_tokens == int(forest.seq_lens.sum()) - shared
    check_invariants(forest, page_size)


@given(batches())
def test_from_rows_is_exact(batch: Batch) -> None:
    check_exact(batch.forest(), batch.rows, batch.seq_lens, batch.page_size)


@given(batches())
def test_from_rows_by_binary_search_finds_the_same(batch: Batch) -> None:
    searched = PrefixForest.from_rows(
        batch.rows, batch.seq_lens, page_size=batch.page_size, prefix_closed=True
    )
    check_exact(searched, batch.rows, batch.seq_lens, batch.page_size)


@given(st.data())
def test_from_rows_is_exact_for_rows_that_are_not_prefix_closed(data: st.DataObject) -> None:
    """Equal slots at one position after unequal ones share nothing."""
    num_requests, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 12))
    dtype = data.draw(st.sampled_from([np.int32, np.int64]))
    values = st.integers(0, data.draw(st.integers(0, 3)))
    rows = data.draw(
        st.lists(st.lists(values, min_size=width, max_size=width), min_size=num_requests,
                 max_size=num_requests)
    )  # fmt: skip
    lens = data.draw(st.lists(st.integers(0, width), min_size=num_requests, max_size=num_requests))
    page_size = data.draw(st.sampled_from([1, 2, 4]))
    table = np.asarray(rows, dtype=dtype)
    forest = PrefixForest.from_rows(table, lens, page_size=page_size)
    check_exact(forest, table, np.asarray(lens), page_size)


@given(batches(), st.data())
def test_positions_past_a_limit_are_private(batch: Batch, data: st.DataObject) -> None:
    limits = np.asarray(
        [data.draw(st.integers(0, n + 2)) for n in batch.seq_lens.tolist()], dtype=np.int64
    )
    caps = np.minimum(limits, batch.seq_lens)
    for prefix_closed in (False, True):
        forest = PrefixForest.from_rows(
            batch.rows,
            batch.seq_lens,
            limits=limits,
            page_size=batch.page_size,
            prefix_closed=prefix_closed,
        )
        check_exact(forest, batch.rows, caps, batch.page_size)


@given(batches(), st.integers(0, 1 << 16), st.sampled_from([0.0, 0.3, 1.0]))
def test_from_paths_finds_what_the_rows_show(batch: Batch, seed: int, cut_share: float) -> None:
    forest = PrefixForest.from_paths(
        radix_paths(batch, seed, cut_share=cut_share),
        batch.seq_lens.tolist(),
        batch.seq_lens,
        page_size=batch.page_size,
    )
    assert forest.sharing() == batch.forest().sharing()
    check_exact(forest, batch.rows, batch.seq_lens, batch.page_size)


@given(batches(), st.integers(0, 1 << 16), st.data())
def test_from_paths_under_limits(batch: Batch, seed: int, data: st.DataObject) -> None:
    """Limit 0 (unsettled), inside a node, at the end, past it; and paths that end early."""
    paths, limits = [], []
    for path, length in zip(radix_paths(batch, seed), batch.seq_lens.tolist(), strict=True):
        known = data.draw(st.one_of(st.just(len(path.ends)), st.integers(0, len(path.ends))))
        paths.append(RadixPath(path.node_ids[:known], path.ends[:known]))
        somewhere = st.integers(0, length + 2 * batch.page_size)
        limits.append(data.draw(st.one_of(st.sampled_from([0, length]), somewhere)))
    forest = PrefixForest.from_paths(paths, limits, batch.seq_lens, page_size=batch.page_size)
    ends = [path.ends[-1] if path.ends else 0 for path in paths]
    caps = np.minimum(np.minimum(limits, ends), batch.seq_lens)
    check_exact(forest, batch.rows, caps, batch.page_size)
    from_rows = PrefixForest.from_rows(
        batch.rows, batch.seq_lens, limits=caps, page_size=batch.page_size
    )
    assert forest.sharing() == from_rows.sharing()


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("seed", range(4))
def test_large_uneven_batches(seed: int, page_size: int) -> None:
    batch = random_batch(seed, num_requests=70, max_tokens=300, page_size=page_size)
    forest = batch.forest()
    check_exact(forest, batch.rows, batch.seq_lens, page_size)
    assert forest.num_nodes > 5, "the generator shares too little to test anything"
    paths = radix_paths(batch, seed)
    limits = batch.seq_lens.tolist()
    by_path = PrefixForest.from_paths(paths, limits, batch.seq_lens, page_size=page_size)
    assert by_path.sharing() == forest.sharing()


def test_a_request_that_ends_inside_a_node_that_others_continue() -> None:
    batch = build_batch([Fork(0, 0, 10), Fork(0, 6, 0), Fork(0, 10, 2)])
    assert batch.forest().sharing() == {(0, 6, frozenset({0, 1, 2})), (6, 10, frozenset({0, 2}))}
    assert batch.forest().shared_lens.tolist() == [10, 6, 10]
    assert batch.forest().unique_tokens == 12


def test_identical_rows_share_everything() -> None:
    batch = build_batch([Fork(0, 0, 7), Fork(0, 7, 0), Fork(0, 7, 0)])
    assert batch.forest().sharing() == {(0, 7, frozenset({0, 1, 2}))}
    assert batch.forest().shared_lens.tolist() == [7, 7, 7]
    assert batch.forest().unique_tokens == 7


def test_the_last_partial_page_is_private() -> None:
    batch = build_batch([Fork(0, 0, 7), Fork(0, 7, 0, same_page=True)], page_size=4)
    assert (batch.rows[0, :7] == batch.rows[1, :7]).all()
    assert batch.forest().sharing() == {(0, 4, frozenset({0, 1}))}
    assert batch.forest().shared_lens.tolist() == [4, 4]


def test_a_request_alone_shares_nothing() -> None:
    batch = build_batch([Fork(0, 0, 5)])
    assert batch.forest().sharing() == NOBODY_SHARES
    assert batch.forest().shared_lens.tolist() == [0]
    check_invariants(batch.forest())


def test_an_empty_batch_has_an_empty_forest() -> None:
    for forest in (
        PrefixForest.from_rows(np.zeros((0, 4), dtype=np.int32), []),
        PrefixForest.from_paths([], [], []),
    ):
        assert (forest.batch_size, forest.num_nodes, forest.unique_tokens) == (0, 0, 0)


def test_many_roots() -> None:
    forks = [Fork(r * 3, 0, 8) if i == 0 else Fork(r * 3, 8, i) for r in range(5) for i in range(3)]
    forest = build_batch(forks, order="scattered").forest()
    roots = {(0, 8, frozenset({r * 3, r * 3 + 1, r * 3 + 2})) for r in range(5)}
    assert forest.sharing() == roots
    assert (forest.node_parent == -1).all()


def test_a_comb_has_a_node_for_every_request_that_leaves() -> None:
    forest = comb_batch(255).forest()
    assert forest.num_nodes == 255
    assert forest.node_parent.tolist() == list(range(-1, 254))
    assert (forest.node_stop - forest.node_start == 1).all()


def test_unsettled_requests_share_nothing() -> None:
    path = RadixPath((3, 9), (4, 8))
    forest = PrefixForest.from_paths([path] * 3, [0, 8, 8], [8, 9, 9])
    assert forest.sharing() == {(0, 8, frozenset({1, 2}))}
    assert PrefixForest.from_paths([path] * 2, [0, 0], [8, 8]).sharing() == NOBODY_SHARES


def test_chains_that_the_same_requests_pass_are_one_node() -> None:
    chain = RadixPath((5, 0, 7), (2, 3, 9))
    forest = PrefixForest.from_paths([chain, chain], [9, 9], [9, 9])
    assert forest.sharing() == {(0, 9, frozenset({0, 1}))}


def test_the_inputs_are_left_alone() -> None:
    batch = random_batch(3, num_requests=20, max_tokens=50)
    rows, lens = batch.rows, batch.seq_lens.copy()
    kept = rows.copy()
    PrefixForest.from_rows(rows, lens, limits=lens // 2)
    assert np.array_equal(rows, kept)
    assert np.array_equal(lens, batch.seq_lens)


def test_the_order_of_the_batch_does_not_matter() -> None:
    batch = random_batch(5, num_requests=30, max_tokens=80)
    moved = np.random.default_rng(0).permutation(30)
    there = PrefixForest.from_rows(batch.rows[moved], batch.seq_lens[moved]).sharing()
    back = {(start, stop, frozenset(int(moved[b]) for b in who)) for start, stop, who in there}
    assert back == batch.forest().sharing()


@pytest.mark.parametrize(
    ("rows", "seq_lens"),
    [
        (np.zeros((2, 3), dtype=np.int32), [4, 2]),  # shorter than a length
        (np.zeros((2, 3), dtype=np.int32), [3]),  # another number of rows
        (np.zeros(3, dtype=np.int32), [3]),  # not a table
    ],
)
def test_rows_of_another_shape_are_refused(rows: NDArray[np.integer], seq_lens: list[int]) -> None:
    with pytest.raises(ValueError, match=r"rows has shape .*; legal is \["):
        PrefixForest.from_rows(rows, seq_lens)


def test_one_path_per_request() -> None:
    with pytest.raises(ValueError, match="paths and limits have"):
        PrefixForest.from_paths([RadixPath((1,), (4,))], [4, 4], [4, 4])


def test_a_table_of_paths_serves_many_requests_and_those_without_a_path() -> None:
    table = PathTable.of([RadixPath((1, 2), (4, 9)), RadixPath((), ()), RadixPath((1,), (4,))])
    assert table.lengths.tolist() == [9, 0, 4]
    path_of = np.asarray([0, -1, 2, 0, 1])
    forest = PrefixForest.from_path_table(table, path_of, [9, 9, 4, 7, 9], [10] * 5)
    assert forest.sharing() == {(0, 4, frozenset({0, 2, 3})), (4, 7, frozenset({0, 3}))}
    check_invariants(forest)


def test_one_node_id_below_two_parents_is_two_nodes() -> None:
    paths = [RadixPath(ids, (4, 9)) for ids in ((1, 3), (2, 3), (1, 3))]
    forest = PrefixForest.from_paths(paths, [9] * 3, [9] * 3)
    assert forest.sharing() == {(0, 9, frozenset({0, 2}))}


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
