"""What a plan is on the device: buffers with fixed addresses, filled by one copy per plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels import plan_header as header
from prefix_kernels.launch import launch
from prefix_kernels.plan import AttentionShape, PackPlan
from prefix_kernels.slots import append_slots_kernel, copy_slots_kernel
from prefix_kernels.staging import Staging

__all__ = ["PlanBuffers", "PlanCapacity", "serialize_plan"]

Int32Array = NDArray[np.int32]

_INT32_MAX = (1 << 31) - 1
_COPY_BLOCK = 1024
_APPEND_BLOCK = 128


@dataclass(frozen=True, slots=True)
class PlanCapacity:
    """What the buffers hold.

    Attributes:
        batch_rows: requests, padding included.
        plan_size: int32 values of a packed plan.
        slots: entries of ``kv_slots``.
        partials: partial results.
    """

    batch_rows: int
    plan_size: int
    slots: int
    partials: int

    def holds(self, other: PlanCapacity) -> bool:
        """Whether a plan of size ``other`` fits."""
        return all(getattr(self, f.name) >= getattr(other, f.name) for f in fields(self))

    def grown_to(self, other: PlanCapacity) -> PlanCapacity:
        """The least capacity, in powers of two, that is no smaller than either."""
        sizes = (max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return PlanCapacity(*(1 << max(size - 1, 0).bit_length() for size in sizes))


def serialize_plan(
    plan: PackPlan, lists: Sequence[Int32Array], partials: Int32Array, padded_batch_size: int
) -> Int32Array:
    """Lay a plan out as one int32 array, as `plan_header.py` says.

    Args:
        plan: the plan.
        lists: work items, [n, ITEM_FIELDS] each, one list per launch of the forward stage.
        partials: where each (pack split, query) writes, see `work_list.py`.
        padded_batch_size: rows of the batch; those past the plan's requests have no partial.

    Raises:
        ValueError: an index does not fit into 32 bits.
    """
    if max(plan.num_slots, len(partials), *(items.size for items in lists)) > _INT32_MAX:
        raise ValueError(
            f"the plan has {plan.num_slots} kv_slots and {len(partials)} partials; "
            f"legal: up to {_INT32_MAX} of each"
        )
    request_indptr = np.full(padded_batch_size + 1, plan.num_partials)
    request_indptr[: plan.batch_size + 1] = plan.request_indptr
    lengths = plan.pack_end - plan.pack_start
    first_query = plan.queries[plan.query_indptr[:-1]]
    sources = np.stack((first_query, plan.pack_start, lengths, plan.slot_offset[:-1]), axis=1)
    head = np.zeros(header.HEADER_SIZE, dtype=np.int32)
    parts = [head]
    size = len(head)

    def add(field: int, part: NDArray[np.integer]) -> None:
        nonlocal size
        head[field] = size
        parts.append(np.ascontiguousarray(part, dtype=np.int32).reshape(-1))
        size += parts[-1].size

    add(header.HEADER_QUERIES, plan.queries)
    add(header.HEADER_PARTIALS, partials)
    add(header.HEADER_REQUEST_INDPTR, request_indptr)
    add(header.HEADER_TAIL_START, plan.tail_start)
    add(header.HEADER_TAIL_OFFSET, plan.tail_offset)
    add(header.HEADER_SOURCES, sources)
    for i, items in enumerate(lists):
        add(header.HEADER_ITEMS + i, items)
        head[header.HEADER_NUM_ITEMS + i] = len(items)
    head[header.HEADER_NUM_REQUESTS] = plan.batch_size
    return np.concatenate(parts)


class PlanBuffers:
    """Device tensors of a plan in use.

    Without a capacity they grow when a plan asks for more, which changes their addresses; with one
    they never do, and a plan that does not fit is refused.

    Args:
        shape: of the layers served.
        device: where the layers run.
        capacity: what to hold for good; None to grow.
    """

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device,
        capacity: PlanCapacity | None = None,
    ) -> None:
        self._partial_shape = (shape.num_qo_heads, shape.v_head_dim)
        self._num_kv_heads = shape.num_kv_heads
        self._device = device
        self._grows = capacity is None
        self.capacity = capacity or PlanCapacity(0, 0, 0, 0)
        self._allocate()

    def _allocate(self) -> None:
        size, device = self.capacity, self._device
        self._staging = Staging(size.plan_size, device)
        with torch.inference_mode(False):  # may be written from outside inference mode later
            self.plan = torch.zeros(size.plan_size, dtype=torch.int32, device=device)
            self.kv_slots = torch.zeros(size.slots, dtype=torch.int32, device=device)
            self.tail_lengths = torch.zeros(size.batch_rows, dtype=torch.int32, device=device)
            arrivals = (size.batch_rows, self._num_kv_heads)
            self.arrivals = torch.zeros(arrivals, dtype=torch.int32, device=device)
            shape = (size.partials, *self._partial_shape)
            self.partial_out = torch.empty(shape, dtype=torch.float32, device=device)
            self.partial_lse = torch.empty(shape[:2], dtype=torch.float32, device=device)

    def load(
        self,
        plan: PackPlan,
        packed: Int32Array,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        padded_batch_size: int,
    ) -> None:
        """Copy a plan to the device and, there, the slots of its packs. Reads no device value.

        Args:
            plan: the plan.
            packed: the same from :func:`serialize_plan`.
            req_to_token: [rows, context] int32 or int64, dense in its second dimension.
            req_pool_indices: [B] int32 or int64.
            padded_batch_size: rows of the batch, padding included.

        Raises:
            ValueError: the plan is larger than the capacity.
        """
        need = PlanCapacity(padded_batch_size, len(packed), plan.num_slots, plan.num_partials)
        if not self.capacity.holds(need):
            if not self._grows:
                raise ValueError(f"the plan needs {need}; legal: up to {self.capacity}")
            self.capacity = self.capacity.grown_to(need)
            self._allocate()
        self.kv_slots[: plan.num_slots].zero_()  # what an older plan left means nothing now
        self.arrivals.zero_()
        self._staging.copy(packed, self.plan)
        lengths = plan.pack_end - plan.pack_start
        blocks = max(1, -(-int(lengths.max()) // _COPY_BLOCK))
        launch(
            copy_slots_kernel,
            (plan.num_packs, blocks),
            plan_ptr=self.plan,
            req_to_token_ptr=req_to_token,
            req_pool_indices_ptr=req_pool_indices,
            kv_slots_ptr=self.kv_slots,
            tail_lengths_ptr=self.tail_lengths,
            row_stride=req_to_token.stride(0),
            num_shared_packs=plan.num_shared_packs,
            BLOCK=_COPY_BLOCK,
        )

    def append(self, seq_lens: torch.Tensor, new_slots: torch.Tensor) -> None:
        """Let every tail grow to its request's length by one slot; device values only.

        Args:
            seq_lens: [rows] int32 or int64 on the device, padding rows included.
            new_slots: [rows] int32 or int64 on the device.
        """
        rows = len(seq_lens)
        launch(
            append_slots_kernel,
            (-(-rows // _APPEND_BLOCK),),
            plan_ptr=self.plan,
            seq_lens_ptr=seq_lens,
            new_slots_ptr=new_slots,
            kv_slots_ptr=self.kv_slots,
            tail_lengths_ptr=self.tail_lengths,
            arrivals_ptr=self.arrivals,
            padded_batch_size=rows,
            NUM_KV_HEADS=self._num_kv_heads,
            BLOCK=_APPEND_BLOCK,
        )
