"""The wrapper's contract, line by line. Bad input: test_wrapper_errors.py."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefix import PrefixDecodeWrapper, PrefixForest
from sglang_prefix.packing import CPU_PROFILE, POLICIES
from sglang_prefix.packing.planner import RESERVED_TAIL_SLOTS, PackPlanner
from tests.attention import AttentionCase, assert_close, make_case
from tests.forests import Batch, Fork, batches, build_batch, comb_batch, random_batch

pytestmark = pytest.mark.usefixtures("nan_memory")

INDEX_DTYPES = (torch.int32, torch.int64)


def wrapper_for(case: AttentionCase, **options: object) -> PrefixDecodeWrapper:
    return PrefixDecodeWrapper(
        case.q.shape[1],
        case.k_cache.shape[1],
        case.q.shape[2],
        v_head_dim=case.v_cache.shape[2],
        q_dtype=case.q.dtype,
        kv_dtype=case.k_cache.dtype,
        **options,  # type: ignore[arg-type]
    )


def planned(case: AttentionCase, **options: object) -> PrefixDecodeWrapper:
    wrapper = wrapper_for(case, **options)
    wrapper.plan(*indices_of(case))
    return wrapper


def indices_of(case: AttentionCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return case.req_to_token, case.req_pool_indices, case.seq_lens


def run(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, seq_lens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run with outputs full of NaN that the wrapper must write."""
    out, lse = case.poisoned_outputs()
    result = wrapper.run(
        case.q, case.k_cache, case.v_cache, out=out, lse=lse, seq_lens=seq_lens, **case.options
    )
    assert result is out
    return out, lse


@pytest.fixture
def batch() -> Batch:
    forks = [Fork(0, 0, 900), Fork(0, 800, 40), Fork(0, 850, 3), Fork(0, 800, 0), Fork(1, 830, 60)]
    forks += [Fork(9, 0, 33), Fork(0, 900, 1), Fork(0, 0, 5), Fork(4, 860, 200), Fork(8, 1060, 20)]
    return build_batch(forks, order="mixed", growth=64)


@pytest.fixture
def case(batch: Batch) -> AttentionCase:
    return make_case(batch, group=4)


@pytest.fixture
def wrapper(case: AttentionCase) -> PrefixDecodeWrapper:
    """Planned for ``case``, with shared packs."""
    return planned(case)


def test_the_signature_is_the_contract() -> None:
    def signature(function: Callable[..., Any]) -> str:
        parameters = inspect.signature(function).parameters.values()
        plain = [p.replace(annotation=p.empty) for p in parameters if p.name != "self"]
        return str(inspect.Signature(plain))

    assert signature(PrefixDecodeWrapper) == (
        "(num_qo_heads, num_kv_heads, head_dim, *, v_head_dim=None, v_in_k=False, page_size=1, "
        "sm_scale=None, logit_cap=0.0, policy='pat', q_dtype=torch.bfloat16, kv_dtype=None, "
        "dtype=None, max_batch_size=None, max_kv_tokens=None, max_partials=None, device='cpu', "
        "executor='auto')"
    )
    plan = "(req_to_token, req_pool_indices, seq_lens, *, forest=None, query_lens=None)"
    assert signature(PrefixDecodeWrapper.plan) == plan
    assert signature(PrefixDecodeWrapper.run) == (
        "(q, k_cache, v_cache, *, out=None, lse=None, return_lse=False, seq_lens=None, "
        "sm_scale=None, logit_cap=None, k_scale=None, v_scale=None, sinks=None, window_left=-1)"
    )
    assert signature(PrefixDecodeWrapper.advance) == "(seq_lens, new_slots, *, rewrite=False)"


def test_the_wrapper_imports_no_sglang() -> None:
    code = (
        "import sys, sglang_prefix, sglang_prefix.wrapper; sglang_prefix.PrefixDecodeWrapper;"
        "print([m for m in sys.modules if m.split('.')[0] in ('sglang', 'sgl_kernel', 'triton')])"
    )
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert probe.stdout.strip() == "[]"


