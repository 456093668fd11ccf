"""Runs plans: owns the slots that a plan reads, appends to its tails, calls the executor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.executor import PlanExecutor
from prefix_kernels.torch_executor import TorchExecutor
from sglang_prefix.packing import AttentionShape
from sglang_prefix.plan import PackPlan

__all__ = ["EXECUTORS", "PlanRunner", "choose_executor"]

IntArray = NDArray[np.int64]

EXECUTORS = ("auto", "torch", "triton")


def choose_executor(
    name: str, device: torch.device, q_dtype: torch.dtype, kv_dtype: torch.dtype
) -> str:
    """Resolve ``"auto"``: Triton on a GPU that its kernels can use, torch elsewhere.

    Raises:
        ValueError: the name is unknown, or its executor cannot take these tensors.
    """
    if name not in EXECUTORS:
        legal = ", ".join(map(repr, EXECUTORS))
        raise ValueError(f"executor={name!r} is unknown; legal: {legal}")
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return "torch"
    # Not at the top: importing Triton takes a second, and the torch executor needs none of it.
    from prefix_kernels.triton_executor import why_not_triton

    why_not = why_not_triton(device, q_dtype, kv_dtype)
    if why_not and name == "triton":
        raise ValueError(f"executor='triton' cannot be used here: {why_not}; legal: 'torch'")
    return "torch" if why_not else "triton"


class PlanRunner:
    """The state behind a plan in use, shared by the wrapper and the SGLang backend.

    Args:
        shape: heads, head dims and item sizes of the layers served.
        device: where q, the caches and ``req_to_token`` live.
        executor: "torch", the torch executor, which runs on any device; or "triton".
        check_slots: refuse slots outside the caches also where looking costs a device sync.
        options: more arguments of the executor.
    """

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device,
        executor: str,
        *,
        check_slots: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._checks_slots = check_slots or device.type == "cpu"
        self.executor_name = executor
        self._device = device
        self._executor = _build_executor(shape, device, executor, options or {})
        self._tail_start = np.zeros(0, dtype=np.int64)
        self._tail_offset = np.zeros(0, dtype=np.int64)
        self.plan: PackPlan | None = None
        self._seq_lens = np.zeros(0, dtype=np.int64)
        self._steps_in_graph = 0  # since then, each of which added a token to every tail
        self.num_rows = 0
        self.slot_range = (0, 0)

    @property
    def seq_lens(self) -> IntArray:
        """[B] lengths that tails have grown to."""
        return self._seq_lens + self._steps_in_graph

    @property
    def max_block_rows(self) -> int | None:
        """Query rows (requests times group size) that read KV in one pass; None for any number."""
        return self._executor.max_block_rows

    def load(
        self,
        plan: PackPlan,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        num_rows: int | None = None,
    ) -> None:
        """Take a plan into use and copy the slots of its positions. Reads no device value.

        Args:
            plan: the plan.
            req_to_token: [rows, context] int32 or int64 on the device.
            req_pool_indices: [B] int32 or int64 on the device.
            num_rows: rows of q and the outputs, padding included; None for as many as requests.
        """
        self._executor.load(plan, req_to_token, req_pool_indices, num_rows=num_rows)
        self.num_rows = plan.batch_size if num_rows is None else num_rows
        if self._checks_slots:
            self.slot_range = _bounds(self._executor.kv_slots)
        first_tail = plan.num_shared_packs
        self._tail_start = plan.pack_start[first_tail:]
        self._tail_offset = plan.slot_offset[first_tail:-1]
        self.plan = plan
        self._set_lengths(plan.seq_lens)

    def append_in_graph(self, seq_lens: torch.Tensor, new_slots: torch.Tensor) -> None:
        """Let every tail grow by one token, from device tensors alone, as a graph records it.

        The host is told by :meth:`note_growth` at each replay.

        Args:
            seq_lens: [rows] int32 or int64 on the device, padding included: the new lengths.
            new_slots: [rows] int32 or int64 on the device.
        """
        if not self._executor.append(seq_lens, new_slots):
            raise NotImplementedError(f"executor {self.executor_name!r} cannot run in a graph")

    def note_growth(self) -> None:
        """Note that a graph lets every tail grow by one token on the device."""
        self._steps_in_graph += 1

    def _set_lengths(self, seq_lens: IntArray) -> None:
        self._seq_lens, self._steps_in_graph = seq_lens, 0

    def append(
        self,
        seq_lens: IntArray,
        new_slots: torch.Tensor,
        device_lens: torch.Tensor | None = None,
    ) -> None:
        """Let tails grow to ``seq_lens`` [B]; ``new_slots`` go request by request.

        The caller has checked the lengths with :meth:`check_lengths`.

        Args:
            seq_lens: [B] the new lengths.
            new_slots: slots of the new tokens, on the device.
            device_lens: [B] int32 or int64, the same lengths on the device, if the caller has
                them there. They spare the kernels a copy where every request grows by one.
        """
        grown = seq_lens - self.seq_lens
        by_one = bool((grown == 1).all())
        if by_one and device_lens is not None and self._executor.append(device_lens, new_slots):
            self._note_slots(new_slots)
            self._set_lengths(seq_lens)
            return
        if by_one:
            target = self._tail_offset + self.seq_lens - self._tail_start
        else:
            within = np.arange(int(grown.sum())) - np.repeat(np.cumsum(grown) - grown, grown)
            first = self._tail_offset + self.seq_lens - self._tail_start
            target = np.repeat(first, grown) + within
        self._write(target, new_slots)
        self._executor.set_lengths(seq_lens - self._tail_start)
        self._set_lengths(seq_lens)

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
        planned, room = self.plan.seq_lens, self.plan.reserved_tail_slots
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
        self._note_slots(slots)
        self._executor.write_slots(target, slots)

    def _note_slots(self, slots: torch.Tensor) -> None:
        if self._checks_slots:
            low, high = _bounds(slots)
            self.slot_range = (min(self.slot_range[0], low), max(self.slot_range[1], high))


def _build_executor(
    shape: AttentionShape, device: torch.device, name: str, options: Mapping[str, Any]
) -> PlanExecutor:
    if name == "torch":
        heads = shape.num_qo_heads, shape.num_kv_heads
        return TorchExecutor(*heads, shape.v_head_dim, device, **options)
    from prefix_kernels.tiles import TileShape
    from prefix_kernels.triton_executor import TritonExecutor

    tile_shape = TileShape(shape.head_dim, shape.v_head_dim, shape.q_itemsize, shape.kv_itemsize)
    heads = shape.num_qo_heads, shape.num_kv_heads
    return TritonExecutor(*heads, tile_shape, device, **options)


def _bounds(slots: torch.Tensor) -> tuple[int, int]:
    """The smallest and the largest slot; (0, 0) if there is none."""
    return (int(slots.min()), int(slots.max())) if len(slots) else (0, 0)
