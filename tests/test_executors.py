"""Every executor against the float64 oracle: each element of output and lse, in every way to run.

The kernels run in Triton's interpreter. What only the wrapper asks of executors, growth by
different amounts and lengths for one call, is here for triton and in test_wrapper.py for torch.
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

from prefix_kernels.plan_buffers import PlanCapacity, serialize_plan
from prefix_kernels.torch_executor import TorchExecutor
from prefix_kernels.triton_executor import TritonExecutor
from sglang_prefix import PrefixDecodeWrapper
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
    tolerances_of,
)
from tests.forests import Batch, Fork, batches, build_batch, comb_batch, random_batch

pytestmark = pytest.mark.usefixtures("nan_memory")

GROUPS = (1, 2, 3, 5, 7, 8, 16)
HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (64, 96))
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
PROFILES = (WHOLE, SPLITS)

every_way = pytest.mark.parametrize("way", WAYS)
# Where launches and merges make no difference, all but one of the four are extended.
few_ways = pytest.mark.parametrize(
    "way",
    ["torch", TRITON[0], *(pytest.param(way, marks=pytest.mark.extended) for way in TRITON[1:])],
)


def dtypes_of(way: str) -> list[torch.dtype]:
    """The interpreter computes bfloat16 products wrongly."""
    return [torch.float32, torch.float16] + [torch.bfloat16] * (way == "torch")


@every_way
@given(data=st.data(), batch=batches(max_requests=8, max_tokens=80), seed=st.integers(0, 1 << 16))
def test_generated_batches(way: str, data: st.DataObject, batch: Batch, seed: int) -> None:
    dims = data.draw(st.sampled_from(HEAD_DIMS)) if way == "torch" else (16, 16)  # interpreted
    case = make_case(
        batch,
        group=data.draw(st.sampled_from(GROUPS)),
        head_dim=dims[0],
        v_head_dim=dims[1],
        dtype=data.draw(st.sampled_from(dtypes_of(way))),
        seed=seed,
    )
    policy, profile = data.draw(st.sampled_from([*POLICIES])), data.draw(st.sampled_from(PROFILES))
    load(case, way, policy, profile).check()


@few_ways
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_head_dims(way: str, dims: tuple[int, int]) -> None:
    batch = random_batch(3, num_requests=7, max_tokens=80, page_size=16)
    for dtype in dtypes_of(way):
        case = make_case(batch, group=4, head_dim=dims[0], v_head_dim=dims[1], dtype=dtype)
        loaded = load(case, way, "node", SPLITS)
        assert loaded.plan.num_shared_packs
        loaded.check()


@few_ways
@pytest.mark.parametrize("group", [*GROUPS, 128])
def test_group_sizes(way: str, group: int) -> None:
    """Also one KV head for 128 query heads: several row blocks already for one request."""
    batch = random_batch(group, num_requests=6, max_tokens=60, page_size=4)
    for num_kv_heads in (1, 3) if group < 128 else (1,):
        case = make_case(batch, num_kv_heads=num_kv_heads, group=group, head_dim=32)
        load(case, way, "node", SPLITS).check()


@few_ways
@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
def test_fp8_caches_with_scales_per_layer_and_head(way: str, kv_dtype: torch.dtype) -> None:
    batch = random_batch(2, num_requests=5, max_tokens=60, page_size=16)
    for k_scale, v_scale in (
        (1.0, 1.0),
        (0.37, 2.5),
        (torch.tensor(0.37), torch.tensor(2.5)),
        (torch.tensor([0.4, 1.7]), torch.tensor([3.0, 0.2])),
        (0.6, torch.tensor([3.0, 0.2])),
    ):
        options = {"k_scale": k_scale, "v_scale": v_scale}
        for dtype in dtypes_of(way):
            case = make_case(batch, group=4, dtype=dtype, kv_dtype=kv_dtype, options=options)
            loaded = load(case, way, "pat", SPLITS)
            (out, lse), (expected, expected_lse) = loaded.run(), case.oracle()
            # The kernels' tolerances are for values of v of up to some 4.
            scale = 1 if way == "torch" else 3
            found, wanted = (out / scale, lse), (expected / scale, expected_lse)
            assert_close(found, wanted, tolerances_of(loaded.executor))


@few_ways
@pytest.mark.parametrize("logit_cap", [0.5, 30.0])
def test_logit_cap(way: str, logit_cap: float) -> None:
    batch = random_batch(4, num_requests=8, max_tokens=90)
    options = {"logit_cap": logit_cap, "k_scale": torch.tensor([0.5, 2.0]), "v_scale": 1.5}
    load(make_case(batch, group=3, options=options), way, "pat", SPLITS).check()


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
        for _ in range(data.draw(st.integers(1, 2)) if way != "torch" else 1):
            loaded.executor.append(lens.to(dtype), slots.to(dtype))
        loaded.check()


@given(batch=batches(max_requests=4, max_tokens=40, growth=8), data=st.data())
def test_the_wrapper_lets_tails_grow_by_any_amounts(batch: Batch, data: st.DataObject) -> None:
    """For one call from the table, or for good without it, also from an empty tail."""
    case = make_case(batch, num_kv_heads=1, head_dim=16)
    policy = data.draw(st.sampled_from([*POLICIES]))
    wrapper = PrefixDecodeWrapper(2, 1, 16, dtype=torch.float32, executor="triton", policy=policy)
    wrapper.plan(case.req_to_token, case.req_pool_indices, case.seq_lens)

    def check(lens: torch.Tensor, **options: Any) -> None:
        out, lse = case.poisoned_outputs()
        wrapper.run(case.q, case.k_cache, case.v_cache, out=out, lse=lse, **options)
        assert_close((out, lse), case.oracle(lens))

    size = len(batch.seq_lens)
    for _ in range(2):
        in_use = case.seq_lens
        steps = st.lists(st.integers(0, 4), min_size=size, max_size=size)
        lens, slots = case.grow(data.draw(st.one_of(st.just([1] * size), steps)))
        check(lens, seq_lens=lens)
        check(in_use)
        wrapper.advance(lens, slots)
        check(lens)


@every_way
def test_padding_rows_get_zeros(way: str) -> None:
    """A graph is captured for more rows than a batch has."""
    case = make_case(random_batch(14, num_requests=5, max_tokens=60), head_dim=16)
    expected = case.oracle()
    case.q = torch.cat((case.q, torch.full((3, *case.q.shape[1:]), torch.nan)))
    loaded = load(case, way, "node", SPLITS, padded_batch_size=8)
    assert loaded.executor.padded_batch_size == 8
    out, lse = loaded.run()
    assert_close((out[:5], lse[:5]), expected)
    assert (out[5:] == 0).all()
    assert (lse[5:] == -torch.inf).all()


@every_way
def test_the_same_plan_and_inputs_give_the_same_bits(way: str) -> None:
    case = make_case(random_batch(11, num_requests=8, max_tokens=60), group=4, head_dim=32)
    for policy in ("pat", "node"):
        loaded = load(case, way, policy, SPLITS)
        runs = [loaded.run(), loaded.run(), load(case, way, policy, SPLITS).run()]
        for again in runs[1:]:
            assert all(torch.equal(*pair) for pair in zip(runs[0], again, strict=True))


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
    with pytest.raises(ValueError, match=r"mode='both'; legal: 'streams', 'fused'"):
        TritonExecutor(case.shape, torch.device("cpu"), mode="both")
    with pytest.raises(ValueError, match=r"merge='never'; legal: 'launch', 'in_kernel'"):
        TritonExecutor(case.shape, torch.device("cpu"), merge="never")
    slot_offset = plan.slot_offset.copy()
    slot_offset[-1] = 1 << 31
    with pytest.raises(ValueError, match=r"2147483648 kv_slots.*legal: up to 2147483647"):
        serialize_plan(replace(plan, slot_offset=slot_offset), [], np.zeros(1, dtype=np.int32), 4)


def test_arrivals_are_counted_back_to_zero_and_survive_an_aborted_step() -> None:
    batch = random_batch(15, num_requests=9, max_tokens=90, growth=4)
    case = make_case(batch, group=3, head_dim=16)
    loaded = load(case, "triton-streams-in_kernel", "node", SPLITS)
    assert (np.diff(loaded.plan.request_indptr) > 1).any()
    assert isinstance(loaded.executor, TritonExecutor)
    arrivals = loaded.executor.buffers.arrivals
    loaded.check()
    assert not arrivals.any()
    arrivals.fill_(1)  # a step that was given up half-way
    loaded.executor.append(*case.grow())
    loaded.check()
