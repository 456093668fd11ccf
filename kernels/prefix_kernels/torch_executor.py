"""The torch executor: runs a pack plan with batched matrix products, on the CPU or any device.

One pack is one product of all its query rows with its KV, head by head, so shared KV is read once
for all requests of the pack. KV is read in place where its slots are consecutive and gathered
where they are not; 16-bit and 8-bit values are widened block by block to float32, in which
everything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.executor import AttentionParams, PlanExecutor
from prefix_kernels.plan import AttentionShape, PackPlan
from prefix_kernels.torch_packs import Span, TorchPack, copy_slots, prepare_packs

__all__ = ["MergeBlock", "TorchExecutor", "merge_blocks", "merge_partials"]

IntArray = NDArray[np.int64]

# Partials merged at a time, padding included: 64 MiB of them at 32 query heads of head dim 128. A
# request that has more is merged alone.
MERGED_AT_ONCE = 4096


class TorchExecutor(PlanExecutor):
    """Runs plans with torch operations; arguments as of :class:`PlanExecutor`.

    It cuts packs into blocks on the host, so it keeps the lengths of the tails there: those of the
    plan, and what each step since has added.
    """

    name = "torch"

    def __init__(
        self, shape: AttentionShape, device: torch.device, *, check_slots: bool = False
    ) -> None:
        super().__init__(shape, device, check_slots=check_slots)
        self._packs: list[TorchPack] = []
        self._num_shared = 0
        self._slot_storage = torch.empty(0, dtype=torch.int64, device=device)
        self._kv_slots = self._slot_storage
        self._tail_offset = np.zeros(0, dtype=np.int64)
        self._tail_lengths = np.zeros(0, dtype=np.int64)
        self._tails_are_cut = True
        self._num_partials = 0
        self._num_rows = 0
        self._query_lens: IntArray | None = None
        self._merges: list[MergeBlock] = []
        self._partial_out = torch.empty(0, device=device)
        self._partial_lse = torch.empty(0, device=device)

    @property
    def kv_slots(self) -> torch.Tensor:
        """Slots of the plan in use, int64, laid out by it."""
        return self._kv_slots

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
        self._reserve(plan)
        self._kv_slots = self._slot_storage[: plan.num_slots]
        copy_slots(plan, req_to_token, req_pool_indices, self._kv_slots)
        self._num_shared = plan.num_shared_packs
        self._num_partials = plan.num_partials
        self._packs = prepare_packs(plan, self._kv_slots)
        for pack in self._packs[: self._num_shared]:
            pack.cut(pack.planned_length, self.shape.num_qo_heads)
        self._tail_offset = plan.tail_offset
        self.set_tail_lengths(plan.seq_lens - plan.tail_start)
        self._num_rows, self._query_lens = plan.num_rows, plan.query_lens
        self._merges = merge_blocks(plan.request_indptr, self.device)

    def _reserve(self, plan: PackPlan) -> None:
        """Enlarge the buffers for a plan that needs more than those before."""
        with torch.inference_mode(False):  # may be written from outside inference mode later
            if len(self._slot_storage) < plan.num_slots:
                self._slot_storage = torch.empty(
                    plan.num_slots, dtype=torch.int64, device=self.device
                )
            if len(self._partial_out) < plan.num_partials:
                shape = (plan.num_partials, self.shape.num_qo_heads)
                self._partial_out = torch.empty(*shape, self.shape.v_head_dim, device=self.device)
                self._partial_lse = torch.empty(shape, device=self.device)

    def _append(
        self, seq_lens: torch.Tensor, new_slots: torch.Tensor, num_new: IntArray | None
    ) -> None:
        del seq_lens  # on the device, where reading them would wait
        lengths = self._tail_lengths + (1 if num_new is None else num_new)
        assert self.plan is not None
        room = self.plan.seq_lens - self.plan.tail_start + self.plan.reserved_tail_slots
        if (lengths > room).any():
            raise RuntimeError("a tail has used up its reserved slots: plan again")
        target = self._tail_offset + lengths - 1
        if self._query_lens is not None:  # a request's last positions, one per query
            behind = np.repeat(np.cumsum(self._query_lens), self._query_lens)
            target = np.repeat(target + 1, self._query_lens) - behind + np.arange(len(behind))
        self._write_slots(target, new_slots[: len(target)])
        self.set_tail_lengths(lengths)

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
        batch, caches = self._num_rows, (k_cache, v_cache)
        heads, v_head_dim = self.shape.num_kv_heads, self.shape.v_head_dim
        out[batch:].zero_()
        q, out = q[:batch], out[:batch]
        if lse is not None:
            lse[batch:].fill_(-torch.inf)
            lse = lse[:batch]
        factor = params.sm_scale * _per_head(params.k_scale)
        rows = q.float().view(batch, heads, -1, q.shape[2]) * factor
        partial_out = self._partial_out[: self._num_partials]
        partial_lse = self._partial_lse[: self._num_partials]
        out_by_head = partial_out.view(self._num_partials, heads, -1, v_head_dim)
        lse_by_head = partial_lse.view(self._num_partials, heads, -1)
        for pack in self._packs:
            pack_rows = rows[pack.queries]
            if pack.num_queries > 1:
                # [n, Hkv, g, D] -> [Hkv, n * g, D]: the rows that read one head's KV together
                pack_rows = pack_rows.transpose(0, 1).reshape(heads, -1, q.shape[2])
            for blocks, partials in zip(pack.blocks, pack.partials, strict=True):
                values, logs = self._attend(pack, blocks, pack_rows, *caches, params.logit_cap)
                if pack.num_queries > 1:
                    shape = (heads, pack.num_queries, -1)
                    out_by_head[partials] = values.view(*shape, v_head_dim).transpose(0, 1)
                    lse_by_head[partials] = logs.view(shape).transpose(0, 1)
                else:
                    out_by_head[partials] = values
                    lse_by_head[partials] = logs[..., 0]
        v_scale = params.v_scale
        if isinstance(v_scale, torch.Tensor) or v_scale != 1.0:
            out_by_head.mul_(_per_head(v_scale))
        merge_partials(partial_out, partial_lse, self._merges, out, lse, params.sinks)

    def _cut_tails(self) -> None:
        """Cut the tails whose lengths have been set since the last run: once for all layers."""
        if self._tails_are_cut:
            return
        tails = self._packs[self._num_shared :]
        for pack, length in zip(tails, self._tail_lengths.tolist(), strict=True):
            pack.cut(length, self.shape.num_qo_heads)
        self._tails_are_cut = True

    def _attend(
        self,
        pack: TorchPack,
        blocks: list[Span],
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
            hidden = pack.hidden(block, scores.device)
            if hidden is not None:
                by_query = scores.view(heads, pack.num_queries, -1, scores.shape[2])
                by_query.masked_fill_(hidden[:, None], -torch.inf)
            block_peak = scores.amax(dim=-1, keepdim=True)
            if hidden is not None:  # a row that sees nothing of the block must not become NaN
                block_peak.clamp_(min=torch.finfo(torch.float32).min)
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
        pack: TorchPack,
        block: Span,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a block in float32, in place where that is possible."""
        low, high, first_slot = block
        caches = (k_cache,) if self.shape.v_in_k else (k_cache, v_cache)
        if first_slot >= 0:
            part = slice(first_slot, first_slot + high - low)
            k, *v = [cache[part].float() for cache in caches]
        else:
            index = self.kv_slots[pack.slot_offset + low : pack.slot_offset + high]
            k, *v = [_gather(cache, index).float() for cache in caches]
        return k, v[0] if v else k[..., : self.shape.v_head_dim]


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


