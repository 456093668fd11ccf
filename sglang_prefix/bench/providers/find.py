"""Which providers of others are here, and why the rest are not; alone imports all of them."""

from __future__ import annotations

from sglang_prefix.bench.providers.base import Provider, ProviderMaker
from sglang_prefix.bench.providers.fa3 import FlashAttention3
from sglang_prefix.bench.providers.fasttree import FastTree
from sglang_prefix.bench.providers.flashinfer import FlashInferCascade, FlashInferDecode
from sglang_prefix.bench.providers.sglang import SglangTorchNative, SglangTriton
from sglang_prefix.bench.providers.sglang_cpu import SglangIntelAmx, VllmSglangCopy
from sglang_prefix.bench.providers.vllm import VllmCpu

__all__ = ["find_providers"]

_OTHERS: tuple[type[Provider], ...] = (
    *(SglangTorchNative, SglangIntelAmx, SglangTriton, VllmCpu, VllmSglangCopy),
    *(FlashInferDecode, FlashInferCascade, FlashAttention3, FastTree),
)


def find_providers(host: str) -> tuple[dict[str, ProviderMaker], dict[str, str]]:
    """Kernels of others: how to make those that are here, and why the rest are absent.

    Imports SGLang, which takes seconds, and what else there is.

    Args:
        host: of those that a provider names.

    Returns:
        Providers by name; reasons by name.
    """
    makers: dict[str, ProviderMaker] = {}
    absent: dict[str, str] = {}
    for provider in _OTHERS:
        elsewhere = "needs a GPU" if "cuda" in provider.hosts else "needs a run on a CPU"
        reason = provider.unavailable() if host in provider.hosts else elsewhere
        if reason is None:
            makers[provider.name] = provider
        else:
            absent[provider.name] = reason
    return makers, absent
