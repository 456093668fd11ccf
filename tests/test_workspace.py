"""What the workspace promises to hold, it holds."""

from __future__ import annotations

import re

import numpy as np
import pytest

from prefix_kernels.launches import FUSED_ROWS
from prefix_kernels.plan import AttentionShape
from prefix_kernels.plan_buffers import PlanCapacity, serialize_plan
from prefix_kernels.tiles import ROW_CLASSES
from prefix_kernels.work_list import build_work_list
from sglang_prefix.backend.workspace import Workspace, size_workspace
from sglang_prefix.config import PrefixConfig
from sglang_prefix.packing import GPU_PROFILE, POLICIES
from sglang_prefix.packing.planner import PackPlanner
from tests.engine.bare_backend import make_layer, make_runner
from tests.forests import random_batch

MIB = 2**20
LLAMA_8B = AttentionShape(32, 8, 128, 128, 2, 2)


def size(shape: AttentionShape = LLAMA_8B, **options: int) -> Workspace:
    defaults = {
        "max_batch_size": 256,
        "context_len": 131072,
        "reserved_tail_slots": 256,
        "max_block_rows": 128,
        "budget": 256 * MIB,
    }
    return size_workspace(shape, **(defaults | options))


@pytest.mark.parametrize(
    "shape",
    [LLAMA_8B, AttentionShape(128, 1, 128, 128, 2, 2), AttentionShape(8, 8, 64, 64, 2, 1)],
    ids=str,
)
@pytest.mark.parametrize("context_len", [2048, 131072])
@pytest.mark.parametrize("max_batch_size", [1, 256, 4096])
@pytest.mark.parametrize("budget", [64 * MIB, 256 * MIB])
def test_it_stays_within_its_budget(
    shape: AttentionShape, context_len: int, max_batch_size: int, budget: int
) -> None:
    workspace = size(shape, context_len=context_len, max_batch_size=max_batch_size, budget=budget)
    capacity = workspace.capacity
    partial_bytes = shape.num_qo_heads * (shape.v_head_dim + 1) * 4
    held = capacity.partials * partial_bytes + 4 * (capacity.plan_size + capacity.slots)
    held += 4 * capacity.batch_rows * (1 + shape.num_kv_heads)
    assert held <= workspace.num_bytes <= budget
    assert 1 <= workspace.sure_batch_size <= capacity.batch_rows <= max_batch_size
    assert workspace.max_partials >= 2 * capacity.batch_rows


def test_the_default_budget_holds_256_requests_of_llama_3_for_sure_and_more_by_chance() -> None:
    assert size().sure_batch_size == 256
    workspace = size(max_batch_size=4096)
    assert workspace.capacity.slots // (131072 + 256) == workspace.sure_batch_size
    assert workspace.sure_batch_size < workspace.capacity.batch_rows


@pytest.mark.parametrize("classes", [ROW_CLASSES, FUSED_ROWS], ids=["streams", "fused"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("drafts", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_every_plan_of_a_sure_batch_fits(
    classes: tuple[int, ...], policy: str, drafts: int, seed: int
) -> None:
    """At any sharing, up to the context length; splits are lowered where partials run out."""
    size, context_len, room = 12, 96, 8
    for shape in (AttentionShape(6, 2, 16, 16, 4, 4), AttentionShape(160, 1, 16, 16, 4, 4)):
        workspace = size_workspace(
            shape,
            max_batch_size=size,
            context_len=context_len,
            reserved_tail_slots=room,
            max_block_rows=classes[-1],
            budget=drafts * (MIB // 8 if shape.num_kv_heads > 1 else MIB),
            query_tokens=drafts,
        )
        assert workspace.sure_batch_size == size
        planner = PackPlanner(
            shape,
            GPU_PROFILE.narrowed_to(classes[-1]),
            policy=policy,
            max_partials=workspace.max_partials,
            reserved_tail_slots=room,
        )
        for num_requests in (size, 3):
            batch = random_batch(seed, num_requests=num_requests, max_tokens=context_len)
            forest = batch.forest()
            query_lens = np.minimum(forest.seq_lens, drafts)
            plan = planner.plan(forest, query_lens=query_lens)
            items, partials = build_work_list(plan, shape.group_size, list(classes))
            packed = serialize_plan(plan, [items], partials, size * drafts)
            need = PlanCapacity(size * drafts, len(packed), plan.num_slots, plan.num_partials)
            assert workspace.capacity.holds(need)


def test_the_torch_executor_keeps_to_the_budget_with_its_partials() -> None:
    """It takes slots as it needs them; of two attention shapes each has half."""
    from sglang_prefix.backend.layers import find_layers  # imports SGLang

    layers = [make_layer(0)]
    for dim, share in ((64, MIB), (32, MIB // 2)):
        layers[0].v_head_dim = dim
        config = PrefixConfig(executor="torch", workspace_mib=1)
        found = find_layers(make_runner(layers), set(), config, serve=True)
        for group in found.groups:
            held = group.planner.max_partials
            assert group.workspace is None
            assert held is not None
            size = group.planner.costs.shape.partial_size
            assert held * size <= share < (held + 1) * size
        layers.append(make_layer(1))


@pytest.mark.parametrize("query_tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("context_len", [4096, 131072])
@pytest.mark.parametrize("num_heads", [(32, 8), (128, 1)])
def test_one_request_of_full_length_must_fit(
    num_heads: tuple[int, int], context_len: int, query_tokens: int
) -> None:
    shape = AttentionShape(*num_heads, 128, 128, 2, 2)
    options = {"context_len": context_len, "query_tokens": query_tokens}
    with pytest.raises(ValueError, match=f"too small for requests of {context_len}") as refused:
        size(shape, budget=16384, **options)
    least = re.search(r"legal: at least (\d+) bytes", str(refused.value))
    assert least is not None
    assert size(shape, budget=int(least[1]), **options).sure_batch_size >= 1
