"""The one registry of workloads: JSON files in ``workloads/``, read by all benchmarks.

A file names its source and lists batches; each is a tree in PAT's notation or an uneven forest
drawn from a seed, for some head configurations. Imports numpy and our forest only, so that the GPU
benchmarks can use it on a host without SGLang.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
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
    """

    name: str
    group: str
    heads: tuple[Heads, ...]
    tree: str | None = None
    uneven: Mapping[str, int] | None = None

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
    """

    name: str
    about: str
    source: str
    batches: tuple[WorkloadSpec, ...]


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
    batches = tuple(
        WorkloadSpec(
            batch["name"],
            batch.get("group", name),
            tuple(Heads.parse(heads) for heads in batch.get("heads", data["heads"])),
            batch.get("tree"),
            batch.get("uneven"),
        )
        for batch in data["batches"]
    )
    return RegistryFile(name, data["about"], data["source"], batches)
