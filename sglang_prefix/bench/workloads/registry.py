"""The one registry of workloads: JSON files in ``workloads/``, read by all benchmarks.

A file names its source and lists batches; each is a tree in PAT's notation or an uneven forest
drawn from a seed, for some head configurations. Or it is a suite, which names batches of other
files in the order in which they are measured. Imports numpy and our forest only, so that it can be
used on a host without SGLang.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import product
from typing import TYPE_CHECKING, Any

from sglang_prefix.bench.workloads.trees import Tree, pat_tree, random_tree
from sglang_prefix.packing import AttentionShape

if TYPE_CHECKING:
    import torch

__all__ = ["Heads", "RegistryFile", "WorkloadSpec", "load_registry", "registry_names"]

_HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of a layer: ``kv`` KV heads, ``qo`` query heads, ``dim`` and ``v_dim`` elements."""

    qo: int
    kv: int
    dim: int = _HEAD_DIM
    v_dim: int = _HEAD_DIM

    @classmethod
    def parse(cls, text: str) -> Heads:
        """Read ``QO:KV`` or ``QO:KV:DIM``, as in ``32:8:128``.

        Raises:
            ValueError: the text is malformed, or the heads do not divide.
        """
        words = text.split(":")
        good = len(words) in (2, 3) and all(w.isascii() and w.isdigit() for w in words)
        numbers = [int(word) for word in words] if good else [0]
        if not all(0 < number < 1 << 16 for number in numbers) or numbers[0] % numbers[1]:
            raise ValueError(
                f"heads {text!r}; legal: QO:KV or QO:KV:DIM, with QO a multiple of KV, as in "
                "'32:8:128'"
            )
        dim = numbers[2] if len(numbers) > 2 else _HEAD_DIM
        return cls(numbers[0], numbers[1], dim, dim)

    def __str__(self) -> str:
        return f"{self.qo}:{self.kv}" + (f":{self.dim}" if self.dim != _HEAD_DIM else "")

    def shape(self, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> AttentionShape:
        """The same with item sizes."""
        return AttentionShape(
            self.qo, self.kv, self.dim, self.v_dim, q_dtype.itemsize, kv_dtype.itemsize
        )


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """A batch of the registry.

    Attributes:
        name: unique in its file.
        group: batches that answer one question.
        heads: configurations to run it with.
        tree: PAT's notation; None for a forest that it cannot say.
        uneven: arguments of :func:`random_tree`; None where there is a tree.
        dtype: of q and of the caches; None for what the user asks for.
        slots: "scattered" or "consecutive"; None for the usual, scattered.
        target: least speed-up over stock that the project promises; None for none.
        page_size: tokens per page; None for what the user asks for.
        is_chain: layers of launches are measured on it, not attention.
    """

    name: str
    group: str
    heads: tuple[Heads, ...]
    tree: str | None = None
    uneven: Mapping[str, int] | None = None
    dtype: str | None = None
    slots: str | None = None
    target: float | None = None
    page_size: int | None = None
    is_chain: bool = False

    def make_tree(self) -> Tree:
        """The batch as a tree."""
        if self.uneven is not None:
            return random_tree(**self.uneven)
        assert self.tree is not None
        return pat_tree(self.tree)


@dataclass(frozen=True, slots=True)
class RegistryFile:
    """One file of the registry.

    Attributes:
        name: of the file, without its suffix.
        about, source: what it holds, and where that comes from.
        batches: in order.
        is_suite: the order is that in which batches are measured, and ours is measured in all its
            launch modes.
    """

    name: str
    about: str
    source: str
    batches: tuple[WorkloadSpec, ...]
    is_suite: bool = False


def registry_names() -> tuple[str, ...]:
    """Names of all files."""
    found = files(__package__).iterdir()
    return tuple(sorted(f.name.removesuffix(".json") for f in found if f.name.endswith(".json")))


@cache
def load_registry(name: str) -> RegistryFile:
    """Read one file.

    Raises:
        ValueError: there is no such file; the message lists them.
    """
    if name not in registry_names():
        legal = ", ".join(map(repr, registry_names()))
        raise ValueError(f"workload file {name!r} is unknown; legal: {legal}")
    text = (files(__package__) / f"{name}.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    is_suite = "suite" in data
    batches = _suite(data) if is_suite else _batches(data, name)
    return RegistryFile(name, data["about"], data["source"], tuple(batches), is_suite)


def _batches(data: dict[str, Any], name: str) -> Iterator[WorkloadSpec]:
    """The batches of a file, each with every dtype and every order of slots that the file names."""
    for slots, batch in product(data.get("slots", [None]), data["batches"]):
        for dtype in data.get("dtypes", [None]):
            yield WorkloadSpec(
                batch["name"],
                batch.get("group", name),
                tuple(Heads.parse(heads) for heads in batch.get("heads", data["heads"])),
                batch.get("tree"),
                batch.get("uneven"),
                dtype,
                slots,
                # A promise is about slots as a fresh engine hands them out.
                batch.get("targets", {}).get(dtype) if slots != "scattered" else None,
                is_chain=batch.get("chain", False),
            )


def _suite(data: dict[str, Any]) -> Iterator[WorkloadSpec]:
    """Batches of other files in a suite's order, each once per page size."""
    for page_size in data["page_sizes"]:
        seen = set()
        for entry in data["suite"]:
            for batch in load_registry(entry["file"]).batches:
                if batch.name not in entry.get("names", [batch.name]):
                    continue
                for heads in batch.heads:
                    key = (batch.group, batch.name, heads)
                    wanted = str(heads) in entry.get("heads", [str(heads)])
                    if not wanted or key in seen or (batch.is_chain and page_size > 1):
                        continue
                    seen.add(key)
                    yield replace(batch, heads=(heads,), page_size=page_size)
