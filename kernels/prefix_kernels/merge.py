"""The merge on a GPU: combining a request's partials by online softmax, in partial order.

The arithmetic is that of `torch_executor.merge_partials`. Partials are merged either by a launch of
its own, one program for each request and KV head, or by the forward program that ends last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prefix_kernels import plan_buffers

__all__ = ["merge_heads", "merge_kernel"]

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
    out_stride,  # elements from row to row, and from head to head
    out_head_stride,
    lse_stride,
    lse_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WRITES_LSE: tl.constexpr,
):
    """Grid (rows, Hkv). A request with one partial has been written by the forward kernel; a row
    without partials is padding and gets zeros.
    """
    request = tl.program_id(0)
    request_indptr_ptr = plan_ptr + tl.load(plan_ptr + HEADER_REQUEST_INDPTR)
    begin = tl.load(request_indptr_ptr + request)
    end = tl.load(request_indptr_ptr + request + 1)
    if end - begin != 1:
        merge_heads(
            partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr, request, tl.program_id(1),
            begin, end, out_stride, out_head_stride, lse_stride, lse_head_stride,
            NUM_KV_HEADS, GROUP_SIZE, V_HEAD_DIM, BLOCK_DV, WRITES_LSE,
        )  # fmt: skip


@triton.jit
def merge_heads(
    partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr, request, kv_head, begin, end,
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
        row_ptr = out_ptr + tl.cast(request, tl.int64) * out_stride
        tl.store(
            row_ptr + head[:, None] * out_head_stride + dims[None, :],
            values.to(out_ptr.dtype.element_ty),
            mask=head_exists[:, None] & (dims < V_HEAD_DIM)[None, :],
        )
        if WRITES_LSE:
            lse = (peak + tl.log2(divisor)) * LN2
            lse_row_ptr = lse_ptr + tl.cast(request, tl.int64) * lse_stride
            tl.store(lse_row_ptr + head * lse_head_stride, lse, mask=head_exists)
