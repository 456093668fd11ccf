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
from sglang_prefix.packing.layout import CostedPlan

__all__ = ["PlannedBatch", "grown"]

IntArray = NDArray[np.int64]


@dataclass(slots=True)
class PlannedBatch:
    """The batch that was planned last, and the steps since then.

    Attributes:
        lens: [B] lengths that were planned for; each later step adds one token to each.
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
        max_steps: later steps for which tails have room.
        pool_indices: of the requests, on the CPU; None where the CPU does not know them.
        states: of the requests, with ``verify`` alone.
        steps: later steps taken.
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
    max_steps: int = 0
    pool_indices: torch.Tensor | None = None
    states: Sequence[Any] = ()
    steps: int = 0

    def is_decided(self, batch: DecodeBatch) -> bool:
        """Whether the step of a batch has been decided ahead: SGLang makes its lengths once."""
        scheduled = batch.schedule_batch
        return (
            self.decided_ahead is not None
            and scheduled is not None
            and scheduled.seq_lens_cpu is self.decided_ahead
        )


def grown(plan: CostedPlan, steps: int) -> CostedPlan:
    """What a plan has become after some steps: each tail has as many tokens more."""
    if steps == 0:
        return plan
    pack_end = plan.pack_end.copy()
    pack_end[plan.num_shared_packs :] += steps
    return replace(
        plan,
        seq_lens=plan.seq_lens + steps,
        pack_end=pack_end,
        reserved_tail_slots=plan.reserved_tail_slots - steps,
    )
