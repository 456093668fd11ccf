"""Every executor against the float64 oracle: each element of output and lse, in every way to run.

The kernels run in Triton's interpreter. What only the wrapper asks of executors, growth by
different amounts and lengths for one call, is in test_wrapper.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder

from prefix_kernels.native_executor import NativeExecutor
from prefix_kernels.plan import PackPlan
from prefix_kernels.plan_buffers import PlanCapacity, serialize_plan
from prefix_kernels.torch_executor import TorchExecutor
from prefix_kernels.triton_executor import TritonExecutor
from prefix_kernels.work_list import ITEM_FIELDS, build_work_list
from sglang_prefix.packing import POLICIES
from tests.attention import (
    SPLITS,
    TRITON,
    WAYS,
    WHOLE,
    Loaded,
    assert_close,
    build_executor,
    load,
    make_case,
)
from tests.forests import Batch, Fork, batches, build_batch, comb_batch, random_batch
from tests.gpu.checks import Note, check
from tests.gpu.conftest import Setting
from tests.gpu.variants import Variant, variants

pytestmark = pytest.mark.usefixtures("nan_memory")

GROUPS = (1, 2, 3, 5, 7, 8, 16, 128)
HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (64, 96))
PROFILES = (WHOLE, SPLITS)

every_way = pytest.mark.parametrize("way", WAYS)
# Where launches and merges make no difference, all but one of the four are extended.
few_ways = pytest.mark.parametrize(
    "way",
    [
        "torch",
        "native",
        TRITON[0],
        *(pytest.param(way, marks=pytest.mark.extended) for way in TRITON[1:]),
    ],
)


def dtypes_of(way: str) -> list[torch.dtype]:
    """The interpreter computes bfloat16 products wrongly."""
    return [torch.float32, torch.float16] + [torch.bfloat16] * (way not in TRITON)


@pytest.mark.parametrize("variant", variants(dry=True), ids=lambda variant: variant.name)
def test_variants(variant: Variant, pytestconfig: pytest.Config, record_property: Note) -> None:
    """What `make gpu-check` checks: head dims, groups, dtypes, scales, caps, padding, same bits."""
    seed = int(pytestconfig.option.hypothesis_seed)
    setting = Setting(torch.device("cpu"), seed, dry=True, control=False)
    check(variant, setting, record_property, on_cpu=True)


@every_way
@given(data=st.data(), batch=batches(max_requests=8, max_tokens=80), seed=st.integers(0, 1 << 16))
def test_generated_batches(way: str, data: st.DataObject, batch: Batch, seed: int) -> None:
    dims = data.draw(st.sampled_from(HEAD_DIMS)) if way not in TRITON else (16, 16)  # interpreted
    case = make_case(
        batch,
        group=data.draw(st.sampled_from(GROUPS)),
        head_dim=dims[0],
        v_head_dim=dims[1],
        dtype=data.draw(st.sampled_from(dtypes_of(way))),
        kv_dtype=data.draw(st.sampled_from([None, torch.float8_e4m3fn, torch.float8_e5m2])),
        sinks=data.draw(st.sampled_from([None, torch.float32, torch.bfloat16])),
        seed=seed,
    )
    policy, profile = data.draw(st.sampled_from([*POLICIES])), data.draw(st.sampled_from(PROFILES))
    load(case, way, policy, profile).check()


@few_ways
def test_sinks_count_once_per_request(way: str) -> None:
    """Requests of one partial and of several, sinks of all dtypes; lse is that of the KV alone."""
    forks = [Fork(0, 0, 40), *(Fork(0, 30, 1 + b) for b in range(5)), Fork(9, 0, 3)]
    for sinks in (torch.float32, torch.bfloat16, torch.float16):
        case = make_case(build_batch(forks), group=3, head_dim=16, sinks=sinks)
        for policy in ("query", "node"):
            loaded = load(case, way, policy, WHOLE)
            loaded.check()
            several = np.diff(loaded.plan.request_indptr) > 1
            assert several.any() == (policy == "node")
            assert not several.all()
        without = load(replace(case, options={}), way, "node", WHOLE)
        assert torch.equal(without.run()[1], loaded.run()[1])
        with pytest.raises(AssertionError, match="not close"):  # a control
            assert_close(without.run(), case.oracle())


@few_ways
@pytest.mark.parametrize("scale", [30.0, 1e-3])
def test_scores_far_from_zero(way: str, scale: float) -> None:
    """Peaked and flat softmaxes: partials far apart in lse, and ones that weigh nothing."""
    case = make_case(random_batch(6, num_requests=8, max_tokens=120), head_dim=32)
    case.sm_scale *= scale
    (out, lse), (expected_out, expected_lse) = load(case, way, "node", SPLITS).run(), case.oracle()
    # Float32 scores of about 100 are off by 1e-5, and exp passes that on as relative error.
    torch.testing.assert_close(out.double(), expected_out, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@few_ways
def test_strided_tensors(way: str) -> None:
    """K and V interleaved in one allocation, q and the outputs as views."""
    case = make_case(random_batch(8, num_requests=7, max_tokens=100, page_size=4), group=4)
    both = torch.stack((case.k_cache, case.v_cache), dim=2)
    case.k_cache, case.v_cache = both[:, :, 0], both[:, :, 1]
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    out = torch.full((8, 7, 64), torch.nan).transpose(0, 1)
    lse = torch.full((8, 7), torch.nan).t()
    assert_close(load(case, way, "pat", SPLITS).run((out, lse)), case.oracle())


@few_ways
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_slots_are_copied_and_the_table_may_change(way: str, index_dtype: torch.dtype) -> None:
    case = make_case(random_batch(5, num_requests=6, max_tokens=1500), num_kv_heads=1, head_dim=16)
    expected = case.oracle()
    case.req_to_token = case.req_to_token.to(index_dtype)
    case.req_pool_indices = case.req_pool_indices.to(index_dtype)
    loaded = load(case, way)
    case.req_to_token.fill_(1 << 20)
    assert_close(loaded.run(), expected)


@few_ways
def test_shapes_of_forests(way: str) -> None:
    """A long prefix with one-token tails; a chain of nodes."""
    forks = [Fork(0, 0, 700), *(Fork(0, 600, 1) for _ in range(70)), Fork(0, 700, 0)]
    for batch, policy in ((build_batch(forks), "pat"), (comb_batch(30, step=3), "node")):
        load(make_case(batch, num_kv_heads=1, head_dim=16), way, policy, SPLITS).check()


@pytest.mark.extended
def test_a_thousand_requests() -> None:
    forks = [Fork(0, 0, 40), *(Fork(b % 7, 20 + b % 13, b % 5) for b in range(1023))]
    case = make_case(build_batch(forks), num_kv_heads=1, group=1, head_dim=16)
    load(case, "triton-streams-launch").check()


@every_way
@given(batch=batches(max_requests=5, max_tokens=40, growth=4), data=st.data())
def test_tails_grow_token_by_token(way: str, batch: Batch, data: st.DataObject) -> None:
    """Lengths and slots of padding rows may follow; a step of the kernels may be repeated."""
    case = make_case(batch, num_kv_heads=1, head_dim=16)
    policy, profile = data.draw(st.sampled_from([*POLICIES])), data.draw(st.sampled_from(PROFILES))
    loaded = load(case, way, policy, profile)
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    padding = torch.tensor([1, 700])[: data.draw(st.integers(0, 2))]
    for _ in range(2):
        lens, slots = case.grow()
        lens, slots = torch.cat((lens, padding)), torch.cat((slots, padding << 20))
        for _ in range(data.draw(st.integers(1, 2)) if way in TRITON else 1):
            loaded.executor.append(lens.to(dtype), slots.to(dtype))
        loaded.check()


@every_way
def test_a_smaller_plan_after_a_larger_one(way: str) -> None:
    """Buffers are kept; what an earlier plan left in them must not be read."""
    executor = None
    for seed, size, tokens in ((9, 12, 150), (10, 3, 40), (9, 12, 150)):
        case = make_case(random_batch(seed, num_requests=size, max_tokens=tokens), head_dim=16)
        loaded = load(case, way, "node", SPLITS, executor=executor)
        executor = loaded.executor
        loaded.check()


@few_ways
def test_a_slot_outside_the_caches_is_refused_before_any_layer(way: str) -> None:
    case = make_case(random_batch(17, num_requests=4, max_tokens=50, growth=1), head_dim=16)
    num_slots = len(case.k_cache)
    loaded = load(case, way)
    lens, slots = case.grow()
    loaded.executor.append(lens, slots)
    loaded.check()
    for bad, complaint in ((num_slots, num_slots), (-1, -1)):
        loaded = load(case, way)
        loaded.executor.append(lens, torch.full_like(slots, bad))
        with pytest.raises(ValueError, match=rf"reach {complaint}; legal: 0 to {num_slots - 1}"):
            loaded.run()
    case.req_to_token[:, 3] = num_slots
    with pytest.raises(ValueError, match=rf"reach {num_slots}; legal: 0 to"):
        load(case, way).run()


# Controls: the comparison sees each of these.


def newest_token_dropped(loaded: Loaded) -> None:
    tails = loaded.plan.seq_lens - loaded.plan.tail_start
    tails[int(tails.argmax())] -= 1
    loaded.executor.set_tail_lengths(tails)


def one_slot_replaced(loaded: Loaded) -> None:
    case = loaded.case
    row = case.req_to_token[case.req_pool_indices[int(case.seq_lens.argmax())]]
    row[3] = row[4].clone()


def one_piece_of_work_lost(loaded: Loaded) -> None:
    if isinstance(loaded.executor, TritonExecutor):
        loaded.executor.buffers.plan[1] -= 1
    elif isinstance(loaded.executor, NativeExecutor):
        loaded.executor._plan.num_packs -= 1
        loaded.executor.cut()
    else:
        assert isinstance(loaded.executor, TorchExecutor)
        loaded.executor._packs[0].blocks = [[] for _ in loaded.executor._packs[0].blocks]


@few_ways
@pytest.mark.parametrize(
    "change", [newest_token_dropped, one_slot_replaced, one_piece_of_work_lost]
)
def test_control_a_change_is_seen(way: str, change: Callable[[Loaded], None]) -> None:
    for dtype in dtypes_of(way):
        batch = random_batch(12, num_requests=9, max_tokens=100, page_size=1)
        loaded = load(make_case(batch, head_dim=32, dtype=dtype), way, "node", SPLITS)
        loaded.check()
        change(loaded)
        with pytest.raises(AssertionError, match="not close"):
            loaded.check()


# What the Triton executor alone has: fixed capacities, arrivals, 32-bit indices.


def test_options_that_are_refused() -> None:
    case = make_case(random_batch(9, num_requests=12, max_tokens=150), head_dim=16)
    plan = load(case).plan
    small = PlanCapacity(64, 1 << 16, 1 << 16, plan.num_partials - 1)
    executor = build_executor(case.shape, TRITON[0], capacity=small)
    with pytest.raises(ValueError, match=r"partials=\d+.*legal: up to .*partials="):
        executor.load(plan, case.req_to_token, case.req_pool_indices)
    with pytest.raises(ValueError, match=r"mode='both'; legal: 'auto', 'streams', 'fused'"):
        TritonExecutor(case.shape, torch.device("cpu"), mode="both")
    with pytest.raises(ValueError, match=r"merge='never'; legal: 'auto', 'launch', 'in_kernel'"):
        TritonExecutor(case.shape, torch.device("cpu"), merge="never")
    with pytest.raises(ValueError, match="graph_rows=48; legal: 16, 32, 64, 128"):
        TritonExecutor(case.shape, torch.device("cpu"), graph_rows=(16, 48))
    slot_offset = plan.slot_offset.copy()
    slot_offset[-1] = 1 << 31
    with pytest.raises(ValueError, match=r"2147483648 kv_slots.*legal: up to 2147483647"):
        serialize_plan(replace(plan, slot_offset=slot_offset), [], np.zeros(1, dtype=np.int32), 4)
    items = np.broadcast_to(np.int32(0), (1 << 28, ITEM_FIELDS))  # which is no memory
    with pytest.raises(ValueError, match=r"268435456 work items; legal: .* 2147483647 .*in all"):
        serialize_plan(plan, [items], np.zeros(1, dtype=np.int32), 4)
    with pytest.raises(ValueError, match=r"v_head_dim=4096 has no tile.*; legal: .*'torch'"):
        TritonExecutor(replace(case.shape, v_head_dim=4096), torch.device("cpu"))


@pytest.mark.parametrize("way", TRITON[:1])
def test_a_slot_of_more_than_32_bits_is_none(way: str) -> None:
    """It is refused as what it is not, never read as the slot that its low bits name."""
    case = make_case(random_batch(17, num_requests=4, max_tokens=50, growth=1), head_dim=16)
    case.req_to_token = case.req_to_token.long()
    case.req_to_token[:, 3] += 1 << 32
    with pytest.raises(ValueError, match="reach 2147483647; legal: 0 to"):
        load(case, way).run()
    case.req_to_token[:, 3] -= 1 << 33
    with pytest.raises(ValueError, match="reach -1; legal: 0 to"):
        load(case, way).run()


@pytest.mark.parametrize(
    ("mode", "group"),
    [
        *(("fused", 3), ("fused", 16)),
        *(pytest.param("fused", group, marks=pytest.mark.extended) for group in (1, 5, 8)),
        pytest.param("streams", 7, marks=pytest.mark.extended),
    ],
)
def test_arrivals_are_counted_back_to_zero_and_survive_an_aborted_step(
    mode: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once per query and row block: where 64 or 128 rows are no whole queries, one is in two."""
    forks = [Fork(0, 0, 12), *(Fork(0, 9, 1 + b % 3) for b in range(18)), *[Fork(1, 10, 2)] * 3]
    batch = build_batch(forks, growth=1)
    loaded = load(make_case(batch, group=group, head_dim=16), f"triton-{mode}-in_kernel", "node")
    assert isinstance(loaded.executor, TritonExecutor)
    arrivals = loaded.executor.buffers.arrivals[: loaded.plan.batch_size]
    counted: list[int] = []
    count = InterpreterBuilder.create_atomic_rmw

    def note(self: object, op: object, ptr: object, value: object, mask: Any, *how: object) -> Any:
        counted.append(int(mask.data.sum()))
        return count(self, op, ptr, value, mask, *how)

    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", note)
    loaded.check()
    assert not arrivals.any()
    expected, straddling = expected_arrivals(loaded.executor, loaded.plan, group)
    assert sum(counted) == expected * loaded.case.shape.num_kv_heads
    assert (straddling > 0) == (group in (3, 5, 7))
    arrivals.fill_(1)  # a step that was given up half-way
    loaded.executor.append(*loaded.case.grow())
    loaded.check()
    assert not arrivals.any()


