"""The pack plan: a partition of the work, and a verifier that sees when it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefix_kernels.plan import PackPlan, split_bounds, verify_plan, verify_slots
from prefix_kernels.torch_executor import MERGED_AT_ONCE, TorchExecutor, merge_blocks
from sglang_prefix.packing import (
    CPU_PROFILE,
    GPU_PROFILE,
    POLICIES,
    AttentionShape,
    CostModel,
    DeviceProfile,
)
from sglang_prefix.packing.layout import CostedPlan
from sglang_prefix.packing.planner import RESERVED_TAIL_SLOTS, PackPlanner
from tests.forests import Batch, Fork, batches, build_batch, comb_batch, random_batch
from tests.pack_reference import cost_models, splitting

SHAPE = AttentionShape(8, 2, 64, 64, 2, 2)
CPU = torch.device("cpu")
# Cuts even the short packs of generated batches.
MANY_SPLITS = splitting(DeviceProfile("many splits", 16, 0.4, 1_000, 8), num_workers=48)
# Three levels, uneven tails, one request that ends inside a node, one alone.
FORKS = [Fork(0, 0, 400), Fork(0, 300, 90), Fork(1, 360, 11), Fork(0, 200, 0), Fork(9, 0, 70)]
FORKS += [Fork(0, 300, 30), Fork(1, 360, 50)]


def plan_of(batch: Batch, profile: DeviceProfile = MANY_SPLITS, policy: str = "pat") -> CostedPlan:
    return PackPlanner(SHAPE, profile, policy=policy, reserved_tail_slots=3).plan(batch.forest())


@pytest.fixture
def batch() -> Batch:
    return build_batch(FORKS)


@pytest.fixture
def plan(batch: Batch) -> CostedPlan:
    plan = plan_of(batch, policy="node")
    assert plan.num_shared_packs >= 3
    assert (plan.num_splits[: plan.num_shared_packs] > 1).all()
    assert (plan.num_splits[plan.num_shared_packs :] > 1).any()
    return plan


@pytest.mark.parametrize("policy", POLICIES)
@given(batch=batches(max_tokens=300), costs=cost_models((CPU_PROFILE, GPU_PROFILE, MANY_SPLITS)))
def test_plans_of_generated_forests_are_partitions(
    policy: str, batch: Batch, costs: CostModel
) -> None:
    planner = PackPlanner(costs.shape, costs.device, policy=policy, reserved_tail_slots=3)
    plan = planner.plan(batch.forest())
    verify_plan(plan)
    verify_slots(plan, batch.rows)
    # The same, counted over again: the slots that each request's packs read are its row's.
    executor = TorchExecutor(SHAPE, torch.device("cpu"))
    table, pool_indices = map(torch.from_numpy, (batch.req_to_token, batch.req_pool_indices))
    executor.load(plan, table, pool_indices)
    kv_slots = executor.kv_slots.numpy()
    read: dict[int, list[tuple[int, int]]] = {b: [] for b in range(plan.batch_size)}
    for p in range(plan.num_packs):
        start, length = int(plan.pack_start[p]), int(plan.pack_end[p] - plan.pack_start[p])
        slots = kv_slots[plan.slot_offset[p] :][:length].tolist()
        for b in plan.pack_queries(p).tolist():
            read[b] += zip(range(start, start + length), slots, strict=True)
    for b, length in enumerate(batch.seq_lens.tolist()):
        assert sorted(read[b]) == list(enumerate(batch.rows[b, :length].tolist()))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_plan_of_a_long_chain_is_a_partition(policy: str) -> None:
    batch = comb_batch(255, step=40)
    plan = plan_of(batch, policy=policy)
    verify_plan(plan)
    verify_slots(plan, batch.rows)


def test_tails_come_last_in_batch_order_with_their_reserved_slots(plan: PackPlan) -> None:
    first = plan.num_shared_packs
    assert plan.queries[plan.query_indptr[first] :].tolist() == list(range(plan.batch_size))
    assert (plan.pack_end[first:] == plan.seq_lens).all()
    room = np.diff(plan.slot_offset) - (plan.pack_end - plan.pack_start)
    assert room[:first].tolist() == [0] * first
    assert room[first:].tolist() == [3] * plan.batch_size
    assert PackPlanner(SHAPE, CPU_PROFILE).reserved_tail_slots == RESERVED_TAIL_SLOTS


def moved(plan: PackPlan, field: str, index: int, by: int) -> PackPlan:
    """The plan with one entry of one array moved."""
    array = getattr(plan, field).copy()
    array[index] += by
    return replace(plan, **{field: array})


def renumbered(plan: PackPlan, numbers: Mapping[int, int]) -> PackPlan:
    """The plan with some partials numbered otherwise."""
    index = [numbers.get(number, number) for number in plan.partial_index.tolist()]
    return replace(plan, partial_index=np.asarray(index))


# The last pack is a tail; that of request 0 is as far from the end as the batch is large.
LAST, FIRST_TAIL = -1, -len(FORKS)
MUTATIONS = (
    ("pack_start", FIRST_TAIL, -1, r"request 0: position .* is not covered once"),
    ("pack_start", FIRST_TAIL, 1, "request 0: position .* is not covered once"),
    ("pack_start", 0, 1, "is not covered once"),
    ("pack_end", LAST, 1, "outruns its query"),
    ("queries", 1, -1, "repeats a query"),
    ("queries", LAST, 1, "a query is not in the batch"),
    ("slot_offset", 1, -1, "kv_slots does not belong to exactly one pack"),
    ("slot_offset", -2, -1, "kv_slots does not belong to exactly one pack"),
    ("slot_offset", LAST, -1, "leaves kv_slots"),
    ("partial_index", 0, 1 << 20, "is not read by request"),
    ("request_indptr", LAST, -1, "request_indptr does not span the partials"),
)


@pytest.mark.parametrize(("field", "index", "by", "says"), MUTATIONS)
def test_the_verifier_says_what_is_wrong(
    plan: PackPlan, field: str, index: int, by: int, says: str
) -> None:
    with pytest.raises(RuntimeError, match=says):
        verify_plan(moved(plan, field, index, by))


def test_the_verifier_sees_who_writes_and_who_reads_a_partial(plan: PackPlan) -> None:
    mine, other = plan.request_indptr[:2].tolist()
    with pytest.raises(RuntimeError, match="not written exactly once"):
        verify_plan(renumbered(plan, {mine + 1: mine}))
    with pytest.raises(RuntimeError, match="is not read by request"):
        verify_plan(renumbered(plan, {mine: other, other: mine}))


@pytest.mark.parametrize("field", [f.name for f in fields(PackPlan) if f.type == "IntArray"])
def test_the_verifier_finds_every_entry_that_is_off_by_one(plan: PackPlan, field: str) -> None:
    for index in range(len(getattr(plan, field))):
        for by in (-1, 1):
            with pytest.raises(RuntimeError, match="the pack plan is wrong"):
                verify_plan(moved(plan, field, index, by))


def test_verify_slots_finds_sharing_that_is_not_there(plan: PackPlan, batch: Batch) -> None:
    for pack in range(plan.num_shared_packs):
        for reader in plan.pack_queries(pack).tolist():
            for position in (int(plan.pack_start[pack]), int(plan.pack_end[pack]) - 1):
                rows = batch.rows.copy()
                rows[reader, position] = 0  # page 0 belongs to nobody
                with pytest.raises(RuntimeError, match=f"pack {pack} claims sharing that is not"):
                    verify_slots(plan, rows)


# Where PAT's partials collide: page 32, g 4, Hkv 8, 8 requests that share 4,096 tokens.
COLLISION_TAILS = (40, 2100, 75, 3300, 520, 1024, 33, 7000)


def published_numbering(plan: CostedPlan) -> Counter[tuple[int, int]]:
    """PAT's slot of each (pack split, query): how many partials the *first* query has by then."""
    counts = [0] * plan.batch_size
    writers: Counter[tuple[int, int]] = Counter()
    packs = [*range(plan.num_shared_packs, plan.num_packs), *range(plan.num_shared_packs)]
    for p in packs:
        queries = plan.pack_queries(p).tolist()
        for _ in range(int(plan.num_splits[p])):
            slot = counts[queries[0]]
            for b in queries:
                writers[b, slot] += 1
                counts[b] += 1
    return writers


