"""What plans for a GPU cost: the tiles of the Triton kernels on a device's multiprocessors.

Nothing here was measured on a GPU. Residency, warps and bytes in flight follow from the tiles that
the kernels launch; instructions are counts from compiled code; times are estimates from both, to be
replaced by measurements.
"""

from __future__ import annotations

from prefix_kernels.launches import LaunchSetting
from prefix_kernels.tiles import TileConfig, TileShape
from sglang_prefix.packing.cost import DeviceProfile, TileCost

__all__ = ["GPU_PROFILE", "H200_BYTES_PER_S", "H200_SMS", "L2_SPEEDUP", "gpu_profile"]

# NVIDIA's data sheet.
H200_BYTES_PER_S, H200_SMS = 4.8e12, 132

# Counted in the binaries for sm_90 (bfloat16, head dim 128, Triton 3.6.0): instructions of a warp
# for 64 KV tokens in the loop over tiles, by rows of the tile (`docs/results/compiled`).
LOOP_INSTRUCTIONS = {16: 289, 32: 422, 64: 428, 128: 407}
_COUNTED_TOKENS, _COUNTED_DIMS = 64, 256
# The same where v is in k, of 512 + 64 elements; the tile of 16 rows has four warps.
LATENT_LOOP_INSTRUCTIONS = {16: 712, 32: 606, 64: 652}
_COUNTED_LATENT_DIMS = 576
# Estimates: a clock under load, schedulers of a multiprocessor, and the share of their slots that
# one program of eight warps fills; together some 2,060 clocks for a tile of 128 x 64.
_CLOCKS_PER_US = 1900.0
_SCHEDULERS = 4
_ISSUED_SHARE = 0.4
# Estimates, by rows: the loads before an item's first KV copy wait for each other (item, length and
# queries, slots and q, KV), and after the loop the results are scaled and stored.
_ITEM_US = {16: 2.0, 32: 2.3, 64: 2.6, 128: 3.0}
# Estimate: what the L2 cache delivers over main memory. Partial results are written to memory, and
# read from there by the merge.
L2_SPEEDUP = 2.5
# Estimate: from the issue of a copy to its arrival, on a loaded device.
_LATENCY_US = 1.0
# Two tiles of KV: an item of fewer has nothing to load ahead.
_MIN_SPLIT_TOKENS = 128


def gpu_profile(
    setting: LaunchSetting,
    read_bytes_per_s: float = H200_BYTES_PER_S,
    *,
    padded_batch_size: int | None = None,
) -> DeviceProfile:
    """The profile of the Triton kernels on a GPU.

    Args:
        setting: of the executor; in the interpreter, the multiprocessors are those of an H200.
        read_bytes_per_s: bandwidth of main memory.
        padded_batch_size: for the tile classes of its launches; None for those of any large batch.
    """
    shape, num_sms = setting.shape, setting.num_sms or H200_SMS
    sm_bytes_per_us = read_bytes_per_s / num_sms / 1e6
    tiles = []
    for launch in setting.launches(padded_batch_size):
        share = launch.tiles[-1].sm_share(shape)
        tiles += [_tile_cost(tile, shape, share) for tile in launch.tiles]
    elements = shape.head_dim + (0 if shape.v_in_k else shape.v_head_dim)
    token_bytes = elements * shape.kv_itemsize
    # A further row block finds the KV in the L2 cache, and its instructions take their time.
    reread = tiles[-1].token_us / (token_bytes / sm_bytes_per_us)
    return DeviceProfile(
        name="cuda",
        max_block_rows=tiles[-1].rows,
        reread_cost=min(1.0, reread),
        pack_bytes=0,
        min_split_tokens=_MIN_SPLIT_TOKENS,
        query_cost=(1 + 1 / L2_SPEEDUP) / 2,
        num_sms=num_sms,
        read_bytes_per_us=read_bytes_per_s / 1e6,
        tiles=tuple(tiles),
    )


def _tile_cost(tile: TileConfig, shape: TileShape, sm_share: float) -> TileCost:
    dims = shape.kv_block
    if shape.v_in_k:
        instructions = LATENT_LOOP_INSTRUCTIONS[tile.block_m] / _COUNTED_LATENT_DIMS
    else:
        instructions = LOOP_INSTRUCTIONS[tile.block_m] / _COUNTED_DIMS
    issued = _SCHEDULERS * _ISSUED_SHARE * _CLOCKS_PER_US
    kv_tile = tile.block_n * dims * shape.kv_itemsize
    return TileCost(
        rows=tile.block_m,
        tokens=tile.block_n,
        sm_share=sm_share,
        item_us=_ITEM_US[tile.block_m],
        token_us=instructions * dims / _COUNTED_TOKENS * tile.num_warps / issued,
        lone_bytes_per_us=(tile.num_stages - 1) * kv_tile / _LATENCY_US,
    )


# Of the kernels for head dim 128 and 16-bit KV on an H200, by its data sheet.
GPU_PROFILE = gpu_profile(LaunchSetting(TileShape(128, 128, 2, 2), 4, H200_SMS))
