"""Which providers of others are here, and why the rest are not; alone imports all of them."""

from __future__ import annotations

from functools import partial

import torch

from sglang_prefix.bench.providers import fa3, fasttree, flashinfer, sglang
from sglang_prefix.bench.providers.base import Provider, ProviderMaker
from sglang_prefix.bench.run import NotRunError
from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["find_providers", "made"]

_OTHERS: tuple[type[Provider], ...] = (
    *sglang.PROVIDERS,
    *flashinfer.PROVIDERS,
    *fa3.PROVIDERS,
    *fasttree.PROVIDERS,
)


def find_providers(
    device: torch.device, host: str
) -> tuple[dict[str, ProviderMaker], dict[str, str]]:
    """Kernels of others: how to make those that are here, and why the rest are absent.

    Imports SGLang, which takes seconds, and what else there is.

    Args:
        device: where they are to run.
        host: of :data:`~sglang_prefix.bench.providers.base.HOSTS`.

    Returns:
        Providers by name; reasons by name.
    """
    makers: dict[str, ProviderMaker] = {}
    absent = dict(sglang.ABSENT)
    for provider in _OTHERS:
        if host in provider.hosts:
            reason = provider.unavailable(device)
        else:
            is_on_gpu = "cuda" in provider.hosts
            reason = "needs a GPU" if is_on_gpu else "SGLang's CPU backend; needs a run on a CPU"
        if reason is None:
            makers[provider.name] = partial(made, provider)
        else:
            absent[provider.name] = reason
    return makers, absent


def made(provider: type[Provider], inputs: AttentionInputs) -> Provider:
    """A provider, prepared for a batch.

    Raises:
        NotRunError: it cannot run such a batch; why.
    """
    if reason := provider.inapplicable(inputs):
        raise NotRunError(reason)
    return provider(inputs)
