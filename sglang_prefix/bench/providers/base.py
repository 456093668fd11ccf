"""What every provider of `bench kernel` is: an attention kernel, prepared for one batch."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch

from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["HOSTS", "PagedProvider", "Provider", "ProviderMaker", "import_reason", "load_module"]

# Where a provider can run: the CPU, Triton's interpreter on it (dry runs), a GPU.
HOSTS = ("cpu", "interpreter", "cuda")


def import_reason(*modules: str) -> str | None:
    """Why one of the modules cannot be imported here; None if all can."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # compiled packages raise what they like when they load
            return f"{module}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


class Provider(ABC):
    """An attention kernel, prepared for one batch.

    Args:
        inputs: what to attend to.

    Attributes:
        name: unique in a case.
        kind: "ours"; "stock", a decode kernel that SGLang itself would use; "peer", of another
            project; "chain", launches whose output means nothing and is not checked.
        hosts: those of :data:`HOSTS` that it can run on.
        executor: what runs it.
        policy: of ours; None for others.
        launch: of our Triton executor: "mode", "merge", and whether buffers and launches are
            "fixed", as those of a graph that serves any plan of the batch size.
        step_parts: methods that are called once per step before the layers, and timed: "plan" and
            what else there is.
        parts_alone: methods that are timed alone, after the step, and are no part of it.
        num_packs: of our plan.
        layers: of one step; None for as many as have KV of their own.
    """

    name: str
    kind: str
    hosts: ClassVar[tuple[str, ...]] = ("cuda",)
    executor: str = ""
    policy: str | None = None
    launch: Mapping[str, Any] = MappingProxyType({"mode": None, "merge": None, "fixed": None})
    step_parts: tuple[str, ...] = ("plan",)
    parts_alone: tuple[str, ...] = ()
    num_packs: int | None = None
    layers: int | None = None

    def __init__(self, inputs: AttentionInputs) -> None:
        self.inputs = inputs
        self.executor = self.executor or self.name

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        """Why it cannot be used on this host; None if it can."""
        return None

    @classmethod
    def inapplicable(cls, inputs: AttentionInputs) -> str | None:
        """Why it cannot run this batch; None if it can."""
        return None

    @property
    def kv_tokens_read(self) -> int:
        """KV tokens that it reads per layer."""
        return self.inputs.logical_tokens

    @abstractmethod
    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One layer on caches [slots, Hkv, D or Dv]; returns the output [B, Hq, Dv]."""

    def facts(self) -> dict[str, Any]:
        """What else goes into the result."""
        return {}

    def run_layers(self) -> None:
        """All layers of a step."""
        w = self.inputs
        for layer in range(self.layers or w.num_layers):
            self.run(w.k[layer % w.num_layers], w.v[layer % w.num_layers])


# Makes a provider for a batch; raises NotRunError where it cannot run such a batch.
ProviderMaker = Callable[[AttentionInputs], Provider]


class PagedProvider(Provider):
    """A kernel that reads pages through indices: [pages, page size, Hkv, D] caches."""

    modules: ClassVar[tuple[str, ...]]

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__(inputs)
        self._page_size = inputs.batch.page_size

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return import_reason(*cls.modules)

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        """Query heads, KV heads, head dim, page size, in the order that FlashInfer wants."""
        heads = self.inputs.heads
        return heads.qo, heads.kv, heads.dim, self._page_size

    def pages(self, cache: torch.Tensor) -> torch.Tensor:
        """A cache [slots, Hkv, D] as pages."""
        return cache.view(-1, self._page_size, *cache.shape[1:])

    def page_lists(self, starts: list[int], stops: list[int], requests: list[int]) -> PageLists:
        """Pages of position ranges of requests, as FlashInfer wants them."""
        size = self._page_size
        counts = [-(-(stop - start) // size) for start, stop in zip(starts, stops, strict=True)]
        indptr = torch.tensor([0, *counts]).cumsum(0).int()
        context = self.inputs.req_to_token.shape[1]
        positions = [
            torch.arange(start, stop, size) + request * context
            for start, stop, request in zip(starts, stops, requests, strict=True)
        ]
        lengths = torch.tensor(stops) - torch.tensor(starts)
        flat = torch.cat(positions).to(self.inputs.q.device)
        return PageLists(indptr, flat, ((lengths - 1) % size + 1).int())

    def page_indices(self, lists: PageLists) -> torch.Tensor:
        """[n] int32 pages, read from the slot table on the device."""
        slots = self.inputs.req_to_token.view(-1)[lists.positions]
        return slots if self._page_size == 1 else slots // self._page_size


class PageLists(NamedTuple):
    """Page counts as ``indptr``, flat positions in the slot table, tokens of the last pages."""

    indptr: torch.Tensor
    positions: torch.Tensor
    last_page_len: torch.Tensor


def load_module(name: str) -> Any:
    """A module of another project, which has no types."""
    return importlib.import_module(name)
