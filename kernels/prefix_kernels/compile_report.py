"""What the compiler makes of the kernels, for any architecture and without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prefix_kernels.forward import pack_forward_kernel
from prefix_kernels.merge_kernel import merge_kernel
from prefix_kernels.tiles import ROW_CLASSES, TileConfig, TileShape, choose_tile, next_power_of_two

__all__ = ["ARCHS", "HEAD_DIMS", "KernelReport", "report_kernels"]

# Shared memory that one program may use, in bytes (CUDA programming guide, compute capabilities).
ARCHS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
HEAD_DIMS = (64, 80, 96, 128, 192, 256)

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
}
# Names of matrix instructions in SASS: Ampere's, Hopper's and Blackwell's.
_MATRIX_INSTRUCTION = re.compile(r"\b(HMMA|QMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA)\b")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One compiled kernel variant.

    Attributes:
        kernel: "pack_forward", "pack_forward_fused" or "merge".
        arch: "sm_80", "sm_90" or "sm_100".
        head_dim: elements per head; of q, k and v.
        dtype, kv_dtype: of q and the output, and of the caches.
        group_size: query heads per KV head.
        block_m, block_n: the tile; of a fused kernel, its wide one.
        num_warps, num_stages: compile options.
        registers: per thread.
        spill_bytes: bytes per thread that did not fit into registers.
        shared_bytes: shared memory of a program.
        shared_limit: what the architecture allows.
        uses_mma: whether the binary has matrix instructions.
        instructions: their names.
    """

    kernel: str
    arch: str
    head_dim: int
    dtype: str
    kv_dtype: str
    group_size: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    uses_mma: bool
    instructions: tuple[str, ...]


def report_kernels(
    arch: str,
    *,
    head_dims: Iterable[int] = HEAD_DIMS,
    dtypes: Iterable[tuple[torch.dtype, torch.dtype]] = ((torch.bfloat16, torch.bfloat16),),
    group_size: int = 4,
) -> Iterator[KernelReport]:
    """Compile every tile variant for an architecture, and the merge.

    Args:
        arch: a key of :data:`ARCHS`.
        head_dims: elements per head.
        dtypes: pairs of q's dtype and the caches'.
        group_size: query heads per KV head.
    """
    dtypes = list(dtypes)
    for head_dim in head_dims:
        for q_dtype, kv_dtype in dtypes:
            shape = TileShape(head_dim, head_dim, q_dtype.itemsize, kv_dtype.itemsize)
            for tile, wide in _variants(shape):
                yield _report_forward(arch, shape, q_dtype, kv_dtype, group_size, tile, wide)
        yield _report_merge(arch, head_dim, dtypes[0][0])


def _variants(shape: TileShape) -> Iterator[tuple[TileConfig, TileConfig | None]]:
    """All tiles that can be chosen: each row class at each KV length, then the fused pair."""
    seen: set[TileConfig] = set()
    for block_m in ROW_CLASSES:
        for kv_length in (16, 32, 64, 128, 1 << 20):
            tile = choose_tile(block_m, kv_length, shape)
            if tile not in seen:
                seen.add(tile)
                yield tile, None
    narrow, wide = (choose_tile(rows, 1 << 20, shape) for rows in (16, 64))
    yield narrow, wide


def _report_forward(
    arch: str,
    shape: TileShape,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    group_size: int,
    tile: TileConfig,
    wide: TileConfig | None,
) -> KernelReport:
    q, kv = _TYPES[q_dtype], _TYPES[kv_dtype]
    pointers = {"q": q, "k": kv, "v": kv, "out": q, "plan": "i32", "kv_slots": "i32"}
    pointers |= {"tail_lengths": "i32", "lse": "fp32", "partial_out": "fp32"}
    pointers |= {"partial_lse": "fp32", "k_scale": "fp32", "v_scale": "fp32"}
    constants = {
        "NUM_KV_HEADS": 8,
        "GROUP_SIZE": group_size,
        "HEAD_DIM": shape.head_dim,
        "V_HEAD_DIM": shape.v_head_dim,
        "BLOCK_D": next_power_of_two(shape.head_dim),
        "BLOCK_DV": next_power_of_two(shape.v_head_dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "WIDE_BLOCK_M": wide.block_m if wide else 0,
        "WIDE_BLOCK_N": wide.block_n if wide else 0,
        "LIST": 0,
        "HAS_CAP": False,
        "HAS_SCALES": kv_dtype.itemsize == 1,
        "WRITES_LSE": False,
    }
    largest = wide or tile
    stages = min(tile.num_stages, largest.num_stages)
    found = _compile(pack_forward_kernel, arch, pointers, constants, tile.num_warps, stages)
    return KernelReport(
        "pack_forward_fused" if wide else "pack_forward",
        arch,
        shape.head_dim,
        q,
        kv,
        group_size,
        largest.block_m,
        largest.block_n,
        tile.num_warps,
        stages,
        *found,
    )


def _report_merge(arch: str, head_dim: int, dtype: torch.dtype) -> KernelReport:
    pointers = {"partial_out": "fp32", "partial_lse": "fp32", "plan": "i32"}
    pointers |= {"out": _TYPES[dtype], "lse": "fp32"}
    constants = {
        "NUM_QO_HEADS": 32,
        "V_HEAD_DIM": head_dim,
        "BLOCK_DV": next_power_of_two(head_dim),
        "BLOCK_PARTIALS": 8,
        "WRITES_LSE": False,
    }
    found = _compile(merge_kernel, arch, pointers, constants, 4, 3)
    name = _TYPES[dtype]
    return KernelReport("merge", arch, head_dim, name, "fp32", 1, 1, 8, 4, 3, *found)


def _compile(
    kernel: Any,
    arch: str,
    pointers: dict[str, str],
    constants: dict[str, int],
    num_warps: int,
    num_stages: int,
) -> tuple[int, int, int, int, bool, tuple[str, ...]]:
    """Compile as a launch with aligned tensors does; return the last fields of a report."""
    signature, hints = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = pointers.get(name.removesuffix("_ptr"))
        is_float = name in ("sm_scale", "v_factor", "logit_cap")
        signature[name] = f"*{pointer}" if pointer else "fp32" if is_float else "i32"
        if not is_float:
            hints[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, hints),
        target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    registers, spilled = _resources(compiled.asm["ptx"])
    instructions = _matrix_instructions(compiled.asm["cubin"])
    shared = int(compiled.metadata.shared)
    return registers, spilled, shared, ARCHS[arch], bool(instructions), instructions


def _resources(ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes per thread, as ptxas says."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if target is None:
        raise RuntimeError("the compiled kernel names no target")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        newer = _TOOLS / "ptxas-blackwell"  # where Triton ships two
        is_blackwell = target.group(1).startswith("sm_10")
        ptxas = str(newer if is_blackwell and newer.exists() else _TOOLS / "ptxas")
        command = [ptxas, "-v", f"-arch={target.group(1)}", str(source), "-o", f"{folder}/out"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    registers = re.search(r"Used (\d+) registers", run.stderr)
    spills = re.findall(r"(\d+) bytes spill", run.stderr)
    if registers is None or not spills:
        raise RuntimeError(f"ptxas printed no resource usage: {run.stderr}")
    return int(registers.group(1)), max(map(int, spills))


def _matrix_instructions(cubin: bytes) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        command = [str(_TOOLS / "cuobjdump"), "-sass", str(binary)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(sorted(set(_MATRIX_INSTRUCTION.findall(run.stdout))))
