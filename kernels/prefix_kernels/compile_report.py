"""What the compiler makes of the kernels, for any architecture and without a GPU.

Compiled in processes of their own: one kernel takes seconds, and a process in which Triton
interprets its kernels cannot compile them.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefix_kernels.amdgcn import read_amdgcn
from prefix_kernels.kernel_report import AMD_ARCHS, COUNTED_TOKENS, KernelReport, TileReport
from prefix_kernels.launches import FUSED_ROWS, MERGE_MODES, PlanFacts, choose_launches
from prefix_kernels.machine_code import MachineCode, find_kv_loops
from prefix_kernels.sass import disassemble
from prefix_kernels.tiles import (
    ARCHS,
    TABLE,
    TileConfig,
    TileShape,
    load_tuned_tiles,
    row_classes,
)

__all__ = [
    "ALL_ARCHS",
    "DEFAULT_DTYPES",
    "HEAD_DIMS",
    "LATENT_DIMS",
    "KernelVariant",
    "compile_variants",
    "kernel_variants",
    "legal_dtypes",
    "triton_version",
]

# Shared memory that one program may use, by what can be compiled for.
ALL_ARCHS = ARCHS | AMD_ARCHS

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
# Of k where v is in it, and of v: the latent and the part with RoPE of DeepSeek's models.
LATENT_DIMS = {576: 512}

_ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}  # all others have one byte
# Dtypes of q, which is the output's, and of the caches.
_DTYPES = (
    ("bf16", "bf16"),
    ("bf16", "fp8_e4m3"),
    ("bf16", "fp8_e4m3fnuz"),
    ("bf16", "fp8_e5m2"),
    ("bf16", "fp8_e5m2fnuz"),
    ("fp16", "fp16"),
    ("fp16", "fp8_e4m3"),
    ("fp16", "fp8_e4m3fnuz"),
    ("fp16", "fp8_e5m2"),
    ("fp16", "fp8_e5m2fnuz"),
    ("fp32", "fp32"),
)
DEFAULT_DTYPES = _DTYPES[:3]
# What an architecture converts, if not the formats of the OCP; gfx942 has AMD's own.
_FP8_DTYPES = {"sm_80": ("fp8_e5m2",), "gfx942": ("fp8_e4m3fnuz", "fp8_e5m2fnuz")}
_OCP_DTYPES = ("fp8_e4m3", "fp8_e5m2")
# Those with matrix instructions that take q from shared memory.
# Between two of these lengths, the choice of a tile is the same.
_KV_LENGTHS = tuple(1 << bit for bit in range(12))
_SIDE_WARPS = 4
_DEFAULT_STAGES = 3  # Triton's own, where a launch names none

_INTERPRET = "TRITON_INTERPRET"
_MAX_VERSION_CHARS = 1 << 16  # of the file that names Triton's version, in its first lines
# Triton's names of what is not called the same there.
_TRITON_DTYPES = {
    "fp8_e4m3": "fp8e4nv",
    "fp8_e4m3fnuz": "fp8e4b8",
    "fp8_e5m2": "fp8e5",
    "fp8_e5m2fnuz": "fp8e5b16",
}
_FLOATS = ("sm_scale", "v_factor", "logit_cap")
_NUM_KV_HEADS = 8
# Query heads of a rank where v is in k, of one KV head: DeepSeek-V3's 128 on eight ranks, or more.
_LATENT_GROUP = 16


@dataclass(frozen=True, slots=True)
class KernelVariant:
    """What the compiler is asked for.

    Attributes:
        kernel: "pack_forward", "pack_forward_fused", "merge", "copy_slots" or "append_slots".
        head_dim: elements per head of q and k; 0 where the kernel has none.
        dtype, kv_dtype: of q and the output, and of the caches; of a slot kernel, both "int32".
        tile: the tile, of a fused kernel its wide one; else rows and elements taken at once.
        narrow_tile: the other tile of a fused kernel.
        merge: of the forward stage, one of :data:`MERGE_MODES`: with "in_kernel", the program that
            completes a request merges it.
        group_size: query heads per KV head.
        overlaps_merge: whether the launch of the merge begins before that of the forward stage
            ends, see `TritonExecutor`.
        v_in_k: as of `AttentionShape`; v has the elements of :data:`LATENT_DIMS` then, else those
            of k.
        sinks: dtype of attention sinks, "bf16" or "fp32"; None for none.
        causal: whether requests have several query tokens, as in a plan with ``query_lens``.
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
    v_in_k: bool = False

    @property
    def v_head_dim(self) -> int:
        """Elements per head of v."""
        return LATENT_DIMS[self.head_dim] if self.v_in_k else self.head_dim

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the layer."""
        return 1 if self.v_in_k else _NUM_KV_HEADS

    @property
    def shape(self) -> TileShape:
        """What its tiles are chosen by, but for the device."""
        q_size, kv_size = (_ITEMSIZES.get(name, 1) for name in (self.dtype, self.kv_dtype))
        return TileShape(self.head_dim, self.v_head_dim, q_size, kv_size, v_in_k=self.v_in_k)

    sinks: str | None = None
    causal: bool = False


def legal_dtypes(arch: str) -> tuple[tuple[str, str], ...]:
    """Dtypes of q and the caches that an architecture has, by its formats of 8 bits."""
    legal = _FP8_DTYPES.get(arch, _OCP_DTYPES)
    return tuple(pair for pair in _DTYPES if pair[1] in _ITEMSIZES or pair[1] in legal)


def kernel_variants(
    arch: str,
    *,
    head_dims: Iterable[int] | None = None,
    dtypes: Iterable[tuple[str, str]] | None = None,
    merges: Iterable[str] = MERGE_MODES,
    kv_lengths: Iterable[int] = _KV_LENGTHS,
    group_size: int = 4,
    causal: bool = False,
) -> Iterator[KernelVariant]:
    """List what `TritonExecutor` launches in all of its modes, on all devices of an architecture.

    For AMD's, which it has not been adapted to, what it would launch there: see `_for_amd`.

    Args:
        arch: a key of :data:`ALL_ARCHS`.
        head_dims: of q and k; those of :data:`LATENT_DIMS` have v in k, without 8-bit caches. None
            for all, without the latter for AMD's, whose shared memory is too small.
        dtypes: of q and the caches; None for those of :data:`DEFAULT_DTYPES` that the arch has.
        merges: of :data:`MERGE_MODES`.
        kv_lengths: tokens of the packs.
        group_size: query heads per KV head; no less than 16 with v in k.
        causal: those of plans with ``query_lens`` instead; the merge and `copy_slots` are the same.
    """
    if head_dims is None:
        head_dims = HEAD_DIMS if arch in AMD_ARCHS else (*HEAD_DIMS, *LATENT_DIMS)
    if dtypes is None:
        dtypes = [pair for pair in legal_dtypes(arch) if pair in DEFAULT_DTYPES]
    pairs, merges, lengths = tuple(dtypes), tuple(merges), tuple(kv_lengths)
    tuned = load_tuned_tiles(TABLE)
    devices = (None, *(name for name, device in tuned.items() if device.arch == arch))
    for head_dim in head_dims:
        v_in_k = head_dim in LATENT_DIMS
        group = max(group_size, _LATENT_GROUP) if v_in_k else group_size
        tile = TileConfig(group, 1, _SIDE_WARPS, _DEFAULT_STAGES, 0)
        one = KernelVariant("merge", head_dim, "", "fp32", tile, group_size=group, v_in_k=v_in_k)
        for dtype, kv_dtype in pairs:
            forward = replace(one, dtype=dtype, kv_dtype=kv_dtype, causal=causal)
            tiles = list(_forward_tiles(forward.shape.on_arch(arch), devices, lengths))
            if arch in AMD_ARCHS:
                tiles = [(name, _for_amd(t), n and _for_amd(n)) for name, t, n in tiles]
            for merge in merges:
                for kernel, tile, narrow in tiles:
                    tile = tile.merging() if merge == "in_kernel" else tile
                    yield replace(
                        forward, kernel=kernel, tile=tile, narrow_tile=narrow, merge=merge
                    )
        if "launch" in merges and not causal:
            for dtype in dict.fromkeys(dtype for dtype, _ in pairs):
                yield replace(one, dtype=dtype)
    for name, block in (("copy_slots", 1024), ("append_slots", 128))[causal:]:
        tile = TileConfig(1, block, _SIDE_WARPS, _DEFAULT_STAGES, 0)
        yield KernelVariant(name, 0, "int32", "int32", tile, causal=causal)


def _for_amd(tile: TileConfig) -> TileConfig:
    """A tile for waves of 64 threads, within the 64 KiB of shared memory of gfx942.

    Four waves fill the four SIMDs of a compute unit, with 512 registers per thread; eight would
    have 256. Nothing bounds the registers there. Two stages fit: KV tiles of 64 KiB and q besides
    would not.
    """
    return replace(tile, num_warps=4, num_stages=2, max_registers=0)


def _forward_tiles(
    shape: TileShape, devices: Iterable[str | None], kv_lengths: Iterable[int]
) -> Iterator[tuple[str, TileConfig, TileConfig | None]]:
    """Each row class at each KV length on each device, then the pairs of a fused launch."""
    launches = [
        one
        for device in devices
        for rows in row_classes(shape)
        for length in kv_lengths
        for one in choose_launches(
            PlanFacts((rows,), length), replace(shape, device=device), "streams"
        )
    ]
    for length in kv_lengths if row_classes(shape) else ():
        launches += choose_launches(PlanFacts((FUSED_ROWS[-1],), length), shape, "fused")
    for narrow, wide in dict.fromkeys((one.tile, one.wide_tile) for one in launches):
        if wide is None:
            yield "pack_forward", narrow, None
        else:
            yield "pack_forward_fused", wide, narrow


def triton_version(folder: Path | None = None) -> str:
    """The version of the Triton in a folder, or of the environment's; nothing is imported.

    Raises:
        ValueError: there is none.
    """
    if folder is None:
        spec = find_spec("triton")
        source = Path(spec.origin) if spec and spec.origin else Path()
    else:
        source = folder / "triton" / "__init__.py"
    try:
        with source.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_VERSION_CHARS)
    except OSError:
        text = ""
    found = re.search(r"^__version__ = ['\"](\S+)['\"]", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"{folder or 'the environment'} has no Triton")
    return found[1]


def compile_variants(
    variants: Iterable[KernelVariant],
    arch: str,
    *,
    jobs: int | None = None,
    triton_folder: Path | None = None,
) -> Iterator[KernelReport]:
    """Compile variants, several at a time, and report on each in their order.

    Args:
        variants: what to compile.
        arch: a key of :data:`ALL_ARCHS`.
        jobs: processes at work; None for one per CPU.
        triton_folder: has the Triton to compile with, as ``pip install --target`` leaves it; None
            for the environment's.

    Raises:
        ImportError: the Triton of that folder cannot be used.
    """
    variants = list(variants)
    jobs = max(1, min(jobs or len(os.sched_getaffinity(0)), len(variants)))
    folder = None if triton_folder is None else str(triton_folder.resolve())
    # Spawned, so that the workers' Triton reads the environment afresh.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _begin_worker, (folder,))
    interpret = os.environ.pop(_INTERPRET, None)
    try:
        reports = pool.map(_compile, variants, [arch] * len(variants), [folder] * len(variants))
    finally:
        if interpret is not None:
            os.environ[_INTERPRET] = interpret
    try:
        yield from reports
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(triton_folder: str | None) -> None:
    # Ctrl-C ends the parent, which then ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not in PYTHONPATH: a spawned process takes its path from the parent.
    if triton_folder is not None:
        sys.path.insert(0, triton_folder)


def _compile(variant: KernelVariant, arch: str, triton_folder: str | None = None) -> KernelReport:
    """Compile as a launch with aligned tensors does."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton_folder is not None and not triton.__file__.startswith(triton_folder):
        raise ImportError(f"triton was imported from {triton.__file__}")
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
    is_amd = arch in AMD_ARCHS
    target = GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", int(arch[3:]), 32)
    source = ASTSource(kernel, signature, constants, hints)
    compiled = triton.compile(source, target=target, options=options)
    asm = compiled.asm
    binary = read_amdgcn(asm["amdgcn"]) if is_amd else disassemble(asm["cubin"])
    return KernelReport(
        variant,
        arch,
        triton.__version__,
        registers=binary.registers,
        spill_bytes=binary.spill_bytes,
        shared_bytes=int(compiled.metadata.shared),
        shared_limit=ALL_ARCHS[arch],
        instructions=binary.matrix_instructions,
        async_copy_bytes=binary.copy_bytes,
        num_instructions=len(binary.code),
        tiles=_tile_reports(variant, binary),
    )


