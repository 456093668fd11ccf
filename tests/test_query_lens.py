"""Queries of several tokens: plans and the wrapper, against the float64 oracle.

What executors make of them is in test_query_lens_executors.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefix_kernels.plan import PackPlan, verify_plan
from sglang_prefix import PrefixDecodeWrapper, PrefixForest
from sglang_prefix.packing import CPU_PROFILE, GPU_PROFILE, POLICIES, AttentionShape, CostModel
from sglang_prefix.packing.pat import pack_pat
from sglang_prefix.packing.planner import PackPlanner
from tests.attention import SPLITS, AttentionCase, make_case
from tests.attention import assert_close as close
from tests.forests import Batch, Fork, batches, build_batch, random_batch
from tests.pack_reference import cheapest_fold, cost_models, pack_cost
from tests.several_queries import COUNTS, FORKS, query_lens, verify_step

pytestmark = pytest.mark.usefixtures("nan_memory")

SHAPE = AttentionShape(8, 2, 64, 64, 2, 2)


@given(batch=batches(max_tokens=300), data=st.data())
def test_nothing_of_several_query_tokens_is_shared(batch: Batch, data: st.DataObject) -> None:
    """So a tail of several queries is never empty: it holds their own tokens at least."""
    counts = np.array(data.draw(query_lens(batch)))
    policy = data.draw(st.sampled_from([*POLICIES]))
    planner = PackPlanner(SHAPE, CPU_PROFILE, policy=policy)
    plan = planner.plan(batch.forest(), query_lens=counts)
    verify_plan(plan)
    before = batch.seq_lens - counts
    for pack in range(plan.num_shared_packs):
        requests = np.unique(plan.request_of_row[plan.pack_queries(pack)])
        several = requests[counts[requests] > 1]
        assert (plan.pack_end[pack] <= before[several]).all()
        assert len(plan.pack_queries(pack)) == counts[requests].sum()
    tails = batch.seq_lens - plan.tail_start
    assert (tails[counts > 1] >= counts[counts > 1]).all()
    assert plan.num_rows == counts.sum()


@given(batch=batches(page_sizes=(1,)), data=st.data())
def test_a_forest_is_limited_as_rows_are(batch: Batch, data: st.DataObject) -> None:
    limits = np.array([data.draw(st.integers(0, n)) for n in batch.seq_lens.tolist()])
    expected = PrefixForest.from_rows(batch.rows, batch.seq_lens, limits=limits)
    assert batch.forest().limited_to(limits).sharing() == expected.sharing()


def test_one_query_token_each_is_todays_plan() -> None:
    batch = build_batch(FORKS)
    for profile in (CPU_PROFILE, GPU_PROFILE):
        planner = PackPlanner(SHAPE, profile)
        ones = np.ones(len(FORKS), dtype=np.int64)
        plan = planner.plan(batch.forest(), query_lens=ones)
        assert plan.query_lens is None
        assert plan.same_as(planner.plan(batch.forest()))


@given(batch=batches(max_requests=6), costs=cost_models((CPU_PROFILE, GPU_PROFILE)), data=st.data())
def test_packs_are_the_cheapest_for_their_rows(
    batch: Batch, costs: CostModel, data: st.DataObject
) -> None:
    counts = data.draw(query_lens(batch))
    forest = batch.forest().limited_to(batch.seq_lens - counts)
    packs = pack_pat(forest, costs, np.array(counts))
    found = pack_cost(packs, forest.seq_lens, costs, counts)
    assert found == pytest.approx(cheapest_fold(forest, costs, counts), rel=1e-12)


def test_query_tokens_fill_tiles() -> None:
    """Eight of one request, in a group of 16, are the 128 rows of the widest tile."""
    batch, shape = build_batch([Fork(0, 0, 4096)]), AttentionShape(32, 2, 128, 128, 2, 2)
    planner = PackPlanner(shape, GPU_PROFILE)
    for count, rows in ((1, 16), (2, 32), (8, 128)):
        plan = planner.plan(batch.forest(), query_lens=np.array([count]))
        (load_,) = plan.loads()
        assert load_.rows == rows
        assert load_.num_items == 2 * plan.num_splits[0] > 2
        assert plan.stats().num_partials == count * plan.num_splits[0]


def test_a_bound_on_partials_counts_query_tokens() -> None:
    forest, counts = build_batch(FORKS).forest(), np.array(COUNTS)
    most = sum(COUNTS)
    plan = PackPlanner(SHAPE, CPU_PROFILE, max_partials=most).plan(forest, query_lens=counts)
    assert plan.num_partials == most
    assert plan.refused_partials > most
    with pytest.raises(ValueError, match=f"max_partials={most - 1} is below the {most} queries"):
        PackPlanner(SHAPE, CPU_PROFILE, max_partials=most - 1).plan(forest, query_lens=counts)


@pytest.mark.parametrize(
    "field", ["query_lens", *(f.name for f in fields(PackPlan) if f.type == "IntArray")]
)
def test_the_verifier_finds_every_entry_that_is_off_by_one(field: str) -> None:
    forks = [Fork(0, 0, 60), Fork(0, 50, 9), Fork(1, 55, 3), Fork(9, 0, 4)]
    planner = PackPlanner(SHAPE, SPLITS, policy="node", reserved_tail_slots=3)
    plan = planner.plan(build_batch(forks).forest(), query_lens=np.array([3, 1, 6, 4]))
    assert plan.num_shared_packs == 2
    assert (plan.num_splits > 1).any()
    verify_plan(plan)
    for index in range(len(getattr(plan, field))):
        for by in (-1, 1):
            array = getattr(plan, field).copy()
            array[index] += by
            with pytest.raises(RuntimeError, match="the pack plan is wrong"):
                verify_plan(replace(plan, **{field: array}))


# The wrapper


def wrapper_of(case: AttentionCase, **options: Any) -> PrefixDecodeWrapper:
    heads, dims = (case.q.shape[1], case.k_cache.shape[1]), case.q.shape[2]
    return PrefixDecodeWrapper(*heads, dims, q_dtype=case.q.dtype, **options)


def indices_of(case: AttentionCase) -> Sequence[torch.Tensor]:
    return case.req_to_token, case.req_pool_indices, case.seq_lens


def check(wrapper: PrefixDecodeWrapper, case: AttentionCase, **options: Any) -> None:
    out, lse = case.poisoned_outputs()
    wrapper.run(case.q, case.k_cache, case.v_cache, out=out, lse=lse, **options)
    close((out, lse), case.oracle(options.get("seq_lens")))


@pytest.mark.parametrize(
    ("executor", "page_size"),
    [*product(("torch", "native"), (1, 16)), ("triton", 1)],
)
def test_the_wrapper(executor: str, page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of rows and of a forest, growth with and without new slots, lengths of one call."""
    monkeypatch.setenv("SGLANG_PREFIX_VERIFY", "1")
    size, most = (7, 60) if executor == "triton" else (9, 90)  # interpreted
    batch = random_batch(3, num_requests=size, max_tokens=most, page_size=page_size, growth=30)
    counts = [min(n, 1 + b % 5) for b, n in enumerate(batch.seq_lens.tolist())]
    case = make_case(batch, head_dim=16, query_lens=counts)
    assert case.query_lens is not None
    wrapper = wrapper_of(case, executor=executor, page_size=page_size, policy="node")
    for forest in (None, batch.forest()):
        wrapper.plan(*indices_of(case), forest=forest, query_lens=case.query_lens.int())
        check(wrapper, case)
    assert wrapper.current_plan.num_shared_packs > 0
    rng = np.random.default_rng(5)
    for step in range(2):
        _, slots = verify_step(case, rng, at=5 * step)
        wrapper.advance(case.seq_lens, slots, rewrite=True)
        check(wrapper, case)
    lens, new = case.seq_lens, batch.growth_slots[:, 20:22]
    for b, (row, n) in enumerate(zip(case.req_pool_indices, lens.tolist(), strict=True)):
        case.req_to_token[row, n : n + 2] = torch.from_numpy(new[b]).int()
    check(wrapper, case, seq_lens=lens + 2)
    check(wrapper, case)
    case.seq_lens = lens + 2
    wrapper.advance(case.seq_lens, torch.from_numpy(new.ravel()))
    check(wrapper, case)


