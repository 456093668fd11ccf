"""FlashAttention 3 from SGLang's kernel package, called as SGLang's backend calls it."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from sglang_prefix.bench.providers.base import Provider
from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["FlashAttention3"]


class FlashAttention3(Provider):
    """FA3's decode with the scheduler metadata of a step."""

    name = "fa3"
    kind = "stock"
    modules = ("sgl_kernel.flash_attn",)

    @classmethod
    def unavailable(cls) -> str | None:
        reason = super().unavailable()
        if reason is None and torch.cuda.get_device_capability()[0] != 9:
            return "needs compute capability 9.x"
        return reason

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__(inputs)
        library = importlib.import_module("sgl_kernel.flash_attn")
        self._attend = library.flash_attn_with_kvcache
        self._schedule = getattr(library, "get_scheduler_metadata", None)
        device, batch = inputs.q.device, inputs.q.shape[0]
        self._cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self._max_len = int(inputs.batch.seq_lens.max())
        self._step: dict[str, Any] = {}
        accepted = inspect.signature(self._attend).parameters
        self._options = {"out": inputs.out} if "out" in accepted else {}

    def plan(self) -> None:
        w = self.inputs
        pages = self.page_numbers(w.req_to_token[:, :: self.page_size])
        lens = w.seq_lens.int()
        self._step = {"page_table": pages.contiguous(), "cache_seqlens": lens}
        if self._schedule is not None:
            self._step["scheduler_metadata"] = self._schedule(
                batch_size=len(lens),
                max_seqlen_q=1,
                max_seqlen_k=self._max_len,
                num_heads=w.heads.qo,
                num_heads_k=w.heads.kv,
                headdim=w.heads.dim,
                cache_seqlens=lens,
                qkv_dtype=w.k.dtype,
                cu_seqlens_q=self._cu_seqlens_q,
                page_size=self.page_size,
                causal=True,
            )

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.inputs
        out: torch.Tensor = self._attend(
            q=w.q,
            k_cache=self.pages(k),
            v_cache=self.pages(v),
            cu_seqlens_q=self._cu_seqlens_q,
            max_seqlen_q=1,
            softmax_scale=w.sm_scale,
            causal=True,
            **self._step,
            **self._options,
        )
        return out
