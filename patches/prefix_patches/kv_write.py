"""``set_kv_buffer`` with ``KVWriteLoc``: writing this step's K and V into SGLang's pool.

Why: an attention backend owns the KV write. Releases: 0.5.17 to 0.5.23;
``KVWriteLoc.for_layer(forward_batch, layer)`` from 0.5.22 on, ``KVWriteLoc(out_cache_loc)`` before.
The scales are handed over only where the pool stores 8-bit floats, as stock backends do: the pool
then divides k and v by them, in place, so a second write of the same tensors would be wrong.
When it is gone: the import fails and the backend factory refuses to start.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

__all__ = ["applies_kv_scales", "write_kv"]


def applies_kv_scales(pool: Any) -> bool:
    """Whether the pool holds k and v divided by the layer's scales."""
    return pool.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def write_kv(pool: Any, layer: Any, forward_batch: Any, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write the new tokens' K and V of one layer."""
    if hasattr(KVWriteLoc, "for_layer"):
        location = KVWriteLoc.for_layer(forward_batch, layer)
    else:
        location = KVWriteLoc(forward_batch.out_cache_loc)
    k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
    v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
    if applies_kv_scales(pool):
        pool.set_kv_buffer(layer, location, k, v, layer.k_scale, layer.v_scale)
    else:
        pool.set_kv_buffer(layer, location, k, v)
