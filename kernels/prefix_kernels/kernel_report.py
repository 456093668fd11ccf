"""What is said of a compiled kernel variant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from prefix_kernels.tiles import programs_for_registers, programs_for_shared_memory

if TYPE_CHECKING:
    from prefix_kernels.compile_report import KernelVariant

__all__ = [
    "AMD_ARCHS",
    "COUNTED_TOKENS",
    "SPILL_FREE_HEAD_DIM",
    "KernelReport",
    "TileReport",
    "find_problems",
]

# Shared memory (LDS) of a compute unit, which one program may use, in bytes (AMD CDNA 3 and CDNA 4
# instruction set architecture guides).
AMD_ARCHS = {"gfx942": 64 * 1024, "gfx950": 160 * 1024}

COUNTED_TOKENS = 64  # of KV, to which the instructions of a loop are scaled
# Head dims up to this one must not spill: they are what most models have.
SPILL_FREE_HEAD_DIM = 128

_MAX_WARPS_PER_SM = 64
# A compute unit has four SIMDs, each with 512 vector registers per lane, accumulators included, in
# eights, for eight waves at most (LLVM's user guide for AMDGPU, gfx90a and later).
_SIMDS, _REGISTERS_PER_LANE, _MAX_WAVES = 4, 512, 8


@dataclass(frozen=True, slots=True)
class TileReport:
    """What a tile of a forward kernel costs, by the counting rule of `machine_code`.

    Attributes:
        block_m, block_n: query rows and KV tokens.
        kv_bytes: of the K and V of those tokens.
        loop_instructions: that a warp issues in the inner loop for 64 KV tokens.
        loop_instructions_by_kind: the same for each of `machine_code.KINDS` that it has; of a tile
            of 128 tokens rounded one by one.
        first_copy_instructions: that a warp issues for an item before its first copy of KV; None
            where nothing is copied asynchronously.
    """

    block_m: int
    block_n: int
    kv_bytes: int
    loop_instructions: int
    loop_instructions_by_kind: dict[str, int]
    first_copy_instructions: int | None


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One compiled kernel variant. An SM is also AMD's compute unit, and a warp its wave.

    Attributes:
        variant: what was compiled.
        arch: what for, such as "sm_90".
        triton: the compiler's version.
        registers: per thread.
        spill_bytes: memory per thread, which holds what did not fit into registers.
        shared_bytes: shared memory of a program.
        shared_limit: what the architecture allows.
        instructions: names of the matrix instructions in the binary.
        async_copy_bytes: widths of the asynchronous copies from global to shared memory.
        num_instructions: of the whole kernel.
        tiles: what each tile of a forward kernel costs, by ascending rows; none where its KV loops
            were not recognised.
    """

    variant: KernelVariant
    arch: str
    triton: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    instructions: tuple[str, ...]
    async_copy_bytes: tuple[int, ...]
    num_instructions: int
    tiles: tuple[TileReport, ...]

    @property
    def loop_instructions(self) -> int | None:
        """Of the tile of most rows, see :class:`TileReport`; None but of a forward kernel."""
        return self.tiles[-1].loop_instructions if self.tiles else None

    @property
    def first_copy_instructions(self) -> int | None:
        """Of the tile of most rows, see :class:`TileReport`; None but of a forward kernel."""
        return self.tiles[-1].first_copy_instructions if self.tiles else None

    @property
    def programs_per_sm(self) -> int:
        """Programs that an SM runs at a time, by registers and shared memory: the occupancy."""
        num_warps = self.variant.tile.num_warps
        if self.arch in AMD_ARCHS:
            waves = min(_REGISTERS_PER_LANE // (-(-self.registers // 8) * 8), _MAX_WAVES)
            fitting = self.shared_limit // max(self.shared_bytes, 1)
            return min(_SIMDS * waves // num_warps, fitting)
        return min(
            programs_for_registers(num_warps, self.registers),
            programs_for_shared_memory(self.shared_bytes, self.arch),
            _MAX_WARPS_PER_SM // num_warps,
        )

    @property
    def kv_bytes_in_flight(self) -> int | None:
        """Bytes of KV that an SM has asked for at a time; None but of a forward kernel.

        Those of all resident programs, of the tile of most rows: all stages but the one in use.
        """
        if not self.tiles:
            return None
        ahead = self.variant.tile.num_stages - 1
        return self.programs_per_sm * ahead * self.tiles[-1].kv_bytes

    def as_dict(self) -> dict[str, Any]:
        """One object, as JSON has it, with one for each tile in it."""
        names = ("loop_instructions", "first_copy_instructions", "programs_per_sm")
        derived = {name: getattr(self, name) for name in (*names, "kv_bytes_in_flight")}
        report = asdict(self)
        return report.pop("variant") | report | derived


def find_problems(reports: Iterable[KernelReport]) -> list[str]:
    """One line for each variant that spills up to head dim 128, is too large, or is not counted."""
    problems = []
    for report in reports:
        variant = report.variant
        tile = f"{variant.tile.block_m}x{variant.tile.block_n}"
        name = f"{variant.kernel} {variant.dtype}/{variant.kv_dtype} head dim {variant.head_dim}"
        if report.spill_bytes and variant.head_dim <= SPILL_FREE_HEAD_DIM:
            problems.append(f"{name} {tile} spills {report.spill_bytes} bytes")
        # Beside the large accumulators, what is needed once per item may lie in memory, but what
        # every KV tile needs may not. Merging in the kernel, too, is left to who asks for it.
        kinds = {kind for one in report.tiles for kind in one.loop_instructions_by_kind}
        if variant.v_in_k and variant.merge == "launch" and "local" in kinds:
            problems.append(f"{name} {tile} spills within its KV loop")
        if report.shared_bytes > report.shared_limit:
            size = f"{report.shared_bytes} bytes of shared memory, over {report.shared_limit}"
            problems.append(f"{name} {tile} uses {size}")
        if variant.kernel.startswith("pack_forward") and not report.tiles:
            problems.append(f"{name} {tile} has no KV loop that the counter recognises")
    return problems
