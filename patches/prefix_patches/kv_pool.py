"""What a KV pool holds, behind the pools that wrap others.

Symbols: ``is_quantized_kv_cache``, ``kv_cache_layout``, ``k_scale_buffer`` of a pool, and
``full_kv_pool``, ``swa_kv_pool`` of a pool of pools. Releases: 0.5.17 to 0.5.23; not every pool has
every one. When one is gone: the pool counts as plain, which the KV dtype check still guards.
"""

from __future__ import annotations

from typing import Any

__all__ = ["is_block_quantized", "is_slot_major"]


def is_block_quantized(pool: Any) -> bool:
    """Whether values are stored with a scale per block (FP4, MXFP8), beside the layer's scales."""
    return any(
        _value(inner, "is_quantized_kv_cache") or _value(inner, "k_scale_buffer") is not None
        for inner in _inner_pools(pool)
    )


def is_slot_major(pool: Any) -> bool:
    """Whether K and V are laid out as [slot, head, dim]."""
    return all(getattr(inner, "kv_cache_layout", "nhd") == "nhd" for inner in _inner_pools(pool))


def _inner_pools(pool: Any) -> list[Any]:
    inner = [getattr(pool, name, None) for name in ("full_kv_pool", "swa_kv_pool")]
    return [pool, *(found for found in inner if found is not None)]


def _value(pool: Any, name: str) -> Any:
    found = getattr(pool, name, None)
    return found() if callable(found) else found
