"""The packing policies: right for any forest, and ``pat`` the cheapest under its own model."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sglang_prefix.bench.workloads.trees import TreeBatch, pat_tree
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import (
    CPU_PROFILE,
    CPU_PROFILES,
    GPU_PROFILE,
    POLICIES,
    AttentionShape,
    CostModel,
    DeviceProfile,
    Packs,
    pat,
    pat_jit,
    policy_named,
)
from sglang_prefix.packing.planner import PackPlanner
from sglang_prefix.packing.policies import CHUNK_TOKENS
from tests.forests import (
    PAT_TREES,
    Batch,
    Fork,
    batches,
    build_batch,
    comb_batch,
    common_lengths,
    random_batch,
)
from tests.pack_reference import (
    GROUPS,
    cheapest_fold,
    cost_models,
    pack_cost,
    pack_set,
    pat_published_rule,
    splitting,
    tail_requests,
)

# Neither an executor's nor a device's: rereads as dear as reads, small tiles, packs nearly free.
DEAR_REREADS = splitting(DeviceProfile("dear rereads", 64, 1.0, 1_000, 16), num_workers=32)
# Packs free, so that sharing pays almost anywhere.
FREE_PACKS = splitting(DeviceProfile("free packs", 128, 0.4, 0, 16), num_workers=8)
# Arithmetic as dear as reads, dearer for a request alone, as on CPUs; numbers of no machine.
DEAR_ROWS = replace(
    FREE_PACKS,
    name="dear rows",
    reread_cost=0.0,
    pack_bytes=50_000,
    query_cost=4.0,
    element_cost=1.5,
    lone_row_cost=2.0,
    pack_row_cost=0.25,
)
PROFILES = (*CPU_PROFILES.values(), GPU_PROFILE, DEAR_REREADS, FREE_PACKS, DEAR_ROWS)


def shape(group: int = 4, *, kv_itemsize: int = 2) -> AttentionShape:
    return AttentionShape(2 * group, 2, 64, 64, 2, kv_itemsize)


def cost_of_pat(forest: PrefixForest, costs: CostModel) -> float:
    return pack_cost(pat.pack_pat(forest, costs), forest.seq_lens, costs)


def assert_pat_is_no_dearer(forest: PrefixForest, costs: CostModel) -> None:
    """Than another policy, or PAT's rule as published and without its cap on the rows of a pack."""
    others = {name: POLICIES[name](forest, costs) for name in ("node", "query", "chunk")}
    for max_rows in (64, 1 << 20):
        others[f"{max_rows} rows"] = pat_published_rule(forest, costs, max_rows=max_rows)
    cost = cost_of_pat(forest, costs)
    for name, packs in others.items():
        other = pack_cost(packs, forest.seq_lens, costs)
        # Sums of the same terms in another order: only float rounding may differ.
        assert cost <= other * (1 + 1e-12) + 1e-6, f"pat costs {cost}, {name} {other}"


@given(batch=batches(), costs=cost_models(PROFILES))
def test_pat_is_no_dearer_than_others(batch: Batch, costs: CostModel) -> None:
    assert_pat_is_no_dearer(batch.forest(), costs)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_pat_is_no_dearer_on_large_batches(profile: DeviceProfile) -> None:
    for seed in range(6):
        forest = random_batch(seed, num_requests=90, max_tokens=700).forest()
        for group in GROUPS:
            assert_pat_is_no_dearer(forest, CostModel(shape(group), profile))


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
@pytest.mark.parametrize("num_nodes", [12, 40, 255])
def test_pat_is_no_dearer_on_combs(num_nodes: int, profile: DeviceProfile) -> None:
    """Where only some of the places at which folded KV may begin are tried."""
    for step in (1, 3, 10, 40):
        forest = comb_batch(num_nodes, step=step).forest()
        assert_pat_is_no_dearer(forest, CostModel(shape(), profile))


@given(
    batch=batches(max_requests=6, max_tokens=2500, page_sizes=(1, 16)), costs=cost_models(PROFILES)
)
def test_pat_is_the_cheapest_of_all_fold_choices(batch: Batch, costs: CostModel) -> None:
    forest = batch.forest()
    widest = max((len(tail_requests(forest, n)) for n in range(forest.num_nodes)), default=0)
    assume(forest.num_nodes and widest <= 6)
    assert cost_of_pat(forest, costs) == pytest.approx(cheapest_fold(forest, costs), rel=1e-12)


