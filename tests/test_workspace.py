"""What the workspace promises to hold, it holds."""

from __future__ import annotations

import re

import numpy as np
import pytest

from prefix_kernels.plan_buffers import PlanCapacity, serialize_plan
from prefix_kernels.tiles import FUSED_ROWS, ROW_CLASSES
from prefix_kernels.work_list import build_work_list
from sglang_prefix.backend.workspace import Workspace, size_workspace
from sglang_prefix.packing import GPU_PROFILE, POLICIES, AttentionShape
from sglang_prefix.packing.planner import PackPlanner, profile_for
from tests.forests import random_batch

MIB = 2**20
LLAMA_8B = AttentionShape(32, 8, 128, 128, 2, 2)


def size(shape: AttentionShape = LLAMA_8B, **options: int) -> Workspace:
    defaults = {
        "max_rows": 256,
        "context_len": 131072,
        "reserved_tail_slots": 256,
        "max_block_rows": 128,
    }
    return size_workspace(shape, **(defaults | {"budget": 256 * MIB} | options))


@pytest.mark.parametrize(
    "shape",
    [LLAMA_8B, AttentionShape(128, 1, 128, 128, 2, 2), AttentionShape(8, 8, 64, 64, 2, 1)],
    ids=str,
)
@pytest.mark.parametrize("context_len", [2048, 131072])
@pytest.mark.parametrize("max_rows", [1, 256, 4096])
def test_it_stays_within_its_budget(shape: AttentionShape, context_len: int, max_rows: int) -> None:
    for budget in (64 * MIB, 256 * MIB):
        workspace = size(shape, context_len=context_len, max_rows=max_rows, budget=budget)
        capacity = workspace.capacity
        partial_bytes = shape.num_qo_heads * (shape.v_head_dim + 1) * 4
        held = capacity.partials * partial_bytes + 4 * (capacity.plan_size + capacity.slots)
        held += 4 * capacity.batch_rows * (1 + shape.num_kv_heads)
        assert held <= workspace.num_bytes <= budget
        assert 1 <= workspace.sure_rows <= capacity.batch_rows <= max_rows
        assert workspace.max_partials >= 2 * capacity.batch_rows


def test_the_default_budget_holds_256_requests_of_llama_3_for_sure() -> None:
    assert size().sure_rows == 256


@pytest.mark.parametrize("mode", ["streams", "fused"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_every_plan_of_a_sure_batch_fits(mode: str, policy: str, seed: int) -> None:
    """At any sharing, up to the context length; splits are lowered where partials run out."""
    rows, context_len, room = 12, 96, 8
    classes = list(FUSED_ROWS if mode == "fused" else ROW_CLASSES)
    for shape in (AttentionShape(6, 2, 16, 16, 4, 4), AttentionShape(160, 1, 16, 16, 4, 4)):
        workspace = size_workspace(
            shape,
            max_rows=rows,
            context_len=context_len,
            reserved_tail_slots=room,
            max_block_rows=classes[-1],
            budget=MIB // 8 if shape.num_kv_heads > 1 else MIB,
        )
        assert workspace.sure_rows == rows
        planner = PackPlanner(
            shape,
            profile_for("triton", classes[-1]),
            policy=policy,
            max_partials=workspace.max_partials,
            reserved_tail_slots=room,
        )
        for batch in (
            random_batch(seed, num_requests=rows, max_tokens=context_len),
            random_batch(seed, num_requests=3, max_tokens=context_len),
        ):
            plan = planner.plan(batch.forest())
            work = build_work_list(plan, shape.group_size, classes)
            packed = serialize_plan(plan, [work.items], work.partials, rows)
            need = PlanCapacity(rows, len(packed), plan.num_slots, plan.num_partials)
            assert workspace.capacity.holds(need)


def test_one_request_of_full_length_must_fit() -> None:
    with pytest.raises(ValueError, match="too small for requests of 131072 tokens") as refused:
        size(budget=MIB // 2)
    least = re.search(r"legal: at least (\d+) bytes", str(refused.value))
    assert least is not None
    assert size(budget=int(least[1])).sure_rows >= 1


def test_batches_beyond_the_sure_ones_are_left_to_chance() -> None:
    workspace = size(max_rows=4096)
    assert workspace.sure_rows < workspace.capacity.batch_rows
    assert np.ceil(workspace.capacity.slots / (131072 + 256)) >= workspace.sure_rows
    assert GPU_PROFILE.num_workers < workspace.max_partials
