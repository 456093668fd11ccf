"""The table of tiles that were measured, by device, and the tiles that it may name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from prefix_kernels.tile_config import (
    ARCHS,
    TileConfig,
    TileShape,
    next_power_of_two,
    row_classes,
)

__all__ = ["TABLE", "TunedDevice", "candidate_tiles", "load_tuned_tiles", "tuned_tile"]

# Written by `python -m benchmarks.gpu.tune --write-table`.
TABLE = Path(__file__).with_name("tuned_tiles.json")

_BLOCK_N = (32, 64, 128)
_STAGES = (2, 3, 4)
# Warps of a program and registers of a thread, so that one to four programs share an SM.
_WARPS_REGISTERS = ((4, 128), (4, 168), (4, 255), (8, 128), (8, 255))
# What the loads of an SM must have outstanding at 4.8 TB/s, see `tiles.py`.
_LEAST_AHEAD_BYTES = 36 * 1024
_SHAPE_FIELDS = ("head_dim", "v_head_dim", "q_itemsize", "kv_itemsize")
_TILE_FIELDS = tuple(field.name for field in fields(TileConfig))


@dataclass(frozen=True, slots=True)
class TunedDevice:
    """What was measured on a device.

    Attributes:
        arch: a key of :data:`ARCHS`.
        result_file: where the measurements are, from the root of the repository.
        tiles: the fastest tile by shape, which names the device, and rows.
    """

    arch: str
    result_file: str
    tiles: Mapping[tuple[TileShape, int], TileConfig]


def tuned_tile(block_m: int, shape: TileShape) -> TileConfig | None:
    """The tile of a row class that was measured to be the fastest on ``shape.device``, if any."""
    if shape.device is None:
        return None
    device = _load_once(TABLE).get(shape.device)
    return device.tiles.get((shape, block_m)) if device else None


def candidate_tiles(block_m: int, shape: TileShape) -> Iterator[TileConfig]:
    """The tiles that are worth measuring, and that a table may name.

    All programs that the registers of an SM have room for must fit into its shared memory: the
    grid has as many, and those left over would run alone, after the others. Together they must
    load enough ahead. The compiler has the last word on which of these spill.
    """
    dim, v_dim = next_power_of_two(shape.head_dim), next_power_of_two(shape.v_head_dim)
    for (warps, registers), block_n, stages in product(_WARPS_REGISTERS, _BLOCK_N, _STAGES):
        tile = TileConfig(block_m, block_n, warps, stages, registers)
        programs = tile.programs_per_sm
        kv_tile = block_n * (dim + v_dim) * shape.kv_itemsize
        floats = block_m * (v_dim + block_n) // (32 * warps)  # accumulators and scores of a thread
        if (
            2 * floats <= registers + 1
            and programs * (stages - 1) * kv_tile >= _LEAST_AHEAD_BYTES
            and programs == tile.resident_programs(shape)
        ):
            yield tile


def load_tuned_tiles(path: Path) -> dict[str, TunedDevice]:
    """Read a table: devices by name.

    Raises:
        ValueError: the file is not such a table, or names a tile that is no candidate.
    """
    try:
        table = json.loads(path.read_text())
        return {name: _read_device(name, entry) for name, entry in table.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of tuned tiles: {error!r}") from error


_load_once = cache(load_tuned_tiles)  # the choice is made for every plan


def _read_device(name: str, entry: dict[str, Any]) -> TunedDevice:
    arch, result_file, rows = (entry[key] for key in ("arch", "result_file", "tiles"))
    if arch not in ARCHS:
        raise ValueError(f"arch of {name} is {arch!r}; legal: {', '.join(ARCHS)}")
    tiles: dict[tuple[TileShape, int], TileConfig] = {}
    for row in rows:
        if set(row) != {*_SHAPE_FIELDS, *_TILE_FIELDS}:
            raise ValueError(f"a tile of {name} has the fields {', '.join(row)}")
        if any(type(value) is not int or value <= 0 for value in row.values()):
            raise ValueError(f"a tile of {name} has a value that is no positive integer: {row}")
        dims = {key: row[key] for key in _SHAPE_FIELDS}
        shape = TileShape(**dims, has_wgmma=arch != "sm_80", device=name)
        tile = TileConfig(**{key: row[key] for key in _TILE_FIELDS})
        legal = tile.block_m in row_classes(shape)
        if not legal or tile not in candidate_tiles(tile.block_m, shape):
            raise ValueError(f"a tile of {name} is not among its candidate_tiles: {asdict(tile)}")
        if (shape, tile.block_m) in tiles:
            raise ValueError(f"{name} has two tiles of {tile.block_m} rows for {shape}")
        tiles[shape, tile.block_m] = tile
    return TunedDevice(arch, str(result_file), tiles)
