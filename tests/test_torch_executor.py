"""What the torch executor alone has: runs of slots, blocks of scores, a merge of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefix_kernels import torch_executor, torch_packs
from prefix_kernels.torch_executor import merge_blocks, merge_partials
from sglang_prefix.packing import POLICIES, DeviceProfile
from tests.attention import SPLITS, TOLERANCES, WHOLE, Outputs, assert_close, load, make_case
from tests.forests import Fork, build_batch, random_batch

pytestmark = pytest.mark.usefixtures("nan_memory")

PROFILES = (WHOLE, SPLITS)
LONG = torch_packs.MIN_RUN_TOKENS


@pytest.mark.parametrize("order", ["contiguous", "scattered", "mixed"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_long_and_short_runs_of_slots(order: str, page_size: int) -> None:
    forks = [Fork(0, 0, 3 * LONG + 5), Fork(0, 2 * LONG, LONG + 40), Fork(0, LONG + 7, 30)]
    batch = build_batch([*forks, Fork(9, 0, 1), Fork(0, 0, LONG)], page_size=page_size, order=order)
    for policy in ("node", "query"):
        for profile in PROFILES:
            load(make_case(batch), "torch", policy, profile).check()


@pytest.mark.parametrize(
    "segments",
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
def test_mixed_runs_of_slots(segments: list[int]) -> None:
    """Segments of consecutive slots in a random order, on both sides of the threshold."""
    total = sum(segments)
    batch = build_batch([Fork(0, 0, total), Fork(0, total - 3, 20)])
    parts = np.split(batch.rows[0, :total], np.cumsum(segments)[:-1])
    row = np.concatenate([*parts[1::2], *parts[::2]])
    for b, pool_row in enumerate(batch.req_pool_indices.tolist()):
        batch.req_to_token[pool_row, : total - 3 * b] = row[: total - 3 * b]
    for policy in ("node", "query"):
        for profile in PROFILES:
            load(make_case(batch), "torch", policy, profile).check()


@pytest.mark.parametrize("planned", [1, LONG - 3, LONG, LONG + 9])
@pytest.mark.parametrize("order", ["contiguous", "scattered"])
@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_tails_grow_behind_runs(planned: int, order: str, profile: DeviceProfile) -> None:
    batch = build_batch([Fork(0, 0, planned), Fork(0, planned, 0)], order=order, growth=16)
    for policy in POLICIES:
        loaded = load(make_case(batch), "torch", policy, profile)
        for _ in range(16):
            loaded.executor.append(*loaded.case.grow())
        loaded.check()


@pytest.mark.parametrize(
    "sizes",
    [{"SCORE_BLOCK_ELEMENTS": 1, "MIN_BLOCK_TOKENS": 7}, {"MAX_SCORE_ELEMENTS": 100}],
    ids=["least", "most"],
)
def test_blocks_of_scores(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs longer than one block of scores go through the running maximum."""
    for name, size in sizes.items():
        monkeypatch.setattr(torch_packs, name, size)
    batch = random_batch(7, num_requests=12, max_tokens=200)
    for policy in POLICIES:
        load(make_case(batch, group=3), "torch", policy, SPLITS).check()


def merged(
    values: torch.Tensor,
    logs: torch.Tensor,
    counts: list[int],
    dtype: torch.dtype,
    sinks: torch.Tensor | None = None,
) -> Outputs:
    indptr = np.asarray([0, *np.cumsum(counts)])
    out = torch.full((len(counts), *values.shape[1:]), torch.nan, dtype=dtype)
    lse = torch.full((len(counts), values.shape[1]), torch.nan)
    merge_partials(values, logs, merge_blocks(indptr, values.device), out, lse, sinks)
    return out, lse


@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    empty=st.floats(0, 1),
    spread=st.sampled_from([1.0, 40.0]),
    dtype=st.sampled_from([*TOLERANCES]),
    seed=st.integers(0, 1 << 16),
)
def test_merge(
    counts: list[int], empty: float, spread: float, dtype: torch.dtype, seed: int
) -> None:
    """Ragged counts; partials over no tokens hold NaN and lse -inf, and weigh nothing."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    values = torch.randn(total, 3, 8, generator=generator)
    logs = torch.randn(total, 3, generator=generator) * spread
    unused = torch.rand(total, 3, generator=generator) < empty
    unused[np.cumsum(counts) - 1] = False  # at least one partial over some tokens
    logs[unused] = -torch.inf
    weighted = torch.where(unused[..., None], 0, values).double()
    values[unused] = torch.nan
    parts = zip(torch.split(weighted, counts), torch.split(logs.double(), counts), strict=True)
    expected = [
        ((torch.softmax(log, dim=0)[..., None] * part).sum(dim=0), torch.logsumexp(log, dim=0))
        for part, log in parts
    ]
    outs, lses = (torch.stack(some) for some in zip(*expected, strict=True))
    assert_close(merged(values, logs, counts, dtype), (outs, lses))
    sinks = torch.randn(3, generator=generator) * spread
    kept = lses.exp() / (lses.exp() + sinks.double().exp())
    assert_close(merged(values, logs, counts, dtype, sinks), (outs * kept[..., None], lses))


@given(
    counts=st.lists(st.integers(1, 9) | st.just(40), min_size=1, max_size=30),
    most=st.integers(1, 60),
)
def test_merge_blocks_are_bounded_and_leave_nothing_out(counts: list[int], most: int) -> None:
    """A request of many partials is not what all others are padded to."""
    indptr = np.asarray([0, *np.cumsum(counts)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_executor, "MERGED_AT_ONCE", most)
        blocks = merge_blocks(indptr, torch.device("cpu"))
        test_merge.hypothesis.inner_test(counts, 0.3, 1.0, torch.float32, 0)  # type: ignore[attr-defined]
    assert [blocks[0].begin, *(b.end for b in blocks)] == [*(b.begin for b in blocks), len(counts)]
    for block in blocks:
        padded = (block.end - block.begin) * max(counts[block.begin : block.end])
        assert padded <= most or block.end - block.begin == 1
        if block.numbers is not None and block.missing is not None:
            owned = block.numbers[~block.missing]
            assert owned.tolist() == [*range(block.first, block.last)]


def test_merge_of_one_partial_each_is_a_copy() -> None:
    values, logs = torch.randn(5, 4, 16), torch.randn(5, 4)
    out, lse = merged(values, logs, [1] * 5, torch.float32)
    assert torch.equal(out, values)
    assert torch.equal(lse, logs)
