"""Every compiled form of the kernels that the Triton executor can launch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from prefix_kernels.tiles import (
    ROW_CLASSES,
    TileConfig,
    TileShape,
    choose_fused_tiles,
    choose_tile,
)

__all__ = ["ARCHS", "DTYPES", "HEAD_DIMS", "KernelVariant", "kernel_variants", "legal_dtypes"]

# Shared memory that one program may use, in bytes (CUDA programming guide, compute capabilities).
ARCHS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
HEAD_DIMS = (64, 80, 96, 128, 192, 256)

# Bytes per element by the names of the report.
_ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8e4nv": 1, "fp8e5": 1}
# Pairs of q's dtype, which is the output's, and the caches'.
DTYPES = (("bf16", "bf16"), ("bf16", "fp8e4nv"))
# All tiles that choose_tile tells apart by the length of the KV.
_KV_LENGTHS = tuple(1 << bit for bit in range(12))
_MERGE_WARPS = 4
_DEFAULT_STAGES = 3  # Triton's own, where a launch names none


@dataclass(frozen=True, slots=True)
class KernelVariant:
    """What the compiler is asked for.

    Attributes:
        kernel: "pack_forward", "pack_forward_fused", "merge", "copy_slots" or "append_slots".
        head_dim: elements per head of q, k and v; 0 where the kernel has none.
        dtype, kv_dtype: of q and the output, and of the caches; of a slot kernel, both "int32".
        tile: the tile; of a fused kernel, its wide one; of the others, what a program takes at once.
        narrow_tile: the other tile of a fused kernel.
        group_size: query heads per KV head.
        merges: whether programs of the forward stage merge the requests that they complete.
    """

    kernel: str
    head_dim: int
    dtype: str
    kv_dtype: str
    tile: TileConfig
    narrow_tile: TileConfig | None = None
    group_size: int = 4
    merges: bool = False


def legal_dtypes(arch: str) -> tuple[tuple[str, str], ...]:
    """The pairs of :data:`DTYPES` that an architecture has: sm_80 cannot convert fp8 e4m3."""
    return tuple(pair for pair in DTYPES if arch != "sm_80" or pair[1] != "fp8e4nv")


def kernel_variants(
    arch: str,
    *,
    head_dims: Iterable[int] = HEAD_DIMS,
    dtypes: Iterable[tuple[str, str]] | None = None,
    group_size: int = 4,
    merges: bool = False,
) -> Iterator[KernelVariant]:
    """List what `TritonExecutor` launches in all of its modes.

    Args:
        arch: a key of :data:`ARCHS`.
        head_dims: elements per head.
        dtypes: pairs of names, of q's dtype and the caches'; None for all that the arch has.
        group_size: query heads per KV head.
        merges: of the forward stage, the form that merges on arrival.
    """
    pairs = legal_dtypes(arch) if dtypes is None else tuple(dtypes)
    for head_dim in head_dims:
        for dtype, kv_dtype in pairs:
            shape = TileShape(head_dim, head_dim, _ITEMSIZES[dtype], _ITEMSIZES[kv_dtype])
            common = KernelVariant(
                "pack_forward",
                head_dim,
                dtype,
                kv_dtype,
                TileConfig(0, 0, 0, 0),
                group_size=group_size,
                merges=merges,
            )
            yield from _forward_variants(common, shape, ARCHS[arch])
        for dtype in dict.fromkeys(dtype for dtype, _ in pairs):
            tile = TileConfig(group_size, 1, _MERGE_WARPS, _DEFAULT_STAGES)
            yield KernelVariant("merge", head_dim, dtype, "fp32", tile, group_size=group_size)
    for name, block in (("copy_slots", 1024), ("append_slots", 128)):
        tile = TileConfig(1, block, _MERGE_WARPS, _DEFAULT_STAGES)
        yield KernelVariant(name, 0, "int32", "int32", tile)


def _forward_variants(
    common: KernelVariant, shape: TileShape, shared_limit: int
) -> Iterator[KernelVariant]:
    """Each row class at each KV length, then the pairs of a fused launch."""
    yield from dict.fromkeys(
        replace(common, tile=choose_tile(rows, length, shape, max_rows=rows))
        for rows in ROW_CLASSES
        for length in _KV_LENGTHS
    )
    pairs = dict.fromkeys(choose_fused_tiles(length, shape) for length in _KV_LENGTHS)
    for narrow, wide in pairs:
        yield replace(common, kernel="pack_forward_fused", tile=wide, narrow_tile=narrow)
