"""Where the parts of a plan stand in its one device array; read by the host and by kernels.

The array is int32. It starts with a header, and the parts follow without gaps, so that a plan
crosses to the device in one copy of the bytes that it needs, while kernels captured in a graph
know one address only.
"""

from __future__ import annotations

__all__ = [
    "HEADER_ITEMS",
    "HEADER_NUM_ITEMS",
    "HEADER_NUM_REQUESTS",
    "HEADER_PARTIALS",
    "HEADER_QUERIES",
    "HEADER_REQUEST_INDPTR",
    "HEADER_SIZE",
    "HEADER_SOURCES",
    "HEADER_TAIL_OFFSET",
    "HEADER_TAIL_START",
    "MAX_LISTS",
]

MAX_LISTS = 4  # work lists, one per launch of the forward stage

HEADER_NUM_REQUESTS = 0
HEADER_NUM_ITEMS = 1  # one per list
HEADER_ITEMS = HEADER_NUM_ITEMS + MAX_LISTS  # one per list: where its items begin
HEADER_QUERIES = HEADER_ITEMS + MAX_LISTS
HEADER_PARTIALS = HEADER_QUERIES + 1
HEADER_REQUEST_INDPTR = HEADER_PARTIALS + 1  # [rows + 1], rows past the batch included
HEADER_TAIL_START = HEADER_REQUEST_INDPTR + 1  # [B]
HEADER_TAIL_OFFSET = HEADER_TAIL_START + 1  # [B] index in kv_slots
HEADER_SOURCES = HEADER_TAIL_OFFSET + 1  # [packs, 4], see `slots.copy_slots_kernel`
HEADER_SIZE = 16
