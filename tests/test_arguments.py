"""Every argument of every public callable, with values of every kind: used, or refused by name.

Arguments are found in the signatures, so that a new one is covered by being there. A value is right
if the call works and its result is the oracle's, and if it is refused by one ``ValueError`` of one
line that names the argument, after which the plan that was in use still runs. Anything else fails.
The messages themselves: test_wrapper_errors.py, test_forest.py.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prefix import PrefixDecodeWrapper, PrefixForest
from sglang_prefix.forest import RadixPath
from sglang_prefix.packing import CPU_PROFILE, AttentionShape
from sglang_prefix.packing.planner import PackPlanner
from tests.attention import AttentionCase, assert_close, make_case
from tests.forests import Fork, build_batch
from tests.test_forest import check_invariants

pytestmark = pytest.mark.usefixtures("nan_memory")

BATCH = build_batch([Fork(0, 0, 40), Fork(0, 33, 9), Fork(0, 33, 0), Fork(9, 0, 7)], growth=8)

Arguments = dict[str, Any]


def make() -> AttentionCase:
    """Without NaN, since tables with other slots are legal."""
    case = make_case(BATCH, num_kv_heads=2, group=2, head_dim=16)
    case.k_cache.nan_to_num_(0.5)
    case.v_cache.nan_to_num_(0.5)
    return case


CASE = make()
HEADS: Arguments = dict(num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)  # noqa: C408


class Tensor(torch.Tensor):
    """A subclass that computes as its base does."""


class Elsewhere(torch.Tensor):
    """A subclass that dispatches for itself, as those that hold their values elsewhere do."""

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("looked at")


# What is no argument of anything, or a number of an unusual kind.
PLAIN = [
    *(None, True, False, np.True_, "", "pat", "cuda", "cpu:0", "meta", "7", "\ud800\n", b"cpu", ()),
    *(0, 1, 2, 3, 7, -1, -2, 2**31 - 1, 2**31, 2**63, 10**30, 10**5000, 0.0, -0.0, 1.0, 2.5, -1.5),
    *(1e-45, 1e-30, 2.0**-32, 0.25, 2.0**32, 1e10, 4e38, 1e308, np.nan, np.inf, -np.inf, 1j),
    *(np.int8(2), np.int64(2), np.uint64(2**64 - 1), np.float32(0.5), np.float16(np.inf)),
    *(Fraction(1, 3), Fraction(10**400), Decimal(1), np.dtype("f4"), np.float32, torch.int8),
    *(torch.float32, torch.float16, torch.device("cpu"), torch.Size([2]), object(), [], {}, {1: 2}),
    *(
        [0, 1, 2, 3],
        [1.5],
        [[1], [2, 3]],
        ["a"],
        [None],
        [10**30],
        (True, "x"),
        range(4),
        iter("ab"),
    ),
    *(np.array(1), np.arange(4), np.zeros((2, 2)), np.array(["a"]), np.array([None]), np.zeros(0)),
    *(torch.tensor(1), torch.tensor(0.5), torch.tensor([0.5, 2]), torch.zeros(0), torch.eye(3)),
    *(torch.tensor([0.5, np.nan]), torch.tensor([1.0, 1e300]).double(), torch.zeros(2).bool()),
    *(
        torch.tensor(0.5, requires_grad=True),
        torch.tensor([2.0, 1]).bfloat16(),
        torch.ones(2).int(),
    ),
    *(torch.eye(2).to_sparse(), torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])),
    *(torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex64), torch.zeros(4).int()),
    *(torch.full((4,), 2**31 - 1), torch.full((4,), -(2**62)), torch.tensor([2**32 + 1] * 4)),
]


def variants(right: Any) -> Iterator[Any]:
    """What can be wrong, or only unusual, with what is right."""
    if isinstance(right, torch.Tensor):
        yield from tensor_variants(right)
    elif isinstance(right, np.ndarray):
        wide = right.astype(np.int64)
        yield from (wide - 2**40, wide + 2**33, -wide, wide + 1, wide - 1, right[..., None])
        yield from (right.tolist(), right[:-1], right[::-1], torch.from_numpy(right.copy()))
        for dtype in ("f8", "u1", "u8", "i4", "O", "U"):
            yield right.astype(dtype)
    elif isinstance(right, list):
        first, *rest = right
        yield from (rest, [*right, first], [right], tuple(right), iter(right), right[::-1])
        yield from ([bad, *rest] for bad in (None, -5, 2.5, 10**30, 3, "ab", ((1,),)))
        # Of paths: ids or ends too few, ends that go back, and numbers that are none.
        for ids, ends in (((1,), (4, 5)), ((1, 2), (4, 3)), ((1.5,), (4,)), ((1,), (-4,))):
            yield [RadixPath(ids, ends), *rest]  # type: ignore[arg-type]


def tensor_variants(right: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from (right.clone(), right.as_subclass(Tensor), right.as_subclass(Elsewhere))
    yield from (right.to(torch.int64), right.to(torch.float16), right.to(torch.float64))
    yield from (right.to("meta"), right.bool(), right[:-1], right[None], right.reshape(-1))
    yield right.transpose(0, -1)
    yield from (right.to_sparse(), torch.nested.nested_tensor([right]))
    yield torch.stack([right, right], -1)[..., 0]  # every other element
    yield right[:1].expand(right.shape)
    yield torch.empty_strided(right.shape, (0,) * right.dim(), dtype=right.dtype)
    yield torch.cat((right, right))[: len(right)]
    yield from (CASE.q, CASE.k_cache[: len(right)], right.detach()[: len(right)])
    with torch.inference_mode():
        yield right.clone()
    if right.is_floating_point():
        yield right.clone().requires_grad_()
        yield torch.nn.Parameter(right.clone())
        yield torch.complex(right, right).conj().imag  # its minus is to come
        yield torch.quantize_per_tensor(right.nan_to_num(), 0.1, 0, torch.qint8)
    else:
        yield from (right - 1, right + 1, -right, right + 2**40, right * 0)


def fresh() -> tuple[AttentionCase, PrefixDecodeWrapper]:
    """A batch, with tensors that a call may spoil, and a wrapper that has planned it."""
    case = make()
    wrapper = PrefixDecodeWrapper(**HEADS, executor="torch")
    wrapper.plan(case.req_to_token, case.req_pool_indices, case.seq_lens)
    return case, wrapper


def check_runs(case: AttentionCase, wrapper: PrefixDecodeWrapper, **expected: Any) -> None:
    """The wrapper's plan gives the oracle's result at the lengths of ``case``."""
    found = wrapper.run(case.q, case.k_cache, case.v_cache, return_lse=True)
    assert_close(found, replace(case, **expected).oracle())  # type: ignore[arg-type]


def right_for(function: Callable[..., Any], case: AttentionCase) -> Arguments:
    """Arguments that are legal, those that may be left out included."""
    lens, grown = case.seq_lens, case.seq_lens + 1
    new_slots = torch.from_numpy(BATCH.growth_slots[:, 0].copy()).int()
    outputs = dict(zip(("out", "lse"), case.poisoned_outputs(), strict=True))
    paths = [RadixPath((1, 2), (33, 40)), RadixPath((1,), (33,)), RadixPath((), ())]
    rows, host_lens = BATCH.rows.copy(), BATCH.seq_lens.copy()
    index = {"req_to_token": case.req_to_token, "req_pool_indices": case.req_pool_indices}
    layer = {"q": case.q, "k_cache": case.k_cache, "v_cache": case.v_cache}
    shape = AttentionShape(4, 2, 16, 16, 4, 4)
    rights: dict[Any, Arguments] = {
        PrefixDecodeWrapper: HEADS,
        PrefixDecodeWrapper.plan: {**index, "seq_lens": lens, "forest": BATCH.forest()},
        PrefixDecodeWrapper.advance: {"seq_lens": grown, "new_slots": new_slots},
        PrefixDecodeWrapper.run: {**layer, **outputs, "seq_lens": lens},
        PrefixForest.from_rows: {"rows": rows, "seq_lens": host_lens, "limits": host_lens - 1},
        PrefixForest.from_paths: {"paths": paths, "limits": [40, 33, 0], "seq_lens": [41, 40, 5]},
        PrefixForest.from_neighbours: {
            "order": np.arange(3),
            "common": np.array([4, 2]),
            "seq_lens": np.array([5, 6, 7]),
        },
        PrefixForest: {name: getattr(BATCH.forest(), name) for name in PrefixForest.__slots__},
        PackPlanner: {"shape": shape, "device": CPU_PROFILE},
        PackPlanner.plan: {"forest": BATCH.forest(), "padded_batch_size": 3},
        PackPlanner.costs_of: {"padded_batch_size": 3},
        AttentionShape: dict.fromkeys(AttentionShape.__slots__, 2) | {"v_in_k": False},
    }
    return rights[function]


CALLABLES: dict[str, Any] = {
    "wrapper": PrefixDecodeWrapper,
    **{name: getattr(PrefixDecodeWrapper, name) for name in ("plan", "advance", "run")},
    **{n: getattr(PrefixForest, n) for n in ("from_rows", "from_paths", "from_neighbours")},
    "forest": PrefixForest,
    "planner": PackPlanner,
    "planner.plan": PackPlanner.plan,
    "planner.costs_of": PackPlanner.costs_of,
    "shape": AttentionShape,
}
# Of our own types, which a caller does not make: checked where they are made.
OUR_OWN = [("planner", name) for name in ("shape", "device", "batch_profile")]
EVERY_ARGUMENT = [
    pytest.param(function, argument, id=f"{name}-{argument}")
    for name, function in CALLABLES.items()
    for argument in inspect.signature(function).parameters
    if argument != "self" and (name, argument) not in OUR_OWN
]


def public_methods(cls: type) -> set[str]:
    return {n for n, member in vars(cls).items() if callable(member) and not n.startswith("_")}


def test_every_public_method_is_here() -> None:
    assert public_methods(PrefixDecodeWrapper) == {"plan", "advance", "run"}
    constructors = {n for n in vars(PrefixForest) if n.startswith("from_")}
    assert constructors <= set(CALLABLES)
    assert public_methods(PackPlanner) == {"plan", "costs_of"}


def is_refused(argument: str, call: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether it raises as it should; and what it returns if not."""
    try:
        return False, call()
    except ValueError as error:
        message = str(error)
        assert re.search(rf"\b{argument}\b", message), message
        assert "legal" in message
        assert message.isprintable(), message
        assert len(message) < 500
        return True, None


