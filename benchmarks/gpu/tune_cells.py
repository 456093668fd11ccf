"""What gpu-tune measures: one pack shape per row class, and the tiles to compare on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from benchmarks.gpu.inputs import Inputs, MismatchError, Outputs
from prefix_kernels import plan_buffers
from prefix_kernels.launch import launch
from prefix_kernels.oracle import RELATIVE_TOLERANCES
from prefix_kernels.tiles import TileConfig, TileShape, candidate_tiles, formula_tile
from sglang_prefix.bench.graphs import launches_of
from sglang_prefix.bench.output_check import relative_error
from sglang_prefix.bench.packed_attention import PackedAttention
from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import Tree, TreeBatch, pat_tree, shared_then_private
from sglang_prefix.packing import GPU_PROFILE

__all__ = ["TuneCell", "TuneWork", "cells", "dry_cells"]

# Query heads per KV head, as in Qwen3-235B-A22B: then a lone request fills the tile of 16 rows, and
# those of more rows are shared packs with no tails among them.
_GROUP = 16
_KV_HEADS = 4
# Packs per SM. With four KV heads an SM has 12 equal pieces of work, which one, two, three and four
# programs share without a rest.
_PACKS_PER_SM = 3
_LEAST_TOKENS = 1024
_LEAST_KV_BYTES = 256 << 20
# One piece per pack, whatever its length.
_UNSPLIT = replace(GPU_PROFILE, name="unsplit", num_workers=1)
# Every graph launches the class of 16 rows and that of all rows of its batch, most often 128.
_ROWS = (16, 128, 64, 32)
_DTYPES = {"bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
_SHAPES = ((128, "bf16"), (64, "bf16"), (128, "fp8_e4m3"), (64, "fp8_e4m3"))


@dataclass(frozen=True, slots=True)
class TuneCell:
    """Packs of ``rows`` rows, bf16 queries, and a head dim and cache dtype."""

    head_dim: int
    kv_dtype: str
    rows: int

    @property
    def name(self) -> str:
        """Unique."""
        return f"dim{self.head_dim}/{self.kv_dtype}/rows{self.rows}"


def cells() -> list[TuneCell]:
    """The most valuable first."""
    return [TuneCell(*shape, rows) for shape, rows in product(_SHAPES, _ROWS)]


def dry_cells() -> list[TuneCell]:
    """A lone request's tile and a shared pack's, and a cache of fp8."""
    return [TuneCell(128, "bf16", 16), TuneCell(128, "bf16", 32), TuneCell(128, "fp8_e4m3", 32)]


@dataclass(frozen=True, slots=True)
class _Launch:
    """A recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def __call__(self) -> None:
        launch(self.kernel, self.grid, **self.arguments)


class TuneWork:
    """The tensors and launches of a cell.

    Args:
        cell: which.
        device, seed: of the tensors.
        dry: tiny, and float16 instead of bfloat16.

    Raises:
        MismatchError: the result with the formula's tile is not what the oracle says.
    """

    def __init__(self, cell: TuneCell, device: torch.device, seed: int, *, dry: bool) -> None:
        self._num_sms = 1
        if device.type == "cuda":
            self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        heads = Heads(_GROUP, 1, 16, 16) if dry else _heads(cell)
        dtype = torch.float16 if dry else torch.bfloat16
        kv_dtype = dtype if cell.kv_dtype == "bf16" else _DTYPES[cell.kv_dtype]
        # As TritonExecutor has it.
        has_wgmma = dry or torch.cuda.get_device_capability(device)[0] in (9, 10)
        self.shape = TileShape(heads.dim, heads.v_dim, dtype.itemsize, kv_dtype.itemsize, has_wgmma)
        token_bytes = heads.kv * (heads.dim + heads.v_dim) * kv_dtype.itemsize
        num_packs, tokens = (2, 33) if dry else _size(self._num_sms, token_bytes)
        self.kv_bytes = num_packs * tokens * token_bytes
        self.facts = {"packs": num_packs, "tokens_per_pack": tokens, "kv_bytes": self.kv_bytes}
        batch = TreeBatch.lay_out(_tree(num_packs, tokens, cell.rows // _GROUP), seed=seed)
        self._inputs = Inputs.build(batch, heads, device, seed, dtype=dtype, kv_dtype=kv_dtype)
        attention = PackedAttention(
            heads.shape(dtype, kv_dtype), device, policy="node", profile=_UNSPLIT
        )
        attention.load(attention.plan(batch.forest()), self._inputs.table, self._inputs.rows)
        self._outputs = self._inputs.outputs()
        recorded = launches_of(lambda: self._inputs.run(attention, self._outputs))
        self._launches = [_Launch(*one) for one in recorded]
        self._place = next(
            i for i, one in enumerate(self._launches) if one.arguments.get("BLOCK_M") == cell.rows
        )
        forward = self._launches[self._place].arguments
        items = attention.executor.buffers.plan[plan_buffers.HEADER_NUM_ITEMS + forward["LIST"]]
        self._num_units = int(items) * heads.kv
        self.formula = formula_tile(cell.rows, self.shape)
        self.candidates = list(candidate_tiles(cell.rows, self.shape))
        if dry:
            self.candidates = self.candidates[:2]
        if self.formula in self.candidates:
            self.candidates.remove(self.formula)
        self._run_with(self.formula)
        self._inputs.compare(self._outputs)
        self._expected: Outputs = self._outputs.clone()

    def forward(self, tile: TileConfig) -> _Launch:
        """The launch of the row class, alone, with another tile."""
        one = self._launches[self._place]
        programs = min(self._num_units, self._num_sms * tile.resident_programs(self.shape))
        options = {
            "BLOCK_N": tile.block_n,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "maxnreg": tile.max_registers,
        }
        return _Launch(one.kernel, (programs,), one.arguments | options)

    def compile(self, tile: TileConfig) -> tuple[int, int]:
        """Registers and spills of a thread; zeros in the interpreter. Launches it once."""
        one = self.forward(tile)
        compiled = one.kernel[one.grid](**one.arguments)
        return getattr(compiled, "n_regs", 0), getattr(compiled, "n_spills", 0)

    def check(self, tile: TileConfig) -> float:
        """The largest relative error of a head against the result with the formula's tile.

        Raises:
            MismatchError: it is over the tolerance.
        """
        self._run_with(tile)
        tolerance = 2 * RELATIVE_TOLERANCES[self._outputs.out.dtype]
        error = relative_error(self._outputs.out, self._expected.out.double())
        if not error <= tolerance:
            raise MismatchError(f"off by {error} from the formula's tile, more than {tolerance}")
        return error

    def _run_with(self, tile: TileConfig) -> None:
        self._outputs.poison()
        for place, one in enumerate(self._launches):
            (self.forward(tile) if place == self._place else one)()


def _heads(cell: TuneCell) -> Heads:
    return Heads(_GROUP * _KV_HEADS, _KV_HEADS, cell.head_dim, cell.head_dim)


def _size(num_sms: int, token_bytes: int) -> tuple[int, int]:
    """Packs, and tokens of each."""
    num_packs, tokens = _PACKS_PER_SM * num_sms, _LEAST_TOKENS
    while num_packs * tokens * token_bytes < _LEAST_KV_BYTES:
        tokens *= 2
    return num_packs, tokens


def _tree(num_packs: int, tokens: int, requests: int) -> Tree:
    """Lone requests, or packs of several with a tail of one token each."""
    if requests == 1:
        return shared_then_private(num_packs, 0, tokens)
    return pat_tree(f"{num_packs},{num_packs * requests}_{tokens},1")
