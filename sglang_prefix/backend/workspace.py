"""How much device memory plans may take, and what is certain to fit into it."""

from __future__ import annotations

from dataclasses import dataclass

from prefix_kernels.plan import AttentionShape
from prefix_kernels.plan_buffers import HEADER_SIZE, PlanCapacity
from prefix_kernels.work_list import ITEM_FIELDS

__all__ = ["Workspace", "size_workspace"]

_INT32 = 4
# Beside its items: its place in `queries` and in `partials`, and the source of its pack.
_INTS_PER_PARTIAL = 2 + 4
# Beside those, of each row of q: bounds of its partials, start and offset of its tail. With several
# rows of a request, it and its place for each row, and less than one of the tail's.
_INTS_PER_ROW = 3
_INTS_PER_CAUSAL_ROW = 4


@dataclass(frozen=True, slots=True)
class Workspace:
    """What the plans of one attention shape may take.

    Attributes:
        capacity: sizes of the device buffers.
        max_partials: partials that a plan may have; the planner gives up splits to stay below, and
            a batch whose sharing alone has more is left to the stock backend.
        sure_batch_size: batches up to this many requests fit whatever they share, at any length
            up to the context length. Larger ones fit if they are short enough.
        num_bytes: device memory of all buffers.
    """

    capacity: PlanCapacity
    max_partials: int
    sure_batch_size: int
    num_bytes: int


def size_workspace(
    shape: AttentionShape,
    *,
    max_batch_size: int,
    context_len: int,
    reserved_tail_slots: int,
    max_block_rows: int,
    budget: int,
    query_tokens: int = 1,
) -> Workspace:
    """Divide a budget between the slots and the partials of plans.

    Sharing only takes slots away: the packs of any plan hold no more slots than one pack per
    request does. Nor does it add rows to the serialised plan: every pack, split and row block has a
    partial of its own for each of its requests. So a plan fits if its partials are within
    ``max_partials`` and the lengths of its requests within the slots.

    Args:
        shape: heads and item sizes of the layers served.
        max_batch_size: requests of the largest batch, padding included; fewer where the budget
            does not hold two partials of each.
        context_len: tokens of the longest request.
        reserved_tail_slots: tokens that each tail may grow by.
        max_block_rows: rows of the widest tile.
        budget: bytes for all buffers.
        query_tokens: of each request, each of which has a row and partials of its own.

    Raises:
        ValueError: the budget does not even hold one request of ``context_len`` tokens; the
            message says how much does.
    """
    blocks = -(-shape.group_size // max_block_rows)
    partial_ints = _INTS_PER_PARTIAL + ITEM_FIELDS * blocks
    partial_bytes = shape.partial_size + partial_ints * _INT32
    row_ints = _INTS_PER_ROW if query_tokens == 1 else _INTS_PER_CAUSAL_ROW
    row_bytes = (row_ints + 1 + shape.num_kv_heads) * _INT32
    request_slots = context_len + reserved_tail_slots
    # Half the budget is enough for partials; twice as many as rows let one pack be split.
    batch_rows = min(max_batch_size * query_tokens, budget // 4 // partial_bytes)
    batch_rows -= batch_rows % query_tokens
    fixed = (HEADER_SIZE + 1) * _INT32 + batch_rows * row_bytes
    left = budget - fixed - min(2 * batch_rows * partial_bytes, budget // 2)
    if batch_rows < 1 or left < request_slots * _INT32:
        per_request = query_tokens * (partial_bytes + row_bytes) + request_slots * _INT32
        least = 4 * (per_request + HEADER_SIZE * _INT32)
        raise ValueError(
            f"a workspace of {budget} bytes is too small for requests of {context_len} tokens; "
            f"legal: at least {least} bytes"
        )
    slots = min(batch_rows // query_tokens * request_slots, left // _INT32)
    # What slots leave goes to partials, with which packs can be cut into more splits.
    max_partials = (budget - fixed - slots * _INT32) // partial_bytes
    capacity = PlanCapacity(
        batch_rows=batch_rows,
        plan_size=HEADER_SIZE + 1 + batch_rows * row_ints + max_partials * partial_ints,
        slots=slots,
        partials=max_partials,
    )
    return Workspace(
        capacity,
        max_partials,
        min(batch_rows // query_tokens, slots // request_slots),
        fixed + slots * _INT32 + max_partials * partial_bytes,
    )
