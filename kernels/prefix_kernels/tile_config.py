"""What a tile is, what its choice depends on, and what architectures have room for."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ARCHS",
    "ROW_CLASSES",
    "TileConfig",
    "TileShape",
    "next_power_of_two",
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
        return _REGISTERS_PER_SM // (32 * self.num_warps * self.max_registers)


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
