"""Our attention outside an engine: planned and run as the backend does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from prefix_kernels import plan_buffers
from prefix_kernels.executor import PlanExecutor, make_executor
from prefix_kernels.plan import AttentionShape, PackPlan
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import CPU_PROFILE, GPU_PROFILE, DeviceProfile
from sglang_prefix.packing.layout import CostedPlan
from sglang_prefix.packing.planner import PackPlanner

__all__ = ["PackedAttention", "drop_one_work_item", "work_item_counts"]


class PackedAttention:
    """Planner and executor of one attention shape and policy.

    Buffers grow and launches fit each plan until :meth:`fix_capacity` is called.

    Args:
        shape: heads and item sizes.
        device: where.
        executor: "torch" or "triton".
        policy: of packing.
        profile: what the planner believes of the device; None for the executor's usual one.
        reserved_tail_slots: tokens that tails may grow by.
        options: of the executor: mode and merge of the Triton executor.
    """

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
        self.shape, self.device = shape, device
        self._name, self._options = executor, options
        self.executor: PlanExecutor = make_executor(executor, shape, device, **options)
        profile = profile or (GPU_PROFILE if executor == "triton" else CPU_PROFILE)
        if self.executor.max_block_rows is not None:
            rows = min(profile.max_block_rows, self.executor.max_block_rows)
            profile = replace(profile, max_block_rows=rows)
        self.planner = PackPlanner(
            shape, profile, policy=policy, reserved_tail_slots=reserved_tail_slots
        )
        self.breaks = False

    def plan(self, forest: PrefixForest) -> CostedPlan:
        """Pack a forest."""
        return self.planner.plan(forest)

    def fix_capacity(
        self, plans: Sequence[PackPlan], *load_arguments: torch.Tensor, padded_batch_size: int
    ) -> None:
        """Fix the Triton executor's buffers and launches, as graphs need.

        Args:
            plans: what must fit; are loaded with ``load_arguments``, see :meth:`load`.
            load_arguments: ``req_to_token`` and ``req_pool_indices``.
            padded_batch_size: of the batches to come.
        """
        from prefix_kernels.plan_buffers import PlanCapacity

        for plan in plans:
            self.executor.load(plan, *load_arguments)
        need = _buffers(self.executor).capacity
        # Other tile classes make other row blocks, so a packed plan may be larger.
        size = max(need.batch_rows, padded_batch_size)
        capacity = PlanCapacity(size, 4 * need.plan_size, need.slots, need.partials)
        self.executor = make_executor(
            self._name, self.shape, self.device, capacity=capacity, **self._options
        )

    def load(
        self,
        plan: PackPlan,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        *,
        padded_batch_size: int | None = None,
    ) -> None:
        """Take a plan into use; a control, ``breaks``, loses one work item of it."""
        self.executor.load(
            plan, req_to_token, req_pool_indices, padded_batch_size=padded_batch_size
        )
        if self.breaks:
            drop_one_work_item(self.executor)

    def poison_partials(self) -> None:
        """Fill the Triton executor's partial results with NaN."""
        buffers = _buffers(self.executor)
        buffers.partial_out.fill_(torch.nan)
        buffers.partial_lse.fill_(torch.nan)


def work_item_counts(executor: PlanExecutor) -> torch.Tensor:
    """Items of each work list of the plan in use, as the kernels read them; may be written."""
    first = plan_buffers.HEADER_NUM_ITEMS
    counts: torch.Tensor = _buffers(executor).plan[first : first + plan_buffers.MAX_LISTS]
    return counts


def drop_one_work_item(executor: PlanExecutor) -> None:
    """Break the plan in use: its longest work list with an item loses the last one."""
    counts = work_item_counts(executor)
    counts[int(counts.argmax())] -= 1


def _buffers(executor: PlanExecutor) -> Any:
    """Of the Triton executor, the only one that has any."""
    return executor.buffers  # type: ignore[attr-defined]
