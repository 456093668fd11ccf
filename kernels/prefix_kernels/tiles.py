"""Which launches, and which tiles in them, compute a plan: one pure function decides.

No tuning happens here or at serving time. What was measured on a device stands in
`tuned_tiles.json`; a formula is for everything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from prefix_kernels.plan import AttentionShape, PackPlan

__all__ = [
    "ARCHS",
    "FUSED_ROWS",
    "LAUNCH_MODES",
    "MERGE_MODES",
    "ROW_CLASSES",
    "TABLE",
    "LaunchConfig",
    "PlanFacts",
    "TileConfig",
    "TileShape",
    "TunedDevice",
    "candidate_tiles",
    "choose_launches",
    "formula_tile",
    "load_tuned_tiles",
    "next_power_of_two",
    "programs_for_registers",
    "programs_for_shared_memory",
    "row_classes",
    "warm_up_sizes",
    "widest_block",
]

# How a plan is launched and merged, see `TritonExecutor`.
LAUNCH_MODES = ("streams", "fused")
MERGE_MODES = ("launch", "in_kernel")

# Shared memory that one program may use, in bytes (CUDA programming guide, compute capabilities).
ARCHS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}

# Query rows of the tiles. The smallest is the matrix unit's; 64 is the least that Hopper's wgmma
# and Blackwell's tcgen05 take.
ROW_CLASSES = (16, 32, 64, 128)
# The two classes of a fused launch: the most frequent one, and the least one for wgmma.
FUSED_ROWS = (16, 64)

# Accumulators, in rows times elements of v: four warps hold 64 x 128 and eight hold twice as much
# without spilling, as `sglang-prefix kernels` shows. 128 x 256 spills, with 16 warps as well.
_FOUR_WARPS = 64 * 128
_LARGEST_ACCUMULATOR = 128 * 128
# Registers per thread. Three programs of four warps share an SM within 168, which is enough for
# 16 rows up to head dim 128.
_MAX_REGISTERS = 255
_NARROW_TILE = 16 * 128
_NARROW_REGISTERS = 168

# What an SM must have outstanding at 4.8 TB/s and a latency of about 1 us.
_LEAST_AHEAD_BYTES = 36 * 1024
# KV bytes that one program keeps in flight or in use. Three such programs fit the shared memory of
# an SM of sm_90 and sm_100, two fit that of sm_80; with the rows of q, any tile stays below it.
_KV_BYTES_IN_FLIGHT = 64 * 1024
_MIN_BLOCK_N = 16
_MAX_BLOCK_N = 64  # 128 compiles without spilling, too; whether it is faster must be measured

_REGISTERS_PER_SM = 64 * 1024
_RESERVED_BYTES = 1024  # an SM's own, for each program that it runs (CUDA programming guide)
_SCRATCH_BYTES = 1024
# Triton's interpreter runs programs one after another. A few show that the loop over items works.
_INTERPRETED_PROGRAMS = 8

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
        device: as ``torch.cuda.get_device_name`` has it, to use what was measured there; None for
            the formula.
    """

    head_dim: int
    v_head_dim: int
    q_itemsize: int
    kv_itemsize: int
    has_wgmma: bool = True
    device: str | None = None

    @classmethod
    def of(cls, shape: AttentionShape, device: str | None = None) -> TileShape:
        """What matters of an attention shape, on a device that has wgmma."""
        itemsizes = shape.q_itemsize, shape.kv_itemsize
        return cls(shape.head_dim, shape.v_head_dim, *itemsizes, device=device)


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
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = _MAX_REGISTERS

    @property
    def programs_per_sm(self) -> int:
        """Programs that the registers of an SM have room for."""
        return programs_for_registers(self.num_warps, self.max_registers)

    def resident_programs(self, shape: TileShape) -> int:
        """Programs that an SM has room for, in registers and in shared memory; at least one."""
        arch = "sm_90" if shape.has_wgmma else "sm_80"
        fitting = programs_for_shared_memory(self.shared_bytes(shape), arch)
        return max(1, min(self.programs_per_sm, fitting))

    def shared_bytes(self, shape: TileShape) -> int:
        """Shared memory of a program: what `compile_report` finds, or up to a few KiB more."""
        dim, v_dim = next_power_of_two(shape.head_dim), next_power_of_two(shape.v_head_dim)
        kv_tile = self.block_n * (dim + v_dim) * shape.kv_itemsize
        q = self.block_m * dim * shape.q_itemsize
        if shape.has_wgmma and self.block_m >= 64:  # reads K and V from there, also those in use
            return self.num_stages * kv_tile + q + _SCRATCH_BYTES
        weights = self.block_m * self.block_n * shape.q_itemsize
        return (self.num_stages - 1) * kv_tile + q + weights + _SCRATCH_BYTES


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """What of a plan decides its launches.

    Attributes:
        qo_rows: query rows (requests times group size) of the packs, every number once.
        kv_length: tokens of the longest pack, once its tail has grown. None if the launches must
            serve every plan of a batch whose rows ``qo_rows`` has, because a graph holds them.
    """

    qo_rows: tuple[int, ...]
    kv_length: int | None

    @classmethod
    def of(cls, plan: PackPlan, group_size: int) -> PlanFacts:
        """Of one plan."""
        rows = np.unique(np.diff(plan.query_indptr)) * group_size
        lengths = plan.pack_end - plan.pack_start
        lengths[plan.num_shared_packs :] += plan.reserved_tail_slots
        return cls(tuple(rows.tolist()), int(lengths.max()))

    @classmethod
    def of_every_plan(cls, padded_batch_size: int, group_size: int) -> PlanFacts:
        """Of every plan of a batch of this size."""
        return cls((padded_batch_size * group_size,), None)


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """One launch of the forward stage: a work list, and the tile or tiles that take its items.

    Attributes:
        work_list: which of the plan's work lists.
        tile: the tile; of a fused launch the narrow one.
        wide_tile: the second tile of a fused launch.
    """

    work_list: int
    tile: TileConfig
    wide_tile: TileConfig | None = None

    @property
    def tiles(self) -> tuple[TileConfig, ...]:
        """Its tiles, by ascending rows."""
        return (self.tile,) if self.wide_tile is None else (self.tile, self.wide_tile)

    def num_programs(self, shape: TileShape, num_sms: int, num_tiles: int | None) -> int:
        """Programs to launch: as many as run at a time, or fewer if there are fewer tiles.

        Args:
            shape: as in :func:`choose_launches`.
            num_sms: multiprocessors; 0 in the interpreter.
            num_tiles: work items times KV heads; None where the launch must not depend on it.
        """
        resident = num_sms * self.tiles[-1].resident_programs(shape) or _INTERPRETED_PROGRAMS
        return resident if num_tiles is None else max(1, min(num_tiles, resident))


