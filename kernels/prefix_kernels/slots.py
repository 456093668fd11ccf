"""Kernels that keep a plan's slots: copied once per plan, appended to once per step."""

from __future__ import annotations

import triton
import triton.language as tl

from prefix_kernels import plan_header

__all__ = ["append_slots_kernel", "copy_slots_kernel"]

HEADER_NUM_REQUESTS = tl.constexpr(plan_header.HEADER_NUM_REQUESTS)
HEADER_TAIL_START = tl.constexpr(plan_header.HEADER_TAIL_START)
HEADER_TAIL_OFFSET = tl.constexpr(plan_header.HEADER_TAIL_OFFSET)
HEADER_SOURCES = tl.constexpr(plan_header.HEADER_SOURCES)


# Neither numbers that change from plan to plan, nor the alignment of what SGLang slices out of its
# buffers, are specialised: else one of them could ask for a compilation while serving.
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

    A source is four int32: batch row, first position, tokens, index in ``kv_slots``.
    """
    pack = tl.program_id(0)
    source_ptr = plan_ptr + tl.load(plan_ptr + HEADER_SOURCES) + pack * 4
    tokens = tl.load(source_ptr + 2)
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(req_pool_indices_ptr + tl.load(source_ptr)).to(tl.int64)
    slots_ptr = req_to_token_ptr + row * row_stride + tl.load(source_ptr + 1)
    slots = tl.load(slots_ptr + within, mask=within < tokens)
    target_ptr = kv_slots_ptr + tl.load(source_ptr + 3)
    tl.store(target_ptr + within, slots.to(tl.int32), mask=within < tokens)
    is_tail = (pack >= num_shared_packs) & (tl.program_id(1) == 0)
    tl.store(tail_lengths_ptr + pack - num_shared_packs, tokens, mask=is_tail)


@triton.jit(
    do_not_specialize=["padded_batch_size"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "new_slots_ptr"],
)
def append_slots_kernel(
    plan_ptr,
    seq_lens_ptr,  # [rows] int32 or int64, lengths with the new token
    new_slots_ptr,  # [rows] int32 or int64, slot of the new token
    kv_slots_ptr,  # [kv slots] int32, written
    tail_lengths_ptr,  # [rows] int32, written
    arrivals_ptr,  # [rows, Hkv] int32, zeroed
    padded_batch_size,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write this step's slots into the tails' growth room, and the lengths of the tails.

    Nothing is counted up, so a step that is repeated or given up leaves no trace; the arrivals that
    a step which was given up has left behind go, too. Rows at or past the number of requests are
    padding and have no tail.
    """
    request = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = (request < padded_batch_size) & (request < tl.load(plan_ptr + HEADER_NUM_REQUESTS))
    start_ptr = plan_ptr + tl.load(plan_ptr + HEADER_TAIL_START) + request
    offset_ptr = plan_ptr + tl.load(plan_ptr + HEADER_TAIL_OFFSET) + request
    length = tl.load(seq_lens_ptr + request, mask=exists, other=0).to(tl.int32)
    tail_length = length - tl.load(start_ptr, mask=exists, other=0)
    target = tl.load(offset_ptr, mask=exists, other=0) + tail_length - 1
    slot = tl.load(new_slots_ptr + request, mask=exists, other=0).to(tl.int32)
    tl.store(kv_slots_ptr + target, slot, mask=exists & (tail_length > 0))
    tl.store(tail_lengths_ptr + request, tail_length, mask=exists)
    for kv_head in range(NUM_KV_HEADS):
        arrival_ptr = arrivals_ptr + request * NUM_KV_HEADS + kv_head
        tl.store(arrival_ptr, 0, mask=request < padded_batch_size)
