"""Queries of several tokens: every executor against the float64 oracle, and controls.

The Triton kernels run in Triton's interpreter, on smaller batches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_kernels.native_executor import NativeExecutor
from prefix_kernels.plan import verify_slots
from prefix_kernels.torch_packs import TorchPack
from prefix_kernels.triton_executor import TritonExecutor
from prefix_kernels.work_list import ITEM_FIELDS
from sglang_prefix.packing import POLICIES, DeviceProfile
from tests.attention import SPLITS, TRITON, WHOLE, AttentionCase, Loaded, load, make_case
from tests.attention import assert_close as close
from tests.forests import Batch, Fork, batches, build_batch
from tests.pack_reference import splitting
from tests.several_queries import COUNTS, FORKS, query_lens, verify_step

pytestmark = pytest.mark.usefixtures("nan_memory")

ON_CPU = ("torch", "native")
MORE = [pytest.param(way, marks=pytest.mark.extended) for way in TRITON[1:-1]]
every_way = pytest.mark.parametrize("way", [*ON_CPU, TRITON[0], TRITON[-1], *MORE])
few_ways = pytest.mark.parametrize("way", [*ON_CPU, TRITON[0]])
interpreted_ways = pytest.mark.parametrize("way", [TRITON[0], TRITON[-1], *MORE])
few_examples = settings(max_examples=settings().max_examples // 4)

FEW_SPLITS = splitting(DeviceProfile("few", 16, 0.4, 100, 8), num_workers=4)

# As FORKS, for the interpreter.
SHORT = [Fork(0, 0, 40), Fork(0, 30, 9), Fork(1, 36, 5), Fork(0, 20, 0), Fork(9, 0, 7)]
SHORT_COUNTS = [3, 1, 12, 5, 7]


def case_of(way: str, growth: int = 0, **options: Any) -> AttentionCase:
    """Queries within tails, straddling, and all that there is of a request."""
    if way in TRITON:
        batch = build_batch(SHORT, growth=growth)
        return make_case(batch, num_kv_heads=1, query_lens=SHORT_COUNTS, **options)
    return make_case(build_batch(FORKS, growth=growth), query_lens=COUNTS, **options)


@pytest.mark.parametrize("way", ON_CPU)
@given(data=st.data(), batch=batches(max_requests=8, max_tokens=80))
def test_generated_batches(way: str, data: st.DataObject, batch: Batch) -> None:
    check_generated(way, data, batch, [torch.float32, torch.float16, torch.bfloat16])


@interpreted_ways
@few_examples
@given(data=st.data(), batch=batches(max_requests=3, max_tokens=30))
def test_generated_batches_interpreted(way: str, data: st.DataObject, batch: Batch) -> None:
    check_generated(way, data, batch, [torch.float32, torch.float16])


def check_generated(way: str, data: st.DataObject, batch: Batch, dtypes: list[torch.dtype]) -> None:
    scales: dict[str, Any] = {"k_scale": 0.5, "v_scale": torch.tensor([0.5, 2.0])}
    dims = data.draw(st.sampled_from([(16, 16, False), (16, 24, False), (24, 16, True)]))
    # The kernels refuse latents of 8 bits.
    few = way in TRITON and dims[2]
    kv_dtypes = [None] if few else [None, torch.float8_e4m3fn, torch.float8_e5m2]
    case = make_case(
        batch,
        group=data.draw(st.sampled_from([1, 3, 4, 7])),
        head_dim=dims[0],
        v_head_dim=dims[1],
        v_in_k=dims[2],
        dtype=data.draw(st.sampled_from(dtypes)),
        kv_dtype=data.draw(st.sampled_from(kv_dtypes)),
        options=data.draw(st.sampled_from([{}, {"logit_cap": 2.0}, scales])),
        sinks=data.draw(st.sampled_from([None, torch.float32, torch.bfloat16])),
        query_lens=data.draw(query_lens(batch)),
        seed=data.draw(st.integers(0, 1 << 16)),
    )
    policy, profile = (
        data.draw(st.sampled_from([*POLICIES])),
        data.draw(st.sampled_from([WHOLE, SPLITS])),
    )
    loaded = load(case, way, policy, profile)
    verify_slots(loaded.plan, batch.rows)
    loaded.check()


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many threads while a test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


LONG = [Fork(0, 0, 1300), Fork(0, 600, 300), Fork(1, 700, 0), Fork(0, 1000, 20), Fork(9, 0, 520)]
LONG_COUNTS = [400, 290, 1, 21, 520]  # more than a tile of tokens, of rows, of an item's rows


@pytest.mark.parametrize("way", ON_CPU)
@pytest.mark.parametrize(
    ("order", "dtype"), [("contiguous", torch.float32), ("scattered", torch.bfloat16)]
)
def test_long_queries(way: str, order: str, dtype: torch.dtype, threads: int) -> None:
    """The bound crosses blocks, tiles, items and splits, and rows that see none of a split."""
    batch = build_batch(LONG, order=order)
    case = make_case(batch, num_kv_heads=1, head_dim=16, dtype=dtype, query_lens=LONG_COUNTS)
    for profile in (WHOLE, SPLITS):
        load(case, way, "node", profile).check()


@few_ways
@pytest.mark.parametrize("scale", [-0.3, 0.0, 30.0])
def test_scores_far_from_zero(way: str, scale: float) -> None:
    case = case_of(way, head_dim=32)
    case.sm_scale = scale
    found, expected = load(case, way, "node", SPLITS).run(), case.oracle()
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-4)


@interpreted_ways
def test_bounds_that_cross_tiles_and_row_blocks(way: str) -> None:
    """Of 64 and 128 rows, whose queries straddle them; of several KV tiles, and of splits."""
    batch = build_batch([Fork(0, 0, 100), Fork(0, 50, 40)])
    case = make_case(batch, num_kv_heads=1, group=3, head_dim=16, query_lens=[50, 24])
    for profile in (WHOLE, FEW_SPLITS):
        load(case, way, "node", profile).check()


@every_way
def test_padding_rows_get_zeros(way: str) -> None:
    case = case_of(way, head_dim=16)
    expected, size = case.oracle(), len(case.q)
    loaded = load(case, way, padded_batch_size=size + 5)
    case.q = torch.cat((case.q, torch.full_like(case.q[:5], torch.nan)))
    out, lse = loaded.run()
    close((out[:size], lse[:size]), expected)
    assert not out[size:].any()
    assert (lse[size:] == -torch.inf).all()


@pytest.mark.parametrize("way", ON_CPU)
@given(data=st.data(), batch=batches(max_requests=5, max_tokens=400, growth=24))
def test_steps_of_drafts_of_which_some_are_rejected(
    way: str, data: st.DataObject, batch: Batch
) -> None:
    check_steps(way, data, batch)


@interpreted_ways
@few_examples
@given(data=st.data(), batch=batches(max_requests=3, max_tokens=30, growth=24))
def test_steps_of_drafts_interpreted(way: str, data: st.DataObject, batch: Batch) -> None:
    check_steps(way, data, batch)


def check_steps(way: str, data: st.DataObject, batch: Batch) -> None:
    """A step of the kernels may be repeated, and what stands behind lengths and slots is padding.

    Three steps fill the 16 slots that are reserved at most.
    """
    counts = [min(n, data.draw(st.integers(1, 5))) for n in batch.seq_lens.tolist()]
    case = make_case(batch, num_kv_heads=1, head_dim=16, query_lens=counts)
    profile = data.draw(st.sampled_from([WHOLE, SPLITS]))
    loaded = load(case, way, data.draw(st.sampled_from([*POLICIES])), profile)
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 16)))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    padding = torch.tensor([1, 700])[: data.draw(st.integers(0, 2))]
    ran = data.draw(st.lists(st.booleans(), min_size=2, max_size=2))
    for step, runs in enumerate([*ran, True]):
        grown, slots = verify_step(case, rng, at=6 * step)
        lens = case.seq_lens
        if way in TRITON:
            lens, slots = (torch.cat((part.long(), padding)) for part in (lens, slots))
            loaded.executor.append(lens.to(dtype), slots.to(dtype))
        loaded.executor.append(lens.to(dtype), slots.to(dtype), num_new=grown)
        if runs:
            loaded.check()


@few_ways
def test_growth_is_refused_before_anything_is_written(way: str) -> None:
    case = make_case(build_batch(FORKS, growth=70), head_dim=16, query_lens=COUNTS)
    loaded = load(case, way)
    slots = torch.full((sum(COUNTS),), 10**6)  # which the next run would refuse
    wrong: Any
    for wrong, says in (
        (np.zeros(8, np.int64), "num_new[0]=0; legal: 1 to 3, the query tokens of the request"),
        (np.full(8, 2), "num_new[1]=2; legal: 1 to 1"),
        (np.ones(7, np.int64), "num_new has shape (7,) and dtype int64; legal: [8] of int64"),
        (np.ones(8), "num_new has shape (8,) and dtype float64; legal: [8] of int64"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            loaded.executor.append(case.seq_lens, slots, num_new=wrong)
    at_once = np.ones(8, np.int64)
    at_once[4] = 17  # of the 70 that it may grow by, and the 16 that are reserved
    with pytest.raises(RuntimeError, match="used up its reserved slots: plan again"):
        loaded.executor.append(case.seq_lens, slots, num_new=at_once)
    loaded.check()


# Controls: the comparison sees each of these.


def no_bound(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(loaded.executor, NativeExecutor):
        loaded.executor._plan.num_requests = 0  # so that no pack is a tail
        loaded.executor.cut()
    if isinstance(loaded.executor, TritonExecutor):
        plan = loaded.executor.buffers.plan
        for count, first in zip(plan[1:5].tolist(), plan[5:9].tolist(), strict=True):
            items = plan[first : first + ITEM_FIELDS * count].view(-1, ITEM_FIELDS)
            tails = torch.from_numpy(loaded.plan.seq_lens - loaded.plan.tail_start).int()
            is_tail = items[:, 5] < 0
            items[is_tail, 5] = tails[-1 - items[is_tail, 5]]
    monkeypatch.setattr(TorchPack, "hidden", lambda *_: None)


def bound_off_by_one(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    tails = loaded.plan.seq_lens - loaded.plan.tail_start
    loaded.executor.set_tail_lengths(tails - 1)


def newest_slots_kept(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if rejected drafts kept their positions."""
    kept = loaded.executor.kv_slots.clone()
    grown, slots = verify_step(loaded.case, np.random.default_rng(0), at=0)
    loaded.executor.append(loaded.case.seq_lens, slots, num_new=grown)
    loaded.executor.kv_slots.copy_(torch.where(kept > 0, kept, loaded.executor.kv_slots))


@few_ways
@pytest.mark.parametrize("change", [no_bound, bound_off_by_one, newest_slots_kept])
def test_control_a_change_is_seen(
    way: str,
    change: Callable[[Loaded, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load(case_of(way, growth=70, head_dim=32), way, "node", SPLITS)
    loaded.check()
    change(loaded, monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        loaded.check()
