"""The torch executor: runs a pack plan with batched matrix products, on the CPU or any device.

One pack is one product of all its query rows with its KV, head by head, so shared KV is read once
for all requests of the pack. KV is read in place where its slots are consecutive and gathered
where they are not; 16-bit and 8-bit values are widened block by block to float32, in which
everything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.executor import AttentionParams, PlanExecutor
from prefix_kernels.merge import merge_partials
from prefix_kernels.plan import AttentionShape, PackPlan, split_bounds
from prefix_kernels.slot_table import SlotTable

__all__ = ["TorchExecutor"]

IntArray = NDArray[np.int64]

# Scores computed at a time (2 MiB of float32): small enough to stay in the cache between the two
# products, large enough to amortise a torch call.
SCORE_BLOCK_ELEMENTS = 1 << 19
MIN_BLOCK_TOKENS = 256
# Consecutive slots are read in place from this length on. A shorter run costs more in calls than
# gathering it together with its neighbours does.
MIN_RUN_TOKENS = 256


@dataclass(slots=True)
class _Run:
    """Tokens ``[begin, end)`` of a pack; ``first_slot`` is -1 where slots are scattered."""

    begin: int
    end: int
    first_slot: int


class _Block(NamedTuple):
    """Tokens ``[low, high)`` of a pack, taken in one go; ``first_slot`` as in :class:`_Run`."""

    low: int
    high: int
    first_slot: int


@dataclass(slots=True)
class _Pack:
    """One pack, ready to run."""

    queries: torch.Tensor | int  # [n] int64 on the device; the batch row itself for one query
    num_queries: int
    slot_offset: int
    num_splits: int
    planned_length: int
    partials: Sequence[torch.Tensor | int]  # per split, like ``queries``
    runs: list[_Run] = field(default_factory=list)
    blocks: list[list[_Block]] = field(default_factory=list)  # per split, of the current length


class TorchExecutor(PlanExecutor):
    """Runs plans with torch operations; arguments as of :class:`PlanExecutor`.

    It cuts packs into blocks on the host, so it keeps the lengths of the tails there: those of the
    plan, and one token more for each step since.
    """

    name = "torch"

    def __init__(
        self, shape: AttentionShape, device: torch.device, *, check_slots: bool = False
    ) -> None:
        super().__init__(shape, device, check_slots=check_slots)
        self._packs: list[_Pack] = []
        self._num_shared = 0
        self._slots = SlotTable(device)
        self._tail_offset = np.zeros(0, dtype=np.int64)
        self._tail_lengths = np.zeros(0, dtype=np.int64)
        self._tails_are_cut = True
        self._num_partials = 0
        self._request_indptr = torch.zeros(1, dtype=torch.int64, device=device)
        self._max_partials_per_request = 0
        self._partial_out = torch.empty(0, device=device)
        self._partial_lse = torch.empty(0, device=device)

    @property
    def kv_slots(self) -> torch.Tensor:
        """Slots of the plan in use, int64, laid out by it."""
        return self._slots.kv_slots

    def set_tail_lengths(self, tail_lengths: IntArray) -> None:
        """Set the tokens [B] in each request's tail; the first layer to run cuts them anew."""
        self._tail_lengths = tail_lengths
        self._tails_are_cut = False

    def _load(
        self,
        plan: PackPlan,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        padded_batch_size: int,
    ) -> None:
        del padded_batch_size  # `run` sees how many rows there are
        self._slots.load(plan, req_to_token, req_pool_indices)
        self._num_shared = plan.num_shared_packs
        self._num_partials = plan.num_partials
        self._packs = self._prepare(plan)
        self._find_runs(plan)
        for pack in self._packs[: self._num_shared]:
            self._cut(pack, pack.planned_length)
        self._tail_offset = plan.tail_offset
        self.set_tail_lengths(plan.seq_lens - plan.tail_start)
        self._request_indptr = torch.from_numpy(plan.request_indptr).to(self.device)
        self._max_partials_per_request = int(np.diff(plan.request_indptr).max())
        if self._partial_out.shape[0] < plan.num_partials:
            shape = (plan.num_partials, self.shape.num_qo_heads)
            with torch.inference_mode(False):  # may be written from outside inference mode later
                self._partial_out = torch.empty(*shape, self.shape.v_head_dim, device=self.device)
                self._partial_lse = torch.empty(shape, device=self.device)

    def _append(self, seq_lens: torch.Tensor, new_slots: torch.Tensor) -> None:
        del seq_lens  # on the device, where reading them would wait
        target = self._tail_offset + self._tail_lengths
        self._write_slots(target, new_slots[: len(target)])
        self.set_tail_lengths(self._tail_lengths + 1)

    def _run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        params: AttentionParams,
    ) -> None:
        self._cut_tails()
        batch, heads = self._request_indptr.shape[0] - 1, self.shape.num_kv_heads
        out[batch:].zero_()
        q, out = q[:batch], out[:batch]
        if lse is not None:
            lse[batch:].fill_(-torch.inf)
            lse = lse[:batch]
        rows = q.float().view(batch, heads, -1, q.shape[2]) * (
            params.sm_scale * _per_head(params.k_scale)
        )
        partial_out = self._partial_out[: self._num_partials]
        partial_lse = self._partial_lse[: self._num_partials]
        out_by_head = partial_out.view(self._num_partials, heads, -1, self.shape.v_head_dim)
        lse_by_head = partial_lse.view(self._num_partials, heads, -1)
        for pack in self._packs:
            pack_rows = rows[pack.queries]
            if pack.num_queries > 1:
                # [n, Hkv, g, D] -> [Hkv, n * g, D]: the rows that read one head's KV together
                pack_rows = pack_rows.transpose(0, 1).reshape(heads, -1, q.shape[2])
            for blocks, partials in zip(pack.blocks, pack.partials, strict=True):
                values, logs = self._attend(
                    pack, blocks, pack_rows, k_cache, v_cache, params.logit_cap
                )
                if pack.num_queries > 1:
                    shape = (heads, pack.num_queries, -1)
                    out_by_head[partials] = values.view(*shape, self.shape.v_head_dim).transpose(
                        0, 1
                    )
                    lse_by_head[partials] = logs.view(shape).transpose(0, 1)
                else:
                    out_by_head[partials] = values
                    lse_by_head[partials] = logs[..., 0]
        v_scale = params.v_scale
        if isinstance(v_scale, torch.Tensor) or v_scale != 1.0:
            out_by_head.mul_(_per_head(v_scale))
        merge_partials(
            partial_out,
            partial_lse,
            self._request_indptr,
            self._max_partials_per_request,
            out,
            lse,
        )

    def _prepare(self, plan: PackPlan) -> list[_Pack]:
        counts = np.diff(plan.query_indptr).tolist()
        num_splits = plan.num_splits.tolist()
        first_query = plan.queries[plan.query_indptr[:-1]].tolist()
        queries = torch.from_numpy(plan.queries).to(self.device).split(counts)
        sizes = [n for n, splits in zip(counts, num_splits, strict=True) for _ in range(splits)]
        partials = torch.from_numpy(plan.partial_index).to(self.device).split(sizes)
        single_partials = plan.partial_index[np.cumsum([0, *sizes[:-1]])].tolist()
        offsets, lengths = plan.slot_offset.tolist(), (plan.pack_end - plan.pack_start).tolist()
        packs = []
        at = 0
        for p, (count, splits) in enumerate(zip(counts, num_splits, strict=True)):
            own = slice(at, at + splits)
            at += splits
            packs.append(
                _Pack(
                    queries[p] if count > 1 else first_query[p],
                    count,
                    offsets[p],
                    splits,
                    lengths[p],
                    partials[own] if count > 1 else single_partials[own],
                )
            )
        return packs

    def _find_runs(self, plan: PackPlan) -> None:
        """Find the stretches of consecutive slots, where looking costs no device sync."""
        if self.device.type != "cpu":
            for pack in self._packs:
                pack.runs = [_Run(0, pack.planned_length, -1)]
            return
        slots = self.kv_slots.numpy()
        breaks = np.flatnonzero(slots[1:] != slots[:-1] + 1) + 1
        lengths = plan.pack_end - plan.pack_start
        offsets = plan.slot_offset[:-1]
        first_break = np.searchsorted(breaks, offsets, side="right").tolist()
        last_break = np.searchsorted(breaks, offsets + lengths, side="left").tolist()
        first_slot = slots[np.minimum(offsets, len(slots) - 1)].tolist()
        for p, pack in enumerate(self._packs):
            if first_break[p] >= last_break[p]:  # one stretch, or no token yet
                slot = first_slot[p] if pack.planned_length else -1
                pack.runs = [_Run(0, pack.planned_length, slot)]
                continue
            cuts = (breaks[first_break[p] : last_break[p]] - pack.slot_offset).tolist()
            pack.runs = _long_runs([0, *cuts, pack.planned_length], slots, pack.slot_offset)

    def _cut_tails(self) -> None:
        """Cut the tails whose lengths have been set since the last run: once for all layers."""
        if self._tails_are_cut:
            return
        tails = self._packs[self._num_shared :]
        for pack, length in zip(tails, self._tail_lengths.tolist(), strict=True):
            self._cut(pack, length)
        self._tails_are_cut = True

    def _cut(self, pack: _Pack, length: int) -> None:
        """Cut a pack that holds ``length`` tokens now into its splits, and those into blocks."""
        num_rows = pack.num_queries * self.shape.num_qo_heads
        size = max(MIN_BLOCK_TOKENS, SCORE_BLOCK_ELEMENTS // num_rows)
        runs = _grown_runs(pack, length)
        pack.blocks = [
            _blocks(runs, *split_bounds(length, pack.num_splits, split), size)
            for split in range(pack.num_splits)
        ]

    def _attend(
        self,
        pack: _Pack,
        blocks: list[_Block],
        rows: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        logit_cap: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend ``rows`` to some blocks of a pack: normalised output and lse.

        One pass over blocks with a running maximum (FlashAttention's online softmax).
        """
        heads, num_rows = rows.shape[0], rows.shape[1]
        peak = total = values = None
        for block in blocks:
            k, v = self._read_block(pack, block, k_cache, v_cache)
            scores = torch.bmm(rows, k.permute(1, 2, 0))
            if logit_cap > 0:
                scores.div_(logit_cap).tanh_().mul_(logit_cap)
            block_peak = scores.amax(dim=-1, keepdim=True)
            if peak is None or total is None or values is None:
                peak = block_peak
                total = scores.sub_(peak).exp_().sum(dim=-1, keepdim=True)
                values = torch.bmm(scores, v.transpose(0, 1))
                continue
            new_peak = torch.maximum(peak, block_peak)
            shrink = peak.sub_(new_peak).exp_()
            peak = new_peak
            total.mul_(shrink).add_(scores.sub_(peak).exp_().sum(dim=-1, keepdim=True))
            values.mul_(shrink).baddbmm_(scores, v.transpose(0, 1))
        if peak is None or total is None or values is None:
            nothing = rows.new_zeros(heads, num_rows, self.shape.v_head_dim)
            return nothing, rows.new_full((heads, num_rows, 1), -torch.inf)
        return values.div_(total), total.log_().add_(peak)

    def _read_block(
        self,
        pack: _Pack,
        block: _Block,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a block in float32, in place where that is possible."""
        low, high, first_slot = block
        if first_slot >= 0:
            part = slice(first_slot, first_slot + high - low)
            return k_cache[part].float(), v_cache[part].float()
        index = self.kv_slots[pack.slot_offset + low : pack.slot_offset + high]
        return _gather(k_cache, index).float(), _gather(v_cache, index).float()


def _gather(cache: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    # index_select does not exist for 8-bit floats on the CPU; their bytes move just as well.
    if cache.dtype.itemsize == 1:
        return cache.view(torch.uint8).index_select(0, index).view(cache.dtype)
    return cache.index_select(0, index)


def _per_head(scale: float | torch.Tensor) -> float | torch.Tensor:
    """A scale that broadcasts over [B, Hkv, g, D]."""
    if isinstance(scale, torch.Tensor) and scale.dim() == 1:
        return scale[:, None, None]
    return scale


def _long_runs(edges: list[int], slots: IntArray, offset: int) -> list[_Run]:
    """Turn the edges between consecutive stretches into runs, short ones gathered together."""
    runs: list[_Run] = []
    for begin, end in pairwise(edges):
        if end - begin >= MIN_RUN_TOKENS:
            runs.append(_Run(begin, end, int(slots[offset + begin])))
        elif runs and runs[-1].first_slot < 0:
            runs[-1].end = end
        else:
            runs.append(_Run(begin, end, -1))
    return runs


def _grown_runs(pack: _Pack, length: int) -> list[_Run]:
    """The runs of a pack that holds ``length`` tokens now; what a tail has gained is scattered."""
    if length <= pack.planned_length:
        return pack.runs
    if pack.planned_length < MIN_RUN_TOKENS:
        return [_Run(0, length, -1)]
    if pack.runs[-1].first_slot < 0:
        return [*pack.runs[:-1], _Run(pack.runs[-1].begin, length, -1)]
    return [*pack.runs, _Run(pack.planned_length, length, -1)]


def _blocks(runs: list[_Run], begin: int, end: int, size: int) -> list[_Block]:
    """Blocks of at most ``size`` tokens that cover tokens [begin, end) of a pack."""
    found = []
    for run in runs:
        low, stop = max(run.begin, begin), min(run.end, end)
        while low < stop:
            high = min(low + size, stop)
            first_slot = run.first_slot + low - run.begin if run.first_slot >= 0 else -1
            found.append(_Block(low, high, first_slot))
            low = high
    return found