def expected_arrivals(executor: TritonExecutor, plan: PackPlan, group: int) -> tuple[int, int]:
    """Pairs of a row block and a query in it that has partials, and those that are halves."""
    classes = [tile.block_m for one, _ in executor._launches for tile in one.tiles]
    items, _ = build_work_list(plan, group, classes)
    several = np.diff(plan.request_indptr) > 1
    whole = halves = 0
    for first_query, _, first_row, rows, *_, tile_class, _ in items.tolist():
        block = np.arange(first_row, min(first_row + classes[tile_class], rows))
        queries, sizes = np.unique(plan.queries[first_query + block // group], return_counts=True)
        whole += int(several[queries].sum())
        halves += int((several[queries] & (sizes < group)).sum())
    assert whole > 0
    return whole, halves


def test_modes_follow_the_batch_size() -> None:
    """One executor: a small batch merges in its only launch, a large one is launched by classes."""
    executor = None
    one, several = ("fused", "in_kernel"), ("streams", "launch")
    for size, modes in ((3, one), (17, several), (5, one)):
        batch = random_batch(size, num_requests=size, max_tokens=24)
        case = make_case(batch, num_kv_heads=1, head_dim=16)
        executor = executor or TritonExecutor(case.shape, torch.device("cpu"))
        loaded = load(case, TRITON[0], "node", SPLITS, executor=executor)
        assert executor.modes == modes
        loaded.check()
        assert not executor.buffers.arrivals.any()
