"""SGLang's own decode kernels: ``torch_native`` on the CPU, Triton on a GPU."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch

from sglang_prefix.bench.providers.base import Provider, import_reason, load_module
from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["ABSENT", "PROVIDERS", "SglangTorchNative", "SglangTriton"]

# SGLang's default for --triton-attention-num-kv-splits.
_MAX_KV_SPLITS = 8


class SglangTorchNative(Provider):
    """SGLang's ``torch_native`` decode: a loop over requests; it keeps nothing between layers."""

    name = "sglang-torch-native"
    kind = "stock"
    hosts = ("cpu",)
    executor = "torch"
    step_parts = ()

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        try:
            _torch_native()
        except Exception as error:  # SGLang raises what it likes when it loads
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return None

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.inputs
        caches = (k, v, w.req_to_token, w.req_pool_indices, w.seq_lens)
        _torch_native()(w.q, w.out, *caches, w.sm_scale)
        return w.out


@cache
def _torch_native() -> Any:
    from prefix_patches.stock_backend import torch_native_decode

    return torch_native_decode()


class SglangTriton(Provider):
    """SGLang's Triton decode kernels with the metadata of its Triton backend."""

    name = "sglang-triton"
    kind = "stock"
    hosts = ("cuda", "interpreter")

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return import_reason("sglang.kernels.ops.attention.decode_attention", _indices_module())

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__(inputs)
        kernels = load_module("sglang.kernels.ops.attention.decode_attention")
        metadata = load_module("sglang.kernels.ops.attention.metadata")
        self._decode = kernels.decode_attention_fwd
        self._count_splits = metadata.get_num_kv_splits_triton
        self._gather = load_module(_indices_module()).create_flashinfer_kv_indices_triton
        q, device = inputs.q, inputs.q.device
        batch, heads = q.shape[:2]
        self._kv_indptr = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        num_tokens = int(inputs.batch.seq_lens.sum())
        self._kv_indices = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self._num_splits = torch.zeros(batch, dtype=torch.int32, device=device)
        shape = (batch, heads, _MAX_KV_SPLITS)
        self._logits = torch.empty(*shape, inputs.v.shape[-1], device=device)
        self._lse = torch.empty(shape, device=device)
        self._num_cores = 8
        accepted = inspect.signature(self._decode).parameters
        self._options: dict[str, Any] = {}
        self._count_options: dict[str, Any] = {}
        if device.type == "cuda":
            self._num_cores = torch.cuda.get_device_properties(device).multi_processor_count
            if "use_pdl" in accepted:
                arch = load_module("sglang.kernels.jit.utils.arch")
                self._options["use_pdl"] = arch.is_arch_support_pdl()
        if "uneven_batch" in accepted and "uneven_batch_ptr" in self._count_splits.arg_names:
            uneven = torch.zeros(1, dtype=torch.int32, device=device)
            self._options["uneven_batch"] = self._count_options["uneven_batch_ptr"] = uneven

    def plan(self) -> None:
        w = self.inputs
        batch, heads = w.q.shape[:2]
        self._kv_indptr[1:] = torch.cumsum(w.seq_lens, 0)
        self._gather[(batch,)](
            w.req_to_token,
            w.req_pool_indices,
            w.seq_lens,
            self._kv_indptr,
            None,
            self._kv_indices,
            w.req_to_token.stride(0),
        )
        self._count_splits[(1,)](
            self._num_splits,
            w.seq_lens,
            batch,
            1,
            heads,
            w.k.shape[-2],
            _MAX_KV_SPLITS,
            self._num_cores,
            MAX_NUM_SEQ=max(256, 1 << (batch - 1).bit_length()),
            **self._count_options,
        )

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.inputs
        self._decode(
            w.q,
            k,
            v,
            w.out,
            self._kv_indptr,
            self._kv_indices,
            self._logits,
            self._lse,
            self._num_splits,
            _MAX_KV_SPLITS,
            w.sm_scale,
            1.0,
            1.0,
            **self._options,
        )
        return w.out


@cache
def _indices_module() -> str:
    """Where this release of SGLang keeps the kernel that gathers slots."""
    names = [f"sglang.kernels.ops.{package}.kv_indices" for package in ("kvcache", "attention")]
    return next((name for name in names if import_reason(name) is None), names[0])


PROVIDERS = (SglangTorchNative, SglangTriton)
# Named so that its absence is seen.
ABSENT = {"sglang-intel-amx": "needs sgl_kernel's AMX kernels; this command does not call them"}