def test_what_the_wrapper_refuses() -> None:
    """One line each, and the plan in use still runs."""
    case = make_case(build_batch(FORKS), head_dim=16, query_lens=COUNTS)
    assert case.query_lens is not None
    wrapper = wrapper_of(case)
    wrapper.plan(*indices_of(case), query_lens=case.query_lens)

    def lens(at: int, value: int) -> torch.Tensor:
        found = torch.tensor(COUNTS)
        found[at] = value
        return found

    for wrong, says in (
        (lens(2, 0), r"query_lens[2]=0; legal: 1 to 371, the tokens of the request"),
        (lens(4, -3), r"query_lens[4]=-3; legal: 1 to 70, "),
        (lens(4, 71), r"query_lens[4]=71; legal: 1 to 70, "),
        (torch.tensor(COUNTS[:-1]), "query_lens has shape (7,); legal: [8], as req_pool_indices"),
        (torch.tensor([COUNTS]), "query_lens has shape (1, 8); legal"),
        (torch.tensor(COUNTS).float(), "query_lens has dtype torch.float32; legal: torch.int32, "),
        (COUNTS, "query_lens is a list; legal: a torch.Tensor"),
        (torch.tensor(COUNTS, device="meta"), "query_lens is on meta, which holds no values"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)) as refusal:
            wrapper.plan(*indices_of(case), query_lens=wrong)  # type: ignore[arg-type]
        assert "\n" not in str(refusal.value)
        check(wrapper, case)
    with pytest.raises(ValueError, match=r"q has shape \(8, 4, 16\); legal: \[154, 4, 16\]"):
        wrapper.run(case.q[:8], case.k_cache, case.v_cache)
    grown, slots = case.seq_lens.clone(), torch.zeros(sum(COUNTS) - 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"seq_lens\[0\]=400 does not grow; legal with rewrite"):
        wrapper.advance(grown, slots, rewrite=True)
    with pytest.raises(ValueError, match=r"new_slots has shape \(152,\); legal: \[154\], one per"):
        wrapper.advance(grown + 1, slots, rewrite=True)
    with pytest.raises(ValueError, match="rewrite=1; legal: True or False"):
        wrapper.advance(grown + 1, slots, rewrite=1)  # type: ignore[arg-type]
    check(wrapper, case)
