"""SGLang's KV pools: what one holds, behind the pools that wrap others, and writing to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import torch

from prefix_patches.attributes import AttentionLayer, ForwardBatch, KVPool, LatentPool
from prefix_patches.patch import RELEASES, Touch

__all__ = [
    "TOUCHED",
    "applies_kv_scales",
    "is_block_quantized",
    "is_slot_major",
    "latent_dims",
    "write_kv",
]

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
    """Whether K and V are laid out as [slot, head, dim], at the slots that ``req_to_token`` names.

    A pool without ``kv_cache_layout`` is. Those of ``--enable-unified-memory`` are not, whatever
    they say: slots are translated at every access (`unified_memory_pool.py`, 0.5.17 to 0.5.23).
    """
    return all(
        getattr(inner, "kv_cache_layout", "nhd") == "nhd"
        and not type(inner).__module__.endswith(".unified_memory_pool")
        for inner in _inner_pools(pool)
    )


def _inner_pools(pool: KVPool) -> list[KVPool]:
    inner = (getattr(pool, "full_kv_pool", None), getattr(pool, "swa_kv_pool", None))
    return [pool, *(found for found in inner if found is not None)]


def latent_dims(pool: KVPool) -> tuple[int, int] | None:
    """Of a pool for multi-head latent attention: elements of the latent, and of the part with RoPE.

    Such a pool (``MLATokenToKVPool``) has one row per token, K of the one KV head, and V is the
    latent at its beginning. None for other pools.
    """
    for inner in _inner_pools(pool):
        if (rank := getattr(inner, "kv_lora_rank", None)) is not None:
            return int(rank), cast(LatentPool, inner).qk_rope_head_dim
    return None


def applies_kv_scales(pool: KVPool) -> bool:
    """Whether the pool holds k and v divided by the layer's scales; one of latents never does."""
    return pool.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and latent_dims(pool) is None


def write_kv(
    pool: KVPool,
    layer: AttentionLayer,
    forward_batch: ForwardBatch,
    k: torch.Tensor,
    v: torch.Tensor,
    k_rope: torch.Tensor | None = None,
) -> None:
    """Write the new tokens' K and V of one layer.

    The scales are handed over only where the pool stores 8-bit floats, as stock backends do: the
    pool then divides k and v by them, in place, so a second write of the same tensors would be
    wrong.

    With ``k_rope`` k is the latent alone, as models hand it to the stock backends that are on
    SGLang's list ``FORWARD_ABSORB_CORE_ATTENTION_BACKENDS``. ``set_mla_kv_buffer``, which takes
    both, does not know a ``KVWriteLoc`` before 0.5.22.
    """
    location = _write_location()(forward_batch, layer)
    if k_rope is not None:
        place = location if _takes_location() else forward_batch.out_cache_loc
        cast(LatentPool, pool).set_mla_kv_buffer(layer, place, k, k_rope)
        return
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
    if _takes_location():
        return location_class.for_layer  # type: ignore[no-any-return]
    return lambda forward_batch, layer: location_class(forward_batch.out_cache_loc)


@functools.cache
def _takes_location() -> bool:
    """Whether every write takes a ``KVWriteLoc`` (from 0.5.22 on)."""
    return hasattr(import_module(_POOLS).KVWriteLoc, "for_layer")
