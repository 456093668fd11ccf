"""The KV loop of the pack-forward kernel.

V may have rows of its own, or be the first elements of K, as in absorbed multi-head latent
attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): then a tile is copied for both at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_kv"]

LOG2E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(2.0**-126)  # normal number of float32
LOWEST = tl.constexpr(-(2.0 - 2.0**-23) * 2.0**127)  # finite number of float32


@triton.jit
def attend_kv(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, kv_slots_ptr, queries_ptr,
    item, length, kv_head, sm_scale, logit_cap,
    q_stride, q_head_stride, k_scale_stride,
    K_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr, V_HEAD_STRIDE: tl.constexpr,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    V_IN_K: tl.constexpr, CAUSAL: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SCALES: tl.constexpr,
    BRANCHES_FOR_TAIL: tl.constexpr, HALF_PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Attend one item's rows to one split of a pack.

    With ``CAUSAL`` a tail may have several queries, of which each sees all but the positions of
    those behind it. KV tiles that no row of the item sees are left out, and those that not all
    rows see are masked.

    Returns:
        peak, total: [BLOCK_M] the maximum of the scores in base 2, and the sum of the weights,
            which is 0 for a row that sees nothing of the split.
        values, high: the weighted sum of V, [BLOCK_M, BLOCK_DV]; with ``V_IN_K`` the halves of it.
    """
    # With V in K, a row is taken in three blocks: the halves of V, which are multiplied with q and
    # with the weights, and the rest, with q alone. Halves, because a thread then holds the
    # addresses of half as many rows, and what is written takes registers a second time.
    D: tl.constexpr = BLOCK_DV // 2 if V_IN_K else BLOCK_D
    DV: tl.constexpr = BLOCK_DV // 2 if V_IN_K else BLOCK_DV
    K_DIM: tl.constexpr = V_HEAD_DIM if V_IN_K else HEAD_DIM
    REST: tl.constexpr = tl.constexpr(triton.next_power_of_2(max(16, HEAD_DIM - V_HEAD_DIM)))
    HAS_REST: tl.constexpr = V_IN_K and HEAD_DIM > V_HEAD_DIM
    # From 64 rows on, the three products must not become a chain: Triton lets all eight warps of
    # wgmma compute all columns of a product that another one follows. It folds their sum into a
    # chain unless they have this option, which means nothing but for operands of 8 bits.
    APART: tl.constexpr = 1 if V_IN_K and BLOCK_M >= 64 else 0
    first_query, first_head, num_rows, first_slot, tail_or_tokens, split, num_splits, _ = item
    slots_ptr = kv_slots_ptr + first_slot
    # The rule of `plan.split_bounds`.
    chunk = ((length + num_splits - 1).to(tl.uint32) // num_splits.to(tl.uint32)).to(tl.int32)
    begin = tl.minimum(split * chunk, length)
    end = tl.minimum(begin + chunk, length)
    seen_by_all = end
    if CAUSAL:
        # The pack's queries from the item's first on, and the place of the item's last.
        num_queries = num_rows // GROUP_SIZE
        last_query = tl.minimum((first_head + (BLOCK_M - 1)) // GROUP_SIZE, num_queries - 1)
        # The first of them sees all of a shared pack, and so do the others.
        seen_by_first = length - tl.where(tail_or_tokens < 0, num_queries - 1, 0)
        end = tl.minimum(end, seen_by_first + last_query)
        seen_by_all = tl.minimum(end, seen_by_first)
    last = tl.maximum(end - 1, 0)
    tokens = tl.arange(0, BLOCK_N)
    slots = tl.load(slots_ptr + tl.minimum(begin + tokens, last))

    rows = first_head + tl.arange(0, BLOCK_M)
    row_exists = rows < num_rows
    if CAUSAL:
        seen = tl.minimum(end, seen_by_first + rows // GROUP_SIZE)
    query = tl.load(queries_ptr + first_query + rows // GROUP_SIZE, mask=row_exists, other=0)
    dims = tl.arange(0, D)
    v_dims = tl.arange(0, DV)
    q_head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    q_row = query.to(tl.int64) * q_stride + q_head * q_head_stride
    q = tl.load(
        q_ptr + q_row[:, None] + dims[None, :],
        mask=row_exists[:, None] & (dims < K_DIM)[None, :],
        other=0.0,
    )
    if V_IN_K:
        high_dims, rest_dims = D + dims, V_HEAD_DIM + tl.arange(0, REST)
        is_high, is_rest = (high_dims < V_HEAD_DIM)[None, :], (rest_dims < HEAD_DIM)[None, :]
        q_rows = q_ptr + q_row[:, None]
        q_high = tl.load(q_rows + high_dims[None, :], mask=row_exists[:, None] & is_high, other=0.0)
        q_rest = tl.load(q_rows + rest_dims[None, :], mask=row_exists[:, None] & is_rest, other=0.0)
    # Rows of q have the sign of their scale, so that the maximum of a row stays one when scaled.
    scale = tl.full([BLOCK_M], 1.0, tl.float32) * sm_scale
    if HAS_SCALES:
        scale *= tl.load(k_scale_ptr + kv_head * k_scale_stride)
    if HALF_PRODUCTS and q.dtype == tl.bfloat16 and k_ptr.dtype.element_ty.is_fp8():
        q, undo = _half_rows(q, scale)
        scale = tl.abs(scale) * undo
    elif HAS_SCALES:
        q = tl.where((scale < 0)[:, None], -q, q)
        if V_IN_K:
            q_high = tl.where((scale < 0)[:, None], -q_high, q_high)
            q_rest = tl.where((scale < 0)[:, None], -q_rest, q_rest)
        scale = tl.abs(scale)
    # Factor on scores in the exponent. At least a number above 0, since -inf times 0 is NaN.
    to_base_2 = tl.full([BLOCK_M], 1.0, tl.float32)
    if not HAS_CAP:
        to_base_2 = scale * LOG2E
        if HAS_SCALES or q.dtype == tl.float16:
            to_base_2 = tl.maximum(to_base_2, SMALLEST, propagate_nan=tl.PropagateNan.ALL)
    # Weights in float16 are up to 2**15 instead of 1, so that those of 2**-39 still count.
    LIFT: tl.constexpr = 15.0 if q.dtype == tl.float16 else 0.0

    k_ptr += kv_head.to(tl.int64) * K_HEAD_STRIDE
    v_ptr += kv_head.to(tl.int64) * V_HEAD_STRIDE
    # A row that sees nothing of a tile must not meet -inf - -inf, which is NaN.
    peak = tl.full([BLOCK_M], LOWEST if CAUSAL else float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, DV], tl.float32)
    high = values
    for start in range(begin, end, BLOCK_N):
        slot = slots.to(tl.int64)
        slots = tl.load(slots_ptr + tl.minimum(start + BLOCK_N + tokens, last))
        k = tl.load(
            k_ptr + slot[:, None] * K_STRIDE + dims[None, :],
            mask=(dims < K_DIM)[None, :],
            other=0.0,
        )
        if V_IN_K:
            k_rows = k_ptr + slot[:, None] * K_STRIDE
            k_high = tl.load(k_rows + high_dims[None, :], mask=is_high, other=0.0)
        scores = tl.dot(
            q, tl.trans(k.to(q.dtype)), input_precision="ieee", max_num_imprecise_acc=APART
        )
        if V_IN_K:
            scores += tl.dot(
                q_high,
                tl.trans(k_high.to(q.dtype)),
                input_precision="ieee",
                max_num_imprecise_acc=APART,
            )
        if HAS_REST:
            k_rest = tl.load(k_rows + rest_dims[None, :], mask=is_rest, other=0.0)
            scores += tl.dot(
                q_rest,
                tl.trans(k_rest.to(q.dtype)),
                input_precision="ieee",
                max_num_imprecise_acc=APART,
            )
        if HAS_CAP:
            # cap * tanh(x / cap), and from here on in base 2. Near 0 by the series: the quotient
            # would lose the digits that a cap far above the scores leaves.
            ratio = scores * (scale / logit_cap)[:, None]
            square = ratio * ratio
            series = ratio * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
            quotient = 1 - 2 / (tl.exp2(ratio * (2 * LOG2E)) + 1)
            scores = tl.where(square < 1 / 16, series, quotient) * (logit_cap * LOG2E)
        if not BRANCHES_FOR_TAIL or seen_by_all - start < BLOCK_N:
            if CAUSAL:
                is_seen = tokens[None, :] < (seen - start)[:, None]
            else:
                is_seen = (tokens < end - start)[None, :]
            scores = tl.where(is_seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * to_base_2 - LIFT)
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores * to_base_2[:, None] - new_peak[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if V_IN_K:
            v = k
            high = tl.dot(
                weights.to(q.dtype),
                k_high.to(q.dtype),
                high * shrink[:, None],
                input_precision="ieee",
            )
        else:
            v = tl.load(
                v_ptr + slot[:, None] * V_STRIDE + v_dims[None, :],
                mask=(v_dims < V_HEAD_DIM)[None, :],
                other=0.0,
            )
        values = tl.dot(
            weights.to(q.dtype), v.to(q.dtype), values * shrink[:, None], input_precision="ieee"
        )
        peak = new_peak
    return peak, total, values, high


@triton.jit
def _half_rows(q, scale):
    """Rows of q in float16, each times a power of two, and what undoes that.

    The largest value of a row comes to lie below 2**15, which leaves the most room for the others:
    values down to 2**-31 of it keep all of their bits, those below 2**-40 of it are lost.
    """
    largest = tl.max(tl.abs(q.to(tl.float32)), 1)
    shift = tl.minimum(141 - (largest.to(tl.int32, bitcast=True) >> 23), 126)
    factor = ((127 + shift) << 23).to(tl.float32, bitcast=True)
    undo = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    factor = tl.where(scale < 0, -factor, factor)
    return (q.to(tl.float32) * factor[:, None]).to(tl.float16), undo
