"""A plan of a generated batch in use by an executor, and its comparison with the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from prefix_kernels.plan import PackPlan, verify_plan
from sglang_prefix.packing import CPU_PROFILE, AttentionShape, DeviceProfile
from sglang_prefix.packing.planner import PackPlanner
from sglang_prefix.runner import PlanRunner
from tests.attention import AttentionCase, assert_close
from tests.forests import Batch

__all__ = ["PROFILES", "SPLITS", "WHOLE", "Runs", "check", "grow", "load"]

# Packs are nearly free, so that short generated batches have some; with splits, short pieces too.
WHOLE = replace(CPU_PROFILE, name="whole", pack_bytes=100)
SPLITS = DeviceProfile("splits", 16, 0.4, 100, 24, 8)
PROFILES = (WHOLE, SPLITS)


@dataclass
class Runs:
    """A case with its plan in use."""

    case: AttentionCase
    plan: PackPlan
    runner: PlanRunner

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self.case.poisoned_outputs()
        case = self.case
        self.runner.run(
            case.q, case.k_cache, case.v_cache, out, lse, sm_scale=case.sm_scale, **case.options
        )
        return out, lse


def load(
    batch: Batch,
    case: AttentionCase,
    policy: str = "pat",
    profile: DeviceProfile = WHOLE,
    executor: str = "torch",
) -> Runs:
    num_qo_heads, num_kv_heads = case.q.shape[1], case.k_cache.shape[1]
    dims = case.k_cache.shape[2], case.v_cache.shape[2]
    shape = AttentionShape(
        num_qo_heads, num_kv_heads, *dims, case.q.dtype.itemsize, case.k_cache.dtype.itemsize
    )
    plan = PackPlanner(shape, profile, policy=policy, reserved_tail_slots=16).plan(batch.forest())
    verify_plan(plan)
    runner = PlanRunner(shape, torch.device("cpu"), executor)
    runner.load(plan, case.req_to_token, case.req_pool_indices)
    return Runs(case, plan, runner)


def check(
    batch: Batch,
    case: AttentionCase,
    policy: str = "pat",
    profile: DeviceProfile = WHOLE,
    executor: str = "torch",
) -> Runs:
    runs = load(batch, case, policy, profile, executor)
    assert_close(runs(), case.oracle())
    return runs


def grow(batch: Batch, case: AttentionCase, by: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the slots of new tokens into the table, in place; return lengths and these slots."""
    slots = []
    for b, n in enumerate(by.tolist()):
        length = int(case.seq_lens[b])
        grown = length - int(batch.seq_lens[b])
        new = torch.from_numpy(batch.growth_slots[b, grown : grown + n]).int()
        case.req_to_token[case.req_pool_indices[b], length : length + n] = new
        slots.append(new)
    case.seq_lens = case.seq_lens + torch.from_numpy(by)
    return case.seq_lens, torch.cat(slots)
