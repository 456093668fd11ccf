"""``TorchNativeAttnBackend._run_sdpa_forward_decode``: SGLang's decode attention on a CPU, alone.

Why: benchmarks compare with it layer by layer. It is a method that uses nothing of its instance,
which needs a model to build. Releases: 0.5.17 to 0.5.23.
When it is gone: the import or the first call fails, and benchmarks name the baseline as absent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["torch_native_decode"]


def torch_native_decode() -> Callable[..., None]:
    """The kernel: ``(q, out, k, v, req_to_token, req_pool_indices, seq_lens, scaling)``.

    q and out are [B, Hq, D]; k and v [slots, Hkv, D]; the rest as SGLang has them. Imports SGLang,
    which takes seconds.
    """
    with warnings.catch_warnings():  # of quantisation kernels that a CPU does not have
        warnings.simplefilter("ignore")
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    backend: Any = object.__new__(TorchNativeAttnBackend)

    def decode(
        q: torch.Tensor,
        out: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        scaling: float,
    ) -> None:
        backend._run_sdpa_forward_decode(
            q,
            out,
            k,
            v,
            req_to_token,
            req_pool_indices,
            seq_lens,
            None,
            scaling=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    return decode
