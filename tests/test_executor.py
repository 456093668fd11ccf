"""The torch executor against the float64 oracle, every element of output and lse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_kernels import torch_executor
from sglang_prefix.packing import POLICIES, DeviceProfile
from tests.attention import AttentionCase, assert_close, make_case
from tests.forests import Batch, Fork, batches, build_batch, random_batch
from tests.plan_runs import PROFILES, SPLITS, WHOLE, Runs, check, grow, load

pytestmark = pytest.mark.usefixtures("nan_memory")

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (64, 96))


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60)
@given(
    batch=batches(max_tokens=120),
    group=st.sampled_from(GROUPS),
    dims=st.sampled_from(HEAD_DIMS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1 << 16),
)
def test_generated_batches(
    policy: str,
    profile: DeviceProfile,
    batch: Batch,
    group: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    case = make_case(
        batch, group=group, head_dim=dims[0], v_head_dim=dims[1], dtype=dtype, seed=seed
    )
    check(batch, case, policy, profile)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_every_head_shape(group: int, dims: tuple[int, int]) -> None:
    batch = random_batch(group, num_requests=9, max_tokens=90, page_size=4)
    for num_kv_heads in (1, 2):
        case = make_case(
            batch, num_kv_heads=num_kv_heads, group=group, head_dim=dims[0], v_head_dim=dims[1]
        )
        runs = check(batch, case, "node", SPLITS)
        assert runs.plan.num_shared_packs


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_fp8_caches_with_scales_per_layer_and_head(
    dtype: torch.dtype, kv_dtype: torch.dtype, profile: DeviceProfile
) -> None:
    batch = random_batch(2, num_requests=12, max_tokens=150, page_size=16)
    for k_scale, v_scale in (
        (1.0, 1.0),
        (0.37, 2.5),
        (torch.tensor(0.37), torch.tensor(2.5)),
        (torch.tensor([0.4, 1.7]), torch.tensor([3.0, 0.2])),
        (0.6, torch.tensor([3.0, 0.2])),
    ):
        options = {"k_scale": k_scale, "v_scale": v_scale}
        case = make_case(
            batch, group=4, head_dim=128, dtype=dtype, kv_dtype=kv_dtype, options=options
        )
        check(batch, case, "pat", profile)


@pytest.mark.parametrize("logit_cap", [0.5, 30.0])
@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_logit_cap(profile: DeviceProfile, logit_cap: float) -> None:
    batch = random_batch(4, num_requests=10, max_tokens=120)
    options = {"logit_cap": logit_cap, "k_scale": torch.tensor([0.5, 2.0]), "v_scale": 1.5}
    check(batch, make_case(batch, group=3, options=options), "pat", profile)


@pytest.mark.parametrize("scale", [30.0, 1e-3])
def test_scores_far_from_zero(scale: float) -> None:
    """Peaked and flat softmaxes: partials far apart in lse, and ones that weigh nothing."""
    batch = random_batch(6, num_requests=8, max_tokens=200)
    case = make_case(batch)
    case.sm_scale *= scale
    runs = load(batch, case, "node", SPLITS)
    out, lse = runs()
    expected_out, expected_lse = case.oracle()
    # Float32 scores of about 100 are off by 1e-5, and exp passes that on as relative error.
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


LONG = torch_executor.MIN_RUN_TOKENS


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
@pytest.mark.parametrize("order", ["contiguous", "scattered", "mixed"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_long_and_short_runs_of_slots(order: str, page_size: int, profile: DeviceProfile) -> None:
    forks = [Fork(0, 0, 3 * LONG + 5), Fork(0, 2 * LONG, LONG + 40), Fork(0, LONG + 7, 30)]
    batch = build_batch([*forks, Fork(9, 0, 1), Fork(0, 0, LONG)], page_size=page_size, order=order)
    for policy in ("node", "query"):
        check(batch, make_case(batch), policy, profile)


@pytest.mark.parametrize(
    "stretches",
    [
        [LONG],
        [LONG - 1],
        [LONG, 5, LONG + 1],
        [3, LONG, 1, 1, LONG, 2],
        [10] * 30,
        [LONG - 1, LONG, LONG - 1],
    ],
    ids=str,
)
def test_mixed_runs_of_slots(stretches: list[int]) -> None:
    """Stretches of consecutive slots in a random order, on both sides of the threshold."""
    total = sum(stretches)
    batch = build_batch([Fork(0, 0, total), Fork(0, total - 3, 20)])
    row = batch.rows[0, :total]
    pieces = np.split(row, np.cumsum(stretches)[:-1])
    row = np.concatenate([*pieces[1::2], *pieces[::2]])
    for b, pool_row in enumerate(batch.req_pool_indices.tolist()):
        batch.req_to_token[pool_row, : total - 3 * b] = row[: total - 3 * b]
    for policy in ("node", "query"):
        check(batch, make_case(batch), policy, WHOLE)
        check(batch, make_case(batch), policy, SPLITS)


def test_blocks_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs longer than one block of scores go through the running maximum."""
    monkeypatch.setattr(torch_executor, "SCORE_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(torch_executor, "MIN_BLOCK_TOKENS", 7)
    batch = random_batch(7, num_requests=12, max_tokens=200)
    for policy in POLICIES:
        check(batch, make_case(batch, group=3), policy, SPLITS)


def test_strided_tensors() -> None:
    """K and V interleaved in one allocation, q and the outputs as views."""
    batch = random_batch(8, num_requests=7, max_tokens=300, page_size=4)
    case = make_case(batch, group=4)
    both = torch.stack((case.k_cache, case.v_cache), dim=2)
    case.k_cache, case.v_cache = both[:, :, 0], both[:, :, 1]
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    runs = load(batch, case, "pat", SPLITS)
    out = torch.full((8, 7, 64), torch.nan).transpose(0, 1)
    lse = torch.full((8, 7), torch.nan).t()
    runs.runner.run(case.q, case.k_cache, case.v_cache, out, lse, sm_scale=case.sm_scale)
    assert_close((out, lse), case.oracle())


@pytest.mark.parametrize("policy", ["pat", "query"])
@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
@settings(max_examples=30)
@given(batch=batches(max_tokens=120, growth=16), data=st.data())
def test_tails_grow_under_one_plan(
    policy: str, profile: DeviceProfile, batch: Batch, data: st.DataObject
) -> None:
    """Step by step, by one token or by several or by none, also from an empty tail."""
    case = make_case(batch)
    runs = check(batch, case, policy, profile)
    size = len(batch.seq_lens)
    for _ in range(3):
        steps = st.one_of(
            st.just([1] * size), st.lists(st.integers(0, 4), min_size=size, max_size=size)
        )
        by = np.asarray(data.draw(steps), dtype=np.int64)
        lens, slots = grow(batch, case, by)
        runs.runner.append(lens.numpy(), slots)
        assert_close(runs(), case.oracle())


@pytest.mark.parametrize("planned", [1, LONG - 3, LONG, LONG + 9])
@pytest.mark.parametrize("order", ["contiguous", "scattered"])
def test_tails_grow_behind_runs(planned: int, order: str) -> None:
    batch = build_batch([Fork(0, 0, planned), Fork(0, planned, 0)], order=order, growth=16)
    for policy in POLICIES:
        for profile in PROFILES:
            case = make_case(batch)
            runs = check(batch, case, policy, profile)
            lens, slots = grow(batch, case, np.asarray([16, 9]))
            runs.runner.append(lens.numpy(), slots)
            assert_close(runs(), case.oracle())


def test_loading_a_smaller_plan_after_a_larger_one() -> None:
    """Buffers are kept; what an earlier plan left in them must not be read."""
    large = random_batch(9, num_requests=20, max_tokens=300)
    small = random_batch(10, num_requests=3, max_tokens=40)
    runs = check(large, make_case(large), "node", SPLITS)
    for batch in (small, large):
        case = make_case(batch)
        plan = load(batch, case, "node", SPLITS).plan
        runs.runner.load(plan, case.req_to_token, case.req_pool_indices)
        assert_close(Runs(case, plan, runs.runner)(), case.oracle())


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_plan_and_inputs_give_the_same_bits(policy: str, profile: DeviceProfile) -> None:
    batch = random_batch(11, num_requests=30, max_tokens=300)
    case = make_case(batch, group=4)
    runs = load(batch, case, policy, profile)
    (out, lse), (again, lse_again) = runs(), runs()
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    reloaded = load(batch, case, policy, profile)()
    assert torch.equal(out, reloaded[0])


# Controls: the comparison above sees each of these.


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def broken(request: pytest.FixtureRequest) -> tuple[Batch, AttentionCase]:
    batch = random_batch(12, num_requests=20, max_tokens=400, page_size=1)
    return batch, make_case(batch, dtype=request.param)


def must_fail(runs: Runs) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_close(runs(), runs.case.oracle())


def test_control_newest_token_dropped(broken: tuple[Batch, AttentionCase]) -> None:
    batch, case = broken
    runs = check(batch, case, "node", SPLITS)
    tails = runs.plan.seq_lens - runs.plan.pack_start[runs.plan.num_shared_packs :]
    longest = int(tails.argmax())
    tails[longest] -= 1
    runs.runner._executor.set_lengths(tails)
    must_fail(runs)


def test_control_one_slot_replaced(broken: tuple[Batch, AttentionCase]) -> None:
    batch, case = broken
    runs = check(batch, case, "node", SPLITS)
    longest = int(batch.seq_lens.argmax())
    slots = case.req_to_token[case.req_pool_indices[longest]]
    case.req_to_token[case.req_pool_indices[longest], 3] = int(slots[4])
    must_fail(runs)


def test_control_one_pack_skipped(
    broken: tuple[Batch, AttentionCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, case = broken
    runs = check(batch, case, "node", SPLITS)
    executor = runs.runner._executor
    assert isinstance(executor, torch_executor.TorchExecutor)
    attend, skipped = executor._attend, executor._packs[0]

    def leave_out(pack: torch_executor._Pack, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        values, logs = attend(pack, *args)
        if pack is skipped:
            logs.fill_(-torch.inf)
        return values, logs

    monkeypatch.setattr(executor, "_attend", leave_out)
    must_fail(runs)