def _tile_reports(variant: KernelVariant, binary: MachineCode) -> tuple[TileReport, ...]:
    """What each tile of a forward kernel costs; nothing if its loops are not as many."""
    if not variant.kernel.startswith("pack_forward"):
        return ()
    tiles = [tile for tile in (variant.narrow_tile, variant.tile) if tile]
    loops = find_kv_loops(binary.code)
    if len(loops) != len(tiles):
        return ()
    elements = variant.head_dim + (0 if variant.v_in_k else variant.v_head_dim)
    token_bytes = elements * _ITEMSIZES.get(variant.kv_dtype, 1)
    return tuple(
        TileReport(
            tile.block_m,
            tile.block_n,
            tile.block_n * token_bytes,
            round(sum(loop.counts.values()) * COUNTED_TOKENS / tile.block_n),
            {kind: round(n * COUNTED_TOKENS / tile.block_n) for kind, n in loop.counts.items()},
            loop.first_copy_instructions,
        )
        for tile, loop in zip(tiles, loops, strict=True)
    )


def _arguments(variant: KernelVariant) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the types of its pointers other than int32, and its constants."""
    from prefix_kernels.forward import pack_forward_kernel
    from prefix_kernels.merge import merge_kernel
    from prefix_kernels.plan_buffers import append_slots_kernel, copy_slots_kernel

    heads = {"NUM_KV_HEADS": variant.num_kv_heads}
    block, causal = {"BLOCK": variant.tile.block_n}, {"CAUSAL": variant.causal}
    # SGLang's table is int32, what it passes per request is int64.
    if variant.kernel == "copy_slots":
        return copy_slots_kernel, {"req_pool_indices": "i64"}, block
    if variant.kernel == "append_slots":
        pointers = {"seq_lens": "i64", "new_slots": "i64"}
        return append_slots_kernel, pointers, heads | block | causal
    q, kv = (_TRITON_DTYPES.get(name, name) for name in (variant.dtype, variant.kv_dtype))
    pointers = {"out": q, "lse": "fp32", "partial_out": "fp32", "partial_lse": "fp32"}
    if variant.sinks is not None:
        pointers["sinks"] = variant.sinks
    outputs = heads | {
        "GROUP_SIZE": variant.group_size,
        "V_HEAD_DIM": variant.v_head_dim,
        "BLOCK_DV": variant.shape.v_block,
        "WRITES_LSE": False,
        "OVERLAPS_MERGE": variant.overlaps_merge,
        **({} if variant.sinks else {"sinks_ptr": None}),
    }
    if variant.kernel == "merge":
        return merge_kernel, pointers, outputs
    pointers |= {"q": q, "k": kv, "v": kv, "k_scale": "fp32", "v_scale": "fp32"}
    narrow = variant.narrow_tile
    tile, wide = (narrow, variant.tile) if narrow else (variant.tile, None)
    k_strides = variant.num_kv_heads * variant.head_dim, variant.head_dim
    v_strides = (0, 0) if variant.v_in_k else k_strides
    constants = (
        outputs
        | causal
        | {
            "K_STRIDE": k_strides[0],
            "K_HEAD_STRIDE": k_strides[1],
            "V_STRIDE": v_strides[0],
            "V_HEAD_STRIDE": v_strides[1],
            "HEAD_DIM": variant.head_dim,
            "BLOCK_D": variant.shape.k_block,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "WIDE_BLOCK_M": wide.block_m if wide else 0,
            "WIDE_BLOCK_N": wide.block_n if wide else 0,
            "LIST": 0,
            "V_IN_K": variant.v_in_k,
            "HAS_CAP": False,
            "HAS_SCALES": kv.startswith("fp8"),
            "MERGES": variant.merge == "in_kernel",
            **tile.switches,
        }
    )
    return pack_forward_kernel, pointers, constants
