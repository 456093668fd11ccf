"""The packing policies: right for any forest, and ``pat`` the cheapest under its own model."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prefix_kernels.plan import verify_plan, verify_slots
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import (
    CPU_PROFILE,
    GPU_PROFILE,
    POLICIES,
    AttentionShape,
    CostModel,
    DeviceProfile,
    Packs,
    pat,
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
    pat_tree,
    random_batch,
)
from tests.pack_reference import (
    cheapest_fold,
    pack_cost,
    pack_set,
    pat_published_rule,
    tail_requests,
)

GROUPS = (1, 2, 3, 4, 5, 7, 8, 16)
# Neither an executor's nor a device's: rereads as dear as reads, small tiles, packs nearly free.
DEAR_REREADS = DeviceProfile("dear rereads", 64, 1.0, 1_000, 32, 16)
# Packs free, so that sharing pays almost anywhere.
FREE_PACKS = DeviceProfile("free packs", 128, 0.4, 0, 8, 16)
PROFILES = (CPU_PROFILE, GPU_PROFILE, DEAR_REREADS, FREE_PACKS)


def shape(group: int = 4, *, heads: int = 2, dim: int = 64, kv_itemsize: int = 2) -> AttentionShape:
    return AttentionShape(heads * group, heads, dim, dim, 2, kv_itemsize)


@st.composite
def cost_models(draw: st.DrawFn, profiles: tuple[DeviceProfile, ...] = PROFILES) -> CostModel:
    heads = draw(st.sampled_from([1, 2, 8]))
    dim, v_dim = draw(st.sampled_from([(64, 64), (128, 128), (192, 128), (256, 256)]))
    group, kv_itemsize = draw(st.sampled_from(GROUPS)), draw(st.sampled_from([1, 2, 4]))
    return CostModel(
        AttentionShape(heads * group, heads, dim, v_dim, max(2, kv_itemsize), kv_itemsize),
        draw(st.sampled_from(profiles)),
    )


def assert_no_dearer(cost: float, reference: float, what: str) -> None:
    # Sums of the same terms in another order: only float rounding may differ.
    assert cost <= reference * (1 + 1e-12) + 1e-6, f"pat costs {cost}, {what} {reference}"


@pytest.mark.parametrize("policy", POLICIES)
@given(batch=batches(), costs=cost_models())
def test_every_policy_partitions_every_forest(policy: str, batch: Batch, costs: CostModel) -> None:
    plan = PackPlanner(costs.shape, costs.device, policy=policy).plan(batch.forest())
    verify_plan(plan)
    verify_slots(plan, batch.rows)


@given(batch=batches(), costs=cost_models())
def test_pat_is_no_dearer_than_any_other_policy(batch: Batch, costs: CostModel) -> None:
    forest = batch.forest()
    cost = pack_cost(pat.pack_pat(forest, costs), forest.seq_lens, costs)
    for name in ("node", "query", "chunk"):
        other = pack_cost(POLICIES[name](forest, costs), forest.seq_lens, costs)
        assert_no_dearer(cost, other, name)


@given(batch=batches(), costs=cost_models())
def test_pat_is_no_dearer_than_the_rule_that_pat_published(batch: Batch, costs: CostModel) -> None:
    forest = batch.forest()
    cost = pack_cost(pat.pack_pat(forest, costs), forest.seq_lens, costs)
    for max_rows in (64, 1 << 20):  # as published, and without its cap on the rows of a pack
        published = pat_published_rule(forest, costs, max_rows=max_rows)
        assert_no_dearer(cost, pack_cost(published, forest.seq_lens, costs), f"{max_rows} rows")


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
@pytest.mark.parametrize("seed", range(6))
def test_pat_is_no_dearer_on_large_batches(seed: int, profile: DeviceProfile) -> None:
    forest = random_batch(seed, num_requests=90, max_tokens=700).forest()
    for group in GROUPS:
        costs = CostModel(shape(group), profile)
        cost = pack_cost(pat.pack_pat(forest, costs), forest.seq_lens, costs)
        others = {name: POLICIES[name](forest, costs) for name in ("node", "query", "chunk")}
        others["published"] = pat_published_rule(forest, costs)
        for name, packs in others.items():
            assert_no_dearer(cost, pack_cost(packs, forest.seq_lens, costs), name)


@settings(max_examples=150)
@given(batch=batches(max_requests=6, max_tokens=2500, page_sizes=(1, 16)), costs=cost_models())
def test_pat_is_the_cheapest_of_all_fold_choices(batch: Batch, costs: CostModel) -> None:
    forest = batch.forest()
    widest = max((len(tail_requests(forest, n)) for n in range(forest.num_nodes)), default=0)
    assume(forest.num_nodes and widest <= 6)
    cost = pack_cost(pat.pack_pat(forest, costs), forest.seq_lens, costs)
    best = cheapest_fold(forest, costs)
    assert cost == pytest.approx(best, rel=1e-12)


@given(batch=batches(), costs=cost_models(), seed=st.integers(0, 99))
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


@given(batch=batches(), costs=cost_models())
@pytest.mark.parametrize("policy", POLICIES)
def test_planning_is_a_pure_function(policy: str, batch: Batch, costs: CostModel) -> None:
    forest = batch.forest()
    before = replace(forest, **{f.name: getattr(forest, f.name).copy() for f in fields(forest)})
    planner = PackPlanner(costs.shape, costs.device, policy=policy)
    assert planner.plan(forest).same_as(planner.plan(forest))
    for f in fields(forest):
        assert np.array_equal(getattr(forest, f.name), getattr(before, f.name)), f.name


@given(batch=batches(max_tokens=400), costs=cost_models())
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


@given(batch=batches(), costs=cost_models())
def test_node_and_query_are_the_two_extremes(batch: Batch, costs: CostModel) -> None:
    forest = batch.forest()
    by_node, by_query = POLICIES["node"](forest, costs), POLICIES["query"](forest, costs)
    assert pack_set(by_node) == forest.sharing()
    assert (by_node.tail_start == forest.shared_lens).all()
    assert pack_set(by_query) == set()
    assert not by_query.tail_start.any()


def test_packs_hold_more_than_64_rows() -> None:
    """PAT caps a pack at 64 rows, 8 requests at a group size of 8, and gives traffic away."""
    forest = pat_tree("1,256_256,32").forest()
    for profile in (CPU_PROFILE, GPU_PROFILE):
        packs: Packs = pat.pack_pat(forest, CostModel(shape(8), profile))
        assert len(packs.start) == 1
        assert np.diff(packs.query_indptr).tolist() == [256]


def test_a_short_shared_stretch_is_not_worth_a_pack() -> None:
    forest = build_batch([Fork(0, 0, 2000), Fork(0, 3, 2000)]).forest()
    assert not len(pat.pack_pat(forest, CostModel(shape(), CPU_PROFILE)).start)
    assert len(POLICIES["node"](forest, CostModel(shape(), CPU_PROFILE)).start) == 1


def test_folding_counts_bytes_not_tokens() -> None:
    """Two requests over one stretch, a pack for free: shared from the length that pays for it.

    Sharing saves one pass over the stretch and costs two queries and partials. PAT's rule has
    that at 4 tokens a query for every head shape and KV dtype.
    """
    for group in (2, 8):
        for kv_itemsize in (1, 2):
            costs = CostModel(
                shape(group, kv_itemsize=kv_itemsize),
                replace(FREE_PACKS, reread_cost=0.0),
            )
            s = costs.shape
            token = s.num_kv_heads * 2 * s.head_dim * kv_itemsize + 4
            query = s.num_qo_heads * (s.head_dim * 2 + (s.head_dim + 1) * 8)
            worth = 2 * query // token + 1
            for length, packs in ((worth - 1, 0), (worth + 1, 1)):
                forest = build_batch([Fork(0, 0, length + 9), Fork(0, length, 9)]).forest()
                assert len(pat.pack_pat(forest, costs).start) == packs, (group, kv_itemsize)


@pytest.mark.parametrize(("tree", "ideal"), PAT_TREES.items())
def test_node_reads_every_token_of_a_published_tree_once(tree: str, ideal: float) -> None:
    forest = pat_tree(tree).forest()
    plan = PackPlanner(shape(), CPU_PROFILE, policy="node").plan(forest)
    stats = plan.stats()
    assert stats.kv_read_ratio == stats.kv_unique_ratio
    assert 1 / stats.kv_read_ratio == pytest.approx(ideal, abs=0.005)


@pytest.mark.parametrize("profile", [CPU_PROFILE, GPU_PROFILE], ids=lambda p: p.name)
@pytest.mark.parametrize("tree", PAT_TREES)
def test_pat_on_published_trees(tree: str, profile: DeviceProfile) -> None:
    batch = pat_tree(tree)
    forest = batch.forest()
    for heads in ((32, 32), (16, 8), (32, 8), (64, 8)):
        costs = CostModel(AttentionShape(*heads, 128, 128, 2, 2), profile)
        plan = PackPlanner(costs.shape, profile).plan(forest)
        cost = pack_cost(pat.pack_pat(forest, costs), forest.seq_lens, costs)
        for other in (pat_published_rule(forest, costs), POLICIES["node"](forest, costs)):
            assert_no_dearer(cost, pack_cost(other, forest.seq_lens, costs), tree)
        assert plan.stats().kv_read_ratio <= 1.0


def lines_run_by_packing(num_nodes: int, step: int, costs: CostModel) -> int:
    """Lines of sglang_prefix/packing that planning a comb runs: work, without a clock."""
    forest = comb_batch(num_nodes, step=step).forest()
    lines = 0

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


@pytest.mark.parametrize("step", [1, 40])
@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_combs_are_planned_in_bounded_work(profile: DeviceProfile, step: int) -> None:
    """Each node of a chain could fold the KV of all above it; few of these are tried."""
    costs = CostModel(shape(), profile)
    half, whole = (lines_run_by_packing(n, step, costs) for n in (128, 255))
    assert 0 < whole < 3 * half
    batch = comb_batch(255, step=step)
    plan = PackPlanner(costs.shape, profile).plan(batch.forest())
    verify_plan(plan)
    verify_slots(plan, batch.rows)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
@pytest.mark.parametrize("num_nodes", [12, 40, 255])
def test_pat_is_no_dearer_on_combs(num_nodes: int, profile: DeviceProfile) -> None:
    """Where only some of the places at which folded KV may begin are tried."""
    costs = CostModel(shape(), profile)
    for step in (1, 3, 10, 40):
        forest = comb_batch(num_nodes, step=step).forest()
        cost = pack_cost(pat.pack_pat(forest, costs), forest.seq_lens, costs)
        others = {name: POLICIES[name](forest, costs) for name in ("node", "query", "chunk")}
        others["published"] = pat_published_rule(forest, costs, max_rows=1 << 20)
        for name, packs in others.items():
            assert_no_dearer(cost, pack_cost(packs, forest.seq_lens, costs), f"{name}, {step}")


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
    """Walk a shared stretch through the lengths at which each choice starts to pay."""
    for group in (1, 4, 16):
        costs = CostModel(shape(group), profile)
        for children, own in (((), 2), ((), 5), ((2,), 1), ((3,), 2), ((4, 2), 1), ((4, 5), 1)):
            longest = 2 * (10 * costs.query_bytes + profile.pack_bytes) / costs.shape.kv_token_bytes
            for length in sorted({int(longest ** (i / 40)) for i in range(41)}):
                forest = build_batch(family(length, *children, own=own)).forest()
                cost = pack_cost(pat.pack_pat(forest, costs), forest.seq_lens, costs)
                what = f"the best for {children} and {own} at {length}"
                assert_no_dearer(cost, cheapest_fold(forest, costs), what)


@pytest.mark.parametrize("profile", [GPU_PROFILE, DEAR_REREADS], ids=lambda p: p.name)
def test_pat_is_the_cheapest_at_the_longest_stretch_worth_folding(profile: DeviceProfile) -> None:
    """Below which one request goes on alone and two together: worth a pack and three partials."""
    for group in (4, 8, 16):
        costs = CostModel(shape(group), profile)
        worth = (3 * costs.query_bytes + profile.pack_bytes) // costs.shape.kv_token_bytes
        for length in range(worth - 3, worth + worth // 3 + 3, 4):
            forest = build_batch(family(length, 2, own=1, below=3000)).forest()
            cost = pack_cost(pat.pack_pat(forest, costs), forest.seq_lens, costs)
            assert_no_dearer(cost, cheapest_fold(forest, costs), f"the best at {length}")


def test_policies_are_named() -> None:
    assert set(POLICIES) == {"pat", "node", "chunk", "query"}
    assert policy_named("pat") is pat.pack_pat
    with pytest.raises(ValueError, match=r"policy='greedy'.*'pat', 'node', 'chunk', 'query'"):
        policy_named("greedy")
    with pytest.raises(ValueError, match="policy='PAT'"):
        PackPlanner(shape(), CPU_PROFILE, policy="PAT")
