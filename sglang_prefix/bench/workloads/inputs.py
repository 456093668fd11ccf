"""Tensors of one step, the outputs that they ask for, and the comparison with the oracle.

The one set of inputs of all kernel benchmarks, of the GPU checks and of tests: a tree laid out on
a KV pool, with random queries and caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.executor import AttentionParams, PlanExecutor
from prefix_kernels.oracle import (
    KERNEL_TOLERANCES,
    RELATIVE_TOLERANCES,
    TOLERANCES,
    decode_attention_oracle,
)
from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import Tree, TreeBatch

__all__ = ["AttentionInputs", "MismatchError", "OutputCheck", "Outputs", "relative_error"]

# Slots whose values are drawn at once, in float32.
_DRAWN_SLOTS = 1 << 16
_CHECKED_QUERIES = 8


class MismatchError(Exception):
    """A result is not what the oracle says."""


@dataclass(slots=True)
class Outputs:
    """Output [padded R, Hq, Dv] and lse [padded R, Hq] float32."""

    out: torch.Tensor
    lse: torch.Tensor

    def poison(self) -> None:
        """Fill both with NaN, so that what is left unwritten shows."""
        self.out.fill_(torch.nan)
        self.lse.fill_(torch.nan)

    def clone(self) -> Outputs:
        """A copy."""
        return Outputs(self.out.clone(), self.lse.clone())

    def same_bits(self, other: Outputs) -> bool:
        """Whether every bit is equal."""
        return torch.equal(self.out, other.out) and torch.equal(self.lse, other.lse)


@dataclass(slots=True)
class AttentionInputs:
    """What a decode attention kernel is given; :meth:`grow` makes the next step of it.

    Attributes:
        heads: of the layers.
        batch: slot rows and what is shared.
        q: [padded R, Hq, D], a row per query, request after request; those past the batch hold NaN.
        k, v: [layers, slots, Hkv, D or Dv]; v may be a view of k, as the heads say.
        req_to_token: [B, context] int32.
        req_pool_indices: [B] int64, the row of each request.
        seq_lens: [B] int64, lengths in use.
        out: [padded R, Hq, Dv], for whoever needs no lse.
        query_lens: [B] query tokens of each request, its newest; None for one each.
        options: logit_cap, k_scale, v_scale, sinks where they are not the defaults.
        unique_tokens: KV tokens of the batch with every shared one counted once.
    """

    heads: Heads
    batch: TreeBatch
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    req_to_token: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    out: torch.Tensor
    query_lens: NDArray[np.int64] | None = None
    options: dict[str, Any] = field(default_factory=dict)
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
        kv_dtype: torch.dtype | None = None,
        padded_batch_size: int | None = None,
        query_tokens: int = 1,
        max_layers: int = 1,
        max_kv_bytes: int = 0,
        poison: bool = False,
        options: Mapping[str, Any] | None = None,
        **layout: Any,
    ) -> Self:
        """Lay a tree out on the device, with random values in all slots that are or will be used.

        Args:
            tree: what is shared.
            heads, device, seed: how wide, where, and of what.
            dtype, kv_dtype: of q and the outputs, and of the caches where it differs.
            padded_batch_size: rows of q and of the outputs; None for no padding.
            query_tokens: of each request, or as many as it has tokens.
            max_layers: layers with KV of their own, as many as ``max_kv_bytes`` hold, at least 1.
            max_kv_bytes: bytes of the caches of all layers.
            poison: all other slots hold NaN, so that what is read by mistake shows; else zeros, as
                in an engine's pool, where kernels of others read and mask the padding slot.
            options: see the class.
            layout: of :meth:`TreeBatch.lay_out`.
        """
        batch = TreeBatch.lay_out(tree, seed=seed, **layout)
        kv_dtype = dtype if kv_dtype is None else kv_dtype
        token_bytes = heads.token_elements * kv_dtype.itemsize
        layers = max(1, min(max_layers, max_kv_bytes // (batch.num_slots * token_bytes)))
        generator = torch.Generator(device).manual_seed(seed)
        slots = torch.from_numpy(batch.used_slots()).to(device)

        def cache(dim: int) -> torch.Tensor:
            shape = (layers, batch.num_slots, heads.kv, dim)
            values = torch.empty(shape, dtype=kv_dtype, device=device)
            # As bytes, since fp8 has no fill; all ones are NaN in every type.
            values.view(torch.uint8).fill_(0xFF if poison else 0)
            # Indexed writes do not know fp8; its bytes do.
            bits = values.view(torch.uint8 if kv_dtype.itemsize == 1 else kv_dtype)
            for layer in bits:
                for some in torch.split(slots, _DRAWN_SLOTS):
                    drawn = torch.empty(len(some), *shape[2:], device=device)
                    drawn.normal_(generator=generator)
                    layer[some] = drawn.to(kv_dtype).view(bits.dtype)
            return values

        size, query_lens = batch.batch_size, np.minimum(batch.seq_lens, query_tokens)
        num_queries = int(query_lens.sum())
        rows = padded_batch_size or num_queries
        q = torch.full((rows, heads.qo, heads.dim), torch.nan, device=device)
        q[:num_queries].normal_(generator=generator)
        k = cache(heads.dim)
        return cls(
            heads=heads,
            batch=batch,
            q=q.to(dtype),
            k=k,
            v=k[..., : heads.v_dim] if heads.v_in_k else cache(heads.v_dim),
            req_to_token=torch.from_numpy(batch.table).to(device),
            req_pool_indices=torch.arange(size, device=device),
            seq_lens=torch.from_numpy(batch.seq_lens).to(device),
            out=torch.empty(rows, heads.qo, heads.v_dim, dtype=dtype, device=device),
            query_lens=query_lens if query_tokens > 1 else None,
            options=dict(options or {}),
        )

    @property
    def sm_scale(self) -> float:
        """Factor on the scores."""
        return float(self.heads.dim**-0.5)

    @property
    def num_layers(self) -> int:
        """Layers with KV of their own."""
        return self.k.shape[0]

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return self.heads.token_elements * self.k.itemsize

    @property
    def logical_tokens(self) -> int:
        """KV tokens of all requests, each with its own: what stock kernels read."""
        return int(self.batch.seq_lens.sum())

    @property
    def num_queries(self) -> int:
        """Rows of q that are not padding."""
        return int(self.counts.sum())

    @property
    def counts(self) -> NDArray[np.int64]:
        """[B] query tokens of each request."""
        lens = self.query_lens
        return np.ones(self.batch.batch_size, dtype=np.int64) if lens is None else lens

    @property
    def flop(self) -> int:
        """Operations of a layer: both products, of every query with all the KV that it sees."""
        heads, counts = self.heads, self.counts
        pairs = counts * self.batch.seq_lens - counts * (counts - 1) // 2
        return 2 * heads.qo * (heads.dim + heads.v_dim) * int(pairs.sum())

    @property
    def params(self) -> AttentionParams:
        """What an executor's ``run`` is given beside tensors."""
        return AttentionParams(self.sm_scale, **self.options)

    def run(self, executor: PlanExecutor, outputs: Outputs) -> None:
        """Launch the first layer."""
        caches = self.k[0], self.v[0]
        executor.run(self.q, *caches, outputs.out, outputs.lse, self.params)

    def outputs(self) -> Outputs:
        """New outputs, full of NaN."""
        shape = (*self.q.shape[:2], self.heads.v_dim)
        return Outputs(
            torch.full(shape, torch.nan, dtype=self.q.dtype, device=self.q.device),
            torch.full(shape[:2], torch.nan, device=self.q.device),
        )

    def newest_slots(self) -> torch.Tensor:
        """[R] int64, the slots of each request's query tokens."""
        request, sees = self._what_queries_see()
        return self.req_to_token[self.req_pool_indices[request], sees - 1].long()

    def _what_queries_see(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[R] int64 the request of each query, and the tokens up to its own."""
        counts = torch.from_numpy(self.counts)
        request = torch.repeat_interleave(torch.arange(len(counts)), counts)
        behind = counts.cumsum(0)[request] - 1 - torch.arange(len(request))
        request = request.to(self.seq_lens.device)
        return request, self.seq_lens[request] - behind.to(self.seq_lens.device)

    def grow(self, step: int) -> None:
        """Give every request one more token, the ``step``-th of the batch's growth."""
        slots = torch.from_numpy(self.batch.growth_slots[:, step])
        device = self.req_to_token.device
        self.req_to_token[self.req_pool_indices, self.seq_lens] = slots.to(device, torch.int32)
        self.seq_lens += 1

    def oracle(self, queries: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [n, Hq, Dv] and natural-log lse [n, Hq] of the first layer, float64.

        Args:
            queries: [n] int64, rows of q; None for all.
        """
        some = torch.arange(self.num_queries, device=self.q.device)
        some = some if queries is None else queries
        request, sees = (each[some] for each in self._what_queries_see())
        return decode_attention_oracle(
            self.q[some],
            self.k[0],
            self.v[0],
            self.req_to_token,
            self.req_pool_indices[request],
            sees,
            sm_scale=self.sm_scale,
            **self.options,
        )

    def compare(self, outputs: Outputs) -> float:
        """The largest relative error of a head's output, all queries against the oracle.

        Raises:
            MismatchError: an element, a head's norm or an lse is over its tolerance or not finite,
                or a padding row is not zero with an lse of minus infinity.
        """
        size = self.num_queries
        expected, expected_lse = self.oracle()
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


class OutputCheck:
    """The check before every timing: outputs of the first layer, of one provider after another.

    The oracle is slow, so it sees a few queries: the first, the last, one of the longest and one of
    the shortest request, and some drawn from the seed. The others are compared with the first
    output that the oracle accepted.

    Args:
        inputs: of the layer.
        seed: decides which queries the oracle sees.
    """

    def __init__(self, inputs: AttentionInputs, seed: int) -> None:
        size, lens = inputs.num_queries, inputs.batch.seq_lens
        extremes = (np.cumsum(inputs.counts) - 1)[[lens.argmax(), lens.argmin()]]
        drawn = np.random.default_rng(seed).permutation(size)[:_CHECKED_QUERIES]
        some = np.unique([0, size - 1, *extremes, *drawn])
        self._some = torch.from_numpy(some).to(inputs.q.device)
        self._expected, _ = inputs.oracle(self._some)
        self._all: torch.Tensor | None = None

    def __call__(self, out: torch.Tensor) -> float:
        """The largest absolute error of an element, over the queries that the oracle sees.

        Args:
            out: [R, Hq, Dv].

        Raises:
            MismatchError: the relative error of a head is over the tolerance, or an output is not
                finite.
        """
        tolerance = RELATIVE_TOLERANCES[out.dtype]
        error = relative_error(out[self._some], self._expected)
        if not error <= tolerance:
            raise MismatchError(f"off by {error}, more than {tolerance}")
        if self._all is None:
            if not out.isfinite().all():
                raise MismatchError("a query's output is not finite")
            self._all = out.clone()
        among = relative_error(out, self._all.double())
        if not among <= 2 * tolerance:
            raise MismatchError(f"off by {among} from another provider, more than {2 * tolerance}")
        return float((out[self._some].double() - self._expected).abs().max())


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest over [B, Hq] of the norm of the error over the norm of the output; NaN passes on."""
    error = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float("nan") if error.isnan().any() else float(error.max())


def _close(
    what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: tuple[float, float]
) -> None:
    relative, absolute = tolerance
    try:
        torch.testing.assert_close(found, expected, rtol=relative, atol=absolute)
    except AssertionError as error:
        raise MismatchError(f"{what}: {' '.join(str(error).split())}") from None