def choose_launches(facts: PlanFacts, shape: TileShape, mode: str) -> list[LaunchConfig]:
    """Choose the launches of a plan. Nothing else decides what the forward stage launches.

    A pack takes the smallest tile that holds its rows; more rows than the largest tile has are
    taken in several blocks. "streams" has a launch for each row class in use, "fused" has one
    launch of up to two tiles.

    Args:
        facts: of the plan, or of every plan that a graph must serve.
        shape: head dims, item sizes, the matrix unit and the device.
        mode: one of :data:`LAUNCH_MODES`.

    Returns:
        By ascending rows; a launch's place is the number of its work list.
    """
    if mode == "fused":
        if max(facts.qo_rows) > FUSED_ROWS[0]:
            return [LaunchConfig(0, *_fused_tiles(facts.kv_length, shape))]
        return [LaunchConfig(0, _choose_tile(FUSED_ROWS[0], facts.kv_length, shape))]
    classes = {_row_class(rows, shape) for rows in facts.qo_rows}
    if facts.kv_length is None:  # two launches in a graph: the narrowest tile, and all rows at once
        classes.add(ROW_CLASSES[0])
    return [
        LaunchConfig(i, _choose_tile(rows, facts.kv_length, shape))
        for i, rows in enumerate(sorted(classes))
    ]


def widest_block(mode: str, shape: TileShape) -> int:
    """Rows of the widest tile that a launch mode has for head dims."""
    return FUSED_ROWS[-1] if mode == "fused" else row_classes(shape)[-1]


def row_classes(shape: TileShape) -> tuple[int, ...]:
    """Rows of the tiles that hold an accumulator of this shape in registers, ascending."""
    dim = next_power_of_two(shape.v_head_dim)
    return tuple(rows for rows in ROW_CLASSES if rows * dim <= _LARGEST_ACCUMULATOR)


