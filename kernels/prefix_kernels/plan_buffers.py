"""What a plan is on the device: buffers with fixed addresses, filled by one copy per plan.

The plan itself is one int32 array. It starts with a header that says where the parts stand, and the
parts follow without gaps. So a plan crosses to the device in one copy of the bytes that it needs,
while kernels captured in a graph know one address only. The slots are copied from ``req_to_token``
by a kernel, once per plan, and appended to by another, once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from prefix_kernels.arguments import INT32_MAX
from prefix_kernels.launch import launch
from prefix_kernels.plan import AttentionShape, PackPlan
from prefix_kernels.work_list import ITEM_FIELDS

__all__ = [
    "HEADER_ITEMS",
    "HEADER_NUM_ITEMS",
    "HEADER_NUM_ROWS",
    "HEADER_PARTIALS",
    "HEADER_QUERIES",
    "HEADER_REQUEST_INDPTR",
    "HEADER_SIZE",
    "MAX_LISTS",
    "PlanBuffers",
    "PlanCapacity",
    "append_slots_kernel",
    "copy_slots_kernel",
    "serialize_plan",
]

Int32Array = NDArray[np.int32]

MAX_LISTS = 4  # work lists, one per launch of the forward stage

HEADER_NUM_ROWS = 0  # queries, padding left out
HEADER_NUM_ITEMS = 1  # one per list
HEADER_ITEMS = HEADER_NUM_ITEMS + MAX_LISTS  # one per list: where its items begin
HEADER_QUERIES = HEADER_ITEMS + MAX_LISTS
HEADER_PARTIALS = HEADER_QUERIES + 1
HEADER_REQUEST_INDPTR = HEADER_PARTIALS + 1  # [rows + 1], padding rows included
HEADER_TAIL_START = HEADER_REQUEST_INDPTR + 1  # [B]
HEADER_TAIL_OFFSET = HEADER_TAIL_START + 1  # [B] index in kv_slots
HEADER_SOURCES = HEADER_TAIL_OFFSET + 1  # [packs, 4], see `copy_slots_kernel`
# Under a plan with `query_lens`, [queries, 2]: the request, and how many of its queries follow.
HEADER_ROWS = HEADER_SOURCES + 1
HEADER_SIZE = HEADER_ROWS + 1

# Under overlap scheduling a plan may be copied while the one before is still on its way.
_NUM_BUFFERS = 3
_COPY_BLOCK = 1024
_APPEND_BLOCK = 128


class PlanCapacity(NamedTuple):
    """What the buffers hold.

    Attributes:
        batch_rows: rows of q, which are requests where each has one query, padding included.
        plan_size: int32 values of a serialised plan.
        slots: entries of ``kv_slots``.
        partials: partial results.
    """

    batch_rows: int
    plan_size: int
    slots: int
    partials: int

    def holds(self, other: PlanCapacity) -> bool:
        """Whether a plan of size ``other`` fits."""
        return all(mine >= need for mine, need in zip(self, other, strict=True))

    def grown_to(self, other: PlanCapacity) -> PlanCapacity:
        """The least capacity, in powers of two, that is no smaller than either."""
        sizes = map(max, self, other)
        return PlanCapacity(*(1 << max(size - 1, 0).bit_length() for size in sizes))


def serialize_plan(
    plan: PackPlan, lists: Sequence[Int32Array], partials: Int32Array, padded_batch_size: int
) -> Int32Array:
    """Lay a plan out as one int32 array, the header first.

    Args:
        plan: the plan.
        lists: work items, [n, ITEM_FIELDS] each, one list per launch of the forward stage.
        partials: where each (pack split, query) writes, see `work_list.py`.
        padded_batch_size: rows of q; those past the plan's queries have no partial.

    Raises:
        ValueError: an index does not fit into 32 bits.
    """
    num_items = sum(map(len, lists))
    num_values = HEADER_SIZE + len(plan.queries) + len(partials) + num_items * ITEM_FIELDS
    num_values += padded_batch_size + 1 + 2 * plan.batch_size + 4 * plan.num_packs
    request_of = plan.request_of_row
    rows = np.zeros((0, 2), dtype=np.int64)
    if plan.query_lens is not None:
        behind = np.cumsum(plan.query_lens)[request_of] - 1 - np.arange(plan.num_rows)
        rows = np.stack((request_of, behind), axis=1)
    num_values += rows.size
    if max(plan.num_slots, num_values) > INT32_MAX:
        raise ValueError(
            f"the plan has {plan.num_slots} kv_slots, {len(partials)} partials and {num_items} "
            f"work items; legal: up to {INT32_MAX} kv_slots, and as many 32-bit values in all"
        )
    request_indptr = np.full(padded_batch_size + 1, plan.num_partials)
    request_indptr[: plan.num_rows + 1] = plan.request_indptr
    lengths = plan.pack_end - plan.pack_start
    reader = request_of[plan.queries[plan.query_indptr[:-1]]]
    sources = np.stack((reader, plan.pack_start, lengths, plan.slot_offset[:-1]), axis=1)
    head = np.zeros(HEADER_SIZE, dtype=np.int32)
    parts = [head]
    size = len(head)

    def add(field: int, part: NDArray[np.integer]) -> None:
        nonlocal size
        head[field] = size
        parts.append(np.ascontiguousarray(part, dtype=np.int32).reshape(-1))
        size += parts[-1].size

    add(HEADER_QUERIES, plan.queries)
    add(HEADER_PARTIALS, partials)
    add(HEADER_REQUEST_INDPTR, request_indptr)
    add(HEADER_TAIL_START, plan.tail_start)
    add(HEADER_TAIL_OFFSET, plan.tail_offset)
    add(HEADER_SOURCES, sources)
    add(HEADER_ROWS, rows)
    for i, items in enumerate(lists):
        add(HEADER_ITEMS + i, items)
        head[HEADER_NUM_ITEMS + i] = len(items)
    head[HEADER_NUM_ROWS] = plan.num_rows
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
        self._staging = _Staging(size.plan_size, device)
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
            padded_batch_size: rows of q, padding included.

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

    def append(self, seq_lens: torch.Tensor, new_slots: torch.Tensor, *, causal: bool) -> None:
        """Let every tail grow to its request's length; device values only.

        Args:
            seq_lens: [B] int32 or int64 on the device; padding may follow.
            new_slots: [rows] int32 or int64 on the device, of the last positions of each request,
                as many as it has queries; padding rows included.
            causal: whether the plan has ``query_lens``; else rows are requests.
        """
        rows = len(new_slots)
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
            CAUSAL=causal,
            BLOCK=_APPEND_BLOCK,
        )


class _Staging:
    """Pinned buffers used in turn, each free again once its copy has been made.

    A copy from pageable memory would make the CPU wait for the stream. A single pinned buffer could
    be overwritten while its last copy is still under way. On the CPU there is nothing to stage.

    Args:
        size: int32 values per buffer.
        device: where copies go.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._next = 0
        self._buffers: list[torch.Tensor] = []
        if device.type == "cuda":
            with torch.inference_mode(False):
                self._buffers = [
                    torch.empty(size, dtype=torch.int32, pin_memory=True)
                    for _ in range(_NUM_BUFFERS)
                ]
            self._copied = [torch.cuda.Event() for _ in self._buffers]

    def copy(self, values: NDArray[np.int32], target: torch.Tensor) -> None:
        """Copy ``values`` [n] to the start of ``target`` [>= n], in order on the current stream."""
        source = torch.from_numpy(values)
        if not self._buffers:
            target[: len(values)].copy_(source)
            return
        staged, copied = self._buffers[self._next], self._copied[self._next]
        self._next = (self._next + 1) % _NUM_BUFFERS
        copied.synchronize()  # of three plans ago: done, unless the device is far behind
        staged[: len(values)].copy_(source)
        target[: len(values)].copy_(staged[: len(values)], non_blocking=True)
        copied.record()


