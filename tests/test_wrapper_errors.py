"""Bad input to the wrapper: one ValueError that names argument, value and what is legal.

After every refusal the wrapper still runs the plan that it had, at the lengths that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
(NUM_ROWS, CONTEXT), SLOTS = BATCH.req_to_token.shape, BATCH.num_slots
POOL, LENS = BATCH.req_pool_indices.tolist(), BATCH.seq_lens.tolist()
GROWN = [n + 1 for n in LENS]
FULL = LENS[3] + RESERVED_TAIL_SLOTS
NAN, INF = float("nan"), float("inf")
F16, BF16, F64, E5M2 = torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2

# By argument: a value, and what is said after the argument's name.
Table = Mapping[str, Sequence[tuple[Any, str]]]


def table(rows: Table) -> pytest.MarkDecorator:
    """One test per row."""
    cases = [
        pytest.param(argument, value, rf"{argument}\b.*{says}", id=f"{argument} {says}")
        for argument, values in rows.items()
        for value, says in values
    ]
    return pytest.mark.parametrize(("argument", "value", "says"), cases)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def changed(values: list[int], at: int, value: int) -> torch.Tensor:
    copy = torch.tensor(values)
    copy[at] = value
    return copy


def make_wrapper(**options: Any) -> PrefixDecodeWrapper:
    heads = {"num_qo_heads": HQ, "num_kv_heads": HKV, "head_dim": D, "v_head_dim": DV}
    return PrefixDecodeWrapper(**{**heads, "dtype": torch.float32, **options})


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


def assert_runs(wrapper: PrefixDecodeWrapper, case: AttentionCase) -> None:
    found = wrapper.run(case.q, case.k_cache, case.v_cache, return_lse=True)
    assert_close(found, case.oracle())  # type: ignore[arg-type]


def refused(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, says: str, bad: Callable[[], Any]
) -> None:
    """``bad`` is refused with this message, and the plan in use still gives the right answer."""
    stats = wrapper.stats
    with pytest.raises(ValueError, match=says):
        bad()
    assert_runs(wrapper, case)
    assert wrapper.stats == stats


@table(
    {
        "num_qo_heads": [
            (7, "=7; legal: a multiple of num_kv_heads=2"),
            (1, "=1; legal: a multiple of num_kv_heads=2"),
            (0, "=0; legal: an integer of at least 1"),
        ],
        "num_kv_heads": [(-1, "=-1; legal"), (2.0, "=2.0; legal")],
        "head_dim": [(0, "=0; legal"), ("64", "='64'; legal")],
        "v_head_dim": [(0, "=0; legal")],
        "page_size": [(0, "=0; legal"), (True, "=True; legal")],
        "sm_scale": [
            (0.0, "=0.0; legal: a finite number above 0"),
            (NAN, "=nan; legal"),
            (INF, "=inf; legal"),
            ("1", "='1'; legal"),
        ],
        "logit_cap": [(-1.0, "=-1.0; legal"), (NAN, "=nan; legal")],
        "policy": [("best", "='best' is unknown; legal: 'pat', 'node', 'chunk', 'query'")],
        "executor": [("gpu", "='gpu' is unknown; legal: 'auto', 'torch', 'triton'")],
        "dtype": [(F64, "=torch.float64; legal: torch.float32"), (E5M2, "=torch.float8_e5m2; ")],
        "max_batch_size": [(0, "=0; legal")],
        "max_kv_tokens": [(-5, "=-5; legal")],
        "max_partials": [(0, "=0; legal")],
        "device": [("abacus", "='abacus'; legal"), (3.5, "=3.5; legal")],
        "kv_dtype": [(E5M2, "")],  # and dtype
    }
)
def test_options(argument: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_wrapper(**{argument: value})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": None, "q_dtype": torch.int8}, "q_dtype=torch.int8; legal"),
        ({"dtype": None, "kv_dtype": torch.int8}, "kv_dtype=torch.int8; legal"),
        ({"max_partials": 3, "max_batch_size": 4}, "max_partials=3 .* max_batch_size=4; legal"),
        (
            {"executor": "triton", "dtype": BF16},
            "executor='triton' cannot be used here: .*use float16 or float32; legal: 'torch'",
        ),
    ],
)
def test_options_together(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_wrapper(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_this_machine_lacks() -> None:
    with pytest.raises(ValueError, match=r"device='cuda'; legal: a device of this host \(.+\)"):
        make_wrapper(device="cuda")


@table(
    {
        "req_to_token": [
            (tensor(5).int(), r"has shape \(5,\); legal"),
            (tensor(2, 2), "has dtype torch.float32; legal"),
            ([[1]], "is a list; legal: a torch.Tensor"),
            (BATCH.req_to_token, "is a ndarray; legal"),
            (tensor(9, 2000, dtype=torch.int32, device="meta"), "is on meta; legal: cpu"),
        ],
        "req_pool_indices": [
            (POOL, "is a list; legal"),
            (tensor(4), "has dtype torch.float32; legal"),
            (tensor(2, 2).int(), r"has shape \(2, 2\); legal"),
            (tensor(0).int(), r"has shape \(0,\); legal"),
            (changed(POOL, 2, -1), r"\[2\]=-1; legal: 0 to 6"),
            (changed(POOL, 1, NUM_ROWS), r"\[1\]=7; legal: 0 to 6"),
        ],
        "seq_lens": [
            (LENS, "is a list; legal"),
            (torch.tensor(LENS).float(), "has dtype torch.float32; legal"),
            (torch.tensor(LENS[:3]), r"has shape \(3,\); legal: \[4\]"),
            (changed(LENS, 0, 0), rf"\[0\]=0; legal: 1 to {CONTEXT}"),
            (changed(LENS, 3, -7), r"\[3\]=-7; legal"),
            (changed(LENS, 1, CONTEXT + 1), rf"\[1\]={CONTEXT + 1}; legal"),
            (changed(LENS, 3, CONTEXT), "KV tokens; legal: up to max_kv_tokens=3000"),
        ],
        "forest": [
            ("pat", "is a str; legal: a PrefixForest"),
            (PrefixForest.from_rows(BATCH.rows[:3], LENS[:3]), "has 3 requests; legal: 4"),
            (
                PrefixForest.from_rows(BATCH.rows, [n - 1 for n in LENS]),
                r"was made for seq_lens=\[899, .*\]; legal: \[900, ",
            ),
        ],
    }
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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_batch_size": 3}, "4 entries; legal: up to max_batch_size=3"),
        ({"max_partials": 3}, "max_partials=3 is below the batch size 4; legal"),
        ({"max_kv_tokens": 2615}, "2616 KV tokens; legal: up to max_kv_tokens=2615"),
    ],
)
def test_batches_over_a_bound(case: AttentionCase, options: dict[str, int], says: str) -> None:
    table, pool, lens = case.req_to_token, case.req_pool_indices, case.seq_lens
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
        lambda: fresh.advance(case.seq_lens, tensor(4).int()),
        lambda: fresh.stats,
        lambda: fresh.current_plan,
    ):
        with pytest.raises(ValueError, match="legal: call plan"):
            early()
    fresh.plan(case.req_to_token, case.req_pool_indices, case.seq_lens)
    assert_runs(fresh, case)


@table(
    {
        "q": [
            (tensor(3, HQ, D), r"has shape \(3, 8, 64\); legal: \(4, 8, 64\)"),
            (tensor(B, HKV, D), r"has shape \(4, 2, 64\); legal"),
            (tensor(B, HQ * D), r"has shape \(4, 512\); legal"),
            (tensor(B, HQ, D, dtype=F16), "has dtype torch.float16; legal: torch.float32"),
            (tensor(B, HQ, D, device="meta"), "is on meta; legal: cpu"),
            ([1.0], "is a list; legal: a torch.Tensor"),
        ],
        "k_cache": [
            (tensor(SLOTS, 3, D), r"has shape .*; legal: \(\d+, 2, 64\)"),
            (tensor(SLOTS, HKV, D + 1), r"has shape .*65\); legal"),
            (tensor(), r"has shape \(\); legal"),
            (tensor(SLOTS, HKV, D, dtype=BF16), "has dtype torch.bfloat16"),
            (None, "is a NoneType; legal"),
        ],
        "v_cache": [
            (tensor(SLOTS, HKV, D), r"has shape .*64\); legal: .*96\)"),
            (tensor(SLOTS - 1, HKV, DV), "has shape .*; legal"),
            (tensor(SLOTS, HKV, DV, device="meta"), "is on meta; legal: cpu"),
        ],
        "out": [
            (tensor(B, HQ, D), r"has shape \(4, 8, 64\); legal: \(4, 8, 96\)"),
            (tensor(B, HQ, DV, dtype=BF16), "has dtype torch.bfloat16; legal"),
        ],
        "lse": [
            (tensor(HQ, B), r"has shape \(8, 4\); legal: \(4, 8\)"),
            (tensor(B, HQ, dtype=F64), "has dtype torch.float64; legal"),
        ],
        "seq_lens": [
            (LENS, "is a list; legal"),
            (torch.tensor(LENS[:3]), r"has shape \(3,\); legal: \[4\]"),
            (torch.tensor(LENS).float(), "has dtype torch.float32; legal"),
            (changed(LENS, 1, LENS[1] - 1), r"\[1\]=858 .*legal: 859 to .*[Pp]lan again"),
            (changed(LENS, 3, FULL + 1), r"\[3\]=264 .*legal: 7 to 263.*[Pp]lan again"),
            (changed(LENS, 0, CONTEXT + 1), rf"\[0\]={CONTEXT + 1}; legal: 1 to"),
        ],
        "sm_scale": [(0.0, "=0.0; legal"), (INF, "=inf; legal")],
        "logit_cap": [(-2.0, "=-2.0; legal")],
        "k_scale": [
            (0.0, "=0.0; legal"),
            (torch.ones(3), r"has shape \(3,\) .*legal: .*\[2\]"),
            (torch.ones(1, HKV), r"has shape \(1, 2\)"),
        ],
        "v_scale": [
            (torch.ones(HKV).int(), "has .*torch.int32; legal"),
            (torch.ones(HKV, device="meta"), "is on meta; legal: cpu"),
            ("1", "='1'; legal"),
            (-1.0, "=-1.0; legal"),
        ],
        "sinks": [(tensor(HQ), "is not supported yet; legal: None")],
        "window_left": [(128, r"=128 is not supported yet; legal: -1")],
    }
)
def test_run(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, argument: str, value: Any, says: str
) -> None:
    arguments: dict[str, Any] = {"q": case.q, "k_cache": case.k_cache, "v_cache": case.v_cache}
    refused(wrapper, case, says, lambda: wrapper.run(**{**arguments, argument: value}))


@table(
    {
        "seq_lens": [
            (torch.tensor(LENS), r"=\[900, .* shrinks below .*[Pp]lan again"),
            (changed(GROWN, 0, 899), r"\[0\]=899 .*[Pp]lan again"),
            (changed(GROWN, 3, FULL + 1), r"\[3\]=264 .*[Pp]lan again"),
            (torch.tensor(GROWN[:3]), r"has shape \(3,\); legal: \[4\]"),
        ],
        "new_slots": [
            (tensor(3).int(), r"has shape \(3,\); legal: \[4\]"),
            (tensor(4), "has dtype torch.float32; legal"),
            ([1] * 4, "is a list; legal"),
            (tensor(4).int() - 3, "holds -3; legal: 0 and above"),
        ],
    }
)
def test_advance(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, argument: str, value: Any, says: str
) -> None:
    arguments = {"seq_lens": torch.tensor(GROWN) + 1, "new_slots": tensor(4).int()}
    refused(wrapper, case, says, lambda: wrapper.advance(**{**arguments, argument: value}))


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
    assert_runs(wrapper, case)


@pytest.mark.parametrize("slot", [-1, SLOTS])
def test_slots_outside_the_cache_in_a_longer_call(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, slot: int
) -> None:
    longer = case.seq_lens + 1
    case.req_to_token[case.req_pool_indices[1], int(case.seq_lens[1])] = slot
    tensors = (case.q, case.k_cache, case.v_cache)
    refused(wrapper, case, f"reach {slot};", lambda: wrapper.run(*tensors, seq_lens=longer))
