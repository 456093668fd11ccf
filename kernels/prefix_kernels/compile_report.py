"""What the compiler makes of the kernels, for any architecture and without a GPU.

Compiled in processes of their own: one kernel takes seconds, and a process in which Triton
interprets its kernels cannot compile them.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prefix_kernels.launches import FUSED_ROWS, MERGE_MODES, PlanFacts, choose_launches
from prefix_kernels.tiles import (
    ARCHS,
    TABLE,
    TileConfig,
    TileShape,
    load_tuned_tiles,
    next_power_of_two,
    programs_for_registers,
    programs_for_shared_memory,
    row_classes,
)

__all__ = [
    "ARCHS",
    "DEFAULT_DTYPES",
    "HEAD_DIMS",
    "SPILL_FREE_HEAD_DIM",
    "KernelReport",
    "KernelVariant",
    "compile_variants",
    "find_problems",
    "kernel_variants",
    "legal_dtypes",
]

HEAD_DIMS = (64, 80, 96, 128, 192, 256)

_ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8_e4m3": 1, "fp8_e5m2": 1}
# Dtypes of q, which is the output's, and of the caches.
_DTYPES = (
    ("bf16", "bf16"),
    ("bf16", "fp8_e4m3"),
    ("bf16", "fp8_e5m2"),
    ("fp16", "fp16"),
    ("fp16", "fp8_e4m3"),
    ("fp16", "fp8_e5m2"),
    ("fp32", "fp32"),
)
DEFAULT_DTYPES = _DTYPES[:2]
# Between two of these lengths, the choice of a tile is the same.
_KV_LENGTHS = tuple(1 << bit for bit in range(12))
_SIDE_WARPS = 4
_DEFAULT_STAGES = 3  # Triton's own, where a launch names none

# Head dims up to this one must not spill: they are what most models have.
SPILL_FREE_HEAD_DIM = 128

_MAX_WARPS_PER_SM = 64
_INTERPRET = "TRITON_INTERPRET"
# Triton's names of what is not called the same there.
_TRITON_DTYPES = {"fp8_e4m3": "fp8e4nv", "fp8_e5m2": "fp8e5"}
_FLOATS = ("sm_scale", "v_factor", "logit_cap")
_NUM_KV_HEADS = 8
# Names of matrix instructions in SASS: Ampere's, Hopper's and Blackwell's.
_MATRIX_INSTRUCTION = re.compile(r"\b([HQ]MMA|[HQ]GMMA|UTC[HQ]MMA)\b")
_ASYNC_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^,]*?, \[[^]]*\], (?:0x)?(\w+)")


@dataclass(frozen=True, slots=True)
class KernelVariant:
    """What the compiler is asked for.

    Attributes:
        kernel: "pack_forward", "pack_forward_fused", "merge", "copy_slots" or "append_slots".
        head_dim: elements per head of q, k and v; 0 where the kernel has none.
        dtype, kv_dtype: of q and the output, and of the caches; of a slot kernel, both "int32".
        tile: the tile, of a fused kernel its wide one; else rows and elements taken at once.
        narrow_tile: the other tile of a fused kernel.
        merge: of the forward stage, one of :data:`MERGE_MODES`: with "in_kernel", the program that
            completes a request merges it.
        group_size: query heads per KV head.
        overlaps_merge: whether the launch of the merge begins before that of the forward stage
            ends, see `TritonExecutor`.
    """

    kernel: str
    head_dim: int
    dtype: str
    kv_dtype: str
    tile: TileConfig
    narrow_tile: TileConfig | None = None
    merge: str = "launch"
    group_size: int = 4
    overlaps_merge: bool = False


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One compiled kernel variant.

    Attributes:
        variant: what was compiled.
        arch: "sm_80", "sm_90" or "sm_100".
        registers: per thread.
        spill_bytes: stack per thread, which holds what did not fit into registers.
        shared_bytes: shared memory of a program.
        shared_limit: what the architecture allows.
        instructions: names of the matrix instructions in the binary.
        async_copy_bytes: widths of the asynchronous copies from global to shared memory.
    """

    variant: KernelVariant
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    instructions: tuple[str, ...]
    async_copy_bytes: tuple[int, ...]

    @property
    def programs_per_sm(self) -> int:
        """Programs that an SM runs at a time, by registers and shared memory: the occupancy."""
        return min(
            programs_for_registers(self.variant.tile.num_warps, self.registers),
            programs_for_shared_memory(self.shared_bytes, self.arch),
            _MAX_WARPS_PER_SM // self.variant.tile.num_warps,
        )

    def as_dict(self) -> dict[str, Any]:
        """One object, as JSON has it, with one for each tile in it."""
        report = asdict(self)
        return report.pop("variant") | report | {"programs_per_sm": self.programs_per_sm}


