"""Planning and loading a plan read nothing back from the device.

Everything that SGLang holds on the device is here of a tensor type that says it is on CUDA and
raises where a CUDA tensor would make the CPU wait. Only launches see the memory behind it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefix_kernels import plan_buffers, triton_executor
from prefix_kernels.plan_buffers import PlanCapacity
from prefix_kernels.triton_executor import TritonExecutor
from sglang_prefix.backend.decode_batch import DecodeBatch
from sglang_prefix.backend.decode_planner import DecodePlanner, LayerGroup
from sglang_prefix.gate import Gate, limits_of
from sglang_prefix.packing import AttentionShape
from sglang_prefix.packing.planner import PackPlanner, profile_for
from tests.scheduling import NUM_ROWS, SHAPES, Request, Scheduler

CAPACITY = PlanCapacity(NUM_ROWS, 1 << 14, 1 << 13, 1 << 9)


class SynchronisedError(AssertionError):
    """The CPU would have waited for the device."""


WAITS = {
    getattr(torch.Tensor, name)
    for name in (
        "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__",
        "__contains__", "nonzero", "masked_select", "equal", "unique", "is_nonzero",
        "__array__",
    )
}  # fmt: skip


class DeviceTensor(torch.Tensor):
    """Stands for a tensor on a CUDA device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WAITS:
            raise SynchronisedError(func.__name__)
        if func is torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        if func is torch.Tensor.to and "cpu" in map(str, (*args[1:], *kwargs.values())):
            raise SynchronisedError("to cpu")
        if func is torch.Tensor.copy_ and not isinstance(args[0], DeviceTensor):
            raise SynchronisedError("copy_ to the host")
        result: Any = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        return result


def on_device(tensor: torch.Tensor) -> Any:
    return tensor.as_subclass(DeviceTensor)


class DeviceScheduler(Scheduler):
    """A scheduler whose planner and executors see device tensors only."""

    def __init__(self, gate: Gate | None = None) -> None:
        super().__init__()
        self.groups = [device_shape(*shape) for shape in SHAPES]
        self.planner = DecodePlanner(
            self.schedule,
            on_device(self.table),
            1,
            self.groups,
            self.counters,
            gate=gate,
            verify=False,
        )

    def step(self, reqs: list[Request], *, in_graph: bool, pads: int = 0) -> str | None:
        """One decode step up to where the layers run."""
        batch = self.decode_batch(reqs, pads=pads)
        for name in ("req_pool_indices", "seq_lens", "out_cache_loc"):
            setattr(batch, name, on_device(getattr(batch, name)))
        if pads:
            batch.num_padding = pads
        previous = self.schedule.push(batch)
        try:
            return self.planner.prepare(DecodeBatch(batch, self.schedule.batch, in_graph))
        finally:
            self.schedule.pop(previous)


def device_shape(qo_heads: int, kv_heads: int, dim: int) -> LayerGroup:
    shape = AttentionShape(qo_heads, kv_heads, dim, dim, 4, 4)
    executor = TritonExecutor(shape, torch.device("cpu"), capacity=CAPACITY)
    # Looking at slots is for the CPU, where it costs no sync.
    executor._checks_slots = False
    buffers: Any = executor.buffers
    for name in ("plan", "kv_slots", "tail_lengths", "arrivals"):
        setattr(buffers, name, on_device(getattr(buffers, name)))
    # Policy "node" packs every node however small.
    options: Any = {"policy": "node", "max_partials": CAPACITY.partials}
    return LayerGroup(PackPlanner(shape, profile_for("triton"), **options), executor)


@pytest.fixture(autouse=True)
def launches_see_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter copies what a kernel is given; a device would not."""
    for module in (plan_buffers, triton_executor):
        launch = vars(module)["launch"]

        def plain(kernel: Any, grid: Any, launch: Any = launch, **arguments: Any) -> None:
            for name, value in arguments.items():
                if isinstance(value, DeviceTensor):
                    arguments[name] = value.as_subclass(torch.Tensor)
            launch(kernel, grid, **arguments)

        monkeypatch.setattr(module, "launch", plain)


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
def test_steps_with_joins_and_leaves_do_not_wait(in_graph: bool) -> None:
    scheduler = DeviceScheduler()
    assert set(requests_come_and_go(scheduler, in_graph)) == {None}
    assert 8 < scheduler.counters.plans < 24
    scheduler.planner.count_step()
    assert scheduler.counters.kv_tokens_read < scheduler.counters.kv_tokens_logical


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
    "copy": lambda tensor: torch.empty(len(tensor), dtype=tensor.dtype).copy_(tensor),
}


@pytest.mark.parametrize("what", PLANTED)
def test_control_a_planted_wait_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = TritonExecutor.load

    def waiting(self: Any, plan: Any, table: Any, rows: Any, **options: Any) -> None:
        PLANTED[what](rows)
        load(self, plan, table, rows, **options)

    monkeypatch.setattr(TritonExecutor, "load", waiting)
    with pytest.raises(SynchronisedError):
        requests_come_and_go(DeviceScheduler(), False)