@pytest.mark.parametrize("policy", POLICIES)
@given(
    batch=batches(max_tokens=600),
    dtypes=st.tuples(*[st.sampled_from(INDEX_DTYPES)] * 3),
    group=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 1 << 16),
    with_forest=st.booleans(),
)
def test_generated_batches(
    policy: str,
    batch: Batch,
    dtypes: tuple[torch.dtype, ...],
    group: int,
    seed: int,
    with_forest: bool,
) -> None:
    case = make_case(batch, group=group, v_head_dim=96, seed=seed)
    wrapper = wrapper_for(case, policy=policy, page_size=batch.page_size)
    indices = (t.to(d) for t, d in zip(indices_of(case), dtypes, strict=True))
    forest = batch.forest()
    wrapper.plan(*indices, forest=forest if with_forest else None)
    assert_close(run(wrapper, case), case.oracle())
    planner = PackPlanner(case.shape, CPU_PROFILE, policy=policy)
    assert wrapper.current_plan.same_as(planner.plan(forest))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_chain_of_1500_prefixes(policy: str) -> None:
    """Within a bound on partial results, which is the caller's or that of 1 GiB."""
    batch = comb_batch(1500)
    case = make_case(batch, num_kv_heads=1, group=1, head_dim=16)
    wrapper = planned(case, policy=policy, max_partials=1 << 14)
    assert wrapper.current_plan.num_partials <= 1 << 14
    assert_close(run(wrapper, case), case.oracle())
    wide = PrefixDecodeWrapper(32, 8, 128, policy=policy)
    if policy != "node":
        wide.plan(*indices_of(case), forest=batch.forest())
        return
    one = case.req_pool_indices[:1], case.seq_lens[:1]
    wide.plan(case.req_to_token, *one)
    says = r"max_partials=None allows 65027 .* needs 1128751 .*; legal: max_partials=1128751 or"
    with pytest.raises(ValueError, match=f"{says} .*policy='pat' needs fewer"):
        wide.plan(*indices_of(case), forest=batch.forest())
    assert wide.current_plan.batch_size == 1


def test_what_run_returns(wrapper: PrefixDecodeWrapper, case: AttentionCase) -> None:
    expected_out, expected_lse = case.oracle()
    inputs = [t.clone() for t in (case.q, case.k_cache, case.v_cache, case.req_to_token)]
    out = wrapper.run(case.q, case.k_cache, case.v_cache)
    assert isinstance(out, torch.Tensor)
    both = wrapper.run(case.q, case.k_cache, case.v_cache, return_lse=True)
    assert isinstance(both, tuple)
    assert torch.equal(both[0], out)
    assert both[1].dtype == torch.float32
    assert_close((out, both[1]), (expected_out, expected_lse))
    given_out, given_lse = case.poisoned_outputs()
    result = wrapper.run(
        case.q, case.k_cache, case.v_cache, out=given_out, lse=given_lse, return_lse=True
    )
    assert result[0] is given_out
    assert result[1] is given_lse
    assert torch.equal(given_out, out)
    for before, after in zip(
        inputs, (case.q, case.k_cache, case.v_cache, case.req_to_token), strict=True
    ):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sinks(wrapper: PrefixDecodeWrapper, case: AttentionCase, dtype: torch.dtype) -> None:
    """A parameter of a model; what it leaves follows from the lse, which it does not change."""
    layer = case.q, case.k_cache, case.v_cache
    sinks = torch.nn.Parameter((4 + torch.randn(case.q.shape[1])).to(dtype))
    found = wrapper.run(*layer, sinks=sinks, return_lse=True)
    assert isinstance(found, tuple)
    assert_close(found, replace(case, options={"sinks": sinks.detach()}).oracle())
    out, lse = wrapper.run(*layer, return_lse=True)
    assert torch.equal(lse, found[1])
    torch.testing.assert_close(found[0], out * torch.sigmoid(lse - sinks.detach())[..., None])


def test_dtype_sets_both() -> None:
    w = PrefixDecodeWrapper(4, 2, 8, dtype=torch.float16)
    assert (w.q_dtype, w.kv_dtype) == (torch.float16, torch.float16)
    w = PrefixDecodeWrapper(4, 2, 8, kv_dtype=torch.float8_e5m2)
    assert (w.q_dtype, w.kv_dtype) == (torch.bfloat16, torch.float8_e5m2)
    w = PrefixDecodeWrapper(4, 2, 8)
    assert (w.q_dtype, w.kv_dtype) == (torch.bfloat16, torch.bfloat16)


