"""SGLang's KV pools: what one holds, behind the pools that wrap others, and writing to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from prefix_patches.attributes import AttentionLayer, ForwardBatch, KVPool
from prefix_patches.patch import RELEASES, Touch

__all__ = ["TOUCHED", "applies_kv_scales", "is_block_quantized", "is_slot_major", "write_kv"]

_POOLS = "sglang.srt.mem_cache.memory_pool"

TOUCHED = (
    Touch(
        f"{_POOLS}:KVWriteLoc",
        why="an attention backend owns the KV write, and `set_kv_buffer` takes the place as this",
        releases=f"{RELEASES}; `for_layer(forward_batch, layer)` from 0.5.22 on, "
        "`KVWriteLoc(out_cache_loc)` before",
    ),
)


def is_block_quantized(pool: KVPool) -> bool:
    """Whether values are stored with a scale per block (FP4, MXFP8), beside the layer's scales.

    Not every pool has both marks. The KV dtype is checked beside them.
    """
    return any(_has_block_scales(inner) for inner in _inner_pools(pool))


def _has_block_scales(pool: KVPool) -> bool:
    mark = getattr(pool, "is_quantized_kv_cache", False)
    is_marked = mark() if callable(mark) else mark
    return bool(is_marked) or getattr(pool, "k_scale_buffer", None) is not None


def is_slot_major(pool: KVPool) -> bool:
    """Whether K and V are laid out as [slot, head, dim]; a pool without ``kv_cache_layout`` is."""
    return all(getattr(inner, "kv_cache_layout", "nhd") == "nhd" for inner in _inner_pools(pool))


def _inner_pools(pool: KVPool) -> list[KVPool]:
    inner = (getattr(pool, "full_kv_pool", None), getattr(pool, "swa_kv_pool", None))
    return [pool, *(found for found in inner if found is not None)]


def applies_kv_scales(pool: KVPool) -> bool:
    """Whether the pool holds k and v divided by the layer's scales."""
    return pool.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def write_kv(
    pool: KVPool,
    layer: AttentionLayer,
    forward_batch: ForwardBatch,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Write the new tokens' K and V of one layer.

    The scales are handed over only where the pool stores 8-bit floats, as stock backends do: the
    pool then divides k and v by them, in place, so a second write of the same tensors would be
    wrong.
    """
    location = _write_location()(forward_batch, layer)
    k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
    v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
    if applies_kv_scales(pool):
        pool.set_kv_buffer(layer, location, k, v, layer.k_scale, layer.v_scale)
    else:
        pool.set_kv_buffer(layer, location, k, v)


@functools.cache
def _write_location() -> Callable[[ForwardBatch, AttentionLayer], Any]:
    """What makes a ``KVWriteLoc`` of a forward batch and a layer."""
    location_class: Any = import_module(_POOLS).KVWriteLoc
    if hasattr(location_class, "for_layer"):
        return location_class.for_layer  # type: ignore[no-any-return]
    return lambda forward_batch, layer: location_class(forward_batch.out_cache_loc)