@given(batch=batches(), costs=cost_models(PROFILES), seed=st.integers(0, 99))
@pytest.mark.parametrize("policy", POLICIES)
def test_packs_do_not_depend_on_the_order_of_the_batch(
    policy: str, batch: Batch, costs: CostModel, seed: int
) -> None:
    moved = np.random.default_rng(seed).permutation(len(batch.seq_lens))
    there = PrefixForest.from_rows(
        batch.rows[moved], batch.seq_lens[moved], page_size=batch.page_size
    )
    here = POLICIES[policy](batch.forest(), costs)
    packs = POLICIES[policy](there, costs)
    back = {
        (start, end, frozenset(moved[list(who)].tolist())) for start, end, who in pack_set(packs)
    }
    assert back == pack_set(here)
    assert (packs.tail_start == here.tail_start[moved]).all()


@given(batch=batches(), costs=cost_models(PROFILES))
@pytest.mark.parametrize("policy", POLICIES)
def test_planning_is_a_pure_function(policy: str, batch: Batch, costs: CostModel) -> None:
    forest = batch.forest()
    before = replace(forest, **{f.name: getattr(forest, f.name).copy() for f in fields(forest)})
    planner = PackPlanner(costs.shape, costs.device, policy=policy)
    assert planner.plan(forest).same_as(planner.plan(forest))
    for f in fields(forest):
        assert np.array_equal(getattr(forest, f.name), getattr(before, f.name)), f.name


@given(batch=batches(max_tokens=400), costs=cost_models(PROFILES))
def test_chunk_is_chunk_attention(batch: Batch, costs: CostModel) -> None:
    """Per chunk and request: one pack of all whose slots are the same up to the chunk's end."""
    common = common_lengths(batch.rows, batch.seq_lens, batch.page_size)
    expected, tail_start = set(), []
    for b, lengths in enumerate(common):
        last = max(lengths) // CHUNK_TOKENS
        tail_start.append(last * CHUNK_TOKENS)
        for end in range(CHUNK_TOKENS, tail_start[b] + 1, CHUNK_TOKENS):
            readers = frozenset(c for c, n in enumerate(lengths) if n >= end or c == b)
            expected.add((end - CHUNK_TOKENS, end, readers))
    packs = POLICIES["chunk"](batch.forest(), costs)
    assert pack_set(packs) == expected
    assert packs.tail_start.tolist() == tail_start


@given(batch=batches(), costs=cost_models(PROFILES))
def test_node_and_query_are_the_two_extremes(batch: Batch, costs: CostModel) -> None:
    forest = batch.forest()
    by_node, by_query = POLICIES["node"](forest, costs), POLICIES["query"](forest, costs)
    assert pack_set(by_node) == forest.sharing()
    assert (by_node.tail_start == forest.shared_lens).all()
    assert pack_set(by_query) == set()
    assert not by_query.tail_start.any()


def test_packs_hold_more_than_64_rows() -> None:
    """PAT caps a pack at 64 rows, 8 requests at a group size of 8, and gives traffic away."""
    forest = TreeBatch.lay_out(pat_tree("1,256_256,32")).forest()
    for profile in (CPU_PROFILE, GPU_PROFILE):
        packs: Packs = pat.pack_pat(forest, CostModel(shape(8), profile))
        assert len(packs.start) == 1
        assert np.diff(packs.query_indptr).tolist() == [256]


@pytest.mark.parametrize(("tree", "ideal"), PAT_TREES.items())
def test_published_trees(tree: str, ideal: float) -> None:
    """``node`` reads every token once, and ``pat`` moves no more bytes for any model's heads."""
    forest = TreeBatch.lay_out(pat_tree(tree)).forest()
    stats = PackPlanner(shape(), CPU_PROFILE, policy="node").plan(forest).stats()
    assert stats.kv_read_ratio == stats.kv_unique_ratio
    assert 1 / stats.kv_read_ratio == pytest.approx(ideal, abs=0.005)
    for profile in (CPU_PROFILE, GPU_PROFILE):
        for heads in ((32, 32), (16, 8), (32, 8), (64, 8)):
            costs = CostModel(AttentionShape(*heads, 128, 128, 2, 2), profile)
            assert_pat_is_no_dearer(forest, costs)
            assert PackPlanner(costs.shape, profile).plan(forest).stats().kv_read_ratio <= 1.0