def test_the_same_row_twice(case: AttentionCase) -> None:
    case.req_pool_indices[3] = case.req_pool_indices[0]
    case.seq_lens[3] = case.seq_lens[0]
    assert_close(run(planned(case), case), case.oracle())


@pytest.mark.parametrize("executor", ["torch", "native", "triton"])
@given(data=st.data(), dtype=st.sampled_from(INDEX_DTYPES), policy=st.sampled_from([*POLICIES]))
def test_any_sequence_of_calls(
    executor: str, data: st.DataObject, dtype: torch.dtype, policy: str
) -> None:
    """Tails grow; lengths of one call see the table that plan was given; rows change hands."""
    most_tokens = 40 if executor == "triton" else 300  # interpreted
    batch = data.draw(batches(max_requests=6, max_tokens=most_tokens, growth=12))
    case = make_case(batch, head_dim=16)
    start, most = case.seq_lens, batch.growth_slots.shape[1]
    case.grow([most] * len(start))  # all slots to come are in the table that the oracle reads
    table, pool = case.req_to_token.clone(), case.req_pool_indices.to(dtype).clone()
    lens, rows_are_ours = start.to(dtype).clone(), True
    wrapper = wrapper_for(case, executor=executor, policy=policy)
    wrapper.plan(table, pool, lens)
    pool.zero_()  # the caller prepares its next batch
    steps = st.lists(st.integers(0, 3), min_size=len(start), max_size=len(start))
    for action in data.draw(st.lists(st.sampled_from(("advance", "call", "rows")), max_size=5)):
        by = torch.tensor(data.draw(steps))
        if action == "advance":
            by = torch.minimum(by, start + most - lens)
            owned = zip(case.req_pool_indices, lens.tolist(), by.tolist(), strict=True)
            slots = torch.cat([case.req_to_token[row, n : n + more] for row, n, more in owned])
            lens += by  # in place, as callers may
            wrapper.advance(lens, slots.to(dtype))
        elif action == "call":
            longest = start + most if rows_are_ours else lens
            called = torch.minimum(start + by * 4, longest)
            assert_close(run(wrapper, case, called.to(dtype)), case.oracle(called))
        else:
            rows_are_ours = not rows_are_ours
            table.copy_(case.req_to_token if rows_are_ours else torch.zeros_like(table))
        assert_close(run(wrapper, case), case.oracle(lens))  # those of a call do not stick
        assert wrapper.stats.kv_tokens_logical == int(lens.sum())


def test_slots_of_a_longer_call_do_not_stick(
    wrapper: PrefixDecodeWrapper, batch: Batch, case: AttentionCase
) -> None:
    longer, _ = case.grow()
    assert_close(run(wrapper, case, longer), case.oracle(longer))
    last = case.req_pool_indices[1], int(longer[1]) - 1
    case.req_to_token[last] = int(batch.growth_slots[1, 40])
    assert_close(run(wrapper, case, longer), case.oracle(longer))


def test_no_gradients_are_recorded(wrapper: PrefixDecodeWrapper, case: AttentionCase) -> None:
    tracked = case.q.clone().requires_grad_()
    for q in (tracked, case.q):
        out = wrapper.run(q, case.k_cache, case.v_cache)
        assert not out.requires_grad  # type: ignore[union-attr]


def test_plan_in_inference_mode_run_outside(case: AttentionCase) -> None:
    with torch.inference_mode():
        wrapper = planned(case)
    assert_close(run(wrapper, case), case.oracle())
    wrapper.advance(*case.grow())
    assert_close(run(wrapper, case), case.oracle())


def test_growth_goes_up_to_the_room(wrapper: PrefixDecodeWrapper, case: AttentionCase) -> None:
    full = case.seq_lens + RESERVED_TAIL_SLOTS
    slots = case.req_to_token[case.req_pool_indices[0], :1].long()
    wrapper.advance(full, slots.repeat(int((full - case.seq_lens).sum())))
    run(wrapper, case)
    with pytest.raises(ValueError, match=r"(?i)seq_lens\[0\]=.*plan again"):
        wrapper.advance(full + 1, slots.repeat(len(full)))


