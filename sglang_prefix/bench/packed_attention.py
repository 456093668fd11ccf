"""Our kernels on a GPU: a policy and a launch mode, planned and run as the backend does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from prefix_kernels import plan_buffers
from prefix_kernels.executor import AttentionParams
from prefix_kernels.plan_buffers import PlanCapacity
from prefix_kernels.triton_executor import TritonExecutor
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import GPU_PROFILE, AttentionShape, DeviceProfile
from sglang_prefix.packing.layout import CostedPlan
from sglang_prefix.packing.planner import PackPlanner

__all__ = ["PackedAttention", "drop_one_work_item"]


class PackedAttention:
    """Planner and executor of one attention shape, policy, launch mode and merge mode.

    Buffers grow and launches fit each plan until :meth:`fix_capacity` is called.

    Args:
        shape: heads and item sizes.
        device: where.
        policy, mode, merge: names.
        profile: what the planner believes of the device.
        reserved_tail_slots: tokens that tails may grow by.
    """

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device,
        *,
        policy: str = "pat",
        mode: str = "streams",
        merge: str = "launch",
        profile: DeviceProfile = GPU_PROFILE,
        reserved_tail_slots: int = 256,
    ) -> None:
        self.shape, self.device = shape, device
        self._how = {"mode": mode, "merge": merge}
        self.executor = self._executor(None)
        rows = min(profile.max_block_rows, self.executor.max_block_rows)
        profile = replace(profile, max_block_rows=rows)
        self.planner = PackPlanner(
            shape, profile, policy=policy, reserved_tail_slots=reserved_tail_slots
        )
        self.breaks = False

    def plan(self, forest: PrefixForest) -> CostedPlan:
        """Pack a forest."""
        return self.planner.plan(forest)

    def fix_capacity(self, plans: list[CostedPlan], *load_arguments: Any, rows: int) -> None:
        """Fix buffers and launches for batches of ``rows``, as graphs need; must hold ``plans``."""
        for plan in plans:
            self.executor.load(plan, *load_arguments)
        need = self.executor.buffers.capacity
        # Other tile classes make other row blocks, so a packed plan may be larger.
        capacity = PlanCapacity(
            max(need.batch_rows, rows), 4 * need.plan_size, need.slots, need.partials
        )
        self.executor = self._executor(capacity)

    def load(
        self,
        plan: CostedPlan,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        *,
        num_rows: int | None = None,
    ) -> None:
        """Take a plan into use; a control loses one work item of it."""
        self.executor.load(plan, req_to_token, req_pool_indices, padded_batch_size=num_rows)
        if self.breaks:
            drop_one_work_item(self.executor)

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        **params: Any,
    ) -> None:
        """Launch one layer: :meth:`TritonExecutor.run`."""
        self.executor.run(q, k_cache, v_cache, out, lse, AttentionParams(**params))

    def poison_partials(self) -> None:
        """Fill the partial results with NaN."""
        self.executor.buffers.partial_out.fill_(torch.nan)
        self.executor.buffers.partial_lse.fill_(torch.nan)

    def runner(
        self, q: torch.Tensor, out: torch.Tensor, sm_scale: float
    ) -> Callable[[torch.Tensor, torch.Tensor], object]:
        """``run`` on fixed tensors, as a function of the caches."""
        return lambda k, v: self.run(q, k, v, out, sm_scale=sm_scale)

    def _executor(self, capacity: PlanCapacity | None) -> TritonExecutor:
        return TritonExecutor(self.shape, self.device, capacity=capacity, **self._how)


def drop_one_work_item(executor: TritonExecutor) -> None:
    """Break the plan in use: its longest work list with an item loses the last one."""
    counts = executor.buffers.plan[
        plan_buffers.HEADER_NUM_ITEMS : plan_buffers.HEADER_NUM_ITEMS + plan_buffers.MAX_LISTS
    ]
    counts[int(counts.argmax())] -= 1
