"""What a server launches: every kernel for its layers, from the executor itself, without a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from prefix_kernels.executor import AttentionParams
from prefix_kernels.launches import LAUNCH_MODES, MERGE_MODES, warm_up_sizes
from prefix_kernels.plan import AttentionShape, PackPlan
from prefix_kernels.plan_buffers import HEADER_SIZE, PlanCapacity
from prefix_kernels.tiles import ROW_CLASSES, TABLE, TileShape, load_tuned_tiles
from prefix_kernels.triton_executor import TritonExecutor
from prefix_kernels.work_list import ITEM_FIELDS

__all__ = ["TORCH_DTYPES", "ServedLayers", "launch_all"]

# By the names that `compile_report` has for them.
TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_CPU = torch.device("cpu")
# Of an executor on the CPU, where no plan is larger than one of one token per request.
_MAX_PARTS = 2
# Tokens from row to row of SGLang's `req_to_token`: the context length and some more. Triton
# compiles for multiples of 16 and for others.
_ROW_STRIDES = (64, 68)
# What SGLang releases have for the indices and the lengths of requests; slots are int64 in all.
_INDEX_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True, slots=True)
class ServedLayers:
    """Attention layers of a model on one rank.

    Attributes:
        num_qo_heads, num_kv_heads: of one rank.
        head_dim, v_head_dim: elements per head of q and k, and of v.
        dtype, kv_dtype: of q and the caches, keys of :data:`TORCH_DTYPES`.
        has_cap: whether logits are capped.
        v_in_k: as of `AttentionShape`.
        sinks: dtype of attention sinks, a key of :data:`TORCH_DTYPES`; None for none.
        causal: whether requests have several query tokens in some passes, as many as there may be.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    kv_dtype: str
    has_cap: bool = False
    v_in_k: bool = False
    sinks: str | None = None
    causal: bool = False

    @property
    def shape(self) -> AttentionShape:
        """The same for planners and executors.

        Raises:
            ValueError: query heads do not come in whole groups.
        """
        return AttentionShape(
            self.num_qo_heads,
            self.num_kv_heads,
            self.head_dim,
            self.v_head_dim,
            TORCH_DTYPES[self.dtype].itemsize,
            TORCH_DTYPES[self.kv_dtype].itemsize,
            self.v_in_k,
        )


def launch_all(
    layers: Iterable[ServedLayers],
    arch: str,
    *,
    modes: Iterable[str] = LAUNCH_MODES,
    merges: Iterable[str] = MERGE_MODES,
    **options: Any,
) -> None:
    """Make every launch that a server makes for layers; to be recorded, see `kernel_cache`.

    Args:
        layers: of all models.
        arch: a key of `tiles.ARCHS`; what was measured on devices of it is launched, too.
        modes, merges: ways to launch and to merge.
        options: further ones of the executor.
    """
    tuned = load_tuned_tiles(TABLE)
    devices = (None, *(name for name, device in tuned.items() if device.arch == arch))
    for one, mode, merge, device in product(layers, modes, merges, devices):
        _launch_layer(one, arch, device, mode=mode, merge=merge, **options)


def _launch_layer(layer: ServedLayers, arch: str, device: str | None, **options: Any) -> None:
    shape = layer.shape
    for size in sorted(warm_up_sizes(shape.group_size, max(ROW_CLASSES) + 1)):
        executor = TritonExecutor(shape, _CPU, capacity=_capacity(size), **options)
        # On the CPU the executor is one for Hopper, of no name.
        executor._tile_shape = TileShape.of(shape).on_arch(arch, device)
        for causal in (False, True) if layer.causal else (False,):
            _launch_step(executor, layer, size, causal)


def _launch_step(executor: TritonExecutor, layer: ServedLayers, size: int, causal: bool) -> None:
    for stride, index_dtype in product(_ROW_STRIDES, _INDEX_DTYPES):
        indices = torch.zeros(size, dtype=index_dtype)
        executor.load(_plan(size, causal), torch.zeros(1, stride, dtype=torch.int32), indices)
        executor.append(torch.ones_like(indices), torch.zeros(size, dtype=torch.int64))
    dtype, kv_dtype = TORCH_DTYPES[layer.dtype], TORCH_DTYPES[layer.kv_dtype]
    q = torch.zeros(size, layer.num_qo_heads, layer.head_dim, dtype=dtype)
    out = torch.zeros(size, layer.num_qo_heads, layer.v_head_dim, dtype=dtype)
    k = torch.zeros(2, layer.num_kv_heads, layer.head_dim, dtype=kv_dtype)
    v = torch.zeros(2, layer.num_kv_heads, layer.v_head_dim, dtype=kv_dtype)
    if layer.v_in_k:
        v = k[..., : layer.v_head_dim]
    params = AttentionParams(1.0, float(layer.has_cap))
    if layer.sinks is not None:
        sinks = torch.zeros(layer.num_qo_heads, dtype=TORCH_DTYPES[layer.sinks])
        params = replace(params, sinks=sinks)
    executor.run(q, k, v, out, None, params)
    if kv_dtype.itemsize == 1:  # as with a checkpoint that brings scales, which is a tensor
        scale = torch.ones(())
        executor.run(q, k, v, out, None, replace(params, k_scale=scale, v_scale=scale))


def _capacity(size: int) -> PlanCapacity:
    """For a plan of ``size`` requests of one token each."""
    values = HEADER_SIZE + 1 + size * (5 + _MAX_PARTS * (6 + ITEM_FIELDS * max(ROW_CLASSES)))
    return PlanCapacity(size, values, size, size)


def _plan(size: int, causal: bool) -> PackPlan:
    """Requests of one token each, which share nothing; the kernels are those of several."""
    steps, ones = np.arange(size + 1), np.ones(size, dtype=np.int64)
    return PackPlan(
        seq_lens=ones,
        pack_start=0 * ones,
        pack_end=ones,
        query_indptr=steps,
        queries=steps[:-1],
        num_splits=ones,
        slot_offset=steps,
        partial_indptr=steps,
        partial_index=steps[:-1],
        request_indptr=steps,
        reserved_tail_slots=0,
        query_lens=ones if causal else None,
    )
