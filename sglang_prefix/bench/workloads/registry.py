"""The one registry of workloads: the JSON files beside this one, read by all benchmarks.

A file names its source and lists batches; each is a tree in PAT's notation or an uneven forest
drawn from a seed, for some head configurations. Or it is a suite, which names batches of other
files in the order in which they are measured. Imports numpy and our forest only, so that it can be
used on a host without SGLang.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import product
from typing import TYPE_CHECKING, Any

from sglang_prefix.bench.workloads.trees import Tree, pat_tree, random_tree
from sglang_prefix.packing import AttentionShape

if TYPE_CHECKING:
    import torch

__all__ = ["Heads", "KernelCase", "load_registry", "registry_names"]

_HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of a layer: ``kv`` KV heads, ``qo`` query heads, ``dim`` and ``v_dim`` elements.

    With ``v_in_k`` v is the first elements of k, see `AttentionShape`.
    """

    qo: int
    kv: int
    dim: int = _HEAD_DIM
    v_dim: int = _HEAD_DIM
    v_in_k: bool = False

    @classmethod
    def parse(cls, text: str) -> Heads:
        """Read ``QO:KV`` or ``QO:KV:DIM``, as in ``32:8:128``; ``QO:KV:DIM:VDIM`` has v in k.

        Raises:
            ValueError: the text is malformed, or the heads do not divide.
        """
        words = text.split(":")
        good = len(words) in (2, 3, 4) and all(
            w.isascii() and w.isdigit() and len(w) < 9 for w in words
        )
        numbers = [int(word) for word in words] if good else [0]
        good = all(0 < number < 1 << 16 for number in numbers) and numbers[0] % numbers[1] == 0
        if not good or (len(numbers) == 4 and numbers[3] > numbers[2]):
            raise ValueError(
                f"--heads is {text!r}; legal: QO:KV or QO:KV:DIM, with QO a multiple of KV, as in "
                "'32:8:128', or QO:KV:DIM:VDIM where v is the first VDIM elements of k"
            )
        has_latent = len(numbers) == 4
        qo, kv, dim = (*numbers, _HEAD_DIM)[:3]
        return cls(qo, kv, dim, numbers[3] if has_latent else dim, has_latent)

    def __str__(self) -> str:
        if self.v_in_k:
            return f"{self.qo}:{self.kv}:{self.dim}:{self.v_dim}"
        return f"{self.qo}:{self.kv}" + (f":{self.dim}" if self.dim != _HEAD_DIM else "")

    @property
    def token_elements(self) -> int:
        """Elements of K and V of one token."""
        return self.kv * (self.dim + (0 if self.v_in_k else self.v_dim))

    def shape(self, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> AttentionShape:
        """The same with item sizes."""
        sizes = q_dtype.itemsize, kv_dtype.itemsize
        return AttentionShape(self.qo, self.kv, self.dim, self.v_dim, *sizes, self.v_in_k)


@dataclass(frozen=True, slots=True)
class KernelCase:
    """A batch to attend to, and the layer's heads.

    Attributes:
        group: cases that answer one question.
        batch_name: unique among the batches of a group.
        heads: of the layer.
        tree: the batch.
        notation: of the tree, PAT's; None for a forest that it cannot say.
        page_size: tokens per page of the KV pool.
        dtype: of q and of the caches; empty for what the user asks for.
        scattered: whether slots are in random order.
        variant: of dtypes and slots, where the file has several; is a part of the name.
        note: what else a reader should know; empty for nothing.
        rank: cases of a lower one are run before; of the same rank, the smaller ones.
        target: least speed-up over stock that the project promises; None for none.
        query_tokens: of each request, its newest: 1 for decode.
        is_chain: layers of launches are measured on it, not attention.
        is_of_suite: its rank is its own, and ours is measured in all its launch modes.
    """

    group: str
    batch_name: str
    heads: Heads
    tree: Tree
    notation: str | None = None
    page_size: int = 1
    dtype: str = ""
    scattered: bool = True
    variant: str = ""
    note: str = ""
    rank: int = 0
    target: float | None = None
    query_tokens: int = 1
    is_chain: bool = False
    is_of_suite: bool = False

    @property
    def name(self) -> str:
        """Unique: "group/batch/heads", and what is unusual."""
        page = f"page{self.page_size}" if self.page_size > 1 else ""
        parts = (self.group, self.batch_name, str(self.heads), page, self.variant)
        return "/".join(filter(None, parts))

    @property
    def logical_elements(self) -> int:
        """Elements of KV of all requests, each with its own: what stock kernels read."""
        return int(self.tree.seq_lens.sum()) * self.heads.token_elements


def registry_names() -> tuple[str, ...]:
    """Names of all files, without their suffix."""
    found = files(__package__).iterdir()
    return tuple(sorted(f.name.removesuffix(".json") for f in found if f.name.endswith(".json")))


@cache
def load_registry(name: str) -> tuple[KernelCase, ...]:
    """The cases of one file: each batch with each of its heads, of which the first have rank 0.

    Raises:
        ValueError: there is no such file; the message lists them.
    """
    if name not in registry_names():
        legal = ", ".join(map(repr, registry_names()))
        raise ValueError(f"workload file {name!r} is unknown; legal: {legal}")
    text = (files(__package__) / f"{name}.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return tuple(_suite(data) if "suite" in data else _cases(data, name))


def _cases(data: dict[str, Any], name: str) -> Iterator[KernelCase]:
    """The batches of a file, each with every dtype and every order of slots that the file names."""
    variants = product(data.get("slots", [""]), data["batches"], data.get("dtypes", [""]))
    for slots, batch, dtype in variants:
        notation = batch.get("tree")
        tree = pat_tree(notation) if notation else random_tree(**batch["uneven"])
        for rank, heads in enumerate(batch.get("heads", data["heads"])):
            yield KernelCase(
                batch.get("group", name),
                batch["name"],
                Heads.parse(heads),
                tree,
                notation,
                dtype=dtype,
                scattered=slots != "consecutive",
                variant="/".join(filter(None, (dtype, slots))),
                rank=rank,
                # A promise is about slots as a fresh engine hands them out.
                target=batch.get("targets", {}).get(dtype) if slots != "scattered" else None,
                query_tokens=batch.get("query_tokens", 1),
                is_chain=batch.get("chain", False),
            )


def _suite(data: dict[str, Any]) -> Iterator[KernelCase]:
    """Cases of other files in a suite's order, each once per page size."""
    found: dict[str, KernelCase] = {}
    for page_size, entry in product(data["page_sizes"], data["suite"]):
        names, heads = entry.get("names"), entry.get("heads")
        for case in load_registry(entry["file"]):
            wanted = not names or case.batch_name in names
            wanted = wanted and (not heads or str(case.heads) in heads)
            if wanted and not (case.is_chain and page_size > 1):
                case = replace(case, page_size=page_size, is_of_suite=True, rank=len(found))
                found.setdefault(case.name, case)
    yield from found.values()
