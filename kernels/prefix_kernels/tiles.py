"""Which tile computes a pack: one pure function, and the choices that were measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = [
    "ROW_CLASSES",
    "TileConfig",
    "TileShape",
    "choose_fused_tiles",
    "choose_tile",
    "next_power_of_two",
    "row_class",
]

# Rows of the tiles. The smallest is the matrix unit's; 64 is the least that Hopper's wgmma takes.
ROW_CLASSES = (16, 32, 64, 128)

# KV bytes that one program keeps in flight or in use. Three programs of this size fit the 227 KiB
# that an SM of sm_90 and sm_100 gives to shared memory, two fit the 163 KiB of sm_80: enough for
# the 36 KiB of outstanding loads per SM that 4.8 TB/s ask for at a latency of about 1 us.
_KV_BYTES_IN_FLIGHT = 64 * 1024
_MIN_BLOCK_N = 16
# A score tile wider than this runs out of registers next to the accumulator.
_MAX_BLOCK_N = {16: 128, 32: 128, 64: 64, 128: 64}


@dataclass(frozen=True, slots=True)
class TileShape:
    """What the choice of a tile depends on, apart from the pack.

    Attributes:
        head_dim, v_head_dim: elements per head of q and k, and of v.
        q_itemsize, kv_itemsize: bytes per element of q, and of the caches.
    """

    head_dim: int
    v_head_dim: int
    q_itemsize: int
    kv_itemsize: int


@dataclass(frozen=True, slots=True)
class TileConfig:
    """One compiled form of the pack-forward kernel.

    Attributes:
        block_m: query rows (requests times group size) of a tile.
        block_n: KV tokens of a tile.
        num_warps: warps of a program.
        num_stages: KV tiles in flight or in use.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def row_class(num_rows: int, max_rows: int = ROW_CLASSES[-1]) -> int:
    """Rows of the smallest tile that holds ``num_rows``; the largest one where none does."""
    legal = [rows for rows in ROW_CLASSES if rows <= max_rows]
    return next((rows for rows in legal if rows >= num_rows), legal[-1])


def choose_tile(
    num_rows: int, kv_length: int, shape: TileShape, *, max_rows: int = ROW_CLASSES[-1]
) -> TileConfig:
    """Choose the tile for packs of up to ``num_rows`` rows over up to ``kv_length`` KV tokens.

    No tuning happens here or at serving time. The KV tile is as wide as the pack is long, within
    what registers hold; the number of stages follows from the bytes to keep in flight.

    Args:
        num_rows: requests times group size of the widest pack.
        kv_length: tokens of the longest pack.
        shape: head dims and item sizes.
        max_rows: the largest tile allowed.
    """
    block_m = row_class(num_rows, max_rows)
    dims = next_power_of_two(shape.head_dim) + next_power_of_two(shape.v_head_dim)
    token_bytes = dims * max(shape.kv_itemsize, shape.q_itemsize)
    limit = _MAX_BLOCK_N[block_m]
    while limit > _MIN_BLOCK_N and (
        2 * limit * token_bytes > _KV_BYTES_IN_FLIGHT or limit >= 2 * max(kv_length, 1)
    ):
        limit //= 2
    num_stages = max(2, min(4, _KV_BYTES_IN_FLIGHT // (limit * token_bytes) + 1))
    return TileConfig(block_m, limit, 8 if block_m == 128 else 4, num_stages)


def choose_fused_tiles(kv_length: int, shape: TileShape) -> tuple[TileConfig, TileConfig]:
    narrow, wide = (choose_tile(rows, kv_length, shape, max_rows=rows) for rows in (16, 64))
    stages = min(narrow.num_stages, wide.num_stages)
    return replace(narrow, num_stages=stages), replace(wide, num_stages=stages)
