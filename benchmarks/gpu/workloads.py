"""What gpu-bench measures: cells in a fixed order, the most valuable first, and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from benchmarks.gpu.ours import Heads
from benchmarks.gpu.trees import Tree, TreeBatch, pat_tree, random_tree, shared_then_private

__all__ = ["PAT_TREES", "Cell", "Workload", "cells", "dry_cells"]

# flashserve/PAT, benchmark/run_kernel_bench.sh: 18 trees that share, then two that do not.
PAT_TREES = (
    "1,10_4096,416",
    "1,256_256,32",
    "1,1024_2048,32",
    "1,2,64_1024,256,256",
    "1,4,256_32,256,32",
    "1,8,512_32,512,256",
    "1,8,512_32,2048,256",
    "1,8,512_512,512,256",
    "1,4,8,256_32,256,256,32",
    "1,4,16,512_1024,256,128,32",
    "1,4,16,64,256,1024_256,32,256,64,32,256",
    "1,16,32,64,128,1024_256,128,64,32,32,32",
    "1,16,32,64,256,1024_256,128,64,32,32,32",
    "1,8,16,32,64,128,1024_256,128,64,32,32,32,32",
    "1,8,16,32,64,256,1024_256,128,64,32,32,32,32",
    "2,8,16,256_256,256,32,32",
    "4,16,256,512_512,32,128,32",
    "8,16,32,256_512,512,256,32",
    "256_1024",
    "256_4096",
)
_NUM_SHARING_TREES = 18
_PAT_HEADS = (Heads(32, 8), Heads(32, 32), Heads(16, 8), Heads(64, 8))
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


def _cell(group: str, what: str, heads: Heads, make_tree: Callable[[], Tree]) -> Cell:
    return Cell(f"{group}/{what}/{heads.qo}:{heads.kv}/page1", group, heads, make_tree)


def _tree_cells(group: str, heads: Heads, begin: int, end: int) -> Iterator[Cell]:
    for number, text in enumerate(PAT_TREES[begin:end], begin + 1):
        yield _cell(group, f"{number:02}_{text}", heads, lambda text=text: pat_tree(text))  # type: ignore[misc]


def _first_cells() -> Iterator[Cell]:
    gqa = Heads(32, 8)
    yield _cell("rollouts", "64x8192+256", gqa, lambda: shared_then_private(64, 8192, 256))
    yield from _tree_cells("unrelated", gqa, _NUM_SHARING_TREES, len(PAT_TREES))
    yield _cell("fixed", "8x512+32", Heads(8, 1), lambda: shared_then_private(8, 512, 32))
    # Launches cost what they cost, whatever is attended to: belongs to the fixed cost.
    yield Cell("chain/32-layers/32:8/page1", "chain", gqa, _chain_tree, is_chain=True)
    yield from _tree_cells("trees", gqa, 0, _NUM_SHARING_TREES)


def _other_cells() -> Iterator[Cell]:
    gqa = Heads(32, 8)
    yield _cell("rollouts", "16x32768+1024", gqa, lambda: shared_then_private(16, 32768, 1024))
    yield _cell("fixed", "8x512+32", gqa, lambda: shared_then_private(8, 512, 32))
    yield _cell("fixed", "1x512", Heads(8, 1), lambda: shared_then_private(1, 0, 512))
    for tokens in (32768, 131072):
        for heads in (gqa, Heads(8, 1)):
            yield _cell("long", f"1x{tokens}", heads, lambda n=tokens: shared_then_private(1, 0, n))  # type: ignore[misc]
    for seed, heads in enumerate((gqa, Heads(28, 4), Heads(40, 8), Heads(48, 8), Heads(16, 1))):
        yield _cell("uneven", f"96-requests-{seed}", heads, lambda seed=seed: _uneven(seed))  # type: ignore[misc]
    for heads in _PAT_HEADS[1:]:
        yield from _tree_cells("trees", heads, 0, _NUM_SHARING_TREES)
    for shared in (1024, 2048, 4096):
        for batch in (16, 32, 64):
            yield _cell(
                "chunk",
                f"{batch}x{shared}+64",
                Heads(32, 32),
                lambda b=batch, n=shared: shared_then_private(b, n, 64),  # type: ignore[misc]
            )
    for heads in _PAT_HEADS[1:]:
        yield from _tree_cells("unrelated", heads, _NUM_SHARING_TREES, len(PAT_TREES))


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


def _uneven(seed: int) -> Tree:
    return random_tree(seed, num_requests=96, max_tokens=4096, page_size=16, num_nodes=12)


@dataclass(slots=True)
class Workload:
    """Tensors of a cell.

    Attributes:
        cell: what it is.
        batch: slot rows and what is shared.
        q: [B, Hq, D].
        k, v: [layers, slots, Hkv, D or Dv].
        req_to_token: [B, context] int32.
        rows: [B] int64, the row of each request.
        seq_lens: [B] int64.
        out: [B, Hq, Dv].
        sm_scale: factor on the scores.
    """

    cell: Cell
    batch: TreeBatch
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    req_to_token: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor
    out: torch.Tensor
    sm_scale: float
    unique_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.unique_tokens = self.batch.forest().unique_tokens

    @classmethod
    def build(cls, cell: Cell, device: torch.device, seed: int, *, dry: bool) -> Workload:
        """Lay a cell out on the device; small, for a dry run."""
        tree, heads = cell.make_tree(), cell.heads
        if dry:
            tree = tree.shrunk(cell.page_size)
            heads = Heads(heads.qo // heads.kv, 1, 16, 16)
        cell = replace(cell, heads=heads)
        batch = TreeBatch.lay_out(tree, page_size=cell.page_size, seed=seed)
        dtype = torch.float32 if dry else torch.bfloat16
        token_bytes = heads.kv * (heads.dim + heads.v_dim) * dtype.itemsize
        layers = max(1, min(_MAX_LAYERS, _KV_BYTES // (batch.num_slots * token_bytes)))
        layers = 1 if dry else layers
        generator = torch.Generator(device).manual_seed(seed)

        def cache(dim: int) -> torch.Tensor:
            shape = (layers, batch.num_slots, heads.kv, dim)
            values = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
            values[:, : cell.page_size] = 0  # the padding page: finite, as in an engine's pool
            return values

        size = batch.batch_size
        q = torch.empty(size, heads.qo, heads.dim, dtype=dtype, device=device)
        return cls(
            cell,
            batch,
            q.normal_(generator=generator),
            cache(heads.dim),
            cache(heads.v_dim),
            torch.from_numpy(batch.table).to(device),
            torch.arange(size, device=device),
            torch.from_numpy(batch.seq_lens).to(device),
            torch.empty(size, heads.qo, heads.v_dim, dtype=dtype, device=device),
            heads.dim**-0.5,
        )

    @property
    def num_layers(self) -> int:
        """Layers with KV of their own."""
        return self.k.shape[0]

    @property
    def kv_bytes_unique(self) -> int:
        """Bytes of the batch's KV in one layer, every shared token counted once."""
        heads = self.cell.heads
        return self.unique_tokens * heads.kv * (heads.dim + heads.v_dim) * self.k.itemsize

    @property
    def floor_bytes(self) -> int:
        """The least that a layer must move: KV once, queries in, outputs out."""
        return self.kv_bytes_unique + (self.q.numel() + self.out.numel()) * self.q.itemsize

    @property
    def flop(self) -> int:
        """Operations of a layer: both products, of every request with all its KV."""
        heads = self.cell.heads
        return 2 * heads.qo * (heads.dim + heads.v_dim) * int(self.batch.seq_lens.sum())
