"""Batches whose requests have several query tokens, and the steps of drafts that follow."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.attention import AttentionCase
from tests.forests import Batch, Fork

__all__ = ["COUNTS", "FORKS", "lens_of", "query_lens", "verify_step"]

IntArray = NDArray[np.int64]

# Three levels, uneven tails, one that ends inside a node, one alone, two that are equal.
FORKS = [Fork(0, 0, 400), Fork(0, 300, 90), Fork(1, 360, 11), Fork(0, 200, 0), Fork(9, 0, 70)]
FORKS += [Fork(0, 300, 30), Fork(1, 360, 50), Fork(6, 410, 0)]
COUNTS = [3, 1, 12, 5, 70, 1, 2, 60]  # within tails, straddling, all there is


@st.composite
def query_lens(draw: st.DrawFn, batch: Batch) -> list[int]:
    """One of a request, a few, more than a page, or all of its tokens."""
    found = []
    for length in batch.seq_lens.tolist():
        count = draw(st.sampled_from([1, 2, 5, batch.page_size + 3, length]))
        found.append(min(count, length))
    return found


def lens_of(case: AttentionCase) -> IntArray:
    assert case.query_lens is not None
    found: IntArray = case.query_lens.numpy()
    return found


def verify_step(
    case: AttentionCase, rng: np.random.Generator, at: int, most: int = 6
) -> tuple[IntArray, torch.Tensor]:
    """Accept some of the drafts and bring new ones, whose slots stand behind the accepted ones:
    what each request grows by, and the slots. Those of rejected drafts are no request's any more.
    """
    counts = lens_of(case)
    grown = rng.integers(1, np.minimum(counts, most) + 1)
    case.seq_lens = case.seq_lens + torch.from_numpy(grown)
    slots = []
    for b, (length, n) in enumerate(zip(case.seq_lens.tolist(), counts.tolist(), strict=True)):
        new = torch.from_numpy(case.batch.growth_slots[b, at : at + n])
        case.req_to_token[case.req_pool_indices[b], length - n : length] = new.int()
        slots.append(new)
    case.q = torch.from_numpy(rng.standard_normal(case.q.shape)).to(case.q.dtype)
    return grown, torch.cat(slots)
