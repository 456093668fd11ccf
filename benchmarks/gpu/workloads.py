"""What gpu-bench measures: cells in a fixed order, the most valuable first, and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from sglang_prefix.bench.workloads.inputs import AttentionInputs
from sglang_prefix.bench.workloads.registry import Heads, load_registry
from sglang_prefix.bench.workloads.trees import Tree, shared_then_private

__all__ = ["PAT_TREES", "Cell", "Workload", "cells", "dry_cells"]

# All of PAT's trees: those that share, then the two that do not.
PAT_TREES = tuple(
    batch.tree for name in ("trees", "unrelated") for batch in load_registry(name).batches
)
# KV of one layer is laid out once per layer, so that every layer of a replay reads cold KV, within
# this many bytes and layers.
_KV_BYTES = 6 << 30
_MAX_LAYERS = 32


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table.

    Attributes:
        name: unique; "group/what/heads/page size".
        group: cells that answer one question.
        heads: of the layer.
        make_tree: the batch.
        page_size: tokens per page of the KV pool.
        is_chain: measures launches, not attention; see `chain.py`.
    """

    name: str
    group: str
    heads: Heads
    make_tree: Callable[[], Tree]
    page_size: int = 1
    is_chain: bool = False


def _cells(registry: str, heads: Heads, *names: str) -> Iterator[Cell]:
    """Batches of a registry file, all or those named, with one of their head configurations."""
    for batch in load_registry(registry).batches:
        if heads in batch.heads and (not names or batch.name in names):
            name = f"{batch.group}/{batch.name}/{heads}/page1"
            yield Cell(name, batch.group, heads, batch.make_tree)


def _first_cells() -> Iterator[Cell]:
    gqa = Heads(32, 8)
    yield from _cells("rollouts", gqa, "64x8192+256")
    yield from _cells("unrelated", gqa)
    yield from _cells("fixed", Heads(8, 1), "8x512+32")
    # Launches cost what they cost, whatever is attended to: belongs to the fixed cost.
    yield Cell("chain/32-layers/32:8/page1", "chain", gqa, _chain_tree, is_chain=True)
    yield from _cells("trees", gqa)


def _other_cells() -> Iterator[Cell]:
    gqa = Heads(32, 8)
    yield from _cells("rollouts", gqa, "16x32768+1024")
    yield from _cells("fixed", gqa)
    yield from _cells("fixed", Heads(8, 1), "1x512")
    for batch in load_registry("long").batches:
        for heads in batch.heads:
            yield from _cells("long", heads, batch.name)
    for batch in load_registry("uneven").batches:
        yield from _cells("uneven", batch.heads[0], batch.name)
    other_heads = load_registry("trees").batches[0].heads[1:]
    for heads in other_heads:
        yield from _cells("trees", heads)
    yield from _cells("chunk", Heads(32, 32))
    for heads in other_heads:
        yield from _cells("unrelated", heads)


def cells() -> list[Cell]:
    """All cells in the order in which they are measured: page size 1 first, then 16."""
    page1 = [*_first_cells(), *_other_cells()]
    page16 = [
        replace(cell, name=cell.name.replace("page1", "page16"), page_size=16)
        for cell in page1
        if not cell.is_chain
    ]
    return page1 + page16


def dry_cells() -> list[Cell]:
    """The first cell of every group and the first with pages of 16: what a dry run measures."""
    first: dict[str, Cell] = {}
    for cell in cells():
        first.setdefault("page16" if cell.page_size == 16 else cell.group, cell)
    return list(first.values())


def _chain_tree() -> Tree:
    """Not attended to as such: `chain.py` makes its own plans for a batch of this size."""
    return shared_then_private(32, 64, 16)


@dataclass(slots=True)
class Workload(AttentionInputs):
    """Tensors of a cell.

    Attributes:
        cell: what it is.
    """

    cell: Cell

    @classmethod
    def build(cls, cell: Cell, device: torch.device, seed: int, *, dry: bool) -> Workload:
        """Lay a cell out on the device; small, for a dry run."""
        tree, heads = cell.make_tree(), cell.heads
        if dry:
            tree = tree.shrunk(cell.page_size)
            heads = Heads(heads.qo // heads.kv, 1, 16, 16)
        return cls.lay_out(
            tree,
            heads,
            device,
            seed,
            dtype=torch.float32 if dry else torch.bfloat16,
            page_size=cell.page_size,
            max_layers=1 if dry else _MAX_LAYERS,
            max_kv_bytes=_KV_BYTES,
            cell=replace(cell, heads=heads),
        )
