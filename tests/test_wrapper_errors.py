"""Bad input to the wrapper: one ValueError that names argument, value and what is legal.

After every refusal the wrapper still runs the plan that it had, at the lengths that it had.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from sglang_prefix import PrefixDecodeWrapper, PrefixForest
from sglang_prefix.packing.layout import CostedPlan
from sglang_prefix.packing.planner import RESERVED_TAIL_SLOTS, PackPlanner
from tests.attention import AttentionCase, assert_close, make_case
from tests.forests import Fork, build_batch

pytestmark = pytest.mark.usefixtures("nan_memory")

B, HQ, HKV, D, DV = 4, 8, 2, 64, 96
BATCH = build_batch([Fork(0, 0, 900), Fork(0, 850, 9), Fork(0, 850, 0), Fork(9, 0, 7)], growth=8)
(NUM_ROWS, CONTEXT), SLOTS = BATCH.req_to_token.shape, BATCH.num_slots
POOL, LENS = BATCH.req_pool_indices.tolist(), BATCH.seq_lens.tolist()
GROWN = [n + 1 for n in LENS]
FULL = LENS[3] + RESERVED_TAIL_SLOTS

Rows = list[tuple[str, Any, str]]


def numbers(name: str, *values: Any, legal: str = "") -> Rows:
    """Values of an argument, each refused as ``name=value; legal: ...``."""
    return [(name, value, rf"{name}={re.escape(repr(value))}; legal: {legal}") for value in values]


def tensors(name: str, right: torch.Tensor, *shapes: Sequence[int], device: bool = True) -> Rows:
    """Everything that can be wrong with a tensor: no tensor, its dtype, its device, its shape."""
    wrong = torch.bool if right.dtype != torch.bool else torch.int8
    rows: Rows = [
        (name, right.tolist(), f"{name} is a list; legal: a torch.Tensor"),
        (name, right.numpy(), f"{name} is a ndarray; legal"),
        (name, right.to(wrong), f"{name} has dtype {wrong}; legal: torch"),
    ]
    if device:
        rows.append((name, right.to("meta"), f"{name} is on meta; legal: cpu"))
    for shape in shapes:
        says = rf"{name} has shape \({', '.join(map(str, shape))},?\); legal"
        rows.append((name, torch.zeros(tuple(shape), dtype=right.dtype), says))
    return rows


def entries(name: str, values: list[int], *bad: tuple[int, int, str]) -> Rows:
    """One entry of an index tensor is bad: where, the value, and what is legal."""
    rows: Rows = []
    for at, value, says in bad:
        copy = torch.tensor(values)
        copy[at] = value
        rows.append((name, copy, rf"{name}\[{at}\]={value}\b.*{says}"))
    return rows


def cases(*rows: Rows) -> pytest.MarkDecorator:
    """One test per row: argument, bad value, and what is said."""
    every = [row for some in rows for row in some]
    params = [pytest.param(*row, id=row[2]) for row in every]
    return pytest.mark.parametrize(("argument", "value", "says"), params)


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
    with pytest.raises(ValueError, match=f"(?i){says}"):
        bad()
    assert_runs(wrapper, case)
    assert wrapper.stats == stats


COUNTS = ("num_qo_heads", "num_kv_heads", "head_dim", "v_head_dim", "page_size")
BOUNDS = ("max_batch_size", "max_kv_tokens", "max_partials")
NAN, INF = float("nan"), float("inf")


@cases(
    *(numbers(n, 0, -1, 2.0, "8", True, legal="an integer of at") for n in (*COUNTS, *BOUNDS)),
    numbers("num_qo_heads", 7, 1, legal="a multiple of num_kv_heads=2"),
    numbers("sm_scale", 0.0, NAN, INF, "1", legal="a finite number above 0"),
    numbers("logit_cap", -1.0, NAN, "1", legal="a finite number"),
    numbers("device", "abacus", 3.5, legal="a device of this host"),
    # Type first: what is no number is compared with nothing.
    *(
        [(name, value, rf"{name}(=| is a ).*; legal: ")]
        for name in ("page_size", "max_partials", "sm_scale", "logit_cap", "policy", "executor")
        for value in (torch.ones(2), np.zeros(2), np.array(1), 10**5000, 10**400)
    ),
    *([(name, np.zeros(2), f"{name} is a ndarray; legal")] for name in ("dtype", "kv_dtype")),
    numbers("page_size", 10**30, 2**31, legal="an integer of at least 1, up to 2147483647"),
    numbers("sm_scale", 1e308, 1e-45, legal="a finite number above 0, from 2"),
    numbers("logit_cap", 4e38, 1e-45, True, legal="a finite number above 0, from 2"),
    numbers("device", 10**30, True, legal="a device of this host"),
    [
        ("policy", "best", "policy='best'; legal: 'pat', 'node', 'chunk', 'query'"),
        ("executor", "gpu", "executor='gpu'; legal: 'auto', 'torch', 'native', 'triton'"),
        ("dtype", torch.float64, r"\bdtype=torch.float64; legal: torch.float32"),
        ("dtype", torch.float8_e5m2, r"\bdtype=torch.float8_e5m2; legal"),
        ("kv_dtype", torch.float8_e5m2, "kv_dtype"),  # and dtype
    ],
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
            {"executor": "triton", "dtype": torch.bfloat16},
            "executor='triton' cannot be used here: .*use float16 or float32; legal: 'torch'",
        ),
    ],
)
def test_options_together(options: Mapping[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_wrapper(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_this_machine_lacks() -> None:
    with pytest.raises(ValueError, match=r"device='cuda'; legal: a device of this host \(.+\)"):
        make_wrapper(device="cuda")


@cases(
    tensors("req_to_token", torch.from_numpy(BATCH.req_to_token), [5], [1, 2, 3]),
    tensors("req_pool_indices", torch.tensor(POOL), [2, 2], [0], device=False),
    [("req_pool_indices", torch.tensor(POOL).to("meta"), "req_pool_indices is on meta, which")],
    [("seq_lens", torch.tensor(LENS).to("meta"), "seq_lens is on meta, which holds no values")],
    entries("req_pool_indices", POOL, (2, -1, "legal: 0 to 6"), (1, NUM_ROWS, "legal: 0 to 6")),
    tensors("seq_lens", torch.tensor(LENS), [3], [2, 2], device=False),
    entries("seq_lens", LENS, (0, 0, f"legal: 1 to {CONTEXT}"), (3, -7, "legal: 1 to")),
    entries("seq_lens", LENS, (1, CONTEXT + 1, f"legal: 1 to {CONTEXT}")),
    [
        ("seq_lens", torch.tensor([900] * 4), "3600 KV tokens; legal: up to max_kv_tokens=3000"),
        ("forest", "pat", "forest is a str; legal: a PrefixForest"),
        (
            "forest",
            PrefixForest.from_rows(BATCH.rows[:3], LENS[:3]),
            "forest has 3 requests; legal: 4",
        ),
        (
            "forest",
            PrefixForest.from_rows(BATCH.rows, [n - 1 for n in LENS]),
            r"forest was made for seq_lens\[0\]=899; legal: 900",
        ),
    ],
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


def test_a_forest_that_was_written_to(wrapper: PrefixDecodeWrapper, case: AttentionCase) -> None:
    """Compiled loops read what it holds."""
    forest = BATCH.forest()
    forest.node_end[:] = 10**9
    table, rows, lens = case.req_to_token, case.req_pool_indices, torch.tensor(LENS)
    refused(wrapper, case, "node_end", lambda: wrapper.plan(table, rows, lens, forest=forest))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_batch_size": 3}, "4 entries; legal: up to max_batch_size=3"),
        ({"max_partials": 3}, "max_partials=3 is below the 4 queries of the batch; legal"),
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
        lambda: fresh.advance(case.seq_lens, torch.zeros(4).int()),
        lambda: fresh.stats,
        lambda: fresh.current_plan,
    ):
        with pytest.raises(ValueError, match="legal: call plan"):
            early()
    fresh.plan(case.req_to_token, case.req_pool_indices, case.seq_lens)
    assert_runs(fresh, case)


@cases(
    tensors("q", torch.zeros(B, HQ, D), [3, HQ, D], [B, HKV, D], [B, HQ * D]),
    tensors("k_cache", torch.zeros(SLOTS, HKV, D), [SLOTS, 3, D], [SLOTS, HKV, D + 1], []),
    tensors("v_cache", torch.zeros(SLOTS, HKV, DV), [SLOTS, HKV, D], [SLOTS, HKV]),
    tensors("out", torch.zeros(B, HQ, DV), [B, HQ, D]),
    tensors("lse", torch.zeros(B, HQ), [HQ, B]),
    tensors("seq_lens", torch.tensor(GROWN), [3], device=False),
    entries("seq_lens", LENS, (1, LENS[1] - 1, "legal: 859 to .*plan again")),
    entries("seq_lens", LENS, (3, FULL + 1, "legal: 7 to 263.*plan again")),
    entries("seq_lens", LENS, (0, CONTEXT + 1, "legal: 1 to")),
    numbers("sm_scale", 0.0, INF, legal="a finite number above 0"),
    numbers("logit_cap", -2.0, legal="a finite number"),
    *(numbers(name, 0.0, -1.0, "1", legal="a finite") for name in ("k_scale", "v_scale")),
    [
        ("k_scale", torch.ones(3), r"k_scale has shape \(3,\) .*legal: .*\[2\]"),
        ("k_scale", torch.ones(1, HKV), r"k_scale has shape \(1, 2\)"),
        ("k_cache", None, "k_cache is a NoneType; legal"),
        ("logit_cap", torch.tensor(1.0), "logit_cap is a Tensor; legal: a finite number"),
        ("window_left", torch.tensor(-1), "window_left is a Tensor; legal: -1"),
        ("return_lse", torch.tensor(True), "return_lse is a Tensor; legal: True or False"),
        ("return_lse", 1, "return_lse=1; legal: True or False"),
        ("logit_cap", 4e38, r"logit_cap=4e\+38; legal: a finite number"),
        ("sm_scale", 1e308, r"sm_scale=1e\+308; legal: a finite number"),
        ("k_scale", torch.tensor([1.0, 1e-45]), "k_scale=.*; legal: a finite number"),
        ("v_scale", torch.tensor(torch.nan), "v_scale=nan; legal: a finite number"),
        ("out", torch.zeros(B, 1, DV).expand(B, HQ, DV), "out has strides .* share memory; legal"),
        ("out", torch.zeros(B, HQ, 2 * DV)[..., ::2], "out has stride 2 in its last dim.*legal: 1"),
        ("lse", torch.zeros(1).expand(B, HQ), "lse has stride 0 in its last dimension; legal: 1"),
        ("lse", torch.zeros(B, HQ).double(), "lse has dtype torch.float64; legal: torch.float32"),
        ("q", torch.zeros(B, HQ, D).to_sparse(), "q is not dense in memory .*sparse_coo.*; legal"),
        ("v_cache", torch.zeros(SLOTS + 1, HKV, DV), "v_cache has .* slots; legal: .* k_cache has"),
        ("v_scale", torch.ones(HKV).int(), "v_scale has .*torch.int32; legal"),
        ("v_scale", torch.ones(HKV, device="meta"), "v_scale is on meta; legal: cpu"),
        ("sinks", [0.0] * HQ, "sinks is a list; legal: a torch.Tensor"),
        ("sinks", torch.zeros(HKV), r"sinks has shape \(2,\); legal: \[8\]"),
        ("sinks", torch.zeros(1, HQ), r"sinks has shape \(1, 8\); legal: \[8\]"),
        ("sinks", torch.zeros(HQ).double(), "sinks has dtype torch.float64; legal: torch.float32"),
        ("sinks", torch.zeros(HQ, device="meta"), "sinks is on meta; legal: cpu"),
        ("sinks", torch.zeros(2 * HQ)[::2], "sinks has stride 2; legal: 1"),
        ("sinks", torch.full((HQ,), INF), "sinks holds NaN or infinity; legal: finite.*-inf"),
        ("sinks", torch.full((HQ,), NAN), "sinks holds NaN or infinity; legal: finite.*-inf"),
        ("window_left", 128, "window_left=128; legal: -1"),
    ],
)
def test_run(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, argument: str, value: Any, says: str
) -> None:
    arguments: dict[str, Any] = {"q": case.q, "k_cache": case.k_cache, "v_cache": case.v_cache}
    refused(wrapper, case, says, lambda: wrapper.run(**{**arguments, argument: value}))


@pytest.mark.parametrize(
    "names", [("out", "q"), ("out", "v_cache"), ("lse", "k_scale"), ("lse", "sinks")]
)
def test_outputs_over_inputs(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, names: tuple[str, str]
) -> None:
    """Whoever reads later would read what has been written."""
    memory = torch.zeros(max(case.v_cache.numel(), B * HQ * max(D, DV)))
    shapes = {
        "out": (B, HQ, DV),
        "lse": (B, HQ),
        "q": (B, HQ, D),
        "k_scale": (HKV,),
        "sinks": (HQ,),
    }
    shapes["v_cache"] = tuple(case.v_cache.shape)
    arguments: dict[str, Any] = {"q": case.q, "k_cache": case.k_cache, "v_cache": case.v_cache}
    arguments |= {
        name: memory[: torch.Size(shapes[name]).numel()].view(shapes[name]).fill_(1.0)
        for name in names
    }
    says = f"{names[0]} shares memory with {names[1]}; legal: memory of its own"
    refused(wrapper, case, says, lambda: wrapper.run(**arguments))


def test_an_output_of_inference_mode(wrapper: PrefixDecodeWrapper, case: AttentionCase) -> None:
    with torch.inference_mode():
        out = torch.zeros(B, HQ, DV)
        wrapper.run(case.q, case.k_cache, case.v_cache, out=out)
    layer = case.q, case.k_cache, case.v_cache
    says = "out was made in inference mode; legal"
    refused(wrapper, case, says, lambda: wrapper.run(*layer, out=out))


@pytest.mark.parametrize("executor", ["torch", "triton"])
def test_a_load_that_fails_leaves_the_plan(
    case: AttentionCase, monkeypatch: pytest.MonkeyPatch, executor: str
) -> None:
    """The executor refuses a plan after all checks of ours."""
    wrapper = make_wrapper(executor=executor)
    indices = case.req_to_token, case.req_pool_indices, case.seq_lens
    wrapper.plan(*indices)
    plan = PackPlanner.plan

    def too_large(self: PackPlanner, forest: PrefixForest, **options: Any) -> CostedPlan:
        made = plan(self, forest, **options)
        made.slot_offset[-1] = 1 << 50
        return made

    monkeypatch.setattr(PackPlanner, "plan", too_large)
    with pytest.raises((ValueError, RuntimeError), match=r"kv_slots|memory"):
        wrapper.plan(torch.zeros_like(case.req_to_token), *(index[:2] for index in indices[1:]))
    assert_runs(wrapper, case)


@cases(
    tensors("seq_lens", torch.tensor(GROWN), [3], device=False),
    entries("seq_lens", GROWN, (0, 899, "plan again"), (3, FULL + 1, "plan again")),
    tensors("new_slots", torch.zeros(B).int(), [3], device=False),
    [
        ("seq_lens", torch.tensor(LENS), r"seq_lens\[0\]=900 shrinks below 901; .*plan again"),
        ("new_slots", torch.zeros(B).int() - 3, "new_slots holds -3; legal: 0 and above"),
        ("new_slots", torch.full((B,), 2**32), "new_slots holds 4294967296; legal: 0 and above"),
        ("new_slots", torch.zeros(B).int().to("meta"), "new_slots is on meta, which holds no"),
    ],
)
def test_advance(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, argument: str, value: Any, says: str
) -> None:
    arguments = {"seq_lens": torch.tensor(GROWN) + 1, "new_slots": torch.zeros(B).int()}
    refused(wrapper, case, says, lambda: wrapper.advance(**{**arguments, argument: value}))


@pytest.mark.parametrize("slot", [-1, SLOTS])
def test_slots_outside_the_cache_in_a_longer_call(
    wrapper: PrefixDecodeWrapper, case: AttentionCase, slot: int
) -> None:
    longer = case.seq_lens + 1
    case.req_to_token[case.req_pool_indices[1], int(case.seq_lens[1])] = slot
    tensors = (case.q, case.k_cache, case.v_cache)
    refused(wrapper, case, f"reach {slot};", lambda: wrapper.run(*tensors, seq_lens=longer))