def attempt(function: Any, argument: str, value: Any) -> bool:
    """Call with one value exchanged; True if it was used, and everything was right."""
    case, wrapper = fresh()
    arguments = right_for(function, case) | {argument: value}
    owner: Any = wrapper
    if function in (PackPlanner.plan, PackPlanner.costs_of):
        owner = PackPlanner(AttentionShape(4, 2, 16, 16, 4, 4), CPU_PROFILE)
    is_method = "self" in inspect.signature(function).parameters
    called = [owner] if is_method else []
    # Which of a forest's arrays is the wrong one nobody can tell.
    named = "forest" if function is PrefixForest else argument
    refused, result = is_refused(named, lambda: function(*called, **arguments))
    if refused:
        check_runs(case, wrapper)
    elif isinstance(result, PrefixForest):
        check_invariants(result)
    elif function is PrefixDecodeWrapper:
        check_new_wrapper(result)
    elif function is PrefixDecodeWrapper.run:
        check_result(replace(case), arguments, result)
        check_runs(case, wrapper)
    elif function is PrefixDecodeWrapper.plan:
        rows = {name: arguments[name] for name in ("req_to_token", "req_pool_indices")}
        # Slots are compared with the caches as soon as there are some.
        rows["seq_lens"] = arguments["seq_lens"]
        refused, _ = is_refused("req_to_token", lambda: check_runs(case, wrapper, **rows))
    elif function is PrefixDecodeWrapper.advance:
        check_advanced(case, wrapper, arguments)
    return not refused