_NUM_ROWS = tl.constexpr(HEADER_NUM_ROWS)
_TAIL_START = tl.constexpr(HEADER_TAIL_START)
_TAIL_OFFSET = tl.constexpr(HEADER_TAIL_OFFSET)
_SOURCES = tl.constexpr(HEADER_SOURCES)
_ROWS = tl.constexpr(HEADER_ROWS)
_NO_SLOT = tl.constexpr(INT32_MAX)


@triton.jit
def _as_int32(slots):
    """Slots in 32 bits; what does not fit becomes the nearest that does, which is none either."""
    if slots.dtype == tl.int64:
        slots = tl.minimum(tl.maximum(slots, -1), _NO_SLOT)
    return slots.to(tl.int32)


# Triton would compile anew for other values of what it specialises, also while serving. So numbers
# that change from plan to plan are not specialised, nor is the alignment of SGLang's slices.
@triton.jit(
    do_not_specialize=["num_shared_packs"],
    do_not_specialize_on_alignment=["req_pool_indices_ptr"],
)
def copy_slots_kernel(
    plan_ptr,
    req_to_token_ptr,  # [rows, context] int32 or int64
    req_pool_indices_ptr,  # [B] int32 or int64
    kv_slots_ptr,  # [kv slots] int32, written
    tail_lengths_ptr,  # [B] int32, written
    row_stride,  # elements from row to row of req_to_token
    num_shared_packs,
    BLOCK: tl.constexpr,
):
    """Copy ``BLOCK`` slots of one pack; grid (packs, blocks of the longest pack).

    A source is four int32: request, first position, tokens, index in ``kv_slots``.
    """
    pack = tl.program_id(0)
    source_ptr = plan_ptr + tl.load(plan_ptr + _SOURCES) + pack * 4
    tokens = tl.load(source_ptr + 2)
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(req_pool_indices_ptr + tl.load(source_ptr)).to(tl.int64)
    slots_ptr = req_to_token_ptr + row * row_stride + tl.load(source_ptr + 1)
    slots = tl.load(slots_ptr + within, mask=within < tokens)
    target_ptr = kv_slots_ptr + tl.load(source_ptr + 3)
    tl.store(target_ptr + within, _as_int32(slots), mask=within < tokens)
    is_tail = (pack >= num_shared_packs) & (tl.program_id(1) == 0)
    tl.store(tail_lengths_ptr + pack - num_shared_packs, tokens, mask=is_tail)


