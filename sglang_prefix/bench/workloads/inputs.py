"""Tensors of one decode step: a tree laid out on a KV pool, with random queries and caches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import torch

from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import Tree, TreeBatch

__all__ = ["AttentionInputs"]


@dataclass(slots=True)
class AttentionInputs:
    """What a decode attention kernel is given.

    Attributes:
        heads: of the layers.
        batch: slot rows and what is shared.
        q: [B, Hq, D].
        k, v: [layers, slots, Hkv, D or Dv].
        req_to_token: [B, context] int32.
        rows: [B] int64, the row of each request.
        seq_lens: [B] int64.
        out: [B, Hq, Dv].
        sm_scale: factor on the scores.
        unique_tokens: KV tokens of the batch with every shared one counted once.
    """

    heads: Heads
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
    def lay_out(
        cls,
        tree: Tree,
        heads: Heads,
        device: torch.device,
        seed: int,
        *,
        dtype: torch.dtype,
        page_size: int,
        max_layers: int = 1,
        max_kv_bytes: int = 0,
        **more: Any,
    ) -> Self:
        """Lay a tree out on the device.

        Args:
            tree, heads: what and how wide.
            device, seed: where, and of what.
            dtype: of q and of the caches.
            page_size: tokens per page of the pool; pages are in random order.
            max_layers: layers with KV of their own, as many as ``max_kv_bytes`` hold, at least 1.
            max_kv_bytes: bytes of the caches of all layers.
            more: fields of a subclass.
        """
        batch = TreeBatch.lay_out(tree, page_size=page_size, seed=seed)
        token_bytes = heads.kv * (heads.dim + heads.v_dim) * dtype.itemsize
        layers = max(1, min(max_layers, max_kv_bytes // (batch.num_slots * token_bytes)))
        generator = torch.Generator(device).manual_seed(seed)

        def cache(dim: int) -> torch.Tensor:
            shape = (layers, batch.num_slots, heads.kv, dim)
            values = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
            values[:, :page_size] = 0  # the padding page: finite, as in an engine's pool
            return values

        size = batch.batch_size
        q = torch.empty(size, heads.qo, heads.dim, dtype=dtype, device=device)
        return cls(
            heads=heads,
            batch=batch,
            q=q.normal_(generator=generator),
            k=cache(heads.dim),
            v=cache(heads.v_dim),
            req_to_token=torch.from_numpy(batch.table).to(device),
            rows=torch.arange(size, device=device),
            seq_lens=torch.from_numpy(batch.seq_lens).to(device),
            out=torch.empty(size, heads.qo, heads.v_dim, dtype=dtype, device=device),
            sm_scale=heads.dim**-0.5,
            **more,
        )

    @property
    def num_layers(self) -> int:
        """Layers with KV of their own."""
        return self.k.shape[0]

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return self.heads.kv * (self.heads.dim + self.heads.v_dim) * self.k.itemsize

    @property
    def logical_tokens(self) -> int:
        """KV tokens of all requests, each with its own: what stock kernels read."""
        return int(self.batch.seq_lens.sum())

    @property
    def kv_bytes_unique(self) -> int:
        """Bytes of the batch's KV in one layer, every shared token counted once."""
        return self.unique_tokens * self.token_bytes

    @property
    def floor_bytes(self) -> int:
        """The least that a layer must move: KV once, queries in, outputs out."""
        return self.kv_bytes_unique + (self.q.numel() + self.out.numel()) * self.q.itemsize

    @property
    def flop(self) -> int:
        """Operations of a layer: both products, of every request with all its KV."""
        heads = self.heads
        return 2 * heads.qo * (heads.dim + heads.v_dim) * self.logical_tokens
