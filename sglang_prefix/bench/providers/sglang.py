"""SGLang's own decode kernels: ``torch_native`` on the CPU, Triton on a GPU."""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any

import torch

from sglang_prefix.bench.providers.base import Provider, import_reason
from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["SglangTorchNative", "SglangTriton"]

_DECODE = "sglang.kernels.ops.attention.decode_attention"
_METADATA = "sglang.kernels.ops.attention.metadata"
# By release, where the kernel is that gathers slots.
_INDICES = ("sglang.kernels.ops.kvcache.kv_indices", "sglang.kernels.ops.attention.kv_indices")
# SGLang's default for --triton-attention-num-kv-splits.
_MAX_KV_SPLITS = 8


class SglangTorchNative(Provider):
    """SGLang's ``torch_native``: a loop over requests; it keeps nothing between layers.

    Several query tokens are an extend, for which it computes the whole request.
    """

    name = "sglang-torch-native"
    kind = "stock"
    hosts = ("cpu",)
    executor = "torch"
    takes_queries = True
    step_parts = ()

    @classmethod
    def unavailable(cls) -> str | None:
        try:
            _torch_native()
        except Exception as error:  # SGLang raises what it likes when it loads
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return None

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.inputs
        caches = (k, v, w.req_to_token, w.req_pool_indices, w.seq_lens)
        query_lens = None if w.query_lens is None else torch.from_numpy(w.query_lens)
        _torch_native()(w.q, w.out, *caches, w.sm_scale, query_lens)
        return w.out


@cache
def _torch_native() -> Any:
    from prefix_patches.stock_backend import torch_native_attention

    return torch_native_attention()


class SglangTriton(Provider):
    """SGLang's Triton decode kernels with the metadata of its Triton backend."""

    name = "sglang-triton"
    kind = "stock"
    hosts = ("cuda", "interpreter")
    takes_latents = True

    @classmethod
    def unavailable(cls) -> str | None:
        return import_reason(_DECODE, _METADATA, _indices_module())

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__(inputs)
        self._decode = importlib.import_module(_DECODE).decode_attention_fwd
        self._count_splits = importlib.import_module(_METADATA).get_num_kv_splits_triton
        self._gather = importlib.import_module(
            _indices_module()
        ).create_flashinfer_kv_indices_triton
        batch, heads = inputs.q.shape[:2]
        device = inputs.q.device

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._kv_indptr = zeros(batch + 1)
        self._kv_indices = zeros(inputs.logical_tokens, dtype=torch.int64)
        self._num_splits = zeros(batch)
        size = (batch, heads, _MAX_KV_SPLITS)
        self._logits = zeros(*size, inputs.v.shape[-1], dtype=torch.float32)
        self._lse = zeros(*size, dtype=torch.float32)
        self._num_cores = 8
        self._options: dict[str, Any] = {}
        self._count_options: dict[str, Any] = {}
        accepted = inspect.signature(self._decode).parameters
        if device.type == "cuda":
            self._num_cores = torch.cuda.get_device_properties(device).multi_processor_count
            if "use_pdl" in accepted:
                arch = importlib.import_module("sglang.kernels.jit.utils.arch")
                self._options["use_pdl"] = arch.is_arch_support_pdl()
        if "uneven_batch" in accepted and "uneven_batch_ptr" in self._count_splits.arg_names:
            uneven = zeros(1)
            self._options["uneven_batch"] = self._count_options["uneven_batch_ptr"] = uneven

    def plan(self) -> None:
        w = self.inputs
        batch, heads = w.q.shape[:2]
        self._kv_indptr[1:] = torch.cumsum(w.seq_lens, 0)
        tables = (w.req_to_token, w.req_pool_indices, w.seq_lens, self._kv_indptr)
        self._gather[(batch,)](*tables, None, self._kv_indices, w.req_to_token.stride(0))
        sizes = (batch, 1, heads, w.heads.kv, _MAX_KV_SPLITS, self._num_cores)
        most = max(256, 1 << (batch - 1).bit_length())
        self._count_splits[(1,)](
            self._num_splits, w.seq_lens, *sizes, MAX_NUM_SEQ=most, **self._count_options
        )

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.inputs
        indices = (self._kv_indptr, self._kv_indices)
        partials = (self._logits, self._lse, self._num_splits, _MAX_KV_SPLITS)
        scales = (w.sm_scale, 1.0, 1.0)
        self._decode(w.q, k, v, w.out, *indices, *partials, *scales, **self._options)
        return w.out


@cache
def _indices_module() -> str:
    return next((name for name in _INDICES if import_reason(name) is None), _INDICES[0])
