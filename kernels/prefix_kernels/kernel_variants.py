"""Every compiled form of the kernels that the Triton executor can launch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from prefix_kernels import tuned_tiles
from prefix_kernels.tile_config import ARCHS, TileConfig, TileShape, row_classes
from prefix_kernels.tiles import MERGE_MODES, choose_fused_tiles, choose_tile

__all__ = [
    "ARCHS",
    "DEFAULT_DTYPES",
    "HEAD_DIMS",
    "KernelVariant",
    "kernel_variants",
    "legal_dtypes",
]

HEAD_DIMS = (64, 80, 96, 128, 192, 256)

_ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8_e4m3": 1, "fp8_e5m2": 1}
# Dtypes of q, which is the output's, and of the caches.
_DTYPES = (
    ("bf16", "bf16"),
    ("bf16", "fp8_e4m3"),
    ("bf16", "fp8_e5m2"),
    ("fp16", "fp16"),
    ("fp16", "fp8_e4m3"),
    ("fp16", "fp8_e5m2"),
    ("fp32", "fp32"),
)
DEFAULT_DTYPES = _DTYPES[:2]
# Between two of these lengths, the choice of a tile is the same.
_KV_LENGTHS = tuple(1 << bit for bit in range(12))
_SIDE_WARPS = 4
_DEFAULT_STAGES = 3  # Triton's own, where a launch names none


@dataclass(frozen=True, slots=True)
class KernelVariant:
    """What the compiler is asked for.

    Attributes:
        kernel: "pack_forward", "pack_forward_fused", "merge", "copy_slots" or "append_slots".
        head_dim: elements per head of q, k and v; 0 where the kernel has none.
        dtype, kv_dtype: of q and the output, and of the caches; of a slot kernel, both "int32".
        tile: the tile, of a fused kernel its wide one; else rows and elements taken at once.
        narrow_tile: the other tile of a fused kernel.
        merge: of the forward stage, one of :data:`MERGE_MODES`: with "in_kernel", the program that
            completes a request merges it.
        group_size: query heads per KV head.
    """

    kernel: str
    head_dim: int
    dtype: str
    kv_dtype: str
    tile: TileConfig
    narrow_tile: TileConfig | None = None
    merge: str = "launch"
    group_size: int = 4


def legal_dtypes(arch: str) -> tuple[tuple[str, str], ...]:
    """Dtypes of q and the caches that an architecture has: sm_80 cannot convert fp8 e4m3."""
    return tuple(pair for pair in _DTYPES if arch != "sm_80" or pair[1] != "fp8_e4m3")


def kernel_variants(
    arch: str,
    *,
    head_dims: Iterable[int] = HEAD_DIMS,
    dtypes: Iterable[tuple[str, str]] | None = None,
    merges: Iterable[str] = MERGE_MODES,
    group_size: int = 4,
) -> Iterator[KernelVariant]:
    """List what `TritonExecutor` launches in all of its modes, on all devices of an architecture.

    Args:
        arch: a key of :data:`ARCHS`.
        head_dims: elements per head.
        dtypes: of q and the caches; None for those of :data:`DEFAULT_DTYPES` that the arch has.
        merges: of :data:`MERGE_MODES`.
        group_size: query heads per KV head.
    """
    if dtypes is None:
        dtypes = [pair for pair in legal_dtypes(arch) if pair in DEFAULT_DTYPES]
    pairs, merges = tuple(dtypes), tuple(merges)
    tuned = tuned_tiles.load_tuned_tiles(tuned_tiles.TABLE)
    devices = (None, *(name for name, device in tuned.items() if device.arch == arch))
    for head_dim in head_dims:
        for dtype, kv_dtype in pairs:
            shape = TileShape(
                head_dim, head_dim, _ITEMSIZES[dtype], _ITEMSIZES[kv_dtype], arch != "sm_80"
            )
            for merge in merges:
                for kernel, tile, narrow in _forward_tiles(shape, devices):
                    yield KernelVariant(
                        kernel, head_dim, dtype, kv_dtype, tile, narrow, merge, group_size
                    )
        if "launch" in merges:
            tile = TileConfig(group_size, 1, _SIDE_WARPS, _DEFAULT_STAGES, 0)
            for dtype in dict.fromkeys(dtype for dtype, _ in pairs):
                yield KernelVariant("merge", head_dim, dtype, "fp32", tile, group_size=group_size)
    for name, block in (("copy_slots", 1024), ("append_slots", 128)):
        tile = TileConfig(1, block, _SIDE_WARPS, _DEFAULT_STAGES, 0)
        yield KernelVariant(name, 0, "int32", "int32", tile)


def _forward_tiles(
    shape: TileShape, devices: Iterable[str | None]
) -> Iterator[tuple[str, TileConfig, TileConfig | None]]:
    """Each row class at each KV length on each device, then the pairs of a fused launch."""
    for tile in dict.fromkeys(
        choose_tile(rows, length, replace(shape, device=device))
        for device in devices
        for rows in row_classes(shape)
        for length in _KV_LENGTHS
    ):
        yield "pack_forward", tile, None
    for narrow, wide in dict.fromkeys(choose_fused_tiles(length, shape) for length in _KV_LENGTHS):
        yield "pack_forward_fused", wide, narrow
