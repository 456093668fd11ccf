"""The tiles of the pack-forward kernel: which there are, what they take, and the fastest ones.

No tuning happens at serving time. What was measured on a device stands in `tuned_tiles.json`; a
formula is for everything else. `launches.py` chooses among them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from prefix_kernels.plan import AttentionShape

__all__ = [
    "ARCHS",
    "MIN_BLOCK_N",
    "ROW_CLASSES",
    "TABLE",
    "TILE_FIELDS",
    "TileConfig",
    "TileShape",
    "TunedDevice",
    "candidate_tiles",
    "formula_tile",
    "load_tuned_tiles",
    "measured_device",
    "measured_tile",
    "next_power_of_two",
    "programs_for_registers",
    "programs_for_shared_memory",
    "row_classes",
]


# Shared memory that one program may use, in bytes (CUDA programming guide, compute capabilities).
ARCHS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}

# Query rows of the tiles. The smallest is the matrix unit's; 64 is the least that Hopper's wgmma
# and Blackwell's tcgen05 take.
ROW_CLASSES = (16, 32, 64, 128)

# Accumulators, in rows times elements of v: four warps hold 64 x 128 and eight hold twice as much
# without spilling, as `sglang-prefix kernels` shows. 128 x 256 spills, with 16 warps as well.
_FOUR_WARPS = 64 * 128
_LARGEST_ACCUMULATOR = 128 * 128
# With v in k, eight warps of sm_90 hold twice as much: q is in shared memory, and v in halves.
# Elsewhere q takes registers, or the accumulator all of the tensor memory. More rows than 64 would
# be no fewer reads: a program could hold half of v's columns, and would multiply q with k again.
_LATENT_ACCUMULATOR, _LATENT_ROWS = 64 * 512, 64
# Registers per thread. Within 168, three programs of four warps share an SM, or one of them and one
# of eight: enough for 16 rows up to head dim 128, and for 128 rows with wgmma.
_MAX_REGISTERS = 255
_NARROW_TILE = 16 * 128
_SHARING_REGISTERS = 168
# Rows of the tiles that have registers left for a next item.
_CARRYING_ROWS = 32
_SWITCHES = ("carries_item", "branches_for_tail", "half_products")  # of a tile

# What an SM must have outstanding at 4.8 TB/s and a latency of about 1 us.
_LEAST_AHEAD_BYTES = 36 * 1024
# KV bytes that one program keeps in flight or in use. Three such programs fit the shared memory of
# an SM of sm_90 and sm_100, two fit that of sm_80; with the rows of q, any tile stays below it.
_KV_BYTES_IN_FLIGHT = 64 * 1024
# With v in k, a tile of 64 tokens with 512 + 64 elements of 16 bits: one in use and one in flight,
# with 64 rows of q, are what sm_90 has; of 16 rows, two programs fit beside each other.
_LATENT_TILE_BYTES = 72 * 1024
MIN_BLOCK_N = 16
_MAX_BLOCK_N = 64  # 128 compiles without spilling, too; whether it is faster must be measured

_REGISTERS_PER_SM = 64 * 1024
_RESERVED_BYTES = 1024  # an SM's own, for each program that it runs (CUDA programming guide)
_SCRATCH_BYTES = 1024

# Written by `sglang-prefix bench tune --write-table`.
TABLE = Path(__file__).with_name("tuned_tiles.json")


@dataclass(frozen=True, slots=True)
class TileShape:
    """What the choice of a tile depends on, apart from the pack.

    Attributes:
        head_dim, v_head_dim: elements per head of q and k, and of v.
        q_itemsize, kv_itemsize: bytes per element of q, and of the caches.
        has_wgmma: whether the device has wgmma or tcgen05, which take q from shared memory;
            elsewhere q is in registers.
        device: as ``torch.cuda.get_device_name`` has it, to use what was measured there or on
            another of its chip; None for the formula.
        has_tensor_memory: whether that is tcgen05, whose results go to tensor memory and come from
            there through registers.
        v_in_k: as of :class:`~prefix_kernels.plan.AttentionShape`.
    """

    head_dim: int
    v_head_dim: int
    q_itemsize: int
    kv_itemsize: int
    has_wgmma: bool = True
    device: str | None = None
    has_tensor_memory: bool = False
    v_in_k: bool = False

    @classmethod
    def of(cls, shape: AttentionShape, device: str | None = None) -> TileShape:
        """What matters of an attention shape, on a device that has wgmma."""
        itemsizes = shape.q_itemsize, shape.kv_itemsize
        dims = shape.head_dim, shape.v_head_dim
        return cls(*dims, *itemsizes, device=device, v_in_k=shape.v_in_k)

    def on_arch(self, arch: str, device: str | None = None) -> TileShape:
        """The same on a device of an architecture: "sm_90", for example."""
        return replace(
            self,
            has_wgmma=arch in ("sm_90", "sm_100"),
            has_tensor_memory=arch == "sm_100",
            device=device,
        )

    @property
    def has_narrow_wgmma(self) -> bool:
        """Whether products of 16-bit values are wgmma, whose results are in registers."""
        is_narrow = self.q_itemsize == self.kv_itemsize == 2
        return is_narrow and self.has_wgmma and not self.has_tensor_memory

    @property
    def v_block(self) -> int:
        """Elements of a row of v as a tile has them: a power of two, or the sum of two halves."""
        return max(32 if self.v_in_k else 16, next_power_of_two(self.v_head_dim))

    @property
    def k_block(self) -> int:
        """The same of k and q; with v in k, v and the rest are powers of two of their own."""
        if not self.v_in_k:
            return max(16, next_power_of_two(self.head_dim))
        rest = self.head_dim - self.v_head_dim
        return self.v_block + (max(16, next_power_of_two(rest)) if rest else 0)

    @property
    def kv_block(self) -> int:
        """Elements of K and V that a tile has of a token."""
        return self.k_block + (0 if self.v_in_k else self.v_block)


@dataclass(frozen=True, slots=True)
class TileConfig:
    """One compiled form of the pack-forward kernel.

    Attributes:
        block_m: query rows (requests times group size) of a tile.
        block_n: KV tokens of a tile.
        num_warps: warps of a program.
        num_stages: KV tiles in flight or in use.
        max_registers: per thread. Without a bound of ours ptxas sets its own and spills to keep
            to it.
        carries_item: whether a program makes its items cheap for a few registers: it loads what
            the next one says during the KV loop of this one, and branches around the output or the
            partials where no row goes there. Not in fused launches.
        branches_for_tail: whether only the last KV tile of an item is masked, by a branch.
        half_products: whether bfloat16 queries are multiplied with 8-bit caches in float16, to
            which there is a conversion in one step.

    The last three change no result beyond rounding. They are switches for measuring both ways on
    one device; the defaults are what executes fewer instructions (docs/kernels.md).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = _MAX_REGISTERS
    carries_item: bool = False
    branches_for_tail: bool = True
    half_products: bool = True

    @property
    def switches(self) -> dict[str, bool]:
        """The kernel's arguments of those names."""
        return {name.upper(): getattr(self, name) for name in _SWITCHES}

    def merging(self) -> TileConfig:
        """The same tile in a kernel that merges, too.

        Beside that, eight warps spill within any bound that lets other programs share their SM.
        """
        return replace(self, max_registers=_MAX_REGISTERS) if self.num_warps == 8 else self

    @property
    def programs_per_sm(self) -> int:
        """Programs that the registers of an SM have room for."""
        return programs_for_registers(self.num_warps, self.max_registers)

    def resident_programs(self, shape: TileShape) -> int:
        """Programs that an SM has room for, in registers and in shared memory; at least one."""
        arch = "sm_90" if shape.has_wgmma else "sm_80"
        fitting = programs_for_shared_memory(self.shared_bytes(shape), arch)
        return max(1, min(self.programs_per_sm, fitting))

    def sm_share(self, shape: TileShape) -> float:
        """Part of an SM that a program takes: of its registers, or of its shared memory."""
        registers = 32 * self.num_warps * (-(-self.max_registers // 8) * 8)
        limit = ARCHS["sm_90" if shape.has_wgmma else "sm_80"] + _RESERVED_BYTES
        shared = self.shared_bytes(shape) + _RESERVED_BYTES
        return max(registers / _REGISTERS_PER_SM, shared / limit)

    def shared_bytes(self, shape: TileShape) -> int:
        """Shared memory of a program: what `compile_report` finds, or up to a few KiB more."""
        kv_tile = self.block_n * shape.kv_block * shape.kv_itemsize
        q = self.block_m * shape.k_block * shape.q_itemsize
        weights = self.block_m * self.block_n * shape.q_itemsize
        if shape.has_wgmma and self.block_m >= 64:  # reads K and V from there, also those in use
            passed_on = weights if shape.v_in_k else 0  # from the warps of some columns to all
            return self.num_stages * kv_tile + q + passed_on + _SCRATCH_BYTES
        return (self.num_stages - 1) * kv_tile + q + weights + _SCRATCH_BYTES


TILE_FIELDS = tuple(field.name for field in fields(TileConfig))


def row_classes(shape: TileShape) -> tuple[int, ...]:
    """Rows of the tiles that hold an accumulator of this shape in registers, ascending."""
    fitting = [rows for rows in ROW_CLASSES if rows * shape.v_block <= _LARGEST_ACCUMULATOR]
    if not shape.v_in_k:
        return tuple(fitting)
    if shape.kv_itemsize == 1:  # converted on the way, a tile would be in shared memory twice
        return ()
    if shape.has_narrow_wgmma and _LATENT_ROWS * shape.v_block <= _LATENT_ACCUMULATOR:
        fitting = [rows for rows in ROW_CLASSES if rows <= _LATENT_ROWS]
    return tuple(rows for rows in fitting if rows <= _LATENT_ROWS)


def formula_tile(block_m: int, shape: TileShape) -> TileConfig:
    """The tile of a row class where nothing was measured.

    The KV tile is as wide as registers allow; the number of stages follows from the bytes to keep
    in flight.
    """
    token_bytes = shape.kv_block * max(shape.kv_itemsize, shape.q_itemsize)
    block_n = _MAX_BLOCK_N if shape.has_wgmma or block_m < 128 else _MAX_BLOCK_N // 2
    tile_bytes = _LATENT_TILE_BYTES if shape.v_in_k else _KV_BYTES_IN_FLIGHT // 2
    while block_n > MIN_BLOCK_N and block_n * token_bytes > tile_bytes:
        block_n //= 2
    accumulator = block_m * shape.v_block
    # Elsewhere, and where KV or q are converted on the way, 128 rows spill within that bound.
    shares = accumulator <= _NARROW_TILE or (shape.has_narrow_wgmma and block_m == ROW_CLASSES[-1])
    # With v in k four warps spill on sm_100, and sm_80 has shared memory for one program only.
    four_warps = _FOUR_WARPS // (2 if shape.v_in_k and not shape.has_narrow_wgmma else 1)
    return TileConfig(
        block_m,
        block_n,
        num_warps=4 if block_m <= 64 and accumulator <= four_warps else 8,
        num_stages=max(2, min(4, _KV_BYTES_IN_FLIGHT // (block_n * token_bytes) + 1)),
        max_registers=_SHARING_REGISTERS if shares else _MAX_REGISTERS,
        carries_item=block_m <= _CARRYING_ROWS,
    )


def candidate_tiles(block_m: int, shape: TileShape) -> Iterator[TileConfig]:
    """The tiles that are worth measuring, and that a table may name.

    All programs that the registers of an SM have room for must fit into its shared memory: the
    grid has as many, and those left over would run alone, after the others. Together they must
    load enough ahead. The compiler has the last word on which of these spill.
    """
    # Warps of a program and registers of a thread, so that one to four programs share an SM.
    warps_registers = ((4, 128), (4, 168), (4, 255), (8, 128), (8, 168), (8, 255))
    for (warps, registers), block_n, stages in product(warps_registers, (32, 64, 128), (2, 3, 4)):
        carries = block_m <= _CARRYING_ROWS
        tile = TileConfig(block_m, block_n, warps, stages, registers, carries_item=carries)
        programs = tile.programs_per_sm
        kv_tile = block_n * shape.kv_block * shape.kv_itemsize
        # Accumulators and scores of a thread.
        floats = block_m * (shape.v_block + block_n) // (32 * warps)
        if (
            2 * floats <= registers + 1
            and programs * (stages - 1) * kv_tile >= _LEAST_AHEAD_BYTES
            and programs == tile.resident_programs(shape)
        ):
            yield tile


def programs_for_registers(num_warps: int, registers: int) -> int:
    """Programs that the registers of an SM have room for; they are handed out in eights."""
    return _REGISTERS_PER_SM // (32 * num_warps * (-(-registers // 8) * 8))


def programs_for_shared_memory(shared_bytes: int, arch: str) -> int:
    """Programs that the shared memory of an SM of ``arch`` has room for."""
    return (ARCHS[arch] + _RESERVED_BYTES) // (shared_bytes + _RESERVED_BYTES)


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


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


# Of a table, which has some 200 characters a tile, and of each number in it.
_MAX_TABLE_CHARS, _MAX_FIELD = 1 << 20, 1 << 16


def load_tuned_tiles(path: Path) -> dict[str, TunedDevice]:
    """Read a table: devices by name.

    Raises:
        ValueError: the file is not such a table, or names a tile that is no candidate.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_TABLE_CHARS + 1)
        if len(text) > _MAX_TABLE_CHARS:
            raise ValueError(f"it has more than {_MAX_TABLE_CHARS:,} characters")
        table = json.loads(text)
        return {name: _read_device(name, entry) for name, entry in table.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no table of tuned tiles: {error!r}") from error


_load_once = cache(load_tuned_tiles)  # the choice is made for every plan
# The chip in a device's name: "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", but none in
# "NVIDIA GeForce RTX 4090", whose series has several.
_CHIP = re.compile(r"NVIDIA [A-Z]+\d+\w*\b")


def measured_device(device: str) -> str | None:
    """The device in the table whose tiles are for ``device``; None where only the formula is.

    That is itself, or the first one of the same chip by its name. Boards and MIG slices of a chip
    have the same multiprocessors, with the same registers, shared memory and matrix unit. Their
    memory differs, so measuring a device itself is better.

    Args:
        device: as ``torch.cuda.get_device_name`` has it.
    """
    table = _load_once(TABLE)
    if device in table:
        return device
    chip = _chip(device)
    return next((name for name in table if chip and _chip(name) == chip), None)


def measured_tile(block_m: int, shape: TileShape) -> TileConfig | None:
    """The tile of a row class that was fastest on ``shape.device``; None where none was."""
    name = measured_device(shape.device) if shape.device else None
    tiles = _load_once(TABLE)[name].tiles if name else {}
    return tiles.get((replace(shape, device=name), block_m))


def _chip(device: str) -> str | None:
    found = _CHIP.match(device)
    return found and found[0]


def _read_device(name: str, entry: dict[str, Any]) -> TunedDevice:
    arch, result_file, rows = (entry[key] for key in ("arch", "result_file", "tiles"))
    if arch not in ARCHS:
        raise ValueError(f"arch of {name} is {arch!r}; legal: {', '.join(ARCHS)}")
    shape_fields = ("head_dim", "v_head_dim", "q_itemsize", "kv_itemsize")
    tiles: dict[tuple[TileShape, int], TileConfig] = {}
    for row in rows:
        if set(row) != {*shape_fields, *TILE_FIELDS}:
            raise ValueError(f"a tile of {name} has the fields {', '.join(row)}")
        numbers = [row[key] for key in row if key not in _SWITCHES]
        if any(type(value) is not int or not 0 < value <= _MAX_FIELD for value in numbers):
            raise ValueError(f"a tile of {name} has a value that is no positive integer: {row}")
        dims = {key: row[key] for key in shape_fields}
        shape = TileShape(**dims).on_arch(arch, name)
        tile = TileConfig(**{key: row[key] for key in TILE_FIELDS})
        candidates = candidate_tiles(tile.block_m, shape)
        if tile.block_m not in row_classes(shape) or tile not in candidates:
            raise ValueError(f"a tile of {name} is not among its candidate_tiles: {asdict(tile)}")
        if (shape, tile.block_m) in tiles:
            raise ValueError(f"{name} has two tiles of {tile.block_m} rows for {shape}")
        tiles[shape, tile.block_m] = tile
    return TunedDevice(arch, str(result_file), tiles)