class MergeBlock(NamedTuple):
    """Requests ``[begin, end)``, merged as if each had as many partials as the one with most.

    Attributes:
        begin, end: batch rows.
        first, last: their partials are ``[first, last)``.
        numbers: [end - begin, most] of its partials; None where every request has as many.
        missing: likewise, which of these a request does not have.
    """

    begin: int
    end: int
    first: int
    last: int
    numbers: torch.Tensor | None
    missing: torch.Tensor | None


def merge_blocks(request_indptr: IntArray, device: torch.device) -> list[MergeBlock]:
    """Cut a batch into blocks that each take no more than :data:`MERGED_AT_ONCE` partials.

    Most batches are one block. A request of a thousand partials beside a thousand of one would
    otherwise be merged as a million.

    Args:
        request_indptr: [B + 1] request ``b`` owns partials ``indptr[b]`` to ``indptr[b + 1]``.
        device: of the partials.
    """
    counts = np.diff(request_indptr)
    bounds = [0, *_merge_cuts(counts, 0, len(counts)), len(counts)]
    blocks = []
    for begin, end in pairwise(bounds):
        first, last = int(request_indptr[begin]), int(request_indptr[end])
        most = int(counts[begin:end].max(initial=0))
        owned = missing = None
        if last - first < (end - begin) * most:
            numbers = request_indptr[begin:end, None] + np.arange(most)
            absent = numbers >= request_indptr[begin + 1 : end + 1, None]
            numbers[absent] = first
            owned, missing = (torch.from_numpy(part).to(device) for part in (numbers, absent))
        blocks.append(MergeBlock(begin, end, first, last, owned, missing))
    return blocks


