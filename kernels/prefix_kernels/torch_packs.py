"""How the torch executor takes a plan apart on the host: slots, runs of slots, blocks of tokens.

Nothing here reads a device value; runs of consecutive slots are looked for on the CPU alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.plan import PackPlan, split_bounds

__all__ = ["Span", "TorchPack", "copy_slots", "prepare_packs"]

IntArray = NDArray[np.int64]

# Scores computed at a time (2 MiB of float32): small enough to stay in the cache between the two
# products, large enough to amortise a torch call.
SCORE_BLOCK_ELEMENTS = 1 << 19
MIN_BLOCK_TOKENS = 256
# The rows of many query tokens may be far more; 64 MiB then bound the memory, in shorter blocks.
MAX_SCORE_ELEMENTS = 1 << 24
# Consecutive slots are read in place from this length on. A shorter run costs more in calls than
# gathering it together with its neighbours does.
MIN_RUN_TOKENS = 256


class Span(NamedTuple):
    """Tokens ``[begin, end)`` of a pack; ``first_slot`` is -1 where slots are scattered."""

    begin: int
    end: int
    first_slot: int


@dataclass(slots=True)
class TorchPack:
    """One pack, ready to run.

    Attributes:
        queries: [n] int64 on the device, rows of q; the row itself for one query.
        num_queries: n.
        slot_offset: where its slots begin in ``kv_slots``.
        num_splits: splits of the pack.
        planned_length: tokens when the plan was made; of a tail of several queries those whose
            slots stay, which are all but the queries' own, the first excepted.
        partials: per split, the partials of its queries, like ``queries``.
        is_causal: whether it is a tail of several queries, of which each sees up to its own token.
        length: tokens that it holds now.
        runs: spans of the planned tokens whose slots are consecutive, or scattered.
        blocks: per split, spans taken in one go, of the tokens that the pack holds now.
    """

    queries: torch.Tensor | int
    num_queries: int
    slot_offset: int
    num_splits: int
    planned_length: int
    partials: Sequence[torch.Tensor | int]
    is_causal: bool = False
    length: int = 0
    runs: list[Span] = field(default_factory=list)
    blocks: list[list[Span]] = field(default_factory=list)

    def hidden(self, block: Span, device: torch.device) -> torch.Tensor | None:
        """[n, tokens] which tokens of a block a query of a tail does not see; None for none.

        Query ``j`` of ``n`` sees all of a tail but its last ``n - j - 1`` tokens.
        """
        first = self.length - self.num_queries + 1  # that some query does not see
        if not self.is_causal or block.end <= first:
            return None
        tokens = torch.arange(block.begin, block.end, device=device)
        sees = torch.arange(first, self.length + 1, device=device)
        return tokens >= sees[:, None]

    def cut(self, length: int, num_qo_heads: int) -> None:
        """Cut the pack, of ``length`` tokens now, into its splits, and those into blocks."""
        num_rows = self.num_queries * num_qo_heads
        size = max(MIN_BLOCK_TOKENS, SCORE_BLOCK_ELEMENTS // num_rows)
        size = min(size, max(1, MAX_SCORE_ELEMENTS // num_rows))
        self.length = length
        runs = self._grown_runs(length)
        self.blocks = [
            _blocks(runs, *split_bounds(length, self.num_splits, split), size)
            for split in range(self.num_splits)
        ]

    def _grown_runs(self, length: int) -> list[Span]:
        """The runs of ``length`` tokens; what a tail has gained counts as scattered."""
        if length <= self.planned_length:
            return self.runs
        if self.planned_length < MIN_RUN_TOKENS:
            return [Span(0, length, -1)]
        if self.runs[-1].first_slot < 0:
            return [*self.runs[:-1], self.runs[-1]._replace(end=length)]
        return [*self.runs, Span(self.planned_length, length, -1)]


def prepare_packs(plan: PackPlan, kv_slots: torch.Tensor) -> list[TorchPack]:
    """The packs of a plan with their runs, not cut into blocks yet.

    Args:
        plan: the plan.
        kv_slots: its slots, on the device where it runs.
    """
    device = kv_slots.device
    counts = np.diff(plan.query_indptr).tolist()
    num_splits = plan.num_splits.tolist()
    first_query = plan.queries[plan.query_indptr[:-1]].tolist()
    queries = torch.from_numpy(plan.queries).to(device).split(counts)
    sizes = [n for n, splits in zip(counts, num_splits, strict=True) for _ in range(splits)]
    partials = torch.from_numpy(plan.partial_index).to(device).split(sizes)
    single_partials = plan.partial_index[np.cumsum([0, *sizes[:-1]])].tolist()
    offsets, lengths = plan.slot_offset.tolist(), _settled_lengths(plan).tolist()
    packs = []
    at = 0
    for p, (count, splits) in enumerate(zip(counts, num_splits, strict=True)):
        own = slice(at, at + splits)
        at += splits
        packs.append(
            TorchPack(
                queries[p] if count > 1 else first_query[p],
                count,
                offsets[p],
                splits,
                lengths[p],
                partials[own] if count > 1 else single_partials[own],
                count > 1 and p >= plan.num_shared_packs,
            )
        )
    if device.type == "cpu":
        _find_runs(packs, plan, kv_slots.numpy())
    else:
        for pack in packs:
            pack.runs = [Span(0, pack.planned_length, -1)]
    return packs


def _settled_lengths(plan: PackPlan) -> IntArray:
    """[P] tokens of each pack whose slots stay while the plan does: see `PlanExecutor.append`."""
    lengths = plan.pack_end - plan.pack_start
    if plan.query_lens is not None:
        lengths[plan.num_shared_packs :] -= plan.query_lens - 1
    return lengths


def _find_runs(packs: list[TorchPack], plan: PackPlan, slots: IntArray) -> None:
    """Find the segments of consecutive slots in every pack."""
    breaks = np.flatnonzero(slots[1:] != slots[:-1] + 1) + 1
    lengths = _settled_lengths(plan)
    offsets = plan.slot_offset[:-1]
    first_break = np.searchsorted(breaks, offsets, side="right").tolist()
    last_break = np.searchsorted(breaks, offsets + lengths, side="left").tolist()
    first_slot = slots[np.minimum(offsets, len(slots) - 1)].tolist()
    for p, pack in enumerate(packs):
        if first_break[p] >= last_break[p]:  # one segment, or no token yet
            slot = first_slot[p] if pack.planned_length else -1
            pack.runs = [Span(0, pack.planned_length, slot)]
            continue
        cuts = (breaks[first_break[p] : last_break[p]] - pack.slot_offset).tolist()
        pack.runs = _long_runs([0, *cuts, pack.planned_length], slots, pack.slot_offset)


def _long_runs(edges: list[int], slots: IntArray, offset: int) -> list[Span]:
    """Turn the edges between consecutive segments into runs, short ones gathered together."""
    runs: list[Span] = []
    for begin, end in pairwise(edges):
        if end - begin >= MIN_RUN_TOKENS:
            runs.append(Span(begin, end, int(slots[offset + begin])))
        elif runs and runs[-1].first_slot < 0:
            runs[-1] = runs[-1]._replace(end=end)
        else:
            runs.append(Span(begin, end, -1))
    return runs


def _blocks(runs: list[Span], begin: int, end: int, size: int) -> list[Span]:
    """Blocks of at most ``size`` tokens that cover tokens [begin, end) of a pack."""
    found = []
    for run in runs:
        low, stop = max(run.begin, begin), min(run.end, end)
        while low < stop:
            high = min(low + size, stop)
            first_slot = run.first_slot + low - run.begin if run.first_slot >= 0 else -1
            found.append(Span(low, high, first_slot))
            low = high
    return found


def copy_slots(
    plan: PackPlan,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_slots: torch.Tensor,
) -> None:
    """Copy the slots of a plan's positions; those reserved for growing tails become 0.

    Args:
        plan: the plan.
        req_to_token: [rows, context] int32 or int64 on the device.
        req_pool_indices: [B] int32 or int64 on the device.
        kv_slots: [plan.num_slots] int64 on the device, written.
    """
    kv_slots.zero_()
    first_query = plan.queries[plan.query_indptr[:-1]]
    if plan.query_lens is not None:
        first_query = plan.request_of_row[first_query]
    starts, ends, offsets = plan.pack_start, plan.pack_end, plan.slot_offset[:-1]
    if kv_slots.device.type == "cpu":  # row by row, which is faster here than one indexed copy
        table, target = req_to_token.numpy(), kv_slots.numpy()
        rows = req_pool_indices.numpy()[first_query]
        for row, start, end, offset in np.stack((rows, starts, ends, offsets), axis=1).tolist():
            target[offset : offset + end - start] = table[row, start:end]
        return
    lengths = ends - starts
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    target_index, request, position = (
        torch.from_numpy(part).to(kv_slots.device, non_blocking=True)
        for part in (
            np.repeat(offsets, lengths) + within,
            np.repeat(first_query, lengths),
            np.repeat(starts, lengths) + within,
        )
    )
    rows_on_device = req_pool_indices.long()[request]
    kv_slots[target_index] = req_to_token[rows_on_device, position].long()
