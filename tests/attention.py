"""Inputs and the one comparison for everything that attends: against the float64 oracle.

Every slot that no request uses holds NaN in both caches, and outputs are handed over full of NaN,
so that whatever is read or left unwritten by mistake shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.oracle import KERNEL_TOLERANCES, TOLERANCES, decode_attention_oracle
from tests.forests import Batch

__all__ = ["KERNEL_TOLERANCES", "TOLERANCES", "AttentionCase", "assert_close", "make_case"]

IntArray = NDArray[np.int64]


@dataclass(slots=True)
class AttentionCase:
    """One decode step's tensors: q [B, Hq, D], caches [slots, Hkv, D or Dv], the slot table."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    req_to_token: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    sm_scale: float
    options: dict[str, Any] = field(default_factory=dict)

    def oracle(self, seq_lens: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the outputs mean at these lengths (those of the case without)."""
        return decode_attention_oracle(
            self.q,
            self.k_cache,
            self.v_cache,
            self.req_to_token,
            self.req_pool_indices,
            self.seq_lens if seq_lens is None else seq_lens,
            sm_scale=self.sm_scale,
            **self.options,
        )

    def poisoned_outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, Hq, Dv] and lse [B, Hq] full of NaN."""
        shape = (*self.q.shape[:2], self.v_cache.shape[2])
        return (
            torch.full(shape, torch.nan, dtype=self.q.dtype),
            torch.full(shape[:2], torch.nan),
        )


def make_case(
    batch: Batch,
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    v_head_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> AttentionCase:
    """Random tensors over a batch; growth slots hold values too, all other unused slots NaN."""
    generator = torch.Generator().manual_seed(seed)
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    used = np.unique(
        np.concatenate(
            [row[:n] for row, n in zip(batch.rows, batch.seq_lens, strict=True)]
            + [batch.growth_slots.ravel()]
        )
    )

    def cache(dim: int) -> torch.Tensor:
        values = torch.full((batch.num_slots, num_kv_heads, dim), torch.nan)
        values[used] = torch.randn(len(used), num_kv_heads, dim, generator=generator)
        return values.to(kv_dtype)

    num_requests = len(batch.seq_lens)
    q = torch.randn(num_requests, num_kv_heads * group, head_dim, generator=generator)
    return AttentionCase(
        q.to(dtype),
        cache(head_dim),
        cache(head_dim if v_head_dim is None else v_head_dim),
        torch.from_numpy(batch.req_to_token.copy()),
        torch.from_numpy(batch.req_pool_indices.copy()),
        torch.from_numpy(batch.seq_lens.copy()),
        head_dim**-0.5,
        dict(options or {}),
    )


def assert_close(
    found: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
    tolerances: Mapping[torch.dtype, tuple[float, float]] = TOLERANCES,
) -> None:
    """Every element of output and lse, and no NaN anywhere."""
    (out, lse), (expected_out, expected_lse) = found, expected
    relative, absolute = tolerances[out.dtype]
    torch.testing.assert_close(out.double(), expected_out, rtol=relative, atol=absolute)
    relative, absolute = TOLERANCES[torch.float32]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=relative, atol=absolute)
