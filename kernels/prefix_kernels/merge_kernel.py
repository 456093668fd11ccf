"""The merge as a kernel: one program combines one head's partials of one request."""

from __future__ import annotations

import triton
import triton.language as tl

from prefix_kernels import plan_header

__all__ = ["merge_kernel"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HEADER_REQUEST_INDPTR = tl.constexpr(plan_header.HEADER_REQUEST_INDPTR)


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
    NUM_QO_HEADS: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    WRITES_LSE: tl.constexpr,
):
    """Combine partials in their own order; see `merge.merge_partials` for the arithmetic.

    Grid (rows, Hq). A request with one partial has been written by the forward kernel; a row
    without partials is padding and gets zeros.
    """
    request = tl.program_id(0)
    head = tl.program_id(1)
    request_indptr_ptr = plan_ptr + tl.load(plan_ptr + HEADER_REQUEST_INDPTR)
    begin = tl.load(request_indptr_ptr + request)
    end = tl.load(request_indptr_ptr + request + 1)
    if end - begin != 1:
        dims = tl.arange(0, BLOCK_DV)
        offsets = tl.arange(0, BLOCK_PARTIALS)
        peak = -float("inf")
        total = 0.0
        values = tl.zeros([BLOCK_DV], tl.float32)
        for start in range(begin, end, BLOCK_PARTIALS):
            index = start + offsets
            exists = index < end
            row = index.to(tl.int64) * NUM_QO_HEADS + head
            logs = tl.load(partial_lse_ptr + row, mask=exists, other=-float("inf")) * LOG2E
            part = tl.load(
                partial_out_ptr + row[:, None] * V_HEAD_DIM + dims[None, :],
                mask=exists[:, None] & (dims < V_HEAD_DIM)[None, :],
                other=0.0,
            )
            new_peak = tl.maximum(peak, tl.max(logs, 0))
            # All pieces so far may be empty: their peak is -inf, and -inf - -inf is nan.
            base = tl.where(new_peak > -float("inf"), new_peak, 0.0)
            shrink = tl.exp2(peak - base)
            weights = tl.exp2(logs - base)
            total = total * shrink + tl.sum(weights, 0)
            values = values * shrink + tl.sum(part * weights[:, None], 0)
            peak = new_peak
        some = total > 0
        values /= tl.where(some, total, 1.0)
        out_row = request.to(tl.int64)
        tl.store(
            out_ptr + out_row * out_stride + head * out_head_stride + dims,
            values.to(out_ptr.dtype.element_ty),
            mask=dims < V_HEAD_DIM,
        )
        if WRITES_LSE:
            lse = (peak + tl.log2(tl.where(some, total, 1.0))) * LN2
            lse_ptr += out_row * lse_stride + head * lse_head_stride
            tl.store(lse_ptr, tl.where(some, lse, -float("inf")))