def warm_up_sizes(group_size: int, most: int) -> set[int]:
    """Batch sizes, up to ``most``, that between them make a server launch every kernel it has.

    Launches are fixed but for the class of the widest tile, which follows from the batch size: the
    smallest batch of each class.
    """
    return {min(size, most) for size in (1, *(rows // group_size + 1 for rows in ROW_CLASSES))}


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


def candidate_tiles(block_m: int, shape: TileShape) -> Iterator[TileConfig]:
    """The tiles that are worth measuring, and that a table may name.

    All programs that the registers of an SM have room for must fit into its shared memory: the
    grid has as many, and those left over would run alone, after the others. Together they must
    load enough ahead. The compiler has the last word on which of these spill.
    """
    dim, v_dim = next_power_of_two(shape.head_dim), next_power_of_two(shape.v_head_dim)
    # Warps of a program and registers of a thread, so that one to four programs share an SM.
    warps_registers = ((4, 128), (4, 168), (4, 255), (8, 128), (8, 255))
    for (warps, registers), block_n, stages in product(warps_registers, (32, 64, 128), (2, 3, 4)):
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


def programs_for_registers(num_warps: int, registers: int) -> int:
    """Programs that the registers of an SM have room for; they are handed out in eights."""
    return _REGISTERS_PER_SM // (32 * num_warps * (-(-registers // 8) * 8))


def programs_for_shared_memory(shared_bytes: int, arch: str) -> int:
    """Programs that the shared memory of an SM of ``arch`` has room for."""
    return (ARCHS[arch] + _RESERVED_BYTES) // (shared_bytes + _RESERVED_BYTES)


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def _row_class(qo_rows: int, shape: TileShape) -> int:
    """Rows of the smallest tile that holds ``qo_rows``; of the largest one where none does."""
    legal = row_classes(shape)
    return next((rows for rows in legal if rows >= qo_rows), legal[-1])


def _choose_tile(block_m: int, kv_length: int | None, shape: TileShape) -> TileConfig:
    """The tile of a row class that was fastest on ``shape.device``, else the formula's."""
    device = _load_once(TABLE).get(shape.device) if shape.device else None
    measured = device.tiles.get((shape, block_m)) if device else None
    return _for_length(measured or formula_tile(block_m, shape), kv_length)


def _fused_tiles(kv_length: int | None, shape: TileShape) -> tuple[TileConfig, TileConfig]:
    """The narrow and the wide tile of a launch that has both.

    One kernel has one number of warps, stages and registers: those of the wide tile, which its
    accumulator needs, and the fewer stages, which both have room for. Tiles that were measured
    alone say nothing about such a pair, so the formula chooses.
    """
    narrow, wide = (
        _for_length(formula_tile(_row_class(rows, shape), shape), kv_length) for rows in FUSED_ROWS
    )
    wide = replace(wide, num_stages=min(narrow.num_stages, wide.num_stages))
    return replace(wide, block_m=narrow.block_m, block_n=narrow.block_n), wide


def _for_length(tile: TileConfig, kv_length: int | None) -> TileConfig:
    """The narrowest KV tile for packs that fit into one, with nothing to load ahead.

    All other lengths get the one width. What a tile has past the end of a pack repeats the last
    slot, which the L1 cache answers, while every width more is a kernel that the first short batch
    would wait seconds for.
    """
    if kv_length is None or kv_length > _MIN_BLOCK_N:
        return tile
    return replace(tile, block_n=_MIN_BLOCK_N, num_stages=2)


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


def _read_device(name: str, entry: dict[str, Any]) -> TunedDevice:
    arch, result_file, rows = (entry[key] for key in ("arch", "result_file", "tiles"))
    if arch not in ARCHS:
        raise ValueError(f"arch of {name} is {arch!r}; legal: {', '.join(ARCHS)}")
    shape_fields = ("head_dim", "v_head_dim", "q_itemsize", "kv_itemsize")
    tile_fields = [field.name for field in fields(TileConfig)]
    tiles: dict[tuple[TileShape, int], TileConfig] = {}
    for row in rows:
        if set(row) != {*shape_fields, *tile_fields}:
            raise ValueError(f"a tile of {name} has the fields {', '.join(row)}")
        if any(type(value) is not int or not 0 < value <= _MAX_FIELD for value in row.values()):
            raise ValueError(f"a tile of {name} has a value that is no positive integer: {row}")
        dims = {key: row[key] for key in shape_fields}
        shape = TileShape(**dims, has_wgmma=arch != "sm_80", device=name)
        tile = TileConfig(**{key: row[key] for key in tile_fields})
        candidates = candidate_tiles(tile.block_m, shape)
        if tile.block_m not in row_classes(shape) or tile not in candidates:
            raise ValueError(f"a tile of {name} is not among its candidate_tiles: {asdict(tile)}")
        if (shape, tile.block_m) in tiles:
            raise ValueError(f"{name} has two tiles of {tile.block_m} rows for {shape}")
        tiles[shape, tile.block_m] = tile
    return TunedDevice(arch, str(result_file), tiles)
