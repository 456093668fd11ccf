"""Engines in the hands of a trainer: paused, with new weights, without memory; and with adapters.

Each scenario runs once with stock and once with our backend; everything happens before the same
decode pass of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.engine import workloads
from tests.engine.adapters import ADAPTERS
from tests.engine.driver import Scenario, Section
from tests.engine.releases import has
from tests.engine.trainer import Step

__all__ = ["HOLD", "LORA", "UNDISTURBED", "build", "sections"]

# The decode pass before which the trainer steps in; the shortest request has 15.
HOLD = 6
ROLLOUTS = workloads.rollouts()
UNDISTURBED = Section("undisturbed", ROLLOUTS, one_batch=True)
RETRACT, IN_PLACE, CONTINUE = ("pause", "retract"), ("pause", "in_place"), ("continue",)
# Another id for the second sample of a prompt: results of aborted requests are named so.
WITH_ABORTED = tuple(replace(r, rid="r2 aborted") if r.rid == "r2" else r for r in ROLLOUTS)
LORA = Section(
    "adapters",
    tuple(replace(r, lora=(None, *ADAPTERS)[i % 3]) for i, r in enumerate(ROLLOUTS)),
    one_batch=True,
)


def sections(llama: str, other: str) -> tuple[Section, ...]:
    """What the trainer does, with two models of one shape; the first is loaded at the start."""
    # Before, SGLang refuses to flush while requests wait, retracted or not.
    flush = "flush" if has("flush-while-paused") else "keep"
    found: tuple[Section, ...] = (
        UNDISTURBED,
        replace(UNDISTURBED, name="all logprobs", input_logprobs=True),
        _stepping("paused in place", IN_PLACE, CONTINUE),
        _stepping("paused and retracted", RETRACT, CONTINUE),
        replace(_stepping("sample aborted", ("abort", "r2 aborted")), requests=WITH_ABORTED),
        # Only KV of the new weights, then KV of two models in one row, then new KV again.
        _stepping("weights from disk", RETRACT, ("disk", other, flush), CONTINUE),
        _stepping("weights as tensors", IN_PLACE, ("tensor", llama, "keep"), CONTINUE),
        _stepping("weights broadcast", RETRACT, ("distributed", other, flush), CONTINUE),
        replace(_stepping("memory released", ("release",), ("resume",)), hold=0),
    )
    if has("flush-while-paused"):
        steps = (RETRACT, ("flush",), ("release",), ("resume",), CONTINUE)
        found += (_stepping("memory released in a pause", *steps),)
    return found


def _stepping(name: str, *steps: Step) -> Section:
    return replace(UNDISTURBED, name=name, hold=HOLD, steps=steps)


def build(
    llama: str,
    other: str,
    stock: Mapping[str, Any],
    ours: Mapping[str, Any],
    env: Mapping[str, str],
) -> dict[str, Scenario]:
    """Scenarios by name.

    Args:
        llama, other: folders of two models of one shape.
        stock, ours: engine arguments.
        env: environment variables for our engines.
    """
    trained = sections(llama, other)
    zeros = replace(UNDISTURBED, name="zeros", mode="zeros")
    adapters = {
        "enable_lora": True,
        "lora_paths": {name: f"{llama}/{name}" for name in ADAPTERS},
        "max_loras_per_batch": 3,
        "lora_backend": "torch_native",
    }
    cpu = {"SGLANG_PREFIX_TEST_WITHOUT_CUDA": "1"}
    # Three requests with the same adapter are too few for the default policy to pack on a CPU.
    lora_env = {**env, **cpu, "SGLANG_PREFIX_POLICY": "node"}
    lora_zeros = replace(LORA, name="zeros", mode="zeros")
    stock_lora, our_lora = ({**engine, **adapters} for engine in (stock, ours))
    return {
        "trainer stock": Scenario(llama, trained, stock, cpu, hooks=True),
        "trainer": Scenario(llama, (zeros, *trained), ours, {**env, **cpu}, hooks=True),
        "lora stock": Scenario(llama, (UNDISTURBED, LORA), stock_lora, cpu, hooks=True),
        "lora": Scenario(llama, (LORA, lora_zeros), our_lora, lora_env, hooks=True),
    }