def check_new_wrapper(wrapper: PrefixDecodeWrapper) -> None:
    """It does what it was made for, where that is small enough to try."""
    dims = wrapper.head_dim, wrapper.v_head_dim
    size = wrapper.num_qo_heads * max(dims)
    if size > 1 << 14 or wrapper.device.type != "cpu" or (wrapper.max_batch_size or 4) < 4:
        return
    if (wrapper.max_partials or 4) < 4 or (wrapper.max_kv_tokens or 1000) < 1000:
        return
    case = make_case(
        BATCH,
        num_kv_heads=wrapper.num_kv_heads,
        group=wrapper.num_qo_heads // wrapper.num_kv_heads,
        head_dim=dims[0],
        v_head_dim=dims[1],
        v_in_k=wrapper.v_in_k,
        dtype=wrapper.q_dtype,
        kv_dtype=wrapper.kv_dtype,
    )
    case.sm_scale, case.options = wrapper.sm_scale, {"logit_cap": wrapper.logit_cap}
    wrapper.plan(case.req_to_token, case.req_pool_indices, case.seq_lens)
    out, lse = wrapper.run(case.q, case.k_cache, case.v_cache, return_lse=True)
    check_outputs(out, lse, case)


def check_outputs(out: torch.Tensor, lse: torch.Tensor | None, case: AttentionCase) -> None:
    """Finite, and the oracle's where float32 can tell the scores apart."""
    assert torch.isfinite(out).all()
    assert lse is None or torch.isfinite(lse).all()
    expected_out, expected_lse = case.oracle()
    if expected_lse.abs().max() < 1e3 and expected_out.abs().max() < 1e3:
        # A scale of V scales the errors, too. A power of two rounds nothing.
        scale = 2.0 ** max(0, math.frexp(float(expected_out.abs().max()))[1])
        assert_close(
            (out / scale, expected_lse.float() if lse is None else lse),
            (expected_out / scale, expected_lse),
        )


