"""Which tile computes a pack: one pure function, and the choices that were measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = [
    "FUSED_ROWS",
    "LAUNCH_MODES",
    "MERGE_MODES",
    "ROW_CLASSES",
    "TileConfig",
    "TileShape",
    "choose_fused_tiles",
    "choose_tile",
    "next_power_of_two",
    "row_class",
    "row_classes",
]

# The ways to launch a plan, see `TritonExecutor`.
LAUNCH_MODES = ("streams", "fused")
MERGE_MODES = ("launch", "arrival")

# Rows of the tiles. The smallest is the matrix unit's; 64 is the least that Hopper's wgmma and
# Blackwell's tcgen05 take.
ROW_CLASSES = (16, 32, 64, 128)
# The two classes of a fused launch: the most frequent one, and the least one for wgmma.
FUSED_ROWS = (16, 64)

# KV bytes that one program keeps in flight or in use. Three programs of this size fit the 227 KiB
# that an SM of sm_90 and sm_100 gives to shared memory, two fit the 163 KiB of sm_80: enough for
# the 36 KiB of outstanding loads per SM that 4.8 TB/s ask for at a latency of about 1 us. With the
# rows of q, any tile stays below the 163 KiB.
_KV_BYTES_IN_FLIGHT = 64 * 1024
_MIN_BLOCK_N = 16
_MAX_BLOCK_N = 64

# What follows is what `sglang-prefix kernels` shows not to spill up to head dim 128. Accumulators,
# in rows times elements of v: four warps hold 64 x 128 and eight hold twice as much; 128 x 256
# spills hundreds of bytes on every architecture, with 16 warps as well.
_FOUR_WARPS = 64 * 128
_EIGHT_WARPS = 128 * 128
# Registers per thread. Without a bound of ours ptxas sets its own and spills to keep to it. Within
# 168, three programs of four warps share an SM; 16 rows up to head dim 128 stay within.
_MAX_REGISTERS = 255
_REGISTERS_PER_SM = 64 * 1024
_NARROW_TILE = 16 * 128
_NARROW_REGISTERS = 168


@dataclass(frozen=True, slots=True)
class TileShape:
    """What the choice of a tile depends on, apart from the pack.

    Attributes:
        head_dim, v_head_dim: elements per head of q and k, and of v.
        q_itemsize, kv_itemsize: bytes per element of q, and of the caches.
        has_wgmma: whether the device has wgmma or tcgen05, which take q from shared memory;
            elsewhere q is in registers.
    """

    head_dim: int
    v_head_dim: int
    q_itemsize: int
    kv_itemsize: int
    has_wgmma: bool = True


@dataclass(frozen=True, slots=True)
class TileConfig:
    """One compiled form of the pack-forward kernel.

    Attributes:
        block_m: query rows (requests times group size) of a tile.
        block_n: KV tokens of a tile.
        num_warps: warps of a program.
        num_stages: KV tiles in flight or in use.
        max_registers: per thread.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = _MAX_REGISTERS

    @property
    def programs_per_sm(self) -> int:
        """Programs that the registers of an SM have room for."""
        return _REGISTERS_PER_SM // (32 * self.num_warps * self.max_registers)


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def row_classes(shape: TileShape) -> tuple[int, ...]:
    """Rows of the tiles that hold an accumulator of this shape in registers, ascending."""
    dim = next_power_of_two(shape.v_head_dim)
    return tuple(rows for rows in ROW_CLASSES if rows * dim <= _EIGHT_WARPS)


def row_class(num_rows: int, shape: TileShape) -> int:
    """Rows of the smallest tile that holds ``num_rows``; of the largest one where none does."""
    legal = row_classes(shape)
    return next((rows for rows in legal if rows >= num_rows), legal[-1])


def choose_tile(num_rows: int, kv_length: int, shape: TileShape) -> TileConfig:
    """Choose the tile for packs of up to ``num_rows`` rows over up to ``kv_length`` KV tokens.

    No tuning happens here or at serving time. The KV tile is as wide as the pack is long, within
    what registers hold; the number of stages follows from the bytes to keep in flight.

    Args:
        num_rows: requests times group size of the widest pack; more than the largest tile has are
            taken in several blocks.
        kv_length: tokens of the longest pack.
        shape: head dims, item sizes and the matrix unit.
    """
    block_m = row_class(num_rows, shape)
    dims = next_power_of_two(shape.head_dim) + next_power_of_two(shape.v_head_dim)
    token_bytes = dims * max(shape.kv_itemsize, shape.q_itemsize)
    block_n = _MAX_BLOCK_N if shape.has_wgmma or block_m < 128 else _MAX_BLOCK_N // 2
    while block_n > _MIN_BLOCK_N and (
        2 * block_n * token_bytes > _KV_BYTES_IN_FLIGHT or block_n >= 2 * max(kv_length, 1)
    ):
        block_n //= 2
    accumulator = block_m * next_power_of_two(shape.v_head_dim)
    return TileConfig(
        block_m,
        block_n,
        num_warps=4 if block_m <= 64 and accumulator <= _FOUR_WARPS else 8,
        num_stages=max(2, min(4, _KV_BYTES_IN_FLIGHT // (block_n * token_bytes) + 1)),
        max_registers=_NARROW_REGISTERS if accumulator <= _NARROW_TILE else _MAX_REGISTERS,
    )


def choose_fused_tiles(kv_length: int, shape: TileShape) -> tuple[TileConfig, TileConfig]:
    """Choose the narrow and the wide tile of a launch that has both.

    One kernel has one number of warps, stages and registers: those of the wide tile, which its
    accumulator needs, and the fewer stages, which both have room for.
    """
    narrow, wide = (choose_tile(rows, kv_length, shape) for rows in FUSED_ROWS)
    wide = replace(wide, num_stages=min(narrow.num_stages, wide.num_stages))
    return replace(wide, block_m=narrow.block_m, block_n=narrow.block_n), wide
