"""Runs plans: owns the slots that a plan reads, appends to its tails, calls the executor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.cpu import TorchExecutor
from sglang_prefix.plan import PackPlan

__all__ = ["EXECUTORS", "PlanRunner", "executor_named"]

IntArray = NDArray[np.int64]

EXECUTORS = ("auto", "cpu")


def executor_named(name: str) -> str:
    """Resolve ``"auto"`` and refuse what is unknown or not there yet.

    Raises:
        ValueError: the name is unknown, or names an executor that this release does not have.
    """
    if name not in EXECUTORS:
        state = "not in this release" if name == "triton" else "unknown"
        raise ValueError(f"executor={name!r} is {state}; legal: {', '.join(map(repr, EXECUTORS))}")
    return "cpu"


class PlanRunner:
    """The state behind a plan in use, shared by the wrapper and the SGLang backend.

    The slots of the planned positions are copied when a plan is loaded, and appended to as tails
    grow, so the rows of ``req_to_token`` may change hands afterwards.

    Args:
        num_qo_heads, num_kv_heads, v_head_dim: shape of the layers served.
        device: where q, the caches and ``req_to_token`` live.
        executor: "auto" or "cpu", the torch executor, which runs on any device.
        check_slots: refuse slots outside the caches also where looking costs a device sync.
    """

    def __init__(
        self,
        num_qo_heads: int,
        num_kv_heads: int,
        v_head_dim: int,
        device: torch.device,
        executor: str = "auto",
        *,
        check_slots: bool = False,
    ) -> None:
        self._checks_slots = check_slots or device.type == "cpu"
        self.executor_name = executor_named(executor)
        self._device = device
        self._executor = TorchExecutor(num_qo_heads, num_kv_heads, v_head_dim, device)
        self._kv_slots = torch.empty(0, dtype=torch.int64, device=device)
        self._tail_start = np.zeros(0, dtype=np.int64)
        self._tail_offset = np.zeros(0, dtype=np.int64)
        self.plan: PackPlan | None = None
        self.seq_lens = np.zeros(0, dtype=np.int64)
        self.slot_range = (0, 0)

    def load(
        self, plan: PackPlan, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor
    ) -> None:
        """Take a plan into use and copy the slots of its positions. Reads no device value.

        Args:
            plan: the plan.
            req_to_token: [rows, context] int32 or int64 on the device.
            req_pool_indices: [B] int32 or int64 on the device.
        """
        if self._kv_slots.shape[0] < plan.num_slots:
            with torch.inference_mode(False):  # may be written from outside inference mode later
                self._kv_slots = torch.zeros(plan.num_slots, dtype=torch.int64, device=self._device)
        kv_slots = self._kv_slots[: plan.num_slots]
        if self._device.type == "cpu":
            self.slot_range = _copy_slots_cpu(plan, req_to_token, req_pool_indices, kv_slots)
        else:
            target, request, position = (
                torch.from_numpy(part).to(self._device, non_blocking=True)
                for part in plan.slot_sources()
            )
            rows = req_pool_indices.long()[request]
            kv_slots[target] = req_to_token[rows, position].long()
            if self._checks_slots:
                self.slot_range = _bounds(kv_slots[target])
        first_tail = plan.num_shared_packs
        self._tail_start = plan.pack_start[first_tail:]
        self._tail_offset = plan.slot_offset[first_tail:-1]
        self._executor.load(plan, kv_slots)
        self.plan = plan
        self.seq_lens = plan.seq_lens

    def append(self, seq_lens: IntArray, new_slots: torch.Tensor) -> None:
        """Let tails grow to ``seq_lens`` [B]; ``new_slots`` go request by request.

        The caller has checked the lengths with :meth:`check_lengths`.
        """
        grown = seq_lens - self.seq_lens
        if (grown == 1).all():
            target = self._tail_offset + self.seq_lens - self._tail_start
        else:
            within = np.arange(int(grown.sum())) - np.repeat(np.cumsum(grown) - grown, grown)
            first = self._tail_offset + self.seq_lens - self._tail_start
            target = np.repeat(first, grown) + within
        self._write(target, new_slots)
        self._executor.set_lengths(seq_lens - self._tail_start)
        self.seq_lens = seq_lens

    @contextmanager
    def lengths_from_rows(
        self,
        seq_lens: IntArray,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
    ) -> Iterator[None]:
        """For a ``with`` block, let tails reach to ``seq_lens`` [B] as ``req_to_token`` has them.

        Slots of positions at or past the lengths in use are read now; those before stay.
        """
        in_use = self.slot_range
        grown = np.maximum(seq_lens - self.seq_lens, 0)
        request = np.repeat(np.arange(len(grown)), grown)
        within = np.arange(len(request)) - np.repeat(np.cumsum(grown) - grown, grown)
        position = self.seq_lens[request] + within
        target = self._tail_offset[request] + position - self._tail_start[request]
        rows = req_pool_indices.long()[torch.from_numpy(request).to(self._device)]
        try:
            self._write(target, req_to_token[rows, torch.from_numpy(position).to(self._device)])
            self._executor.set_lengths(seq_lens - self._tail_start)
            yield
        finally:
            self.slot_range = in_use
            self._executor.set_lengths(self.seq_lens - self._tail_start)

    def check_lengths(self, seq_lens: IntArray) -> None:
        """Refuse lengths that this plan cannot serve.

        Raises:
            ValueError: a length is below the planned one, or past the growth room.
        """
        assert self.plan is not None
        planned, room = self.plan.seq_lens, self.plan.growth_room
        if (seq_lens < planned).any() or (seq_lens > planned + room).any():
            bad = int(np.flatnonzero((seq_lens < planned) | (seq_lens > planned + room))[0])
            raise ValueError(
                f"seq_lens[{bad}]={seq_lens[bad]} does not fit the plan; legal: {planned[bad]} to "
                f"{planned[bad] + room}. Plan again."
            )

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        *,
        sm_scale: float,
        logit_cap: float = 0.0,
        k_scale: float | torch.Tensor = 1.0,
        v_scale: float | torch.Tensor = 1.0,
    ) -> None:
        """Attend one layer's queries; arguments as in :meth:`TorchExecutor.run`.

        Raises:
            ValueError: a slot lies outside the caches (checked on the CPU, or if asked for).
        """
        if self._checks_slots:
            low, high = self.slot_range
            if low < 0 or high >= k_cache.shape[0]:
                raise ValueError(
                    f"the slots of req_to_token or new_slots reach {low if low < 0 else high}; "
                    f"legal: 0 to {k_cache.shape[0] - 1} for this k_cache. Plan again."
                )
        self._executor.run(
            q,
            k_cache,
            v_cache,
            out,
            lse,
            sm_scale=sm_scale,
            logit_cap=logit_cap,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    def _write(self, target: IntArray, slots: torch.Tensor) -> None:
        if not len(target):
            return
        slots = slots.to(torch.int64)
        if self._checks_slots:
            low, high = _bounds(slots)
            self.slot_range = (min(self.slot_range[0], low), max(self.slot_range[1], high))
        self._kv_slots[torch.from_numpy(target).to(self._device)] = slots


def _bounds(slots: torch.Tensor) -> tuple[int, int]:
    """The smallest and the largest slot; (0, 0) if there is none."""
    return (int(slots.min()), int(slots.max())) if len(slots) else (0, 0)


def _copy_slots_cpu(
    plan: PackPlan,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_slots: torch.Tensor,
) -> tuple[int, int]:
    """Copy each pack's slots row by row; return the smallest and the largest."""
    table, target = req_to_token.numpy(), kv_slots.numpy()
    target.fill(0)
    first_query = plan.queries[plan.query_indptr[:-1]]
    rows = req_pool_indices.numpy()[first_query]
    starts, ends, offsets = plan.pack_start, plan.pack_end, plan.slot_offset[:-1]
    for row, start, end, offset in np.stack((rows, starts, ends, offsets), axis=1).tolist():
        target[offset : offset + end - start] = table[row, start:end]
    return int(target.min()), int(target.max())
