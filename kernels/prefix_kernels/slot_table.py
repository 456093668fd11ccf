"""The slots of a plan's positions, kept by torch operations."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.plan import PackPlan

__all__ = ["SlotTable"]

IntArray = NDArray[np.int64]


class SlotTable:
    """Owns ``kv_slots``: copied when a plan is loaded, written to as tails grow.

    So the rows of ``req_to_token`` may change hands while a plan is in use.

    Args:
        device: where the slots are used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._storage = torch.empty(0, dtype=torch.int64, device=device)
        self.kv_slots = self._storage

    def load(
        self, plan: PackPlan, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor
    ) -> None:
        """Copy the slots of a plan's positions; those of the growth room become 0.

        Args:
            plan: the plan.
            req_to_token: [rows, context] int32 or int64 on the device.
            req_pool_indices: [B] int32 or int64 on the device.
        """
        if self._storage.shape[0] < plan.num_slots:
            with torch.inference_mode(False):  # may be written from outside inference mode later
                self._storage = torch.zeros(plan.num_slots, dtype=torch.int64, device=self._device)
        self.kv_slots = self._storage[: plan.num_slots]
        self.kv_slots.zero_()
        if self._device.type == "cpu":
            self._copy_rows(plan, req_to_token, req_pool_indices)
            return
        target, request, position = (
            torch.from_numpy(part).to(self._device, non_blocking=True)
            for part in _slot_sources(plan)
        )
        rows = req_pool_indices.long()[request]
        self.kv_slots[target] = req_to_token[rows, position].long()

    def _copy_rows(
        self, plan: PackPlan, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor
    ) -> None:
        """Copy row by row, which is faster on the CPU than one indexed copy."""
        table, target = req_to_token.numpy(), self.kv_slots.numpy()
        first_query = plan.queries[plan.query_indptr[:-1]]
        rows = req_pool_indices.numpy()[first_query]
        starts, ends, offsets = plan.pack_start, plan.pack_end, plan.slot_offset[:-1]
        for row, start, end, offset in np.stack((rows, starts, ends, offsets), axis=1).tolist():
            target[offset : offset + end - start] = table[row, start:end]


def _slot_sources(plan: PackPlan) -> tuple[IntArray, IntArray, IntArray]:
    """Where the planned slots come from: (index in kv_slots, batch row, position), flat."""
    lengths = plan.pack_end - plan.pack_start
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    first_query = plan.queries[plan.query_indptr[:-1]]
    return (
        np.repeat(plan.slot_offset[:-1], lengths) + within,
        np.repeat(first_query, lengths),
        np.repeat(plan.pack_start, lengths) + within,
    )