def test_the_batch_on_which_pats_partial_slots_collide() -> None:
    forks = [Fork(0, 4096, tail) if b else Fork(0, 0, 4096 + tail)
             for b, tail in enumerate(COLLISION_TAILS)]  # fmt: skip
    batch = build_batch(forks, page_size=32)
    shape = AttentionShape(32, 8, 128, 128, 2, 2)
    plan = PackPlanner(shape, GPU_PROFILE).plan(batch.forest())
    assert plan.num_shared_packs == 1
    tail_splits = plan.num_splits[plan.num_shared_packs :]
    assert tail_splits.min() == 1 < tail_splits.max(), "cut for balance, not all alike"
    collisions = [key for key, count in published_numbering(plan).items() if count > 1]
    assert collisions, "the example no longer shows the defect"
    verify_plan(plan)
    verify_slots(plan, batch.rows)
    partials = np.diff(plan.request_indptr)
    assert (partials == plan.num_splits[0] + tail_splits).all()


@given(length=st.integers(0, 3000), num_splits=st.integers(1, 70))
def test_splits_cover_a_pack_in_order(length: int, num_splits: int) -> None:
    at, longest = 0, -(-length // num_splits)
    for split in range(num_splits):
        begin, end = split_bounds(length, num_splits, split)
        assert begin == at
        assert begin <= end <= begin + longest
        at = end
    assert at == length


def test_a_bound_on_partials_costs_splits_first_then_sharing(batch: Batch) -> None:
    forest = batch.forest()

    def bounded(max_partials: int | None) -> CostedPlan:
        planner = PackPlanner(SHAPE, MANY_SPLITS, policy="node", max_partials=max_partials)
        plan = planner.plan(forest)
        verify_plan(plan)
        assert max_partials is None or plan.num_partials <= max_partials
        return plan

    free = bounded(None)
    unsplit = len(free.queries)  # one partial per (pack, query)
    assert batch.seq_lens.shape[0] < unsplit < free.num_partials
    assert bounded(free.num_partials).same_as(free)
    for bound in (free.num_partials - 1, unsplit):
        plan = bounded(bound)
        assert (plan.num_splits == 1).all()
        assert plan.num_shared_packs == free.num_shared_packs
        assert plan.refused_partials == 0
    for bound in (unsplit - 1, plan.batch_size):
        plan = bounded(bound)
        assert plan.num_shared_packs == 0
        assert plan.refused_partials == unsplit
        assert plan.num_partials == plan.batch_size


@pytest.mark.parametrize("policy", POLICIES)
def test_a_chain_of_1500_prefixes_keeps_to_the_bound(policy: str) -> None:
    """Its nodes have a million readers, each with a partial result under ``node``."""
    forest, bound = comb_batch(1500).forest(), 1 << 14
    free = PackPlanner(SHAPE, CPU_PROFILE, policy=policy).plan(forest)
    plan = PackPlanner(SHAPE, CPU_PROFILE, policy=policy, max_partials=bound).plan(forest)
    readers = int((forest.node_end - forest.node_begin).sum())
    assert policy != "node" or free.num_partials == readers + 1501 > 1_000_000
    if free.num_partials <= bound:
        assert plan.same_as(free)
    else:
        assert plan.refused_partials == free.num_partials
        assert plan.num_shared_packs == 0
    assert plan.num_partials * SHAPE.partial_size <= bound * SHAPE.partial_size == 34_078_720
    merged = [block.last - block.first for block in merge_blocks(plan.request_indptr, CPU)]
    assert sum(merged) == plan.num_partials
    assert max(merged) <= MERGED_AT_ONCE


def test_a_bound_below_the_batch_size_is_refused(batch: Batch) -> None:
    size = len(batch.seq_lens)
    planner = PackPlanner(SHAPE, CPU_PROFILE, max_partials=size - 1)
    with pytest.raises(
        ValueError, match=f"max_partials={size - 1} is below the {size} queries .*; legal"
    ):
        planner.plan(batch.forest())


def test_statistics_of_a_batch_computed_by_hand() -> None:
    """Two requests of 6 and 7 tokens share 4; Hq 4, Hkv 2, d 8, two-byte q and KV."""
    batch = build_batch([Fork(0, 0, 6), Fork(0, 4, 3)])
    planner = PackPlanner(AttentionShape(4, 2, 8, 8, 2, 2), CPU_PROFILE, policy="node")
    stats = planner.plan(batch.forest()).stats()
    assert (stats.kv_tokens_read, stats.kv_tokens_logical, stats.kv_tokens_unique) == (9, 13, 9)
    assert stats.kv_read_ratio == stats.kv_unique_ratio == 9 / 13
    assert (stats.num_packs, stats.num_partials) == (3, 4)
    # Token: 2 heads x (8 + 8) x 2 bytes + 4 of slot index = 68. Query: q 4 x 8 x 2 = 64, partial
    # 4 heads x (8 + 1) x 4 bytes, written and read = 288. Output 2 x 4 x 8 x 2 = 128.
    assert stats.bytes_ratio == (9 * 68 + 4 * (64 + 288) + 128) / (13 * 68 + 2 * 64 + 128)
    grown = planner.plan(batch.forest()).stats(grown_tokens=5)
    assert (grown.kv_tokens_read, grown.kv_tokens_logical, grown.kv_tokens_unique) == (14, 18, 14)


def test_statistics_count_a_pack_once_per_row_block() -> None:
    """200 requests at a group size of 4 are 800 rows: seven blocks of 128."""
    batch = build_batch([Fork(0, 0, 5001)] + [Fork(0, 5000, 1)] * 199)
    shape = AttentionShape(8, 2, 64, 64, 2, 2)
    stats = PackPlanner(shape, GPU_PROFILE, policy="node").plan(batch.forest()).stats()
    assert stats.kv_tokens_read == 7 * 5000 + 200
    assert stats.kv_tokens_unique == 5000 + 200
    on_cpu = PackPlanner(shape, CPU_PROFILE, policy="node").plan(batch.forest()).stats()
    assert on_cpu.kv_tokens_read == on_cpu.kv_tokens_unique


@pytest.mark.parametrize("policy", POLICIES)
def test_statistics_of_query_and_node_bound_the_others(policy: str) -> None:
    forest = random_batch(1, num_requests=60, max_tokens=400).forest()
    stats = PackPlanner(SHAPE, CPU_PROFILE, policy=policy).plan(forest).stats()
    assert stats.kv_unique_ratio <= stats.kv_read_ratio <= 1.0
    if policy == "query":
        assert stats.kv_read_ratio == stats.bytes_ratio == 1.0
    if policy == "node":
        assert stats.kv_read_ratio == stats.kv_unique_ratio


def test_plans_compare_by_content(batch: Batch) -> None:
    plan = plan_of(batch)
    assert plan.same_as(plan_of(batch))
    assert not plan.same_as(plan_of(batch, policy="query"))
    assert not plan.same_as(replace(plan, reserved_tail_slots=plan.reserved_tail_slots + 1))
    assert not plan.same_as(moved(plan, "num_splits", 0, 1))