def lines_run_by_packing(batch: Batch, costs: CostModel) -> int:
    """Lines that packing runs: work, without a clock."""
    forest, lines = batch.forest(), 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace if "packing" in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        pat.pack_pat(forest, costs)
    finally:
        sys.settrace(before)
    return lines


@pytest.fixture
def by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Python run pat's loops, whose lines can be counted."""
    for name, value in list(vars(pat_jit).items()):
        if hasattr(value, "py_func"):
            monkeypatch.setattr(pat_jit, name, value.py_func)
            monkeypatch.setattr(pat, name, value.py_func, raising=False)


@pytest.mark.usefixtures("by_python")
@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_combs_are_packed_in_bounded_work(profile: DeviceProfile) -> None:
    """Each node of a chain could fold the KV of all above it; few of these are tried."""
    costs = CostModel(shape(), profile)
    for step in (1, 40):
        half, whole = (lines_run_by_packing(comb_batch(n, step=step), costs) for n in (128, 255))
        assert 255 < whole < 3 * half


def family(length: int, *children: int, own: int, below: int = 60) -> list[Fork]:
    """``length`` tokens that all share, ``below`` more for ``children[i]``, none for ``own``."""
    forks = [Fork(0, 0, length + 9)]
    for readers in children:
        first = len(forks)
        forks += [Fork(0, length, below + 9)] + [Fork(first, length + below, 9)] * (readers - 1)
    return forks + [Fork(0, length, 9)] * (own - 1)


@pytest.mark.parametrize(
    "profile",
    [*PROFILES, replace(FREE_PACKS, name="free rereads", reread_cost=0.0)],
    ids=lambda p: p.name,
)
def test_pat_is_the_cheapest_at_every_length(profile: DeviceProfile) -> None:
    """Walk a shared segment through the lengths at which each choice starts to pay."""
    for group in (1, 4, 16):
        costs = CostModel(shape(group), profile)
        for children, own in (((), 2), ((), 5), ((2,), 1), ((3,), 2), ((4, 2), 1), ((4, 5), 1)):
            longest = 2 * (10 * costs.query_bytes + costs.pack_bytes) / costs.pack_token_bytes
            for length in sorted({int(longest ** (i / 40)) for i in range(41)}):
                forest = build_batch(family(length, *children, own=own)).forest()
                best = pytest.approx(cheapest_fold(forest, costs), rel=1e-12)
                assert cost_of_pat(forest, costs) == best, f"{children} and {own} at {length}"


@pytest.mark.parametrize("profile", [GPU_PROFILE, DEAR_REREADS], ids=lambda p: p.name)
def test_pat_is_the_cheapest_at_the_longest_segment_worth_folding(profile: DeviceProfile) -> None:
    """Below which one request goes on alone and two together: worth a pack and three partials."""
    for group in (4, 8, 16):
        costs = CostModel(shape(group), profile)
        gained = int(3 * costs.query_bytes + costs.pack_bytes)
        worth = gained // costs.shape.kv_token_bytes
        for length in range(worth - 3, worth + worth // 3 + 3, 4):
            forest = build_batch(family(length, 2, own=1, below=3000)).forest()
            best = pytest.approx(cheapest_fold(forest, costs), rel=1e-12)
            assert cost_of_pat(forest, costs) == best, f"at {length}"


def test_policies_are_named() -> None:
    assert set(POLICIES) == {"pat", "node", "chunk", "query"}
    assert policy_named("pat") is pat.pack_pat
    with pytest.raises(ValueError, match=r"policy='greedy'.*'pat', 'node', 'chunk', 'query'"):
        policy_named("greedy")
    with pytest.raises(ValueError, match="policy='PAT'"):
        PackPlanner(shape(), CPU_PROFILE, policy="PAT")
