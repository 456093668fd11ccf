"""Our attention outside an engine: planned and run as the backend does it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from prefix_kernels import plan_buffers
from prefix_kernels.executor import PlanExecutor, make_executor
from prefix_kernels.plan import AttentionShape, PackPlan
from sglang_prefix.gate import limits_of
from sglang_prefix.packing import DeviceProfile
from sglang_prefix.packing.planner import PackPlanner, planner_for

__all__ = ["PackedAttention"]


class PackedAttention:
    """Planner and executor of one attention shape and policy.

    Buffers grow and launches fit each plan until :meth:`fix_capacity` is called.

    Args:
        shape: heads and item sizes.
        device: where.
        executor: "torch", "native" or "triton".
        policy: of packing.
        profile: what the planner believes of the device; None for the executor's usual one.
        reserved_tail_slots: tokens that tails may grow by.
        options: of the executor: mode and merge of the Triton executor.

    Attributes:
        plan: packs a forest.
        breaks: a control: every plan that is loaded loses one work item.
    """

    breaks = False

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device,
        *,
        executor: str = "triton",
        policy: str = "pat",
        profile: DeviceProfile | None = None,
        reserved_tail_slots: int = 256,
        **options: Any,
    ) -> None:
        self._make = partial(make_executor, executor, shape, device, **options)
        self.executor: PlanExecutor = self._make()
        plans: dict[str, Any] = {"policy": policy, "reserved_tail_slots": reserved_tail_slots}
        if profile is None:
            bandwidth = limits_of(device).read_bytes_per_s
            self.plan = planner_for(self.executor, bandwidth, **plans).plan
        else:
            rows = self.executor.max_block_rows or profile.max_block_rows
            self.plan = PackPlanner(shape, profile.narrowed_to(rows), **plans).plan

    def load(
        self,
        plan: PackPlan,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        *,
        padded_batch_size: int | None = None,
    ) -> None:
        """Take a plan into use."""
        self.executor.load(
            plan, req_to_token, req_pool_indices, padded_batch_size=padded_batch_size
        )
        if self.breaks:
            counts = self.work_item_counts()
            counts[int(counts.argmax())] -= 1

    # Of the Triton executor alone:

    def fix_capacity(
        self, plans: Sequence[PackPlan], *tables: torch.Tensor, padded_batch_size: int
    ) -> None:
        """Fix buffers and launches, as graphs need.

        Args:
            plans: what must fit.
            tables: ``req_to_token`` and ``req_pool_indices`` to load the plans with.
            padded_batch_size: of the batches to come.
        """
        for plan in plans:
            self.executor.load(plan, *tables)
        need = self._buffers.capacity
        # Other tile classes make other row blocks, so a serialised plan may be larger.
        size = max(need.batch_rows, padded_batch_size)
        self.executor = self._make(
            capacity=plan_buffers.PlanCapacity(size, 4 * need.plan_size, need.slots, need.partials)
        )

    def work_item_counts(self) -> torch.Tensor:
        """Items of each work list of the plan in use, as the kernels read them; may be written."""
        first = plan_buffers.HEADER_NUM_ITEMS
        counts: torch.Tensor = self._buffers.plan[first : first + plan_buffers.MAX_LISTS]
        return counts

    def poison_partials(self) -> None:
        """Fill the partial results with NaN."""
        for buffer in (self._buffers.partial_out, self._buffers.partial_lse):
            buffer.fill_(torch.nan)

    @property
    def _buffers(self) -> Any:
        return self.executor.buffers  # type: ignore[attr-defined]
