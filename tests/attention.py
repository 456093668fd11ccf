"""Inputs for everything that attends, plans in use by an executor, and the one comparison.

Every slot that no request uses holds NaN in both caches, and outputs and partial results are full
of NaN before a layer runs, so that whatever is read or left unwritten by mistake shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.executor import AttentionParams, PlanExecutor, make_executor
from prefix_kernels.native_executor import NativeExecutor
from prefix_kernels.oracle import KERNEL_TOLERANCES, TOLERANCES, decode_attention_oracle
from prefix_kernels.plan import AttentionShape, PackPlan, verify_plan
from prefix_kernels.triton_executor import LAUNCH_MODES, MERGE_MODES, TritonExecutor
from sglang_prefix.packing import DeviceProfile
from sglang_prefix.packing.planner import PackPlanner
from tests.forests import Batch
from tests.pack_reference import splitting

__all__ = [
    "KERNEL_TOLERANCES",
    "SPLITS",
    "TOLERANCES",
    "TRITON",
    "WAYS",
    "WHOLE",
    "AttentionCase",
    "Loaded",
    "Outputs",
    "assert_close",
    "build_executor",
    "load",
    "make_case",
]

IntArray = NDArray[np.int64]
Outputs = tuple[torch.Tensor, torch.Tensor]

# Packs are nearly free, so that short generated batches have some; with splits, short ones too.
WHOLE = DeviceProfile("whole", 1 << 20, 0.0, 100, 1 << 20)
SPLITS = splitting(DeviceProfile("splits", 16, 0.4, 100, 8), num_workers=24)

# Every way to run a plan: an executor by name, and its options.
WAYS: dict[str, dict[str, Any]] = {"torch": {}, "native": {}} | {
    f"triton-{mode}-{merge}": {"mode": mode, "merge": merge}
    for mode in LAUNCH_MODES
    for merge in MERGE_MODES
}
TRITON = [way for way in WAYS if way.startswith("triton")]


@dataclass(slots=True)
class AttentionCase:
    """One step's tensors: q [R, Hq, D], caches [slots, Hkv, D or Dv], the slot table."""

    batch: Batch
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    req_to_token: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    sm_scale: float
    options: dict[str, Any] = field(default_factory=dict)
    query_lens: torch.Tensor | None = None

    @property
    def shape(self) -> AttentionShape:
        """Of the layer."""
        heads = self.q.shape[1], self.k_cache.shape[1]
        dims = self.k_cache.shape[2], self.v_cache.shape[2]
        sizes = self.q.dtype.itemsize, self.k_cache.dtype.itemsize
        v_in_k = self.v_cache.data_ptr() == self.k_cache.data_ptr()
        return AttentionShape(*heads, *dims, *sizes, v_in_k)

    @property
    def newest_slots(self) -> torch.Tensor:
        """[B] the slot of each request's newest token."""
        return self.req_to_token[self.req_pool_indices, self.seq_lens - 1]

    def oracle(self, seq_lens: torch.Tensor | None = None) -> Outputs:
        """What the outputs mean at these lengths (those of the case without)."""
        return decode_attention_oracle(
            self.q,
            self.k_cache,
            self.v_cache,
            self.req_to_token,
            self.req_pool_indices,
            self.seq_lens if seq_lens is None else seq_lens,
            sm_scale=self.sm_scale,
            query_lens=self.query_lens,
            **self.options,
        )

    def poisoned_outputs(self) -> Outputs:
        """Output [R, Hq, Dv] and lse [R, Hq] full of NaN."""
        shape = (*self.q.shape[:2], self.v_cache.shape[2])
        return (
            torch.full(shape, torch.nan, dtype=self.q.dtype),
            torch.full(shape[:2], torch.nan),
        )

    def grow(self, by: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Give requests new tokens, one each by default; the lengths, and the new slots in order.

        The slots are written to the table as well.
        """
        by = [1] * len(self.seq_lens) if by is None else by
        slots = []
        for b, n in enumerate(by):
            length = int(self.seq_lens[b])
            grown = length - int(self.batch.seq_lens[b])
            new = torch.from_numpy(self.batch.growth_slots[b, grown : grown + n]).int()
            self.req_to_token[self.req_pool_indices[b], length : length + n] = new
            slots.append(new)
        self.seq_lens = self.seq_lens + torch.tensor(by)
        return self.seq_lens, torch.cat(slots)


def make_case(
    batch: Batch,
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    v_head_dim: int | None = None,
    v_in_k: bool = False,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    options: Mapping[str, Any] | None = None,
    sinks: torch.dtype | None = None,
    query_lens: Sequence[int] | None = None,
    seed: int = 0,
) -> AttentionCase:
    """Random tensors over a batch; growth slots hold values too, all other unused slots NaN.

    With ``v_in_k`` V is the first ``v_head_dim`` elements of each row of K.
    Sinks of a dtype, if one is given, are of the size of a softmax's sum; the first is none, and
    the last two leave everything and nothing of their heads.
    """
    generator = torch.Generator().manual_seed(seed)
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    in_use = [row[:n] for row, n in zip(batch.rows, batch.seq_lens, strict=True)]
    used = np.unique(np.concatenate([*in_use, batch.growth_slots.ravel()]))

    def cache(dim: int) -> torch.Tensor:
        values = torch.full((batch.num_slots, num_kv_heads, dim), torch.nan)
        values[used] = torch.randn(len(used), num_kv_heads, dim, generator=generator)
        return values.to(kv_dtype)

    options = dict(options or {})
    if sinks is not None:
        logits = 3 + 2 * torch.randn(num_kv_heads * group, generator=generator)
        logits[:1], logits[-2:] = -torch.inf, torch.tensor([-3e4, 3e4])[-len(logits) :]
        options["sinks"] = logits.to(sinks)
    num_rows = len(batch.seq_lens) if query_lens is None else sum(query_lens)
    q = torch.randn(num_rows, num_kv_heads * group, head_dim, generator=generator)
    k_cache = cache(head_dim)
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    return AttentionCase(
        batch,
        q.to(dtype),
        k_cache,
        k_cache[..., :v_head_dim] if v_in_k else cache(v_head_dim),
        torch.from_numpy(batch.req_to_token.copy()),
        torch.from_numpy(batch.req_pool_indices.copy()),
        torch.from_numpy(batch.seq_lens.copy()),
        head_dim**-0.5,
        options,
        None if query_lens is None else torch.tensor(query_lens),
    )


@dataclass
class Loaded:
    """A case with its plan in use by an executor."""

    case: AttentionCase
    plan: PackPlan
    executor: PlanExecutor

    def run(self, outputs: Outputs | None = None) -> Outputs:
        """Run the layer on poisoned memory."""
        case = self.case
        out, lse = outputs or case.poisoned_outputs()
        if isinstance(self.executor, TritonExecutor):
            self.executor.buffers.partial_out.fill_(torch.nan)
            self.executor.buffers.partial_lse.fill_(torch.nan)
        elif isinstance(self.executor, NativeExecutor):
            self.executor.partial_out.fill_(torch.nan)
            self.executor.partial_lse.fill_(torch.nan)
        params = AttentionParams(case.sm_scale, **case.options)
        self.executor.run(case.q, case.k_cache, case.v_cache, out, lse, params)
        return out, lse

    def check(self) -> None:
        """Run the layer and compare every element with the oracle."""
        assert_close(self.run(), self.case.oracle(), tolerances_of(self.executor))


def build_executor(shape: AttentionShape, way: str = "torch", **options: Any) -> PlanExecutor:
    """The executor of one of :data:`WAYS`, on the CPU."""
    name = way.split("-")[0]
    return make_executor(name, shape, torch.device("cpu"), **WAYS[way], **options)


def load(
    case: AttentionCase,
    way: str = "torch",
    policy: str = "pat",
    profile: DeviceProfile = WHOLE,
    *,
    executor: PlanExecutor | None = None,
    padded_batch_size: int | None = None,
) -> Loaded:
    """Plan a case and load the plan, which is a partition of the work."""
    planner = PackPlanner(case.shape, profile, policy=policy, reserved_tail_slots=16)
    query_lens = None if case.query_lens is None else case.query_lens.numpy()
    plan = planner.plan(case.batch.forest(), query_lens=query_lens)
    verify_plan(plan)
    executor = executor or build_executor(case.shape, way)
    executor.load(
        plan, case.req_to_token, case.req_pool_indices, padded_batch_size=padded_batch_size
    )
    return Loaded(case, plan, executor)


def tolerances_of(executor: PlanExecutor) -> Mapping[torch.dtype, tuple[float, float]]:
    """How far an executor's output may be off."""
    # Where 16-bit values are multiplied as they are, weights are rounded to them.
    rounds = isinstance(executor, NativeExecutor) and executor._library.prefix_products() != 0
    return KERNEL_TOLERANCES if executor.name == "triton" or rounds else TOLERANCES


def assert_close(
    found: Outputs,
    expected: Outputs,
    tolerances: Mapping[torch.dtype, tuple[float, float]] = TOLERANCES,
) -> None:
    """Every element of output and lse, and no NaN anywhere."""
    (out, lse), (expected_out, expected_lse) = found, expected
    relative, absolute = tolerances[out.dtype]
    torch.testing.assert_close(out.double(), expected_out, rtol=relative, atol=absolute)
    relative, absolute = TOLERANCES[torch.float32]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=relative, atol=absolute)
