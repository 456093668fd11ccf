"""The merge on a GPU: combining a request's partials by online softmax, in partial order.

The arithmetic is that of `torch_executor.merge_partials`. Partials are merged either by a launch of
its own, one program for each request and KV head, or by the forward program that ends last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prefix_kernels import plan_buffers

__all__ = ["kept_of_sinks", "last_block_merge", "merge_heads", "merge_kernel"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HEADER_REQUEST_INDPTR = tl.constexpr(plan_buffers.HEADER_REQUEST_INDPTR)


@triton.jit
def merge_kernel(
    partial_out_ptr,  # [partials, Hq, Dv] float32
    partial_lse_ptr,  # [partials, Hq] float32, natural log
    plan_ptr,
    out_ptr,  # [rows, Hq, Dv]
    lse_ptr,  # [rows, Hq] float32
    sinks_ptr,  # [Hq], or None: a kernel without sinks has no such parameter
    out_stride,  # elements from row to row, and from head to head
    out_head_stride,
    lse_stride,
    lse_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WRITES_LSE: tl.constexpr,
    OVERLAPS_MERGE: tl.constexpr,
):
    """Grid (rows, Hkv). A request with one partial has been written by the forward kernel; a row
    without partials is padding and gets zeros.

    With ``OVERLAPS_MERGE`` programs may begin while the forward kernel runs (programmatic dependent
    launch, CUDA programming guide; compute capability 9.0). They find their partials meanwhile, in
    a plan that was there before that kernel, and wait for its end before they read any. Those that
    have nothing to merge wait, too, since the end of this launch stands for the end of both.
    """
    request = tl.program_id(0)
    request_indptr_ptr = plan_ptr + tl.load(plan_ptr + HEADER_REQUEST_INDPTR)
    begin = tl.load(request_indptr_ptr + request)
    end = tl.load(request_indptr_ptr + request + 1)
    if OVERLAPS_MERGE:
        tl.extra.cuda.gdc_wait()
    if end - begin != 1:
        merge_heads(
            partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr, sinks_ptr, request,
            tl.program_id(1), begin, end, out_stride, out_head_stride, lse_stride, lse_head_stride,
            NUM_KV_HEADS, GROUP_SIZE, V_HEAD_DIM, BLOCK_DV, WRITES_LSE,
        )  # fmt: skip


@triton.jit
def kept_of_sinks(sinks_ptr, head, head_exists, lse):
    """What sinks leave of the outputs of heads: exp(lse) / (exp(lse) + exp(sink)).

    All of nothing, whose lse is -inf: padding stays zeros.
    """
    sinks = tl.load(sinks_ptr + head, mask=head_exists, other=0.0).to(tl.float32)
    kept = 1 / (1 + tl.exp2((sinks - lse) * LOG2E))
    return tl.where(lse > float("-inf"), kept, 1.0)


@triton.jit
def merge_heads(
    partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr, sinks_ptr, request, kv_head, begin, end,
    out_stride, out_head_stride, lse_stride, lse_head_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    V_HEAD_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, WRITES_LSE: tl.constexpr,
):  # fmt: skip
    """Merge partials [begin, end) of a request for the query heads of one KV head."""
    # Some four thousand values at a time: the loads of several partials overlap.
    BLOCK_HEADS: tl.constexpr = tl.constexpr(min(triton.next_power_of_2(GROUP_SIZE), 8))
    BLOCK_PARTIALS: tl.constexpr = tl.constexpr(max(4096 // (BLOCK_HEADS * BLOCK_DV), 1))
    dims = tl.arange(0, BLOCK_DV)
    offsets = tl.arange(0, BLOCK_PARTIALS)
    for first_head in range(0, GROUP_SIZE, BLOCK_HEADS):
        within = first_head + tl.arange(0, BLOCK_HEADS)
        head_exists = within < GROUP_SIZE
        head = kv_head * GROUP_SIZE + within
        peak = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_HEADS], tl.float32)
        values = tl.zeros([BLOCK_HEADS, BLOCK_DV], tl.float32)
        for start in range(begin, end, BLOCK_PARTIALS):
            index = start + offsets
            exists = (index < end)[:, None] & head_exists[None, :]
            row = index.to(tl.int64)[:, None] * (NUM_KV_HEADS * GROUP_SIZE) + head[None, :]
            # Past the L1 cache: another SM may have written them just now.
            logs = tl.load(
                partial_lse_ptr + row, mask=exists, other=float("-inf"), cache_modifier=".cg"
            )
            part = tl.load(
                partial_out_ptr + row[:, :, None] * V_HEAD_DIM + dims[None, None, :],
                mask=exists[:, :, None] & (dims < V_HEAD_DIM)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            new_peak = tl.maximum(peak, tl.max(logs, 0) * LOG2E)
            # All splits so far may be empty: their peak is -inf, and -inf - -inf is nan.
            base = tl.where(new_peak > float("-inf"), new_peak, 0.0)
            shrink = tl.exp2(peak - base)
            weights = tl.exp2(logs * LOG2E - base[None, :])
            total = total * shrink + tl.sum(weights, 0)
            values = values * shrink[:, None] + tl.sum(part * weights[:, :, None], 0)
            peak = new_peak
        divisor = tl.where(total > 0, total, 1.0)
        values /= divisor[:, None]
        lse = (peak + tl.log2(divisor)) * LN2
        if sinks_ptr is not None:
            values *= kept_of_sinks(sinks_ptr, head, head_exists, lse)[:, None]
        row_ptr = out_ptr + tl.cast(request, tl.int64) * out_stride
        tl.store(
            row_ptr + head[:, None] * out_head_stride + dims[None, :],
            values.to(out_ptr.dtype.element_ty),
            mask=head_exists[:, None] & (dims < V_HEAD_DIM)[None, :],
        )
        if WRITES_LSE:
            lse_row_ptr = lse_ptr + tl.cast(request, tl.int64) * lse_stride
            tl.store(lse_row_ptr + head * lse_head_stride, lse, mask=head_exists)


@triton.jit
def last_block_merge(
    partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr, sinks_ptr, arrivals_ptr,
    request_indptr_ptr, rows, query, goes_to_partial, kv_head,
    out_stride, out_head_stride, lse_stride, lse_head_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    V_HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
    WRITES_LSE: tl.constexpr,
):  # fmt: skip
    """Count this tile's rows, and merge the requests whose partials are all there.

    A request is complete for a KV head when every grouped head of every partial has been counted.
    The first row of a query in the tile counts for all that the tile has of it: the others may be
    in the next row block, where the group size does not divide the tile's rows. Which program
    completes a request is chance. The result is not, since partials are merged in order.

    Args:
        rows: [BLOCK_M] rows of the pack.
        query: [BLOCK_M] batch row of each.
        goes_to_partial: [BLOCK_M] whether a row has written a partial.
    """
    tl.debug_barrier()  # the partials of all threads come before the count
    within = tl.arange(0, BLOCK_M)
    head = rows % GROUP_SIZE
    counts = goes_to_partial & ((head == 0) | (within == 0))
    rows_here = tl.minimum(GROUP_SIZE - head, BLOCK_M - within)
    counter_ptr = arrivals_ptr + query * NUM_KV_HEADS + kv_head
    before = tl.atomic_add(counter_ptr, rows_here, mask=counts, sem="acq_rel", scope="gpu")
    begin = tl.load(request_indptr_ptr + query, mask=counts, other=0)
    end = tl.load(request_indptr_ptr + query + 1, mask=counts, other=0)
    completes = counts & (before + rows_here == (end - begin) * GROUP_SIZE)
    tl.store(counter_ptr, 0, mask=completes)
    tl.debug_barrier()
    waiting = tl.where(completes, query, -1)  # at most one row of a request is its last
    for _ in range(tl.sum(completes.to(tl.int32), 0)):
        request = tl.max(waiting, 0)
        waiting = tl.where(waiting == request, -1, waiting)
        merge_heads(
            partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr, sinks_ptr, request, kv_head,
            tl.load(request_indptr_ptr + request), tl.load(request_indptr_ptr + request + 1),
            out_stride, out_head_stride, lse_stride, lse_head_stride,
            NUM_KV_HEADS, GROUP_SIZE, V_HEAD_DIM, BLOCK_DV, WRITES_LSE,
        )  # fmt: skip