@pytest.mark.parametrize(
    "scale",
    [0.5, torch.tensor(0.5), torch.tensor([0.5, 2.0]), torch.tensor([0.5, 2.0]).bfloat16()],
    ids=["float", "[]", "[Hkv]", "[Hkv] bfloat16"],
)
def test_scales(wrapper: PrefixDecodeWrapper, case: AttentionCase, scale: torch.Tensor) -> None:
    case.options = {"k_scale": scale, "v_scale": 3.0}
    assert_close(run(wrapper, case), case.oracle())
    case.options = {"v_scale": scale}
    assert_close(run(wrapper, case), case.oracle())
    case.options = {}
    assert_close(run(wrapper, case), case.oracle())


def test_scale_and_cap_of_the_wrapper_and_of_a_call(batch: Batch, case: AttentionCase) -> None:
    wrapper = planned(case, sm_scale=0.3, logit_cap=2.0)
    case.sm_scale, case.options = 0.3, {"logit_cap": 2.0}
    expected = case.oracle()
    found = wrapper.run(case.q, case.k_cache, case.v_cache, return_lse=True)
    assert_close(found, expected)  # type: ignore[arg-type]
    case.sm_scale, case.options = 0.7, {"logit_cap": 0.0}
    found = wrapper.run(
        case.q, case.k_cache, case.v_cache, return_lse=True, sm_scale=0.7, logit_cap=0.0
    )
    assert_close(found, case.oracle())  # type: ignore[arg-type]
    found = wrapper.run(case.q, case.k_cache, case.v_cache, return_lse=True)
    assert_close(found, expected)  # type: ignore[arg-type]


def test_with_a_forest_nothing_is_read_back_from_the_device(batch: Batch) -> None:
    """On the meta device there is nothing to read: any `.item()`, `.cpu()`, `.numpy()` raises."""
    wrapper = PrefixDecodeWrapper(8, 2, 64, device="meta", page_size=batch.page_size)
    lens = torch.from_numpy(batch.seq_lens)
    table = torch.empty(batch.req_to_token.shape, dtype=torch.int32, device="meta")
    indices = torch.empty(len(lens), dtype=torch.int64, device="meta")
    wrapper.plan(table, indices, lens, forest=batch.forest())
    assert wrapper.stats.num_packs > len(lens)
    cache = torch.empty(batch.num_slots, 2, 64, dtype=torch.bfloat16, device="meta")
    q = torch.empty(len(lens), 8, 64, dtype=torch.bfloat16, device="meta")
    scale = torch.empty(2, device="meta")
    wrapper.run(q, cache, cache, k_scale=scale, v_scale=scale, seq_lens=lens + 2)
    wrapper.advance(lens + 1, torch.empty(len(lens), dtype=torch.int32, device="meta"))
    assert wrapper.run(q, cache, cache).shape == (len(lens), 8, 64)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="req_pool_indices is on meta, which holds no values"):
        wrapper.plan(table, indices, lens)  # the documented copy


def test_verify_passes_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PREFIX_VERIFY", "1")
    for seed, page_size in ((0, 1), (1, 16)):
        batch = random_batch(seed, num_requests=15, max_tokens=90, page_size=page_size)
        case = make_case(batch)
        wrapper = wrapper_for(case, page_size=page_size)
        for forest in (None, batch.forest()):
            wrapper.plan(*indices_of(case), forest=forest)
            assert_close(run(wrapper, case), case.oracle())


@pytest.mark.parametrize("at", [5, 7])
def test_verify_finds_a_forest_that_is_wrong(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Two requests share 6 tokens; the forest says 5, 7, or none."""
    case = make_case(build_batch([Fork(0, 0, 9), Fork(0, 6, 3), Fork(9, 0, 4)]))
    said = build_batch([Fork(0, 0, 9), Fork(0, at, 9 - at), Fork(9, 0, 4)]).forest()
    none = PrefixForest.from_neighbours(np.arange(3), np.zeros(2, dtype=np.int64), said.seq_lens)
    wrapper = planned(case)
    monkeypatch.setenv("SGLANG_PREFIX_VERIFY", "1")
    says = rf"VERIFY: the forest claims a node of positions 0 to {at} .* requests \[0, 1\]"
    with pytest.raises(RuntimeError, match=says):
        wrapper.plan(*indices_of(case), forest=said)
    with pytest.raises(
        RuntimeError, match=r"misses a node of positions 0 to 6 shared by requests \[0, 1\]"
    ):
        wrapper.plan(*indices_of(case), forest=none)
    assert_close(run(wrapper, case), case.oracle())  # the plan before is still in use
