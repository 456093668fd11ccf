"""The graph check: a step captured once, replayed under other plans of the same batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.inputs import Inputs, MismatchError, Outputs
from sglang_prefix.bench.graphs import capture
from sglang_prefix.bench.packed_attention import PackedAttention
from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import Tree, TreeBatch, random_tree, shared_then_private
from sglang_prefix.packing import GPU_PROFILE, DeviceProfile

__all__ = ["check_replays"]

_ROWS, _GROWTH = 24, 4
_EAGER = DeviceProfile("eager", 128, 0.4, 100, 264, 32)
_REPEATS = 100


@dataclass(slots=True)
class _Plan:
    """A batch to be served under the capture."""

    name: str
    inputs: Inputs
    policy: str
    profile: DeviceProfile


class _Server:
    """Static tensors, as an engine's graph knows them, and the step that is captured."""

    def __init__(self, attention: PackedAttention, like: Inputs, rows: int, slots: int) -> None:
        self.attention, self.sm_scale = attention, like.sm_scale
        device, heads = like.q.device, like.heads
        self.q = torch.zeros(rows, heads.qo, heads.dim, dtype=like.q.dtype, device=device)
        self.k_cache, self.v_cache = (
            torch.zeros(slots, heads.kv, dim, dtype=like.q.dtype, device=device)
            for dim in (heads.dim, heads.v_dim)
        )
        self.seq_lens = torch.ones(rows, dtype=torch.int64, device=device)
        self.new_slots = torch.zeros(rows, dtype=torch.int64, device=device)
        shape = (rows, heads.qo, heads.v_dim)
        self.outputs = Outputs(
            torch.zeros(shape, dtype=like.q.dtype, device=device),
            torch.zeros(shape[:2], device=device),
        )

    def step(self) -> None:
        """This step's slots, then a layer."""
        self.attention.executor.append(self.seq_lens, self.new_slots)
        self.attention.run(
            self.q,
            self.k_cache,
            self.v_cache,
            self.outputs.out,
            self.outputs.lse,
            sm_scale=self.sm_scale,
        )

    def fill(self, inputs: Inputs) -> None:
        """Set the static tensors for a step; all that it does not set is poison."""
        self.outputs.poison()
        self.attention.poison_partials()
        size = inputs.batch.batch_size
        for tensor, values in (
            (self.q, inputs.q),
            (self.k_cache, inputs.k_cache),
            (self.v_cache, inputs.v_cache),
        ):
            tensor.fill_(torch.nan)
            tensor[: len(values)] = values
        self.seq_lens.fill_(1 << 20)
        self.new_slots.fill_(1 << 20)
        self.seq_lens[:size] = inputs.seq_lens
        self.new_slots[:size] = inputs.newest_slots()


def check_replays(
    way: tuple[str, str], device: torch.device, seed: int, *, dry: bool, control: bool
) -> dict[str, Any]:
    """Capture under single tokens, then serve other forests by replays.

    Args:
        way: launch mode and merge mode.
        device, seed: where, and of what.
        dry: small.
        control: lose a work item of every plan.
    """
    rows, repeats = (3, 2) if dry else (_ROWS, _REPEATS)
    heads = Heads(3, 1, 16, 16) if dry else Heads(32, 8)
    dtype = torch.float16 if dry else torch.bfloat16
    plans = _plans(heads, device, seed, rows, dtype, tokens=12 if dry else 900)
    first = _inputs(shared_then_private(rows, 0, 1), heads, device, seed, dtype)
    shape = heads.shape(dtype, dtype)
    attention = PackedAttention(
        shape, device, mode=way[0], merge=way[1], reserved_tail_slots=_GROWTH
    )
    plans = plans[::2] if dry else plans
    made = [
        PackedAttention(
            shape, device, policy=plan.policy, profile=plan.profile, reserved_tail_slots=_GROWTH
        ).plan(plan.inputs.batch.forest())
        for plan in plans
    ]
    widest = max(plans, key=lambda plan: plan.inputs.batch.num_slots).inputs
    # Fixed for all of them; the slots that this reads mean nothing yet.
    context = max(plan.inputs.table.shape[1] for plan in plans)
    table = torch.zeros(rows, context, dtype=torch.int32, device=device)
    attention.fix_capacity(made, table, torch.arange(rows, device=device), rows=rows)
    server = _Server(attention, first, rows, widest.batch.num_slots)
    attention.load(attention.plan(first.batch.forest()), first.table, first.rows, num_rows=rows)
    server.fill(first)
    replay = capture(server.step, device)
    errors = {}
    attention.breaks = control
    for plan, serialize_plan in zip(plans, made, strict=True):
        inputs = plan.inputs
        lost = inputs.table.clone()
        attention.load(serialize_plan, lost, inputs.rows, num_rows=rows)
        lost.fill_(1 << 20)  # the rows have changed hands
        worst = 0.0
        for step in range(3):
            server.fill(inputs)
            replay()
            try:
                worst = max(worst, inputs.compare(server.outputs))
            except MismatchError as error:
                raise MismatchError(f"{plan.name}, step {step}: {error}") from None
            if step == 0:
                _same_bits(server, replay, repeats, plan.name)
            if step < 2:
                inputs.grow(step)
        errors[plan.name] = worst
    return {"errors": errors, "replays": repeats}


def _same_bits(server: _Server, replay: Any, repeats: int, name: str) -> None:
    before = server.outputs.clone()
    for number in range(repeats):
        server.outputs.poison()
        replay()
        if not before.same_bits(server.outputs):
            raise MismatchError(f"{name}: replay {number} differs from the first in some bit")


def _plans(
    heads: Heads, device: torch.device, seed: int, rows: int, dtype: torch.dtype, *, tokens: int
) -> list[_Plan]:
    def random(number: int, requests: int) -> Tree:
        return random_tree(seed + number, num_requests=requests, max_tokens=tokens)

    trees = {
        "one prefix": (shared_then_private(rows, tokens, 3), "node", _EAGER),
        "uneven": (random(1, rows), "node", _EAGER),
        "fewer requests": (random(2, rows // 2), "pat", GPU_PROFILE),
        "nothing shared": (shared_then_private(rows - 1, 0, tokens), "query", GPU_PROFILE),
        "one request": (shared_then_private(1, 0, 2 * tokens), "pat", GPU_PROFILE),
        "chunks": (random(3, rows), "chunk", GPU_PROFILE),
    }
    return [
        _Plan(name, _inputs(tree, heads, device, seed + i, dtype, rows), policy, profile)
        for i, (name, (tree, policy, profile)) in enumerate(trees.items())
    ]


def _inputs(
    tree: Tree,
    heads: Heads,
    device: torch.device,
    seed: int,
    dtype: torch.dtype,
    rows: int | None = None,
) -> Inputs:
    batch = TreeBatch.lay_out(tree, growth=_GROWTH, seed=seed)
    return Inputs.build(batch, heads, device, seed, dtype=dtype, num_rows=rows)
