"""Lets SGLang's CPU engine do what it otherwise does on a GPU only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sglang_prefix.bench.hooks import patch_after_import


def allow_float32_scheme(module: ModuleType) -> None:
    """Let SGLang load KV scales into a float32 model, so that answers can be compared exactly."""
    import torch

    legal = [torch.float16, torch.bfloat16, torch.float32]
    module.CompressedTensorsConfig.get_supported_act_dtypes = classmethod(lambda cls: legal)


def pad_torch_native(module: ModuleType) -> None:
    """Give ``torch_native`` the length of padding rows that AMX has, so that it can be padded."""
    module.TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1


def do_without_cuda(module: ModuleType) -> None:
    """Replace calls that need CUDA.

    Adapters pin host memory, and releasing memory synchronises the device, whichever that is.
    """
    import torch

    def unpinned(create: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(create)
        def call(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
            return create(*args, **kwargs)

        return call

    changed: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch, name, unpinned(getattr(torch, name))) for name in ("tensor", "empty", "zeros")
    ]
    changed.append((torch.Tensor, "pin_memory", lambda self: self))
    changed.append((torch, "get_device_module", lambda device=None: torch.cpu))
    for owner, name, function in changed:
        setattr(owner, name, function)


layers = "sglang.srt.layers"
patch_after_import(
    {
        f"{layers}.quantization.compressed_tensors.compressed_tensors": allow_float32_scheme,
        f"{layers}.attention.torch_native_backend": pad_torch_native,
        "sglang.srt.managers.scheduler": do_without_cuda,
    }
)