def legal_dtypes(arch: str) -> tuple[tuple[str, str], ...]:
    """Dtypes of q and the caches that an architecture has: sm_80 cannot convert fp8 e4m3."""
    return tuple(pair for pair in _DTYPES if arch != "sm_80" or pair[1] != "fp8_e4m3")


def kernel_variants(
    arch: str,
    *,
    head_dims: Iterable[int] = HEAD_DIMS,
    dtypes: Iterable[tuple[str, str]] | None = None,
    merges: Iterable[str] = MERGE_MODES,
    group_size: int = 4,
) -> Iterator[KernelVariant]:
    """List what `TritonExecutor` launches in all of its modes, on all devices of an architecture.

    Args:
        arch: a key of :data:`ARCHS`.
        head_dims: elements per head.
        dtypes: of q and the caches; None for those of :data:`DEFAULT_DTYPES` that the arch has.
        merges: of :data:`MERGE_MODES`.
        group_size: query heads per KV head.
    """
    if dtypes is None:
        dtypes = [pair for pair in legal_dtypes(arch) if pair in DEFAULT_DTYPES]
    pairs, merges = tuple(dtypes), tuple(merges)
    tuned = load_tuned_tiles(TABLE)
    devices = (None, *(name for name, device in tuned.items() if device.arch == arch))
    for head_dim in head_dims:
        for dtype, kv_dtype in pairs:
            shape = TileShape(
                head_dim, head_dim, _ITEMSIZES[dtype], _ITEMSIZES[kv_dtype], arch != "sm_80"
            )
            for merge in merges:
                for kernel, tile, narrow in _forward_tiles(shape, devices):
                    yield KernelVariant(
                        kernel, head_dim, dtype, kv_dtype, tile, narrow, merge, group_size
                    )
        if "launch" in merges:
            tile = TileConfig(group_size, 1, _SIDE_WARPS, _DEFAULT_STAGES, 0)
            for dtype in dict.fromkeys(dtype for dtype, _ in pairs):
                yield KernelVariant("merge", head_dim, dtype, "fp32", tile, group_size=group_size)
    for name, block in (("copy_slots", 1024), ("append_slots", 128)):
        tile = TileConfig(1, block, _SIDE_WARPS, _DEFAULT_STAGES, 0)
        yield KernelVariant(name, 0, "int32", "int32", tile)


def _forward_tiles(
    shape: TileShape, devices: Iterable[str | None]
) -> Iterator[tuple[str, TileConfig, TileConfig | None]]:
    """Each row class at each KV length on each device, then the pairs of a fused launch."""
    launches = [
        one
        for device in devices
        for rows in row_classes(shape)
        for length in _KV_LENGTHS
        for one in choose_launches(
            PlanFacts((rows,), length), replace(shape, device=device), "streams"
        )
    ]
    for length in _KV_LENGTHS:
        launches += choose_launches(PlanFacts((FUSED_ROWS[-1],), length), shape, "fused")
    for narrow, wide in dict.fromkeys((one.tile, one.wide_tile) for one in launches):
        if wide is None:
            yield "pack_forward", narrow, None
        else:
            yield "pack_forward_fused", wide, narrow


def find_problems(reports: Iterable[KernelReport]) -> list[str]:
    """One line for each variant that spills, up to head dim 128, or does not fit."""
    problems = []
    for report in reports:
        variant = report.variant
        tile = f"{variant.tile.block_m}x{variant.tile.block_n}"
        name = f"{variant.kernel} {variant.dtype}/{variant.kv_dtype} head dim {variant.head_dim}"
        if report.spill_bytes and variant.head_dim <= SPILL_FREE_HEAD_DIM:
            problems.append(f"{name} {tile} spills {report.spill_bytes} bytes")
        if report.shared_bytes > report.shared_limit:
            size = f"{report.shared_bytes} bytes of shared memory, over {report.shared_limit}"
            problems.append(f"{name} {tile} uses {size}")
    return problems