def _merge_cuts(counts: IntArray, begin: int, end: int) -> list[int]:
    """Where to cut requests ``[begin, end)``: in the middle, until each part is small enough."""
    size = end - begin
    if size < 2 or size * int(counts[begin:end].max()) <= MERGED_AT_ONCE:
        return []
    middle = begin + size // 2
    left, right = _merge_cuts(counts, begin, middle), _merge_cuts(counts, middle, end)
    return [*left, middle, *right]


def merge_partials(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    blocks: Sequence[MergeBlock],
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Combine each request's partials into its attention output.

    The weight of partial ``i`` is ``exp(lse_i - lse)`` with ``lse = logsumexp(lse_i)``
    (PAT, arXiv 2511.22333, section 4; the online softmax of arXiv 1805.02867). A partial over no
    tokens has lse = -inf, weighs nothing, and its output is not looked at.

    A sink adds ``exp(sink)`` to a softmax sum of ``exp(lse)``, so all that it does to the output is
    a factor ``exp(lse) / (exp(lse) + exp(sink))``: once, when all partials have been merged.

    Args:
        partial_out: [num_partials, Hq, Dv] float32, each normalised by its own softmax sum.
        partial_lse: [num_partials, Hq] float32, natural log.
        blocks: of :func:`merge_blocks`; every request has a partial with lse > -inf.
        out: [B, Hq, Dv], any float dtype; written.
        lse: [B, Hq] float32, without the sinks; written where given.
        sinks: [Hq], any float dtype; None for none.
    """
    for block in blocks:
        own = slice(block.begin, block.end)
        own_lse = None if lse is None else lse[own]
        _merge_block(partial_out, partial_lse, block, out[own], own_lse, sinks)


def _merge_block(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    block: MergeBlock,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """:func:`merge_partials` of one block, whose rows ``out`` and ``lse`` are."""
    own, batch = slice(block.first, block.last), block.end - block.begin
    if block.last - block.first == batch:
        _write_merged(partial_out[own], partial_lse[own], out, lse, sinks)
        return
    if block.numbers is None or block.missing is None:  # as many each: nothing to gather
        values = partial_out[own].view(batch, -1, *out.shape[1:])
        logs = partial_lse[own].view(batch, -1, out.shape[1])
    else:
        values = partial_out[block.numbers]
        logs = partial_lse[block.numbers].masked_fill_(block.missing[..., None], -torch.inf)
    total = torch.logsumexp(logs, dim=1)
    weights = torch.exp(logs - total[:, None])
    # Not a plain product: an unused partial may hold anything, and 0 * nan is nan.
    values = torch.where(weights[..., None] > 0, values, 0)
    _write_merged((weights[..., None] * values).sum(dim=1), total, out, lse, sinks)


def _write_merged(
    values: torch.Tensor,
    total: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """Write merged values [n, Hq, Dv] and their lse [n, Hq]; the values less what sinks take."""
    if sinks is not None:
        values = values * torch.sigmoid(total - sinks)[..., None]
    out.copy_(values)
    if lse is not None:
        lse.copy_(total)
