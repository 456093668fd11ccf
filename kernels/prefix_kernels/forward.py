"""The pack-forward kernel: attention of a pack's queries over one split of its KV.

Grid: programs that run at the same time. Each takes work items from a list in turn. An item is one
row block of one split of one pack; an item and a KV head are what one tile computes. All query
heads that read that KV head, of all requests of the pack, are rows of the tile, so shared KV is
read once for all of them (PAT, arXiv 2511.22333, section 3). Softmax is online, in base 2, with one
rescale per KV tile (FlashAttention-2, arXiv 2307.08691, section 3.1).

Slots come from the plan's own ``kv_slots``, never from ``req_to_token``. They are loaded one KV
tile ahead of the rows that they address, because only then does the compiler keep several tiles in
flight. Slot positions past the end repeat the last one, so that K and V need no mask and a score of
-inf never meets the values of another request.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prefix_kernels import plan_buffers, work_list
from prefix_kernels.kv_loop import attend_kv
from prefix_kernels.merge import kept_of_sinks, last_block_merge, merge_heads

__all__ = ["pack_forward_kernel"]

LN2 = tl.constexpr(0.6931471805599453)
ITEM_FIELDS = tl.constexpr(work_list.ITEM_FIELDS)
TO_OUT = tl.constexpr(work_list.TO_OUT)
TO_PARTIALS = tl.constexpr(work_list.TO_PARTIALS)
HEADER_NUM_ITEMS = tl.constexpr(plan_buffers.HEADER_NUM_ITEMS)
HEADER_ITEMS = tl.constexpr(plan_buffers.HEADER_ITEMS)
HEADER_QUERIES = tl.constexpr(plan_buffers.HEADER_QUERIES)
HEADER_PARTIALS = tl.constexpr(plan_buffers.HEADER_PARTIALS)
HEADER_REQUEST_INDPTR = tl.constexpr(plan_buffers.HEADER_REQUEST_INDPTR)
HEADER_NUM_ROWS = tl.constexpr(plan_buffers.HEADER_NUM_ROWS)


@triton.jit(
    do_not_specialize=["padded_batch_size"]
)  # else a batch size could ask for a compilation
def pack_forward_kernel(
    # One layer.
    q_ptr,  # [B, Hq, D]
    k_ptr,  # [slots, Hkv, D]
    v_ptr,  # [slots, Hkv, Dv]
    out_ptr,  # [B, Hq, Dv]: of requests with a single partial
    lse_ptr,  # [B, Hq] float32: likewise
    partial_out_ptr,  # [partials, Hq, Dv] float32
    partial_lse_ptr,  # [partials, Hq] float32, natural log
    k_scale_ptr,  # float32, one per KV head at their strides
    v_scale_ptr,
    sinks_ptr,  # [Hq], or None: a kernel without sinks has no such parameter
    # The plan, laid out as `plan_buffers.py` says; fields of an item in `work_list.py`.
    plan_ptr,  # int32
    kv_slots_ptr,  # [kv slots] int32
    tail_lengths_ptr,  # [B] int32
    arrivals_ptr,  # [rows, Hkv] int32, zeros before and after the launch
    padded_batch_size,  # of q and the outputs, padding included
    sm_scale,
    v_factor,
    logit_cap,
    # Elements from request to the next, and from head to head.
    q_stride,
    q_head_stride,
    out_stride,
    out_head_stride,
    lse_stride,
    lse_head_stride,
    k_scale_stride,
    v_scale_stride,
    # Elements from slot to the next, and from head to head. They are those of the engine's pool, so
    # they never change; as runtime values they would cost a 64-bit product for every row.
    K_STRIDE: tl.constexpr,
    K_HEAD_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    V_HEAD_STRIDE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # powers of two
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE_BLOCK_M: tl.constexpr,  # the second tile class of a fused launch, 0 for none
    WIDE_BLOCK_N: tl.constexpr,
    LIST: tl.constexpr,  # which of the plan's work lists
    V_IN_K: tl.constexpr,  # whether v is the first elements of k; v_ptr is not read then
    CAUSAL: tl.constexpr,  # whether requests have several queries, each with its own bound
    HAS_CAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    WRITES_LSE: tl.constexpr,
    MERGES: tl.constexpr,  # whether the program that completes a request merges its partials
    OVERLAPS_MERGE: tl.constexpr,  # whether the launch of the merge may begin before this one ends
    # Of the tile, see `TileConfig`.
    CARRIES_ITEM: tl.constexpr,
    BRANCHES_FOR_TAIL: tl.constexpr,
    HALF_PRODUCTS: tl.constexpr,
):
    if OVERLAPS_MERGE:  # its programs wait for the end of all of ours, see `merge_kernel`
        tl.extra.cuda.gdc_launch_dependents()
    num_tiles = tl.load(plan_ptr + HEADER_NUM_ITEMS + LIST) * NUM_KV_HEADS
    items_ptr = plan_ptr + tl.load(plan_ptr + HEADER_ITEMS + LIST)
    queries_ptr = plan_ptr + tl.load(plan_ptr + HEADER_QUERIES)
    partials_ptr = plan_ptr + tl.load(plan_ptr + HEADER_PARTIALS)
    request_indptr_ptr = plan_ptr + tl.load(plan_ptr + HEADER_REQUEST_INDPTR)
    step = tl.num_programs(0)
    first = tl.program_id(0)
    item = _load_item(items_ptr + first // NUM_KV_HEADS * ITEM_FIELDS, first < num_tiles)
    length = _load_length(item, tail_lengths_ptr)
    for index in range(first, num_tiles, step):
        item_ptr = items_ptr + index // NUM_KV_HEADS * ITEM_FIELDS
        kv_head = index % NUM_KV_HEADS
        if not CARRIES_ITEM:
            item = _load_item(item_ptr, True)
            length = _load_length(item, tail_lengths_ptr)
        following = item
        if CARRIES_ITEM:
            next_index = index + tl.minimum(step, num_tiles - 1 - index)
            following = _load_item(items_ptr + next_index // NUM_KV_HEADS * ITEM_FIELDS, True)
        is_wide = False
        if WIDE_BLOCK_M > 0:
            is_wide = item[7] > 0
        if is_wide:
            if WIDE_BLOCK_M > 0:  # a constant: not compiled without a second class
                length = _attend_item(
                    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr,
                    k_scale_ptr, v_scale_ptr, sinks_ptr, kv_slots_ptr, queries_ptr, partials_ptr,
                    tail_lengths_ptr, arrivals_ptr, request_indptr_ptr,
                    item, item_ptr, following, length, kv_head, sm_scale, v_factor, logit_cap,
                    q_stride, q_head_stride, out_stride, out_head_stride,
                    lse_stride, lse_head_stride, k_scale_stride, v_scale_stride,
                    K_STRIDE, K_HEAD_STRIDE, V_STRIDE, V_HEAD_STRIDE,
                    NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV,
                    WIDE_BLOCK_M, WIDE_BLOCK_N, V_IN_K, CAUSAL, HAS_CAP, HAS_SCALES, WRITES_LSE,
                    MERGES, CARRIES_ITEM, BRANCHES_FOR_TAIL, HALF_PRODUCTS,
                )  # fmt: skip
        else:
            length = _attend_item(
                q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr,
                k_scale_ptr, v_scale_ptr, sinks_ptr, kv_slots_ptr, queries_ptr, partials_ptr,
                tail_lengths_ptr, arrivals_ptr, request_indptr_ptr,
                item, item_ptr, following, length, kv_head, sm_scale, v_factor, logit_cap,
                q_stride, q_head_stride, out_stride, out_head_stride, lse_stride, lse_head_stride,
                k_scale_stride, v_scale_stride, K_STRIDE, K_HEAD_STRIDE, V_STRIDE, V_HEAD_STRIDE,
                NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV,
                BLOCK_M, BLOCK_N, V_IN_K, CAUSAL, HAS_CAP, HAS_SCALES, WRITES_LSE, MERGES,
                CARRIES_ITEM, BRANCHES_FOR_TAIL, HALF_PRODUCTS,
            )  # fmt: skip
        item = following
    if MERGES and LIST == 0:
        # Padding rows have no partials, so no program completes them. Merging none gives zeros.
        for row in range(
            tl.load(plan_ptr + HEADER_NUM_ROWS) + tl.program_id(0),
            padded_batch_size,
            tl.num_programs(0),
        ):
            for kv_head in range(NUM_KV_HEADS):
                merge_heads(
                    partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr, sinks_ptr,
                    row, kv_head, 0, 0, out_stride, out_head_stride, lse_stride, lse_head_stride,
                    NUM_KV_HEADS, GROUP_SIZE, V_HEAD_DIM, BLOCK_DV, WRITES_LSE,
                )  # fmt: skip


@triton.jit
def _load_item(item_ptr, exists):
    """What of an item its attention needs; zeros if there is none."""
    first_query = tl.load(item_ptr, mask=exists, other=0)
    first_head = tl.load(item_ptr + 2, mask=exists, other=0)
    rows = tl.load(item_ptr + 3, mask=exists, other=0)
    first_slot = tl.load(item_ptr + 4, mask=exists, other=0)
    tokens = tl.load(item_ptr + 5, mask=exists, other=0)
    split = tl.load(item_ptr + 6, mask=exists, other=0)
    num_splits = tl.load(item_ptr + 7, mask=exists, other=0)
    tile_class = tl.load(item_ptr + 8, mask=exists, other=0)
    return first_query, first_head, rows, first_slot, tokens, split, num_splits, tile_class


@triton.jit
def _load_length(item, tail_lengths_ptr):
    """Tokens of an item's pack. Those of a tail change under the plan."""
    tokens = item[4]
    return tl.load(tail_lengths_ptr - 1 - tokens, mask=tokens < 0, other=tokens)


