"""How a variant of the kernels, or a captured step, is run and compared with the oracle.

On a GPU, and with tiny inputs in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from prefix_kernels.plan import PackPlan
from sglang_prefix.bench.graphs import capture
from sglang_prefix.bench.packed_attention import PackedAttention
from sglang_prefix.bench.workloads.inputs import AttentionInputs, MismatchError, Outputs
from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import Tree, random_tree, shared_then_private
from sglang_prefix.packing import GPU_PROFILE, DeviceProfile
from tests.gpu.conftest import Setting
from tests.gpu.variants import CPU_EXECUTORS, EAGER, Modes, Variant

__all__ = [
    "Errors",
    "GraphServer",
    "Note",
    "assert_same_bits",
    "check",
    "note_error",
    "planned",
    "run",
]

GROWTH = 4
FAR_AWAY = 1 << 20  # a slot and a length that no pool here has

Errors = dict[str, float]
Note = Callable[[str, Any], None]


def check(
    variant: Variant, setting: Setting, record_property: Note, *, on_cpu: bool = False
) -> None:
    """Run a variant in all its modes, launches fitted to the plan and fixed as for a graph.

    Args:
        variant, setting: what, and where.
        record_property: is told the largest error of each run.
        on_cpu: run it by the executors for CPUs as well.
    """
    errors: Errors = {}
    inputs = variant.inputs(setting.device, setting.seed)
    with setting.verdict():
        runs = variant.runs(few=setting.dry)
        also = CPU_EXECUTORS if on_cpu else ()
        runs += [(policy, modes, False) for policy in variant.policies for modes in also]
        for policy, modes, fixed in runs:
            name = "/".join((policy, *modes)) + ("/fixed" if fixed else "")
            if variant.steps and errors:  # the run before has grown them
                inputs = variant.inputs(setting.device, setting.seed)
            attention = planned(variant, inputs, policy, modes, fixed, breaks=setting.control)
            outputs, errors[name] = inputs.outputs(), 0.0
            for step in range(variant.steps + 1):
                if step:
                    inputs.grow(step - 1)
                    attention.executor.append(inputs.seq_lens, inputs.newest_slots())
                run(attention, inputs, outputs)
                note_error(errors, name, step, inputs, outputs)
            again = partial(run, attention, inputs, outputs)
            assert_same_bits(again, outputs, variant.repeats)
    record_property("errors", errors)


def note_error(
    errors: Errors, name: str, step: int, inputs: AttentionInputs, outputs: Outputs
) -> None:
    """Compare with the oracle; the largest error of all steps is kept."""
    try:
        errors[name] = max(errors[name], inputs.compare(outputs))
    except MismatchError as error:
        raise MismatchError(f"{name}, step {step}: {error}") from None


def run(attention: PackedAttention, inputs: AttentionInputs, outputs: Outputs) -> None:
    """Launch a layer over poison."""
    outputs.poison()
    if attention.executor.name == "triton":
        attention.poison_partials()
    inputs.run(attention.executor, outputs)


def planned(
    variant: Variant,
    inputs: AttentionInputs,
    policy: str,
    modes: Modes,
    fixed: bool,
    *,
    breaks: bool,
) -> PackedAttention:
    """Attention with the plan of the inputs in use."""
    options = {"mode": modes[0], "merge": modes[1]}
    if modes in CPU_EXECUTORS:
        options = {"executor": modes[0]}
    attention = PackedAttention(
        inputs.heads.shape(inputs.q.dtype, inputs.k.dtype),
        inputs.q.device,
        policy=policy,
        profile=variant.profile,
        reserved_tail_slots=16,
        **options,
    )
    plan = attention.plan(inputs.batch.forest(), query_lens=inputs.query_lens)
    tables, size = (inputs.req_to_token, inputs.req_pool_indices), len(inputs.q)
    if fixed:
        attention.fix_capacity([plan], *tables, padded_batch_size=size)
    attention.breaks = breaks
    attention.load(plan, *tables, padded_batch_size=size)
    return attention


def assert_same_bits(again: Callable[[], object], outputs: Outputs, repeats: int) -> None:
    """Every further run gives the very bits of the first."""
    before = outputs.clone()
    for number in range(repeats):
        outputs.poison()
        again()
        assert before.same_bits(outputs), f"run {number} differs from the first in some bit"


def lay_out(
    tree: Tree, setting: Setting, size: int, number: int = 0, query_tokens: int = 1
) -> AttentionInputs:
    """Inputs of a batch of up to ``size`` requests that is served under the capture."""
    return AttentionInputs.lay_out(
        tree,
        # Rows of a whole batch fill the tile of 128; queries straddle row blocks of 16 and 64.
        Heads(24, 2, 16, 16) if setting.dry else Heads(32, 8),
        setting.device,
        setting.seed + number,
        dtype=torch.float32 if setting.dry else torch.bfloat16,
        growth=GROWTH,
        padded_batch_size=size * query_tokens,
        query_tokens=query_tokens,
        poison=True,
    )


def forests_to_serve(setting: Setting, size: int) -> list[tuple[str, Tree, str, DeviceProfile]]:
    """Name, tree, policy and profile of each."""
    tokens = 60 if setting.dry else 900

    def uneven(number: int, requests: int) -> Tree:
        return random_tree(setting.seed + number, num_requests=requests, max_tokens=tokens)

    return [
        ("one prefix", shared_then_private(size, tokens, 3), "node", EAGER),
        ("uneven", uneven(1, size), "node", EAGER),
        ("fewer requests", uneven(2, size // 2), "pat", GPU_PROFILE),
        ("nothing shared", shared_then_private(size - 1, 0, tokens), "query", GPU_PROFILE),
        ("one request", shared_then_private(1, 0, 2 * tokens), "pat", GPU_PROFILE),
        ("chunks", uneven(3, size), "chunk", GPU_PROFILE),
    ]


class GraphServer:
    """Static tensors, as an engine's graph knows them, and a step captured under single tokens.

    Args:
        modes: launch and merge mode.
        setting: where.
        query_tokens: of each request.
        options: further ones of the Triton executor.

    Attributes:
        served: name, inputs and plan of the batches that the graph is to serve.
        replay: the captured step.
        outputs: what it writes.
    """

    def __init__(
        self, modes: Modes, setting: Setting, *, query_tokens: int = 1, **options: Any
    ) -> None:
        size, rows = (n * (7 if setting.dry else 24) for n in (1, query_tokens))
        tree = shared_then_private(size, 0, query_tokens)
        first = lay_out(tree, setting, size, query_tokens=query_tokens)
        options |= {"mode": modes[0], "merge": modes[1], "reserved_tail_slots": GROWTH}
        shape = first.heads.shape(first.q.dtype, first.k.dtype)
        self.attention = PackedAttention(shape, setting.device, **options)
        self.served: list[tuple[str, AttentionInputs, PackPlan]] = []
        for name, tree, policy, profile in forests_to_serve(setting, size):
            inputs = lay_out(tree, setting, size, len(self.served), query_tokens)
            planner = PackedAttention(
                shape, setting.device, policy=policy, profile=profile, **options
            )
            plan = planner.plan(inputs.batch.forest(), query_lens=inputs.query_lens)
            self.served.append((name, inputs, plan))
        # Fixed for all of them; the slots that this reads mean nothing yet.
        context = max(inputs.req_to_token.shape[1] for _, inputs, _ in self.served)
        table = torch.zeros(size, context, dtype=torch.int32, device=setting.device)
        pool = torch.arange(size, device=setting.device)
        plans = [plan for *_, plan in self.served]
        self.attention.fix_capacity(plans, table, pool, padded_batch_size=rows)
        num_slots = max(inputs.batch.num_slots for _, inputs, _ in self.served)
        self._params = first.params
        self._q = torch.zeros_like(first.q)
        self._k, self._v = (
            torch.zeros(num_slots, *cache.shape[2:], dtype=cache.dtype, device=cache.device)
            for cache in (first.k, first.v)
        )
        self.lens, self.new_slots = (
            torch.ones(n, dtype=torch.int64, device=setting.device) for n in (size, rows)
        )
        self.outputs = first.outputs()
        plan = self.attention.plan(first.batch.forest(), query_lens=first.query_lens)
        self.load(plan, first)
        self.fill(first)
        self.replay = capture(self.step, setting.device)
        self.attention.breaks = setting.control

    def load(self, plan: PackPlan, inputs: AttentionInputs) -> None:
        """Take a plan into use; the rows change hands at once."""
        rows = inputs.req_to_token.clone()
        size = len(self._q)
        self.attention.load(plan, rows, inputs.req_pool_indices, padded_batch_size=size)
        rows.fill_(FAR_AWAY)

    def step(self) -> None:
        """This step's slots, then a layer."""
        executor = self.attention.executor
        executor.append(self.lens, self.new_slots)
        out = self.outputs
        executor.run(self._q, self._k, self._v, out.out, out.lse, self._params)

    def fill(self, inputs: AttentionInputs) -> None:
        """Set the static tensors for a step; all that it does not set is poison."""
        self.outputs.poison()
        self.attention.poison_partials()
        self._q.copy_(inputs.q)
        for tensor, values in ((self._k, inputs.k[0]), (self._v, inputs.v[0])):
            tensor.fill_(torch.nan)
            tensor[: len(values)] = values
        steps = ((self.lens, inputs.seq_lens), (self.new_slots, inputs.newest_slots()))
        for static, values in steps:
            static.fill_(FAR_AWAY)
            static[: len(values)] = values
