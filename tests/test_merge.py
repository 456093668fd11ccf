"""Merging partials: the online softmax over what each request's packs and splits left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_kernels.merge import merge_partials
from tests.attention import assert_close

pytestmark = pytest.mark.usefixtures("nan_memory")


def merged(
    partial_out: torch.Tensor, partial_lse: torch.Tensor, counts: list[int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    indptr = torch.tensor([0, *np.cumsum(counts)])
    out = torch.full((len(counts), *partial_out.shape[1:]), torch.nan, dtype=dtype)
    lse = torch.full((len(counts), partial_out.shape[1]), torch.nan)
    merge_partials(partial_out, partial_lse, indptr, max(counts), out, lse)
    return out, lse


@settings(max_examples=50)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    empty=st.floats(0, 1),
    spread=st.sampled_from([1.0, 40.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
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
    expected_out, expected_lse = [], []
    for part, log in zip(
        torch.split(weighted, counts), torch.split(logs.double(), counts), strict=True
    ):
        expected_lse.append(torch.logsumexp(log, dim=0))
        expected_out.append((torch.softmax(log, dim=0)[..., None] * part).sum(dim=0))
    found = merged(values, logs, counts, dtype)
    assert_close(found, (torch.stack(expected_out), torch.stack(expected_lse)))


def test_merge_of_one_partial_each_is_a_copy() -> None:
    values, logs = torch.randn(5, 4, 16), torch.randn(5, 4)
    out, lse = merged(values, logs, [1] * 5, torch.float32)
    assert torch.equal(out, values)
    assert torch.equal(lse, logs)


def test_merge_does_not_depend_on_the_lse_of_others() -> None:
    """A request's result is the same whoever else is in the batch."""
    values, logs = torch.randn(7, 2, 4), torch.randn(7, 2)
    alone = merged(values[2:5], logs[2:5], [3], torch.float32)
    among = merged(values, logs, [2, 3, 2], torch.float32)
    torch.testing.assert_close(among[0][1], alone[0][0])
    torch.testing.assert_close(among[1][1], alone[1][0])