@triton.jit
def _attend_item(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr,
    k_scale_ptr, v_scale_ptr, sinks_ptr, kv_slots_ptr, queries_ptr, partials_ptr,
    tail_lengths_ptr, arrivals_ptr, request_indptr_ptr,
    item, item_ptr, following, length, kv_head, sm_scale, v_factor, logit_cap,
    q_stride, q_head_stride, out_stride, out_head_stride, lse_stride, lse_head_stride,
    k_scale_stride, v_scale_stride,
    K_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr, V_HEAD_STRIDE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    V_IN_K: tl.constexpr, CAUSAL: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SCALES: tl.constexpr,
    WRITES_LSE: tl.constexpr, MERGES: tl.constexpr, CARRIES_ITEM: tl.constexpr,
    BRANCHES_FOR_TAIL: tl.constexpr, HALF_PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Compute one item for one KV head; returns the length of the following item's pack."""
    peak, total, values, high = attend_kv(
        q_ptr, k_ptr, v_ptr, k_scale_ptr, kv_slots_ptr, queries_ptr,
        item, length, kv_head, sm_scale, logit_cap,
        q_stride, q_head_stride, k_scale_stride,
        K_STRIDE, K_HEAD_STRIDE, V_STRIDE, V_HEAD_STRIDE,
        GROUP_SIZE, HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV,
        BLOCK_M, BLOCK_N, V_IN_K, CAUSAL, HAS_CAP, HAS_SCALES,
        BRANCHES_FOR_TAIL, HALF_PRODUCTS,
    )  # fmt: skip
    if CARRIES_ITEM:  # what it says has arrived by now
        length = _load_length(following, tail_lengths_ptr)
    _write_item(
        out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, v_scale_ptr, sinks_ptr, item_ptr,
        queries_ptr, partials_ptr, arrivals_ptr, request_indptr_ptr,
        peak, total, values, high, kv_head, v_factor,
        out_stride, out_head_stride, lse_stride, lse_head_stride, v_scale_stride,
        NUM_KV_HEADS, GROUP_SIZE, V_HEAD_DIM, BLOCK_DV, BLOCK_M,
        V_IN_K, HAS_SCALES, WRITES_LSE, MERGES, CARRIES_ITEM,
    )  # fmt: skip
    return length


@triton.jit
def _write_item(
    out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, v_scale_ptr, sinks_ptr, item_ptr,
    queries_ptr, partials_ptr, arrivals_ptr, request_indptr_ptr,
    peak, total, values, high, kv_head, v_factor,
    out_stride, out_head_stride, lse_stride, lse_head_stride, v_scale_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    V_HEAD_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    V_IN_K: tl.constexpr, HAS_SCALES: tl.constexpr, WRITES_LSE: tl.constexpr,
    MERGES: tl.constexpr, CARRIES_ITEM: tl.constexpr,
):  # fmt: skip
    # An empty split has no peak; its result is zeros with an lse of -inf.
    divisor = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, (peak + tl.log2(divisor)) * LN2, float("-inf"))
    factor = v_factor
    if HAS_SCALES:
        factor *= tl.load(v_scale_ptr + kv_head * v_scale_stride)
    values *= (factor / divisor)[:, None]
    if V_IN_K:
        high *= (factor / divisor)[:, None]
    HALF: tl.constexpr = BLOCK_DV // 2 if V_IN_K else BLOCK_DV

    # The item is read again instead of kept, since what follows from it would take registers during
    # the loop, once for every layout that uses it. Volatile, else the compiler keeps it.
    rows = tl.load(item_ptr + 2, volatile=True) + tl.arange(0, BLOCK_M)
    row_exists = rows < tl.load(item_ptr + 3, volatile=True)
    head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    block_queries_ptr = queries_ptr + tl.load(item_ptr, volatile=True)
    block_partials_ptr = partials_ptr + tl.load(item_ptr + 1)
    targets = tl.load(item_ptr + 9)
    v_dims = tl.arange(0, HALF)
    is_dim = (v_dims < V_HEAD_DIM)[None, :]
    is_high_dim = (HALF + v_dims < V_HEAD_DIM)[None, :]
    # One store after the other, the narrower type first, and `partial` loaded for each: this order
    # keeps the fewest values in the layout of a store at any time.
    if not CARRIES_ITEM or targets & TO_OUT != 0:
        partial = tl.load(block_partials_ptr + rows // GROUP_SIZE, mask=row_exists, other=0)
        query = tl.load(block_queries_ptr + rows // GROUP_SIZE, mask=row_exists, other=0)
        goes_to_out = row_exists & (partial < 0)
        out_row = query.to(tl.int64) * out_stride + head * out_head_stride
        merged, merged_high = values, high
        if sinks_ptr is not None:  # partials get theirs when they have been merged
            kept = kept_of_sinks(sinks_ptr, head, row_exists, lse)[:, None]
            merged *= kept
            if V_IN_K:
                merged_high *= kept
        tl.store(
            out_ptr + out_row[:, None] + v_dims[None, :],
            merged.to(out_ptr.dtype.element_ty),
            mask=goes_to_out[:, None] & is_dim,
        )
        if V_IN_K:
            tl.store(
                out_ptr + out_row[:, None] + (HALF + v_dims)[None, :],
                merged_high.to(out_ptr.dtype.element_ty),
                mask=goes_to_out[:, None] & is_high_dim,
            )
        if WRITES_LSE:
            lse_row = query.to(tl.int64) * lse_stride + head * lse_head_stride
            tl.store(lse_ptr + lse_row, lse, mask=goes_to_out)
    if not CARRIES_ITEM or targets & TO_PARTIALS != 0:
        partial = tl.load(block_partials_ptr + rows // GROUP_SIZE, mask=row_exists, other=-1)
        goes_to_partial = partial >= 0
        partial_row = partial.to(tl.int64) * (NUM_KV_HEADS * GROUP_SIZE) + head
        tl.store(
            partial_out_ptr + partial_row[:, None] * V_HEAD_DIM + v_dims[None, :],
            values,
            mask=goes_to_partial[:, None] & is_dim,
        )
        if V_IN_K:
            tl.store(
                partial_out_ptr + partial_row[:, None] * V_HEAD_DIM + (HALF + v_dims)[None, :],
                high,
                mask=goes_to_partial[:, None] & is_high_dim,
            )
        tl.store(partial_lse_ptr + partial_row, lse, mask=goes_to_partial)
        if MERGES:
            query = tl.load(block_queries_ptr + rows // GROUP_SIZE, mask=row_exists, other=0)
            last_block_merge(
                partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr, sinks_ptr, arrivals_ptr,
                request_indptr_ptr, rows, query, goes_to_partial, kv_head,
                out_stride, out_head_stride, lse_stride, lse_head_stride,
                NUM_KV_HEADS, GROUP_SIZE, V_HEAD_DIM, BLOCK_M, BLOCK_DV, WRITES_LSE,
            )  # fmt: skip
