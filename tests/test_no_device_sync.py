"""Planning and loading a plan read nothing back from the device.

Everything that SGLang holds on the device is here on torch's meta device, which has no values: what
would make the CPU wait for a CUDA device raises there. Launches do nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefix_kernels import plan_buffers
from prefix_kernels.plan_buffers import PlanCapacity
from prefix_kernels.triton_executor import TritonExecutor
from sglang_prefix.backend.decode_batch import DecodeBatch
from sglang_prefix.backend.decode_planner import DecodePlanner, LayerGroup
from sglang_prefix.gate import Gate, limits_of
from sglang_prefix.packing import AttentionShape
from sglang_prefix.packing.planner import planner_for
from tests.scheduling import NUM_ROWS, SHAPES, Request, Scheduler

CAPACITY = PlanCapacity(NUM_ROWS, 1 << 14, 1 << 13, 1 << 9)
DEVICE = torch.device("meta")


class DeviceScheduler(Scheduler):
    """A scheduler whose planner and executors see device tensors only."""

    def __init__(self, gate: Gate | None = None) -> None:
        super().__init__()
        self.groups = [device_shape(*shape) for shape in SHAPES]
        table = self.table.to(DEVICE)
        self.planner = DecodePlanner(
            self.schedule, table, 1, self.groups, self.counters, gate=gate, verify=False
        )

    def step(self, reqs: list[Request], *, in_graph: bool, pads: int = 0) -> str | None:
        """One decode step up to where the layers run."""
        batch = self.decode_batch(reqs, pads=pads)
        for name in ("req_pool_indices", "seq_lens", "out_cache_loc"):
            setattr(batch, name, getattr(batch, name).to(DEVICE))
        if pads:
            batch.num_padding = pads
        previous = self.schedule.push(batch)
        try:
            return self.planner.prepare(DecodeBatch(batch, self.schedule.batch, in_graph))
        finally:
            self.schedule.pop(previous)


def device_shape(qo_heads: int, kv_heads: int, dim: int) -> LayerGroup:
    shape = AttentionShape(qo_heads, kv_heads, dim, dim, 4, 4)
    executor = TritonExecutor(shape, DEVICE, capacity=CAPACITY)
    # Policy "node" packs every node however small.
    options: Any = {"policy": "node", "max_partials": CAPACITY.partials}
    return LayerGroup(planner_for(executor, **options), executor)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that would have been launched."""
    names: list[str] = []
    monkeypatch.setattr(
        plan_buffers, "launch", lambda kernel, grid, **arguments: names.append(kernel.__name__)
    )
    return names


def requests_come_and_go(scheduler: DeviceScheduler, in_graph: bool) -> list[str | None]:
    """Decode steps in which requests join and leave, with what the planner said of each."""
    rng = random.Random(0)
    system = [rng.randrange(256) for _ in range(50)]
    reqs: list[Request] = []
    said = []
    for step in range(24):
        if step % 3 == 0 and len(reqs) < 6:
            reqs = [*reqs, *scheduler.prefill([*system, step, step])]
        if step % 5 == 4:
            reqs = reqs[1:]
        said.append(scheduler.step(reqs, in_graph=in_graph, pads=2 if in_graph else 0))
        scheduler.publish(*(req for req in reqs if req.kv.cache_protected_len < len(system)))
    return said


@pytest.mark.parametrize("in_graph", [False, True])
def test_steps_with_joins_and_leaves_do_not_wait(in_graph: bool, launches: list[str]) -> None:
    scheduler = DeviceScheduler()
    assert set(requests_come_and_go(scheduler, in_graph)) == {None}
    assert 8 < scheduler.counters.decode.plans < 24
    assert launches.count("copy_slots_kernel") == len(SHAPES) * scheduler.counters.decode.plans
    scheduler.planner.count_step()
    assert scheduler.counters.decode.kv_tokens_read < scheduler.counters.decode.kv_tokens_logical


def test_the_gate_does_not_wait_either() -> None:
    said = requests_come_and_go(DeviceScheduler(Gate(limits_of(torch.device("cpu")), "fa3")), True)
    assert set(said) == {"gate-nothing-shared", "gate-no-gain"}  # so little is never worth it


PLANTED: dict[str, Callable[[Any], object]] = {
    "item": lambda tensor: tensor[0].item(),
    "tolist": lambda tensor: tensor.tolist(),
    "cpu": lambda tensor: tensor.cpu(),
    "to": lambda tensor: tensor.to("cpu"),
    "numpy": lambda tensor: tensor.numpy(),
    "bool": lambda tensor: bool(tensor[0] > 0),
    "equal": lambda tensor: torch.equal(tensor, torch.zeros(len(tensor), dtype=tensor.dtype)),
    "nonzero": lambda tensor: tensor.nonzero(),
    "copy": lambda tensor: torch.empty(len(tensor), dtype=tensor.dtype).copy_(tensor),
}


@pytest.mark.parametrize("what", PLANTED)
def test_control_a_planted_wait_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = TritonExecutor.load

    def waiting(self: Any, plan: Any, table: Any, rows: Any, **options: Any) -> None:
        PLANTED[what](rows)
        load(self, plan, table, rows, **options)

    monkeypatch.setattr(TritonExecutor, "load", waiting)
    with pytest.raises((RuntimeError, TypeError), match=r"(?i)meta|device"):
        requests_come_and_go(DeviceScheduler(), False)
