"""What a tile is, what its choice depends on, and what architectures have room for."""

from __future__ import annotations

from dataclasses import dataclass

from prefix_kernels.plan import AttentionShape

__all__ = [
    "ARCHS",
    "ROW_CLASSES",
    "TileConfig",
    "TileShape",
    "next_power_of_two",
    "programs_for_registers",
    "programs_for_shared_memory",
    "row_class",
    "row_classes",
]

# Shared memory that one program may use, in bytes (CUDA programming guide, compute capabilities).
ARCHS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}

# Rows of the tiles. The smallest is the matrix unit's; 64 is the least that Hopper's wgmma and
# Blackwell's tcgen05 take.
ROW_CLASSES = (16, 32, 64, 128)
# Accumulators that eight warps hold, in rows times elements of v; 128 x 256 spills hundreds of
# bytes on every architecture, with 16 warps as well.
_LARGEST_ACCUMULATOR = 128 * 128
_REGISTERS_PER_SM = 64 * 1024
# What an SM reserves for itself for each program it runs (CUDA programming guide).
_RESERVED_BYTES = 1024
_SCRATCH_BYTES = 1024


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
    max_registers: int = 255

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


def programs_for_registers(num_warps: int, registers: int) -> int:
    """Programs that the registers of an SM have room for; they are handed out in eights."""
    return _REGISTERS_PER_SM // (32 * num_warps * (-(-registers // 8) * 8))


def programs_for_shared_memory(shared_bytes: int, arch: str) -> int:
    """Programs that the shared memory of an SM of ``arch`` has room for."""
    return (ARCHS[arch] + _RESERVED_BYTES) // (shared_bytes + _RESERVED_BYTES)


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def row_classes(shape: TileShape) -> tuple[int, ...]:
    """Rows of the tiles that hold an accumulator of this shape in registers, ascending."""
    dim = next_power_of_two(shape.v_head_dim)
    return tuple(rows for rows in ROW_CLASSES if rows * dim <= _LARGEST_ACCUMULATOR)


def row_class(num_rows: int, shape: TileShape) -> int:
    """Rows of the smallest tile that holds ``num_rows``; of the largest one where none does."""
    legal = row_classes(shape)
    return next((rows for rows in legal if rows >= num_rows), legal[-1])
