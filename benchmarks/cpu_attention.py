"""Decode attention on the CPU: our executor against SGLang's ``TorchNativeAttnBackend``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.timing import interleaved, medians
from prefix_kernels.oracle import decode_attention_oracle
from prefix_patches.stock_backend import torch_native_decode
from sglang_prefix import PrefixDecodeWrapper

__all__ = ["CASES", "AttentionCase", "measure_attention"]

HEADS = {"num_qo_heads": 32, "num_kv_heads": 8, "head_dim": 128}
POLICIES = ("pat", "node", "chunk", "query")
# Against the float64 oracle, on outputs of order one: rounding of the output's own dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """A batch with one shared prefix.

    Attributes:
        batch, shared, private: requests, tokens that all share, tokens that each has alone.
        dtype: of q and of the cache.
        scattered: slots in random order instead of consecutive.
        target: smallest speed-up over stock that the project promises; None for none.
    """

    batch: int
    shared: int
    private: int
    dtype: torch.dtype
    scattered: bool
    target: float | None


def _cases() -> list[AttentionCase]:
    bf16, fp32 = torch.bfloat16, torch.float32
    targets: dict[tuple[int, int, int, torch.dtype], float | None] = {
        (32, 2048, 128, bf16): 15.0,
        (32, 2048, 128, fp32): 4.0,
        (16, 512, 64, bf16): 5.0,
        (16, 512, 64, fp32): None,
        (8, 0, 1024, bf16): 0.95,
        (8, 0, 1024, fp32): 0.95,
    }
    return [
        AttentionCase(*shape, scattered, None if scattered else target)
        for scattered in (False, True)
        for shape, target in targets.items()
    ]


CASES = _cases()


def measure_attention(case: AttentionCase, rounds: int, seed: int) -> dict[str, Any]:
    """Check one case against the oracle, then time stock and every policy, interleaved."""
    batch = _Batch(case, seed)
    candidates: dict[str, Callable[[], object]] = {"stock": batch.run_stock}
    batch.run_stock()
    batch.check("stock", case)
    stats = {}
    for policy in POLICIES:
        wrapper = PrefixDecodeWrapper(*HEADS.values(), policy=policy, dtype=case.dtype)
        wrapper.plan(batch.table, batch.rows, batch.lengths)
        batch.run(wrapper)
        batch.check(policy, case)
        candidates[policy] = lambda wrapper=wrapper: batch.run(wrapper)  # type: ignore[misc]
        stats[policy] = asdict(wrapper.stats)
    seconds = interleaved(candidates, rounds)
    middle = medians(seconds)
    return {
        **asdict(case),
        "dtype": str(case.dtype).removeprefix("torch."),
        **HEADS,
        "median_ms": {name: value * 1e3 for name, value in middle.items()},
        "speedup_over_stock": middle["stock"] / middle["pat"],
        "speedup_over_query": middle["query"] / middle["pat"],
        "stats": stats,
        "seconds": seconds,
    }


class _Batch:
    """Tensors of one case, and the stock kernel on them."""

    def __init__(self, case: AttentionCase, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_slots = case.shared + case.batch * case.private + 1
        slots = np.arange(1, num_slots)  # slot 0 is SGLang's padding slot
        if case.scattered:
            slots = np.random.default_rng(seed).permutation(slots)
        shared, private = np.split(slots, [case.shared])
        table = np.concatenate(
            (np.tile(shared, (case.batch, 1)), private.reshape(case.batch, case.private)), axis=1
        )
        self.table = torch.from_numpy(table.astype(np.int32))
        self.rows = torch.arange(case.batch)
        self.lengths = torch.full((case.batch,), case.shared + case.private)
        heads, kv_heads, dim = HEADS.values()
        shape = (num_slots, kv_heads, dim)
        self.q = torch.randn(case.batch, heads, dim, generator=generator).to(case.dtype)
        self.k = torch.randn(shape, generator=generator).to(case.dtype)
        self.v = torch.randn(shape, generator=generator).to(case.dtype)
        self.out = torch.empty_like(self.q)
        self._stock = torch_native_decode()
        self.expected, _ = decode_attention_oracle(
            self.q, self.k, self.v, self.table, self.rows, self.lengths, sm_scale=dim**-0.5
        )

    def check(self, name: str, case: AttentionCase) -> None:
        error = (self.out.double() - self.expected).abs().max().item()
        self.out.fill_(torch.nan)
        if not error <= TOLERANCE[case.dtype]:
            raise RuntimeError(f"{name} is off by {error} on {case}: not timed")

    def run(self, wrapper: PrefixDecodeWrapper) -> torch.Tensor:
        out = wrapper.run(self.q, self.k, self.v, out=self.out)
        assert isinstance(out, torch.Tensor)
        return out

    def run_stock(self) -> None:
        self._stock(
            self.q,
            self.out,
            self.k,
            self.v,
            self.table,
            self.rows,
            self.lengths,
            HEADS["head_dim"] ** -0.5,
        )
