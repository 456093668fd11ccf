"""A batch that has been planned, and the steps that it has taken since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_patches.attributes import Request
from sglang_prefix.backend.decode_batch import DecodeBatch
from sglang_prefix.jit import jit
from sglang_prefix.packing.layout import CostedPlan

__all__ = ["PlannedBatch", "advance", "grown"]

IntArray = NDArray[np.int64]


@dataclass(slots=True)
class PlannedBatch:
    """The batch that was planned last, and the steps since then.

    Attributes:
        lens: [B] lengths that were planned for. Each later step of decode adds a token to each,
            each later verify pass as many as have been accepted.
        sum_of_lengths: of those, padding included.
        padded_batch_size: its requests and the padding behind them.
        reason: why it should be the stock backend's; None if it should be packed.
        plans: one for each group; none where it cannot be packed, or will not be.
        kv_tokens_read, kv_tokens_logical: what its step adds to the counters of that name.
        packed_us, stock_us: the gate's predictions.
        decided_ahead: the scheduled lengths of a step that has been decided, and is still to be
            prepared.
        ready: for what the executors were made ready last: the padded size, and the step.
        reqs: its requests; None if no later step may reuse the plan.
        epoch: of the schedule at that time.
        max_growth: tokens for which each tail has room.
        pool_indices: of the requests, on the CPU; None where the CPU does not know them.
        states: of the requests, with ``verify`` alone.
        steps: later steps taken.
        drafts: tokens of each request that a verify pass checks; 0 in decode.
        newest_lens: [B] lengths at the verify pass that was looked at last; None in decode.
        num_new: [B] tokens that it added to each; None for one each.
        most_grown: tokens that a request has grown by at most; of verify passes a bound, counted
            anew where it is reached.
    """

    lens: IntArray
    sum_of_lengths: int
    padded_batch_size: int
    reason: str | None = None
    plans: Sequence[CostedPlan] = ()
    kv_tokens_read: int = 0
    kv_tokens_logical: int = 0
    packed_us: float = 0.0
    stock_us: float = 0.0
    decided_ahead: torch.Tensor | None = None
    ready: tuple[int, int] | None = None
    reqs: list[Request] | None = None
    epoch: int = -1
    max_growth: int = 0
    pool_indices: torch.Tensor | None = None
    states: Sequence[Any] = ()
    steps: int = 0
    drafts: int = 0
    newest_lens: IntArray | None = None
    num_new: IntArray | None = None
    most_grown: int = 0

    @property
    def growth(self) -> int | IntArray:
        """Tokens by which each request is longer now than the plan was made for."""
        return self.steps if self.newest_lens is None else self.newest_lens - self.lens

    @property
    def num_grown(self) -> int:
        """Tokens by which all requests together are."""
        if self.newest_lens is None:
            return self.steps * len(self.lens)
        return int((self.newest_lens - self.lens).sum())

    def follow(self, batch: DecodeBatch) -> bool:
        """Go on to a batch, if its lengths are those of the next step and tails have room for it.

        The sum of the lengths, which SGLang hands over, tells whether a decode step was left out.
        If it does not go on, the plan is of no use to any later step.
        """
        if self.newest_lens is None or self.num_new is None:
            steps = self.steps + 1
            total = self.sum_of_lengths + steps * len(self.lens)
            if steps > self.max_growth or batch.sum_of_lengths != total:
                return False
        else:
            lens = batch.counted_lengths()
            if lens is None or len(lens) < len(self.newest_lens):
                return False
            most = advance(lens, self.drafts, self.newest_lens, self.num_new)
            self.most_grown += most
            if self.most_grown > self.max_growth:  # as far as the bound knows
                self.most_grown = int((self.newest_lens - self.lens).max())
            if not 0 < most <= self.drafts or self.most_grown > self.max_growth:
                return False
        self.steps += 1
        return True

    def has_same_rows(self, batch: DecodeBatch) -> bool:
        """Whether requests have kept their rows of ``req_to_token``, as far as the CPU knows."""
        found, known = batch.pool_indices, self.pool_indices
        if found is known:
            return True
        if found is None or known is None or not torch.equal(found, known):
            return False
        self.pool_indices = found
        return True

    def verify_step(self, batch: DecodeBatch) -> None:
        """Compare the requests of a step, and the lengths of decode, with what is known.

        Raises:
            RuntimeError: they differ.
        """
        if batch.kv_states() != self.states:
            raise RuntimeError(
                "SGLANG_PREFIX_VERIFY: a request moved in the radix tree or to another row, or was "
                "retracted, without a prefill"
            )
        lens = None if self.drafts else batch.host_lengths(len(self.lens))
        if lens is not None and not np.array_equal(lens, self.lens + self.steps):
            raise RuntimeError("SGLANG_PREFIX_VERIFY: a step did not add one token to each request")

    def is_decided(self, batch: DecodeBatch) -> bool:
        """Whether the step of a batch has been decided ahead: SGLang makes its lengths once."""
        scheduled = batch.schedule_batch
        return scheduled is not None and scheduled.seq_lens_cpu is self.decided_ahead


@jit
def advance(lens: IntArray, drafts: int, newest: IntArray, num_new: IntArray) -> int:
    """Note the lengths of a verify pass, and what is new of each; the most that is.

    One loop, since a pass finds the processor's caches full of other things: each operation of
    NumPy then takes some microseconds.

    Args:
        lens: [B] lengths without drafts; what stands behind those of ``newest`` is padding.
        drafts: tokens of each request that the pass checks.
        newest: [B] lengths of the pass before, drafts included; they become this one's.
        num_new: [B], written.

    Returns:
        0 if some request has not grown.
    """
    most, least = 0, 1
    for i in range(len(newest)):
        now = lens[i] + drafts
        new = now - newest[i]
        newest[i], num_new[i] = now, new
        most, least = max(most, new), min(least, new)
    return most if least > 0 else 0


def grown(plan: CostedPlan, growth: int | IntArray) -> CostedPlan:
    """What a plan has become after some steps: each tail has as many tokens more."""
    most = int(np.max(growth))
    if most == 0:
        return plan
    # Those that have grown less keep more room than the plan says; it says one number for all, and
    # the slots of a tail begin where they began.
    pack_end = plan.pack_end.copy()
    pack_end[plan.num_shared_packs :] += growth
    return replace(
        plan,
        seq_lens=plan.seq_lens + growth,
        pack_end=pack_end,
        reserved_tail_slots=plan.reserved_tail_slots - most,
    )
