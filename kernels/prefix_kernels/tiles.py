"""Which tile computes a pack: one pure function, and the choices that were measured."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from prefix_kernels.tile_config import (
    ROW_CLASSES,
    TileConfig,
    TileShape,
    next_power_of_two,
    row_class,
    row_classes,
)
from prefix_kernels.tuned_tiles import tuned_tile

__all__ = [
    "FUSED_ROWS",
    "LAUNCH_MODES",
    "MERGE_MODES",
    "ROW_CLASSES",
    "TileConfig",
    "TileShape",
    "choose_classes",
    "choose_fused_tiles",
    "choose_tile",
    "formula_tile",
    "next_power_of_two",
    "row_class",
    "row_classes",
    "widest_block",
]

# The ways to launch a plan, see `TritonExecutor`.
LAUNCH_MODES = ("streams", "fused")
MERGE_MODES = ("launch", "in_kernel")

# The two classes of a fused launch: the most frequent one, and the least one for wgmma.
FUSED_ROWS = (16, 64)

# KV bytes that one program keeps in flight or in use. Three programs of this size fit the 227 KiB
# that an SM of sm_90 and sm_100 gives to shared memory, two fit the 163 KiB of sm_80: enough for
# the 36 KiB of outstanding loads per SM that 4.8 TB/s ask for at a latency of about 1 us. With the
# rows of q, any tile stays below the 163 KiB.
_KV_BYTES_IN_FLIGHT = 64 * 1024
_MIN_BLOCK_N = 16
# Twice as wide compiles without spilling, too, given the registers. A formula cannot say whether
# that is faster: `candidate_tiles` has it for measurement to decide.
_MAX_BLOCK_N = 64

# What follows is what `sglang-prefix kernels` shows not to spill up to head dim 128. Accumulators,
# in rows times elements of v: four warps hold 64 x 128 and eight hold twice as much.
_FOUR_WARPS = 64 * 128
# Registers per thread. Within 168, three programs of four warps share an SM; 16 rows up to head
# dim 128 stay within.
_MAX_REGISTERS = 255
_NARROW_TILE = 16 * 128
_NARROW_REGISTERS = 168


def choose_tile(num_rows: int, kv_length: int, shape: TileShape) -> TileConfig:
    """Choose the tile for packs of up to ``num_rows`` rows over up to ``kv_length`` KV tokens.

    No tuning happens here or at serving time: what was measured on ``shape.device`` stands in
    `tuned_tiles.json`, and :func:`formula_tile` is for all others.

    Packs of up to 16 tokens get the narrowest KV tile. All others get the one width: what a tile
    has past the end of a pack repeats the last slot, which the L1 cache answers, while every width
    more is a kernel that the first short batch would wait seconds for.

    Args:
        num_rows: requests times group size of the widest pack; more than the largest tile has are
            taken in several blocks.
        kv_length: tokens of the longest pack.
        shape: head dims, item sizes, the matrix unit and the device.
    """
    block_m = row_class(num_rows, shape)
    return _for_length(tuned_tile(block_m, shape) or formula_tile(block_m, shape), kv_length)


def formula_tile(block_m: int, shape: TileShape) -> TileConfig:
    """The tile of a row class where nothing was measured.

    The KV tile is as wide as registers allow; the number of stages follows from the bytes to keep
    in flight.
    """
    dims = next_power_of_two(shape.head_dim) + next_power_of_two(shape.v_head_dim)
    token_bytes = dims * max(shape.kv_itemsize, shape.q_itemsize)
    block_n = _MAX_BLOCK_N if shape.has_wgmma or block_m < 128 else _MAX_BLOCK_N // 2
    while block_n > _MIN_BLOCK_N and 2 * block_n * token_bytes > _KV_BYTES_IN_FLIGHT:
        block_n //= 2
    accumulator = block_m * next_power_of_two(shape.v_head_dim)
    return TileConfig(
        block_m,
        block_n,
        num_warps=4 if block_m <= 64 and accumulator <= _FOUR_WARPS else 8,
        num_stages=max(2, min(4, _KV_BYTES_IN_FLIGHT // (block_n * token_bytes) + 1)),
        max_registers=_NARROW_REGISTERS if accumulator <= _NARROW_TILE else _MAX_REGISTERS,
    )


def widest_block(mode: str, shape: TileShape) -> int:
    """Rows of the widest tile that a launch mode has for head dims."""
    return FUSED_ROWS[-1] if mode == "fused" else row_classes(shape)[-1]


def choose_classes(
    num_rows: Collection[int], shape: TileShape, *, mode: str, fixed: bool
) -> list[int]:
    """Rows of the tile classes that a plan is launched with, ascending.

    Args:
        num_rows: requests times group size of each pack; with ``fixed``, of the whole batch alone.
        shape: as in :func:`choose_tile`.
        mode: one of :data:`LAUNCH_MODES`.
        fixed: launches must not depend on the plan, because a graph holds them.
    """
    if mode == "fused":
        return list(FUSED_ROWS if max(num_rows) > FUSED_ROWS[0] else FUSED_ROWS[:1])
    classes = {row_class(number, shape) for number in num_rows}
    # No more than two launches inside a graph.
    return sorted({ROW_CLASSES[0], *classes} if fixed else classes)


def choose_fused_tiles(kv_length: int, shape: TileShape) -> tuple[TileConfig, TileConfig]:
    """Choose the narrow and the wide tile of a launch that has both.

    One kernel has one number of warps, stages and registers: those of the wide tile, which its
    accumulator needs, and the fewer stages, which both have room for. Tiles that were measured
    alone say nothing about such a pair, so the formula chooses.
    """
    narrow, wide = (
        _for_length(formula_tile(row_class(rows, shape), shape), kv_length) for rows in FUSED_ROWS
    )
    wide = replace(wide, num_stages=min(narrow.num_stages, wide.num_stages))
    return replace(wide, block_m=narrow.block_m, block_n=narrow.block_n), wide


def _for_length(tile: TileConfig, kv_length: int) -> TileConfig:
    """The narrowest KV tile for packs that fit into one, with nothing to load ahead."""
    if kv_length > _MIN_BLOCK_N:
        return tile
    return replace(tile, block_n=_MIN_BLOCK_N, num_stages=2)
