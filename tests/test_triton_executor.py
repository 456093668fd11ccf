"""The Triton executor in Triton's interpreter, every element against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_kernels.plan_buffers import PlanBuffers, PlanCapacity, serialize_plan
from prefix_kernels.tiles import TileShape
from prefix_kernels.triton_executor import LAUNCH_MODES, MERGE_MODES, TritonExecutor
from sglang_prefix import PrefixDecodeWrapper
from sglang_prefix.packing import POLICIES, DeviceProfile
from tests import plan_runs
from tests.attention import KERNEL_TOLERANCES, AttentionCase, assert_close, make_case
from tests.forests import Batch, Fork, batches, build_batch, comb_batch, random_batch
from tests.plan_runs import SPLITS, WHOLE, Runs, grow

pytestmark = pytest.mark.usefixtures("nan_memory")

GROUPS = (1, 2, 3, 5, 7, 8, 16)
HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (64, 96))
DTYPES = (torch.float32, torch.float16)
HOW = [(mode, merge) for mode in LAUNCH_MODES for merge in MERGE_MODES]


def executor_of(runs: Runs) -> TritonExecutor:
    executor = runs.runner._executor
    assert isinstance(executor, TritonExecutor)
    return executor


def build_executor(
    case: AttentionCase, how: tuple[str, str] = HOW[0], capacity: PlanCapacity | None = None
) -> TritonExecutor:
    shape = TileShape(
        case.q.shape[2], case.v_cache.shape[2], case.q.dtype.itemsize, case.k_cache.dtype.itemsize
    )
    return TritonExecutor(
        case.q.shape[1],
        case.k_cache.shape[1],
        shape,
        torch.device("cpu"),
        mode=how[0],
        merge=how[1],
        capacity=capacity,
    )


def load(
    batch: Batch,
    case: AttentionCase,
    policy: str = "node",
    profile: DeviceProfile = SPLITS,
    how: tuple[str, str] = HOW[0],
) -> Runs:
    """A plan in use, its partials full of NaN."""
    runs = plan_runs.load(batch, case, policy, profile, "triton")
    runs.runner._executor = build_executor(case, how)
    runs.runner.load(runs.plan, case.req_to_token, case.req_pool_indices)
    poison(executor_of(runs).buffers)
    return runs


def poison(buffers: PlanBuffers) -> None:
    buffers.partial_out.fill_(torch.nan)
    buffers.partial_lse.fill_(torch.nan)


def assert_right(runs: Runs) -> None:
    assert_close(runs(), runs.case.oracle(), KERNEL_TOLERANCES)


@pytest.mark.parametrize("how", HOW, ids="-".join)
@settings(max_examples=12)
@given(
    batch=batches(max_requests=8, max_tokens=100),
    policy=st.sampled_from(sorted(POLICIES)),
    profile=st.sampled_from([WHOLE, SPLITS]),
    group=st.sampled_from(GROUPS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 16),
)
def test_generated_batches(
    how: tuple[str, str],
    batch: Batch,
    policy: str,
    profile: DeviceProfile,
    group: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    case = make_case(batch, group=group, head_dim=16, dtype=dtype, seed=seed)
    assert_right(load(batch, case, policy, profile, how))


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_size(group: int) -> None:
    batch = random_batch(group, num_requests=9, max_tokens=90, page_size=4)
    for num_kv_heads in (1, 3):
        case = make_case(batch, num_kv_heads=num_kv_heads, group=group, head_dim=32)
        assert_right(load(batch, case))


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_shape(dims: tuple[int, int], dtype: torch.dtype) -> None:
    batch = random_batch(3, num_requests=7, max_tokens=80, page_size=16)
    case = make_case(batch, group=4, head_dim=dims[0], v_head_dim=dims[1], dtype=dtype)
    for how in (HOW[0], HOW[-1]):
        assert_right(load(batch, case, how=how))


def test_multi_query_attention_with_128_heads() -> None:
    """One KV head for 128 query heads: several row blocks already for one request."""
    batch = random_batch(4, num_requests=5, max_tokens=60)
    case = make_case(batch, num_kv_heads=1, group=128, head_dim=64, dtype=torch.float16)
    for how in (HOW[0], HOW[-1]):
        assert_right(load(batch, case, how=how))


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_caches_with_scales(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    batch = random_batch(2, num_requests=6, max_tokens=100, page_size=16)
    for k_scale, v_scale in (
        (0.37, 2.5),
        (torch.tensor(0.37), torch.tensor(2.5)),
        (torch.tensor([0.4, 1.7]), torch.tensor([3.0, 0.2])),
        (0.6, torch.tensor([3.0, 0.2])),
    ):
        options = {"k_scale": k_scale, "v_scale": v_scale}
        case = make_case(batch, group=4, dtype=dtype, kv_dtype=kv_dtype, options=options)
        runs = load(batch, case)
        found, expected = runs(), case.oracle()
        assert_close((found[0] / 3, found[1]), (expected[0] / 3, expected[1]), KERNEL_TOLERANCES)


@pytest.mark.parametrize("logit_cap", [0.5, 30.0])
def test_logit_cap(logit_cap: float) -> None:
    batch = random_batch(4, num_requests=8, max_tokens=90)
    options = {"logit_cap": logit_cap, "k_scale": torch.tensor([0.5, 2.0]), "v_scale": 1.5}
    assert_right(load(batch, make_case(batch, group=3, options=options)))


def test_scores_far_from_zero() -> None:
    batch = random_batch(6, num_requests=8, max_tokens=120)
    case = make_case(batch, head_dim=32)
    case.sm_scale *= 30
    out, lse = load(batch, case)()
    expected_out, expected_lse = case.oracle()
    # Float32 scores of about 100 are off by 1e-5, and exp passes that on as relative error.
    torch.testing.assert_close(out.double(), expected_out, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_strided_tensors() -> None:
    batch = random_batch(8, num_requests=7, max_tokens=100, page_size=4)
    case = make_case(batch, group=4)
    both = torch.stack((case.k_cache, case.v_cache), dim=2)
    case.k_cache, case.v_cache = both[:, :, 0], both[:, :, 1]
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    runs = load(batch, case)
    out = torch.full((8, 7, 64), torch.nan).transpose(0, 1)
    lse = torch.full((8, 7), torch.nan).t()
    runs.runner.run(case.q, case.k_cache, case.v_cache, out, lse, sm_scale=case.sm_scale)
    assert_close((out, lse), case.oracle())


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_slots_are_copied_and_the_table_may_change(index_dtype: torch.dtype) -> None:
    batch = random_batch(5, num_requests=6, max_tokens=1500)
    case = make_case(batch, num_kv_heads=1, head_dim=16)
    expected = case.oracle()
    case.req_to_token = case.req_to_token.to(index_dtype)
    case.req_pool_indices = case.req_pool_indices.to(index_dtype)
    runs = load(batch, case)
    case.req_to_token.fill_(1 << 20)
    assert_close(runs(), expected)


@pytest.mark.parametrize("how", HOW, ids="-".join)
@settings(max_examples=6)
@given(batch=batches(max_requests=6, max_tokens=60, growth=16), data=st.data())
def test_tails_grow_under_one_plan(how: tuple[str, str], batch: Batch, data: st.DataObject) -> None:
    case = make_case(batch, num_kv_heads=1, head_dim=16)
    runs = load(batch, case, data.draw(st.sampled_from(["pat", "node", "query"])), how=how)
    size = len(batch.seq_lens)
    for _ in range(2):
        steps = st.one_of(
            st.just([1] * size), st.lists(st.integers(0, 4), min_size=size, max_size=size)
        )
        lens, slots = grow(batch, case, np.asarray(data.draw(steps), dtype=np.int64))
        runs.runner.append(lens.numpy(), slots)
        poison(executor_of(runs).buffers)
        assert_right(runs)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_the_append_kernel_reads_lengths_on_the_device(index_dtype: torch.dtype) -> None:
    """As inside a graph: lengths and slots of padded rows, repeated without harm."""
    batch = random_batch(13, num_requests=9, max_tokens=70, growth=8)
    case = make_case(batch, num_kv_heads=1, head_dim=16)
    runs = load(batch, case)
    for _ in range(5):
        lens, slots = grow(batch, case, np.ones(9, dtype=np.int64))
        padded_lens = torch.cat((lens, torch.tensor([1, 700]))).to(index_dtype)
        padded_slots = torch.cat((slots, torch.tensor([0, 1 << 20]))).to(index_dtype)
        for _ in range(2):
            executor_of(runs).append(padded_lens, padded_slots)
        assert_right(runs)


@pytest.mark.parametrize("how", HOW, ids="-".join)
def test_rows_past_the_batch_get_zeros(how: tuple[str, str]) -> None:
    """A graph is captured for more rows than a batch has."""
    batch = random_batch(14, num_requests=5, max_tokens=60)
    case = make_case(batch, head_dim=16)
    runs = load(batch, case, how=how)
    executor = executor_of(runs)
    executor.load(runs.plan, case.req_to_token, case.req_pool_indices, num_rows=8)
    case.q = torch.cat((case.q, torch.full((3, *case.q.shape[1:]), torch.nan)))
    out, lse = runs()
    expected_out, expected_lse = case.oracle(case.seq_lens)
    assert_close((out[:5], lse[:5]), (expected_out[:5], expected_lse[:5]))
    assert (out[5:] == 0).all()
    assert (lse[5:] == -torch.inf).all()


def test_one_long_request_and_many_one_token_tails() -> None:
    forks = [Fork(0, 0, 700), *(Fork(0, 600, 1) for _ in range(70)), Fork(0, 700, 0)]
    batch = build_batch(forks)
    for how in HOW:
        assert_right(load(batch, make_case(batch, num_kv_heads=1, head_dim=16), "pat", how=how))


def test_a_thousand_requests() -> None:
    forks = [Fork(0, 0, 40), *(Fork(b % 7, 20 + b % 13, b % 5) for b in range(1023))]
    batch = build_batch(forks)
    case = make_case(batch, num_kv_heads=1, group=1, head_dim=16)
    assert_right(load(batch, case, "pat", WHOLE))


def test_a_chain_of_nodes() -> None:
    batch = comb_batch(30, step=3)
    assert_right(load(batch, make_case(batch, head_dim=16)))


def test_the_same_plan_and_inputs_give_the_same_bits() -> None:
    batch = random_batch(11, num_requests=12, max_tokens=120)
    case = make_case(batch, group=4, head_dim=32, dtype=torch.float16)
    for how in HOW:
        runs = load(batch, case, how=how)
        (out, lse), (again, lse_again) = runs(), runs()
        assert torch.equal(out, again)
        assert torch.equal(lse, lse_again)


def test_loading_a_smaller_plan_after_a_larger_one() -> None:
    large = random_batch(9, num_requests=12, max_tokens=150)
    small = random_batch(10, num_requests=3, max_tokens=40)
    runs = load(large, make_case(large, head_dim=16))
    for batch in (small, large):
        case = make_case(batch, head_dim=16)
        plan = load(batch, case).plan
        runs.runner.load(plan, case.req_to_token, case.req_pool_indices)
        poison(executor_of(runs).buffers)
        assert_right(Runs(case, plan, runs.runner))


def test_a_plan_over_the_capacity_is_refused() -> None:
    batch = random_batch(9, num_requests=12, max_tokens=150)
    case = make_case(batch, head_dim=16)
    plan = plan_runs.load(batch, case).plan
    small = PlanCapacity(64, 1 << 16, 1 << 16, plan.num_partials - 1)
    executor = build_executor(case, capacity=small)
    with pytest.raises(ValueError, match=r"partials=\d+.*legal: up to .*partials="):
        executor.load(plan, case.req_to_token, case.req_pool_indices)
    with pytest.raises(ValueError, match=r"mode='both'; legal: 'streams', 'fused'"):
        build_executor(case, ("both", "launch"))
    with pytest.raises(ValueError, match=r"merge='never'; legal: 'launch', 'in_kernel'"):
        build_executor(case, ("fused", "never"))


def test_arrivals_are_counted_back_to_zero_and_survive_an_aborted_step() -> None:
    batch = random_batch(15, num_requests=9, max_tokens=90, growth=4)
    case = make_case(batch, group=3, head_dim=16)
    runs = load(batch, case, how=("streams", "in_kernel"))
    assert (runs.plan.request_indptr[1:] - runs.plan.request_indptr[:-1] > 1).any()
    arrivals = executor_of(runs).buffers.arrivals
    assert_right(runs)
    assert not arrivals.any()
    arrivals.fill_(1)  # a step that was given up half-way
    lens, slots = grow(batch, case, np.ones(9, dtype=np.int64))
    executor_of(runs).append(lens, slots)
    poison(executor_of(runs).buffers)
    assert_right(runs)


def test_the_wrapper_plans_grows_and_runs_with_the_kernels() -> None:
    batch = random_batch(16, num_requests=7, max_tokens=80, growth=8)
    case = make_case(batch, group=2, head_dim=32, dtype=torch.float16)
    wrapper = PrefixDecodeWrapper(4, 2, 32, dtype=torch.float16, executor="triton")
    assert wrapper.executor == "triton"
    wrapper.plan(case.req_to_token, case.req_pool_indices, case.seq_lens)
    assert_close(wrapper_run(wrapper, case), case.oracle(), KERNEL_TOLERANCES)
    # For one call only, from the table: several tokens, none, one.
    before = case.seq_lens
    lens, slots = grow(batch, case, np.asarray([3, 0, 1, 2, 0, 1, 5]))
    assert_close(wrapper_run(wrapper, case, seq_lens=lens), case.oracle(), KERNEL_TOLERANCES)
    assert_close(wrapper_run(wrapper, case), case.oracle(before), KERNEL_TOLERANCES)
    # For good, without the table.
    case.req_to_token.fill_(1 << 20)
    wrapper.advance(lens, slots)
    expected = make_case(batch, group=2, head_dim=32, dtype=torch.float16)
    grow(batch, expected, np.asarray([3, 0, 1, 2, 0, 1, 5]))
    assert_close(wrapper_run(wrapper, case), expected.oracle(), KERNEL_TOLERANCES)


def wrapper_run(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, seq_lens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = case.poisoned_outputs()
    wrapper.run(case.q, case.k_cache, case.v_cache, out=out, lse=lse, seq_lens=seq_lens)
    return out, lse


def test_a_slot_outside_the_caches_is_refused_before_any_launch() -> None:
    batch = random_batch(17, num_requests=4, max_tokens=50)
    case = make_case(batch, head_dim=16)
    case.req_to_token[:, 3] = len(case.k_cache)
    runs = load(batch, case)
    with pytest.raises(ValueError, match=rf"reach {len(case.k_cache)}; legal: 0 to"):
        runs()


def test_indices_past_int32_are_refused() -> None:
    batch = random_batch(17, num_requests=4, max_tokens=50)
    plan = plan_runs.load(batch, make_case(batch, head_dim=16)).plan
    slot_offset = plan.slot_offset.copy()
    slot_offset[-1] = 1 << 31
    with pytest.raises(ValueError, match=r"2147483648 kv_slots.*legal: up to 2147483647"):
        serialize_plan(replace(plan, slot_offset=slot_offset), [], np.zeros(1, dtype=np.int32), 4)


# Controls: the comparison sees each of these.


@pytest.fixture(params=DTYPES, ids=str)
def broken(request: pytest.FixtureRequest) -> Iterator[Runs]:
    batch = random_batch(12, num_requests=9, max_tokens=100)
    runs = load(batch, make_case(batch, head_dim=32, dtype=request.param))
    assert_right(runs)
    yield runs
    with pytest.raises(AssertionError, match="not close"):
        assert_right(runs)


def test_control_newest_token_dropped(broken: Runs) -> None:
    tails = broken.plan.seq_lens - broken.plan.pack_start[broken.plan.num_shared_packs :]
    tails[int(tails.argmax())] -= 1
    executor_of(broken).set_lengths(tails)


def test_control_one_slot_replaced(broken: Runs) -> None:
    slots = executor_of(broken).kv_slots
    slots[3] = slots[4]


def test_control_one_work_item_lost(broken: Runs) -> None:
    executor = executor_of(broken)
    poison(executor.buffers)
    executor.buffers.plan[1] -= 1