@triton.jit(
    do_not_specialize=["padded_batch_size"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "new_slots_ptr"],
)
def append_slots_kernel(
    plan_ptr,
    seq_lens_ptr,  # [B] int32 or int64, lengths with the new tokens
    new_slots_ptr,  # [rows] int32 or int64, slot of each query token
    kv_slots_ptr,  # [kv slots] int32, written
    tail_lengths_ptr,  # [B] int32, written
    arrivals_ptr,  # [rows, Hkv] int32, zeroed
    padded_batch_size,
    NUM_KV_HEADS: tl.constexpr,
    CAUSAL: tl.constexpr,  # whether requests have several query tokens, else rows are requests
    BLOCK: tl.constexpr,
):
    """Write this step's slots at the ends of the tails, and the lengths of the tails.

    Lengths are written, not counted up, so a step that is repeated or given up does no harm. The
    arrivals that such a step may have left are reset. Rows at or past the number of queries are
    padding and have no tail. Where a request has several queries, each writes the tail's length.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = (row < padded_batch_size) & (row < tl.load(plan_ptr + _NUM_ROWS))
    request = row
    if CAUSAL:
        rows_ptr = plan_ptr + tl.load(plan_ptr + _ROWS) + 2 * row
        request = tl.load(rows_ptr, mask=exists, other=0)
    start_ptr = plan_ptr + tl.load(plan_ptr + _TAIL_START) + request
    offset_ptr = plan_ptr + tl.load(plan_ptr + _TAIL_OFFSET) + request
    length = tl.load(seq_lens_ptr + request, mask=exists, other=0).to(tl.int32)
    tail_length = length - tl.load(start_ptr, mask=exists, other=0)
    seen = tail_length  # of the tail, by this row
    if CAUSAL:
        seen -= tl.load(rows_ptr + 1, mask=exists, other=0)
    target = tl.load(offset_ptr, mask=exists, other=0) + seen - 1
    slot = _as_int32(tl.load(new_slots_ptr + row, mask=exists, other=0))
    tl.store(kv_slots_ptr + target, slot, mask=exists & (seen > 0))
    tl.store(tail_lengths_ptr + request, tail_length, mask=exists)
    for kv_head in range(NUM_KV_HEADS):
        arrival_ptr = arrivals_ptr + row * NUM_KV_HEADS + kv_head
        tl.store(arrival_ptr, 0, mask=row < padded_batch_size)
