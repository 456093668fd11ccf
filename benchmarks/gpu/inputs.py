"""Inputs of gpu-check, the outputs that they ask for, and the comparison with the oracle.

Every slot that no request uses holds NaN in both caches, and outputs and partials are NaN before
each run, so that whatever is read or left unwritten by mistake shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from prefix_kernels.oracle import (
    KERNEL_TOLERANCES,
    RELATIVE_TOLERANCES,
    TOLERANCES,
    decode_attention_oracle,
)
from sglang_prefix.bench.output_check import relative_error
from sglang_prefix.bench.packed_attention import PackedAttention
from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import TreeBatch

__all__ = ["Inputs", "MismatchError", "Outputs"]


class MismatchError(Exception):
    """A result is not what the oracle says."""


@dataclass(slots=True)
class Outputs:
    """Output [rows, Hq, Dv] and lse [rows, Hq]."""

    out: torch.Tensor
    lse: torch.Tensor

    def poison(self) -> None:
        """Fill both with NaN."""
        self.out.fill_(torch.nan)
        self.lse.fill_(torch.nan)

    def clone(self) -> Outputs:
        """A copy."""
        return Outputs(self.out.clone(), self.lse.clone())

    def same_bits(self, other: Outputs) -> bool:
        """Whether every bit is equal."""
        return torch.equal(self.out, other.out) and torch.equal(self.lse, other.lse)


@dataclass(slots=True)
class Inputs:
    """One decode step of a batch: tensors on the device, lengths that may grow.

    Attributes:
        batch: slot rows and what is shared.
        heads: of the layer.
        q: [rows, Hq, D], rows past the batch NaN.
        k_cache, v_cache: [slots, Hkv, D or Dv].
        table: [B, context] int32.
        rows: [B] int64.
        seq_lens: [B] int64, the lengths in use.
        options: logit_cap, k_scale, v_scale where they are not the defaults.
    """

    batch: TreeBatch
    heads: Heads
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    table: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        batch: TreeBatch,
        heads: Heads,
        device: torch.device,
        seed: int,
        *,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        options: dict[str, Any] | None = None,
        num_rows: int | None = None,
        first_slot: int = 0,
    ) -> Inputs:
        """Random values for all slots that are or will be used.

        Args:
            batch, heads: what and how wide.
            device, seed: where, and of what.
            dtype, kv_dtype: of q, and of the caches where it differs.
            options: see the class.
            num_rows: rows of q, padding included.
            first_slot: added to every slot.
        """
        generator = torch.Generator(device).manual_seed(seed)
        lens = batch.seq_lens.tolist()
        used = [batch.table[b, :length] for b, length in enumerate(lens)]
        index = np.unique(np.concatenate([*used, batch.growth_slots.ravel()])) + first_slot
        slots = torch.from_numpy(index).to(device)
        stored = dtype if kv_dtype is None else kv_dtype

        def cache(dim: int) -> torch.Tensor:
            shape = (batch.num_slots + first_slot, heads.kv, dim)
            # Filled as bytes where the type has no fill of its own: all ones are NaN in e4m3 too.
            values = torch.empty(shape, dtype=stored, device=device)
            values.view(torch.uint8).fill_(0xFF)
            drawn = torch.empty(len(slots), *shape[1:], device=device).normal_(generator=generator)
            # Indexed writes do not know fp8; its bytes do.
            bits = torch.uint8 if stored.itemsize == 1 else stored
            values.view(bits)[slots] = drawn.to(stored).view(bits)
            return values

        size = batch.batch_size
        q = torch.full((num_rows or size, heads.qo, heads.dim), torch.nan, device=device)
        q[:size].normal_(generator=generator)
        table = torch.from_numpy(batch.table).to(device)
        return cls(
            batch,
            heads,
            q.to(dtype),
            cache(heads.dim),
            cache(heads.v_dim),
            torch.where(table > 0, table + first_slot, 0).int(),
            torch.arange(size, device=device),
            torch.from_numpy(batch.seq_lens).to(device),
            dict(options or {}),
        )

    @property
    def sm_scale(self) -> float:
        """Factor on the scores."""
        return float(self.heads.dim**-0.5)

    def outputs(self) -> Outputs:
        """New outputs, full of NaN."""
        shape = (*self.q.shape[:2], self.heads.v_dim)
        return Outputs(
            torch.full(shape, torch.nan, dtype=self.q.dtype, device=self.q.device),
            torch.full(shape[:2], torch.nan, device=self.q.device),
        )

    def run(self, attention: PackedAttention, outputs: Outputs) -> None:
        """Launch one layer."""
        caches = (self.k_cache, self.v_cache)
        attention.run(
            self.q, *caches, outputs.out, outputs.lse, sm_scale=self.sm_scale, **self.options
        )

    def newest_slots(self) -> torch.Tensor:
        """[B] int64, the slot of each request's newest token."""
        return self.table[self.rows, self.seq_lens - 1].long()

    def grow(self, step: int, first_slot: int = 0) -> None:
        """Give every request one more token, the ``step``-th."""
        slots = torch.from_numpy(self.batch.growth_slots[:, step] + first_slot)
        self.table[self.rows, self.seq_lens] = slots.to(self.table.device, torch.int32)
        self.seq_lens += 1

    def compare(self, outputs: Outputs) -> float:
        """The largest relative error of a head's output.

        Raises:
            MismatchError: an element, a head's norm or an lse is over its tolerance or not finite,
                or a padding row is not zero.
        """
        size = self.batch.batch_size
        expected, expected_lse = decode_attention_oracle(
            self.q[:size],
            self.k_cache,
            self.v_cache,
            self.table,
            self.rows,
            self.seq_lens,
            sm_scale=self.sm_scale,
            **self.options,
        )
        dtype = self.q.dtype
        scale = float(torch.as_tensor(self.options.get("v_scale", 1.0)).abs().max())
        found = outputs.out[:size].double() / scale
        _close("output", found, expected / scale, KERNEL_TOLERANCES[dtype])
        _close("lse", outputs.lse[:size].double(), expected_lse, TOLERANCES[torch.float32])
        error = relative_error(outputs.out[:size], expected)
        if not error <= RELATIVE_TOLERANCES[dtype]:
            raise MismatchError(f"a head is off by {error} of its norm")
        padding = outputs.out[size:], outputs.lse[size:]
        if not ((padding[0] == 0).all() and (padding[1] == -torch.inf).all()):
            raise MismatchError("a padding row is not zero")
        return error


def _close(
    what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: tuple[float, float]
) -> None:
    relative, absolute = tolerance
    try:
        torch.testing.assert_close(found, expected, rtol=relative, atol=absolute)
    except AssertionError as error:
        raise MismatchError(f"{what}: {' '.join(str(error).split())}") from None
