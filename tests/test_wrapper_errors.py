"""Bad input to the wrapper: one ValueError that names argument, value and what is legal.

After every refusal the wrapper still runs the plan that it had, at the lengths that it had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang_prefix import PrefixDecodeWrapper, PrefixForest
from sglang_prefix.packing.planner import RESERVED_TAIL_SLOTS
from tests.attention import AttentionCase, assert_close, make_case
from tests.forests import Fork, build_batch

pytestmark = pytest.mark.usefixtures("nan_memory")

B, HQ, HKV, D, DV = 4, 8, 2, 64, 96
BATCH = build_batch([Fork(0, 0, 900), Fork(0, 850, 9), Fork(0, 850, 0), Fork(9, 0, 7)], growth=8)
CONTEXT, NUM_ROWS = BATCH.req_to_token.shape[1], BATCH.req_to_token.shape[0]
SLOTS = BATCH.num_slots
LENS = BATCH.seq_lens.tolist()


def make_wrapper(**options: Any) -> PrefixDecodeWrapper:
    return PrefixDecodeWrapper(HQ, HKV, D, **{"v_head_dim": DV, "dtype": torch.float32, **options})


@pytest.fixture
def case() -> AttentionCase:
    return make_case(BATCH, num_kv_heads=HKV, group=HQ // HKV, head_dim=D, v_head_dim=DV)


@pytest.fixture
def wrapper(case: AttentionCase) -> PrefixDecodeWrapper:
    """In use: planned, advanced by one token, and run."""
    wrapper = make_wrapper(max_batch_size=5, max_kv_tokens=3000)
    wrapper.plan(case.req_to_token, case.req_pool_indices, case.seq_lens)
    slots = torch.from_numpy(BATCH.growth_slots[:, 0].copy())
    case.seq_lens = case.seq_lens + 1
    wrapper.advance(case.seq_lens, slots)
    for row, length, slot in zip(case.req_pool_indices, case.seq_lens, slots, strict=True):
        case.req_to_token[row, length - 1] = slot
    return wrapper


def refused(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, says: str, bad: Callable[[], Any]
) -> None:
    """``bad`` is refused with this message, and the plan in use still gives the right answer."""
    expected = case.oracle()
    stats = wrapper.stats
    with pytest.raises(ValueError, match=says):
        bad()
    found = wrapper.run(case.q, case.k_cache, case.v_cache, return_lse=True)
    assert_close(found, expected)  # type: ignore[arg-type]
    assert wrapper.stats == stats


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((7, 2, 64), r"num_qo_heads=7; legal: a multiple of num_kv_heads=2"),
        ((2, 4, 64), r"num_qo_heads=2; legal: a multiple of num_kv_heads=4"),
        ((0, 2, 64), r"num_qo_heads=0; legal: an integer of at least 1"),
        ((8, -1, 64), r"num_kv_heads=-1; legal"),
        ((8, 2, 0), r"head_dim=0; legal"),
        ((8, 2, "64"), r"head_dim='64'; legal"),
        ((8, 2.0, 64), r"num_kv_heads=2.0; legal"),
    ],
    ids=str,
)
def test_heads(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PrefixDecodeWrapper(*arguments)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"v_head_dim": 0}, r"v_head_dim=0; legal"),
        ({"page_size": 0}, r"page_size=0; legal"),
        ({"page_size": True}, r"page_size=True; legal"),
        ({"sm_scale": 0.0}, r"sm_scale=0.0; legal: a finite number above 0"),
        ({"sm_scale": float("nan")}, r"sm_scale=nan; legal"),
        ({"sm_scale": float("inf")}, r"sm_scale=inf; legal"),
        ({"sm_scale": "1"}, r"sm_scale='1'; legal"),
        ({"logit_cap": -1.0}, r"logit_cap=-1.0; legal"),
        ({"logit_cap": float("nan")}, r"logit_cap=nan; legal"),
        ({"policy": "best"}, r"policy='best' is unknown; legal: 'pat', 'node', 'chunk', 'query'"),
        ({"executor": "gpu"}, r"executor='gpu' is unknown; legal: 'auto', 'torch', 'triton'"),
        (
            {"executor": "triton", "dtype": torch.bfloat16},
            r"executor='triton' cannot be used here: .*use float16 or float32; legal: 'torch'",
        ),
        ({"dtype": torch.float64}, r"q_dtype=torch.float64; legal: torch.float32"),
        ({"dtype": None, "q_dtype": torch.int8}, r"q_dtype=torch.int8; legal"),
        ({"dtype": None, "kv_dtype": torch.int8}, r"kv_dtype=torch.int8; legal"),
        ({"dtype": torch.float8_e5m2}, r"q_dtype=torch.float8_e5m2; legal"),
        ({"max_batch_size": 0}, r"max_batch_size=0; legal"),
        ({"max_kv_tokens": -5}, r"max_kv_tokens=-5; legal"),
        ({"max_partials": 0}, r"max_partials=0; legal"),
        ({"max_partials": 3, "max_batch_size": 4}, r"max_partials=3 .* max_batch_size=4; legal"),
        ({"device": "abacus"}, r"device='abacus'; legal"),
        ({"device": 3.5}, r"device=3.5; legal"),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_wrapper(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_this_machine_lacks() -> None:
    with pytest.raises(ValueError, match=r"device='cuda'; legal: a device of this host \(.+\)"):
        make_wrapper(device="cuda")


def test_dtype_and_another_kv_dtype() -> None:
    with pytest.raises(ValueError, match="kv_dtype"):
        make_wrapper(kv_dtype=torch.float8_e5m2)


def changed(values: list[int], at: int, value: int) -> torch.Tensor:
    copy = torch.tensor(values)
    copy[at] = value
    return copy


POOL = BATCH.req_pool_indices.tolist()
OTHER = BATCH.forest()
SHORT = PrefixForest.from_rows(BATCH.rows[:3], LENS[:3])


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        (
            "req_to_token",
            torch.zeros(5, dtype=torch.int32),
            r"req_to_token has shape \(5,\); legal",
        ),
        ("req_to_token", torch.zeros(2, 2), r"req_to_token has dtype torch.float32; legal"),
        ("req_to_token", [[1]], r"req_to_token is a list; legal: a torch.Tensor"),
        ("req_to_token", BATCH.req_to_token, r"req_to_token is a ndarray; legal"),
        (
            "req_to_token",
            torch.zeros(9, 2000, dtype=torch.int32, device="meta"),
            r"req_to_token is on meta; legal: cpu",
        ),
        ("req_pool_indices", POOL, r"req_pool_indices is a list; legal"),
        ("req_pool_indices", torch.zeros(4), r"req_pool_indices has dtype torch.float32; legal"),
        (
            "req_pool_indices",
            torch.zeros(2, 2).int(),
            r"req_pool_indices has shape \(2, 2\); legal",
        ),
        ("req_pool_indices", torch.zeros(0).int(), r"req_pool_indices has shape \(0,\); legal"),
        ("req_pool_indices", changed(POOL, 2, -1), r"req_pool_indices\[2\]=-1; legal: 0 to 6"),
        ("req_pool_indices", changed(POOL, 1, NUM_ROWS), r"req_pool_indices\[1\]=7; legal: 0 to 6"),
        ("seq_lens", LENS, r"seq_lens is a list; legal"),
        ("seq_lens", torch.tensor(LENS).float(), r"seq_lens has dtype torch.float32; legal"),
        ("seq_lens", torch.tensor(LENS[:3]), r"seq_lens has shape \(3,\); legal: \[4\]"),
        ("seq_lens", changed(LENS, 0, 0), rf"seq_lens\[0\]=0; legal: 1 to {CONTEXT}"),
        ("seq_lens", changed(LENS, 3, -7), r"seq_lens\[3\]=-7; legal"),
        ("seq_lens", changed(LENS, 1, CONTEXT + 1), rf"seq_lens\[1\]={CONTEXT + 1}; legal"),
        ("seq_lens", changed(LENS, 3, CONTEXT), r"max_kv_tokens=3000"),
        ("forest", "pat", r"forest is a str; legal: a PrefixForest"),
        ("forest", SHORT, r"forest has 3 requests; legal: 4"),
        (
            "forest",
            PrefixForest.from_rows(BATCH.rows, [n - 1 for n in LENS]),
            r"forest was made for seq_lens=\[899, .*\]; legal: \[900, ",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
def test_plan(
    wrapper: PrefixDecodeWrapper,
    case: AttentionCase,
    monkeypatch: pytest.MonkeyPatch,
    argument: str,
    value: Any,
    says: str,
    verify: bool,
) -> None:
    arguments = {
        "req_to_token": case.req_to_token,
        "req_pool_indices": case.req_pool_indices,
        "seq_lens": torch.tensor(LENS),
        argument: value,
    }
    if verify:
        monkeypatch.setenv("SGLANG_PREFIX_VERIFY", "1")
    refused(wrapper, case, says, lambda: wrapper.plan(**arguments))
    if argument in ("req_to_token", "req_pool_indices") and not verify:
        arguments["forest"] = BATCH.forest()
        refused(wrapper, case, says, lambda: wrapper.plan(**arguments))


def test_batches_over_a_bound(case: AttentionCase) -> None:
    table, pool, lens = case.req_to_token, case.req_pool_indices, case.seq_lens
    for options, says in (
        ({"max_batch_size": 3}, r"4 entries; legal: up to max_batch_size=3"),
        ({"max_partials": 3}, r"max_partials=3 is below the batch size 4; legal"),
        (
            {"max_kv_tokens": sum(LENS) - 1},
            rf"{sum(LENS)} KV tokens; legal: up to max_kv_tokens={sum(LENS) - 1}",
        ),
    ):
        bounded = make_wrapper(**options)
        bounded.plan(table, pool[:1], lens[:1])
        with pytest.raises(ValueError, match=says):
            bounded.plan(table, pool, lens)
        bounded.run(case.q[:1], case.k_cache, case.v_cache)


def test_a_value_of_verify_that_means_nothing(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PREFIX_VERIFY", "yes")
    indices = (case.req_to_token, case.req_pool_indices, case.seq_lens)
    refused(wrapper, case, "SGLANG_PREFIX_VERIFY='yes'", lambda: wrapper.plan(*indices))


def test_before_plan(case: AttentionCase) -> None:
    fresh = make_wrapper()
    for early in (
        lambda: fresh.run(case.q, case.k_cache, case.v_cache),
        lambda: fresh.advance(case.seq_lens, torch.zeros(4).int()),
        lambda: fresh.stats,
        lambda: fresh.current_plan,
    ):
        with pytest.raises(ValueError, match="legal: call plan"):
            early()
    fresh.plan(case.req_to_token, case.req_pool_indices, case.seq_lens)
    assert_close(fresh.run(case.q, case.k_cache, case.v_cache, return_lse=True), case.oracle())  # type: ignore[arg-type]


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


GROWN = [n + 1 for n in LENS]


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("q", tensor(3, HQ, D), r"q has shape \(3, 8, 64\); legal: \(4, 8, 64\)"),
        ("q", tensor(B, HKV, D), r"q has shape \(4, 2, 64\); legal"),
        ("q", tensor(B, HQ * D), r"q has shape \(4, 512\); legal"),
        (
            "q",
            tensor(B, HQ, D, dtype=torch.float16),
            r"q has dtype torch.float16; legal: torch.float32",
        ),
        ("q", tensor(B, HQ, D, device="meta"), r"q is on meta; legal: cpu"),
        ("q", [1.0], r"q is a list; legal: a torch.Tensor"),
        ("k_cache", tensor(SLOTS, 3, D), r"k_cache has shape .*; legal: \(\d+, 2, 64\)"),
        ("k_cache", tensor(SLOTS, HKV, D + 1), r"k_cache has shape .*65\); legal"),
        ("k_cache", torch.zeros(()), r"k_cache has shape \(\); legal"),
        (
            "k_cache",
            tensor(SLOTS, HKV, D, dtype=torch.bfloat16),
            r"k_cache has dtype torch.bfloat16",
        ),
        ("k_cache", None, r"k_cache is a NoneType; legal"),
        ("v_cache", tensor(SLOTS, HKV, D), r"v_cache has shape .*64\); legal: .*96\)"),
        ("v_cache", tensor(SLOTS - 1, HKV, DV), r"v_cache has shape .*; legal"),
        ("v_cache", tensor(SLOTS, HKV, DV, device="meta"), r"v_cache is on meta; legal: cpu"),
        ("out", tensor(B, HQ, D), r"out has shape \(4, 8, 64\); legal: \(4, 8, 96\)"),
        ("out", tensor(B, HQ, DV, dtype=torch.bfloat16), r"out has dtype torch.bfloat16; legal"),
        ("lse", tensor(HQ, B), r"lse has shape \(8, 4\); legal: \(4, 8\)"),
        ("lse", tensor(B, HQ, dtype=torch.float64), r"lse has dtype torch.float64; legal"),
        ("seq_lens", LENS, r"seq_lens is a list; legal"),
        ("seq_lens", torch.tensor(LENS[:3]), r"seq_lens has shape \(3,\); legal: \[4\]"),
        ("seq_lens", torch.tensor(LENS).float(), r"seq_lens has dtype torch.float32; legal"),
        (
            "seq_lens",
            changed(LENS, 1, LENS[1] - 1),
            r"seq_lens\[1\]=858 .*legal: 859 to .*[Pp]lan again",
        ),
        (
            "seq_lens",
            changed(LENS, 3, LENS[3] + RESERVED_TAIL_SLOTS + 1),
            r"seq_lens\[3\]=264 .*legal: 7 to 263.*[Pp]lan again",
        ),
        ("seq_lens", changed(LENS, 0, CONTEXT + 1), rf"seq_lens\[0\]={CONTEXT + 1}; legal: 1 to"),
        ("sm_scale", 0.0, r"sm_scale=0.0; legal"),
        ("sm_scale", float("inf"), r"sm_scale=inf; legal"),
        ("logit_cap", -2.0, r"logit_cap=-2.0; legal"),
        ("k_scale", 0.0, r"k_scale=0.0; legal"),
        ("k_scale", torch.ones(3), r"k_scale has shape \(3,\) .*legal: .*\[2\]"),
        ("k_scale", torch.ones(1, HKV), r"k_scale has shape \(1, 2\)"),
        ("v_scale", torch.ones(HKV, dtype=torch.int32), r"v_scale has .*torch.int32; legal"),
        ("v_scale", torch.ones(HKV, device="meta"), r"v_scale is on meta; legal: cpu"),
        ("v_scale", "1", r"v_scale='1'; legal"),
        ("v_scale", -1.0, r"v_scale=-1.0; legal"),
        ("sinks", torch.zeros(HQ), r"sinks is not supported yet; legal: None"),
        ("window_left", 128, r"window_left=128 is not supported yet; legal: -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_run(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, argument: str, value: Any, says: str
) -> None:
    arguments: dict[str, Any] = {"q": case.q, "k_cache": case.k_cache, "v_cache": case.v_cache}
    refused(wrapper, case, says, lambda: wrapper.run(**{**arguments, argument: value}))


@pytest.mark.parametrize(
    ("lens", "slots", "says"),
    [
        (torch.tensor(LENS), tensor(0).int(), r"(?i)seq_lens=\[900, .* shrinks below .*plan again"),
        (changed(GROWN, 0, 899), tensor(4).int(), r"(?i)seq_lens\[0\]=899 .*plan again"),
        (changed(GROWN, 3, 264), tensor(256).int(), r"(?i)seq_lens\[3\]=264 .*plan again"),
        (torch.tensor(GROWN[:3]), tensor(0).int(), r"seq_lens has shape \(3,\); legal: \[4\]"),
        (torch.tensor(GROWN) + 1, tensor(3).int(), r"new_slots has shape \(3,\); legal: \[4\]"),
        (torch.tensor(GROWN) + 1, tensor(4), r"new_slots has dtype torch.float32; legal"),
        (torch.tensor(GROWN) + 1, [1] * 4, r"new_slots is a list; legal"),
        (torch.tensor(GROWN) + 1, tensor(4).int() - 3, r"new_slots holds -3; legal: 0 and above"),
    ],
)
def test_advance(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, lens: torch.Tensor, slots: Any, says: str
) -> None:
    refused(wrapper, case, says, lambda: wrapper.advance(lens, slots))


@pytest.mark.parametrize("slot", [-1, SLOTS, 1 << 30])
def test_slots_outside_the_cache(case: AttentionCase, slot: int) -> None:
    """The caches are first seen by run, so run is where their size is known."""
    wrapper = make_wrapper()
    table = case.req_to_token.clone()
    table[case.req_pool_indices[1], 852] = slot
    says = rf"req_to_token.* reach {slot}; legal: 0 to {SLOTS - 1}"
    with pytest.raises(ValueError, match=says):  # noqa: PT012, either call may refuse it
        wrapper.plan(table, case.req_pool_indices, case.seq_lens)
        wrapper.run(case.q, case.k_cache, case.v_cache)
    wrapper.plan(case.req_to_token, case.req_pool_indices, case.seq_lens)
    found = wrapper.run(case.q, case.k_cache, case.v_cache, return_lse=True)
    assert_close(found, case.oracle())  # type: ignore[arg-type]


@pytest.mark.parametrize("slot", [-1, SLOTS])
def test_slots_outside_the_cache_in_a_longer_call(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, slot: int
) -> None:
    longer = case.seq_lens + 1
    case.req_to_token[case.req_pool_indices[1], int(case.seq_lens[1])] = slot
    tensors = (case.q, case.k_cache, case.v_cache)
    refused(wrapper, case, f"reach {slot};", lambda: wrapper.run(*tensors, seq_lens=longer))