def check_result(case: AttentionCase, arguments: Arguments, result: Any) -> None:
    given = {**arguments, "q": arguments["q"].detach()}
    out = result[0] if isinstance(result, tuple) else result
    assert isinstance(result, tuple) == bool(arguments.get("return_lse"))
    assert given["out"] is None or out is given["out"]
    names = ("logit_cap", "k_scale", "v_scale")
    case.options = {name: given[name] for name in names if given.get(name) is not None}
    case.options = {n: v if torch.is_tensor(v) else float(v) for n, v in case.options.items()}
    case.sm_scale = float(case.sm_scale if given.get("sm_scale") is None else given["sm_scale"])
    for name in ("q", "k_cache", "v_cache", "seq_lens"):
        if given[name] is not None:
            setattr(case, name, given[name].detach())
    check_outputs(out, given["lse"], case)


def check_advanced(case: AttentionCase, wrapper: PrefixDecodeWrapper, arguments: Arguments) -> None:
    """The new slots are in use: the table that the oracle reads gets them, too."""
    slots, lens = arguments["new_slots"], arguments["seq_lens"]
    if int(slots.max()) >= len(case.k_cache):  # known as soon as there is a cache
        with pytest.raises(ValueError, match="new_slots reach"):
            check_runs(case, wrapper)
        return
    case.req_to_token[case.req_pool_indices, case.seq_lens] = slots.to(case.req_to_token.dtype)
    check_runs(case, wrapper, seq_lens=lens)


@pytest.mark.parametrize(("function", "argument"), EVERY_ARGUMENT)
def test_values_of_every_kind(function: Any, argument: str) -> None:
    case, _ = fresh()
    right = right_for(function, case).get(argument)
    used = 0
    for number, value in enumerate((*PLAIN, *variants(right))):
        try:
            used += attempt(function, argument, value)
        except BaseException as error:
            error.add_note(f"value {number}, a {type(value).__name__}")
            raise
    assert used < len(PLAIN), "nearly everything passes, so nothing is looked at"


NUMBERS = st.one_of(
    st.integers(),
    st.integers(-2, 9),
    st.floats(),
    st.floats(1e-12, 1e12),
    st.fractions(),
    st.decimals(),
    st.builds(np.float32, st.floats(width=32)),
)


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        pytest.param(function, argument, id=f"{function.__name__}-{argument}")
        for function in (PrefixDecodeWrapper, PrefixDecodeWrapper.run)
        for argument, parameter in inspect.signature(function).parameters.items()
        if re.search("int|float", str(parameter.annotation))
    ],
)
@given(value=NUMBERS)
def test_numbers(function: Any, argument: str, value: Any) -> None:
    attempt(function, argument, value)


LEGAL = st.floats(2.0**-32, 2.0**32)


@pytest.mark.parametrize("executor", ["torch", "native", "triton"])
@settings(max_examples=10)
@given(sm_scale=LEGAL, k_scale=LEGAL, v_scale=LEGAL, logit_cap=st.just(0.0) | LEGAL)
def test_legal_numbers_together_stay_finite(executor: str, **numbers: float) -> None:
    """Their products and quotients, too."""
    case, _ = fresh()
    wrapper = PrefixDecodeWrapper(**HEADS, executor=executor)
    wrapper.plan(case.req_to_token, case.req_pool_indices, case.seq_lens)
    given_numbers: Arguments = dict(numbers)
    layer = case.q, case.k_cache, case.v_cache
    for part in wrapper.run(*layer, return_lse=True, **given_numbers):
        assert torch.isfinite(part).all()


@pytest.mark.parametrize("executor", ["torch", "native", "triton"])
@settings(max_examples=10)
@given(logit_cap=LEGAL | st.floats(1.0, 1e6))
def test_every_cap_is_the_oracles(executor: str, logit_cap: float) -> None:
    """Far above the scores it changes nothing; far below it is all that is left of them."""
    case, _ = fresh()
    wrapper = PrefixDecodeWrapper(**HEADS, executor=executor)
    wrapper.plan(case.req_to_token, case.req_pool_indices, case.seq_lens)
    layer = case.q, case.k_cache, case.v_cache
    found = wrapper.run(*layer, return_lse=True, logit_cap=logit_cap)
    expected = replace(case, options={"logit_cap": logit_cap}).oracle()
    assert_close(found, expected)  # type: ignore[arg-type]