def compile_variants(
    variants: Iterable[KernelVariant], arch: str, *, jobs: int | None = None
) -> Iterator[KernelReport]:
    """Compile variants, several at a time, and report on each in their order.

    Args:
        variants: what to compile.
        arch: a key of :data:`ARCHS`.
        jobs: processes at work; None for one per CPU.
    """
    variants = list(variants)
    jobs = max(1, min(jobs or len(os.sched_getaffinity(0)), len(variants)))
    # Spawned, so that the workers' Triton reads the environment afresh.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _ignore_interrupts)
    interpret = os.environ.pop(_INTERPRET, None)
    try:
        reports = pool.map(_compile, variants, [arch] * len(variants))
    finally:
        if interpret is not None:
            os.environ[_INTERPRET] = interpret
    try:
        yield from reports
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C ends the parent, which then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _compile(variant: KernelVariant, arch: str) -> KernelReport:
    """Compile as a launch with aligned tensors does."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, pointers, constants = _arguments(variant)
    signature, hints = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in _FLOATS:
            signature[name] = "fp32"
        else:
            pointer = pointers.get(name.removesuffix("_ptr"), "i32")
            signature[name] = f"*{pointer}" if name.endswith("_ptr") else "i32"
            parameter = kernel.params[index]
            if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
                hints[(index,)] = [["tt.divisibility", 16]]
    tile = variant.tile
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if tile.max_registers:
        options["maxnreg"] = tile.max_registers
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, hints),
        target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options=options,
    )
    copies = {int(size, 16) for size in _ASYNC_COPY.findall(compiled.asm["ptx"])}
    usage, sass = _disassemble(compiled.asm["cubin"])
    return KernelReport(
        variant,
        arch,
        registers=int(usage[1]),
        spill_bytes=int(usage[2]),
        shared_bytes=int(compiled.metadata.shared),
        shared_limit=ARCHS[arch],
        instructions=tuple(sorted(set(_MATRIX_INSTRUCTION.findall(sass)))),
        async_copy_bytes=tuple(sorted(copies)),
    )


def _arguments(variant: KernelVariant) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the types of its pointers other than int32, and its constants."""
    from prefix_kernels.forward import pack_forward_kernel
    from prefix_kernels.merge import merge_kernel
    from prefix_kernels.plan_buffers import append_slots_kernel, copy_slots_kernel

    heads = {"NUM_KV_HEADS": _NUM_KV_HEADS}
    block = {"BLOCK": variant.tile.block_n}
    # SGLang's table is int32, what it passes per request is int64.
    if variant.kernel == "copy_slots":
        return copy_slots_kernel, {"req_pool_indices": "i64"}, block
    if variant.kernel == "append_slots":
        pointers = {"seq_lens": "i64", "new_slots": "i64"}
        return append_slots_kernel, pointers, heads | block
    q, kv = (_TRITON_DTYPES.get(name, name) for name in (variant.dtype, variant.kv_dtype))
    pointers = {"out": q, "lse": "fp32", "partial_out": "fp32", "partial_lse": "fp32"}
    outputs = heads | {
        "GROUP_SIZE": variant.group_size,
        "V_HEAD_DIM": variant.head_dim,
        "BLOCK_DV": next_power_of_two(variant.head_dim),
        "WRITES_LSE": False,
        "OVERLAPS_MERGE": variant.overlaps_merge,
    }
    if variant.kernel == "merge":
        return merge_kernel, pointers, outputs
    pointers |= {"q": q, "k": kv, "v": kv, "k_scale": "fp32", "v_scale": "fp32"}
    narrow = variant.narrow_tile
    tile, wide = (narrow, variant.tile) if narrow else (variant.tile, None)
    constants = outputs | {
        "HEAD_DIM": variant.head_dim,
        "BLOCK_D": next_power_of_two(variant.head_dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "WIDE_BLOCK_M": wide.block_m if wide else 0,
        "WIDE_BLOCK_N": wide.block_n if wide else 0,
        "LIST": 0,
        "HAS_CAP": False,
        "HAS_SCALES": kv.startswith("fp8"),
        "MERGES": variant.merge == "in_kernel",
    }
    return pack_forward_kernel, pointers, constants


def _disassemble(cubin: bytes) -> tuple[re.Match[str], str]:
    """Registers and stack bytes per thread of a binary, and its text."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        command = [str(tools / "cuobjdump"), "-res-usage", "-sass", str(binary)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {printed[:1000]}")
    return usage, printed
