"""What every provider of `bench kernel` is: an attention kernel, prepared for one batch."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from sglang_prefix.bench.run import NotRunError
from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["Provider", "ProviderMaker", "check_memory", "import_reason"]

# Of the host's free memory, what one thing may take: the rest is for whoever works on it.
_MEMORY_SHARE = 0.75


def import_reason(*modules: str) -> str | None:
    """Why one of the modules cannot be imported here; None if all can."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # compiled packages raise what they like when they load
            return f"{module}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def check_memory(num_bytes: int, what: str) -> None:
    """Refuse what the host has no memory for: there an allocation succeeds, and a process dies.

    Raises:
        NotRunError: ``what`` needs more than is free, with a margin.
    """
    import psutil  # type: ignore[import-untyped]

    free = psutil.virtual_memory().available
    if num_bytes > _MEMORY_SHARE * free:
        raise NotRunError(
            f"{what} takes {num_bytes >> 20} MiB, over {_MEMORY_SHARE:.0%} of the {free >> 20} MiB "
            "that are free"
        )


class Provider(ABC):
    """An attention kernel, prepared for one batch.

    Args:
        inputs: what to attend to.

    Raises:
        NotRunError: it cannot run such a batch.

    Attributes:
        name: of the ones of others.
        kind: "ours"; "stock", a decode kernel that SGLang itself would use; "peer", of another
            project; "chain", launches whose output means nothing and is not checked.
        hosts: where it can run: "cpu", "interpreter" (Triton's, in dry runs), "cuda".
        modules: what it imports.
        executor: what runs it; empty for one of its own.
        takes_latents: whether v may be in k.
        takes_queries: whether a request may have several query tokens.
        step_parts: methods that are called once per step before the layers, and timed.
        parts_alone: methods that are timed alone, after the step, and are no part of it.
        facts: what the result says of ours: "policy", "mode" and "merge" of our executors,
            "packs" of the plan.
        layers: of one step; None for as many as have KV of their own.
        kv_tokens_read: per layer.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    hosts: ClassVar[tuple[str, ...]] = ("cuda",)
    modules: ClassVar[tuple[str, ...]] = ()
    executor: ClassVar[str] = ""
    takes_latents: ClassVar[bool] = False
    takes_queries: ClassVar[bool] = False
    step_parts: ClassVar[Sequence[str]] = ("plan",)
    parts_alone: ClassVar[Sequence[str]] = ()
    layers: int | None = None

    def __init__(self, inputs: AttentionInputs) -> None:
        if inputs.heads.v_in_k and not self.takes_latents:
            raise NotRunError("it reads a V of its own")
        if inputs.query_lens is not None and not self.takes_queries:
            raise NotRunError("it takes one query token of a request")
        self.inputs = inputs
        self.page_size = inputs.batch.page_size
        self.kv_tokens_read = inputs.logical_tokens
        self.facts: dict[str, Any] = dict.fromkeys(("policy", "mode", "merge", "packs"))

    @classmethod
    def unavailable(cls) -> str | None:
        """Why it cannot be used on this host; None if it can."""
        return import_reason(*cls.modules)

    @abstractmethod
    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One layer on caches [slots, Hkv, D or Dv]; returns the output [R, Hq, Dv]."""

    def run_layers(self) -> None:
        """All layers of a step."""
        w = self.inputs
        for layer in range(self.layers or w.num_layers):
            self.run(w.k[layer % w.num_layers], w.v[layer % w.num_layers])

    def pages(self, cache: torch.Tensor) -> torch.Tensor:
        """A cache [slots, Hkv, D] as [pages, page size, Hkv, D]."""
        return cache.view(-1, self.page_size, *cache.shape[1:])

    def page_numbers(self, slots: torch.Tensor) -> torch.Tensor:
        """Of slots, each the first of its page, on the device."""
        return slots if self.page_size == 1 else slots // self.page_size


# Makes a provider for a batch; raises NotRunError where it cannot run such a batch.
ProviderMaker = Callable[[AttentionInputs], Provider]
