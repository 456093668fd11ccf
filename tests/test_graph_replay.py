"""Steps captured as a graph keeps them, replayed under other plans: what `gpu/` checks, and more.

Without a GPU the capture is a list of launches with the arguments of its time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefix_kernels.launches import MERGE_MODES
from sglang_prefix.bench.graphs import launches_of
from sglang_prefix.bench.workloads.inputs import MismatchError
from tests.gpu.checks import GraphServer
from tests.gpu.conftest import Setting
from tests.gpu.variants import ALL_MODES, Modes

pytestmark = pytest.mark.usefixtures("nan_memory")


# Tile classes of 16, 64 and 128 rows, and for comparison those of 16 and 128.
TWO_CLASSES = [
    pytest.param((("streams", merge), {"graph_rows": (16,)}), marks=pytest.mark.extended)
    for merge in MERGE_MODES
]


@pytest.fixture(
    params=[*((modes, {}) for modes in ALL_MODES), *TWO_CLASSES],
    ids=["/".join(modes) for modes in ALL_MODES] + [f"two/{merge}" for merge in MERGE_MODES],
)
def server(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> GraphServer:
    seed = int(pytestconfig.option.hypothesis_seed)
    modes, options = request.param
    setting = Setting(torch.device("cpu"), seed, dry=True, control=False)
    return GraphServer(modes, setting, **options)


def launched(server: GraphServer) -> list[tuple[Any, ...]]:
    """Kernels, grids and arguments of a step, its tensors as addresses."""
    return [
        (
            *again.args,
            {
                name: value.data_ptr() if isinstance(value, torch.Tensor) else value
                for name, value in again.keywords.items()
            },
        )
        for again in launches_of(server.step)
    ]


def test_one_capture_serves_every_forest(server: GraphServer) -> None:
    """Other forests, fewer requests, grown tails, padding rows, repeated replays."""
    for _, inputs, plan in server.served:
        server.load(plan, inputs)
        for step in range(2):
            outputs = []
            for _ in range(2):
                server.fill(inputs)
                server.replay()
                inputs.compare(server.outputs)
                outputs.append(server.outputs.clone())
            assert outputs[0].same_bits(outputs[1])
            inputs.grow(step)


@pytest.mark.parametrize("modes", [ALL_MODES[0], ALL_MODES[-1]], ids="/".join)
def test_verification_of_drafts(modes: Modes, pytestconfig: pytest.Config) -> None:
    """Three query tokens of a request: uneven lengths, fewer requests, growth, a repeated step."""
    seed = int(pytestconfig.option.hypothesis_seed)
    setting = Setting(torch.device("cpu"), seed, dry=True, control=False)
    server = GraphServer(modes, setting, query_tokens=3)
    for _, inputs, plan in server.served[1:3]:
        assert plan.query_lens is not None
        server.load(plan, inputs)
        for step in range(2):
            server.fill(inputs)
            server.replay()
            inputs.compare(server.outputs)
            inputs.grow(step)
    server.attention.executor.append(server.lens, server.new_slots)
    server.replay()
    inputs.seq_lens -= 1  # the lengths are those of the step that was repeated
    inputs.compare(server.outputs)


def test_a_replay_after_an_aborted_one(server: GraphServer) -> None:
    name, inputs, plan = server.served[1]
    assert name == "uneven"
    server.load(plan, inputs)
    server.fill(inputs)
    launches = launches_of(server.step)
    for count in range(1, len(launches)):
        server.fill(inputs)
        for again in launches[:count]:
            again()
        server.fill(inputs)
        server.replay()
        inputs.compare(server.outputs)


def test_the_capture_holds_for_every_plan(server: GraphServer) -> None:
    """The same kernels, grids and addresses, whatever is loaded."""
    first = launched(server)
    for _, inputs, plan in server.served:
        server.load(plan, inputs)
        server.fill(inputs)
        assert launched(server) == first


def test_control_the_plan_is_not_loaded(server: GraphServer) -> None:
    for _, inputs, _ in server.served:
        server.fill(inputs)
        # Lengths that the old plan can take, so that nothing is read out of bounds.
        server.lens.fill_(1)
        server.new_slots[inputs.batch.batch_size :] = 1
        server.replay()
        with pytest.raises(MismatchError):
            inputs.compare(server.outputs)


def test_tile_classes_of_a_capture(server: GraphServer, request: pytest.FixtureRequest) -> None:
    """84 rows: what a pack needs is there, and every class is in use by one of the plans."""
    two = "two" in request.node.name
    blocks = [
        again.keywords[name]
        for again in launches_of(server.step)
        for name in ("BLOCK_M", "WIDE_BLOCK_M")
        if again.keywords.get(name)
    ]
    wanted = [16, 128] if two else [16, 64] if "fused" in request.node.name else [16, 64, 128]
    assert sorted(blocks) == wanted
    used = torch.zeros(len(blocks) if "fused" not in request.node.name else 1, dtype=torch.bool)
    for _, inputs, plan in server.served:
        server.load(plan, inputs)
        used |= server.attention.work_item_counts()[: len(used)] > 0
    assert used.all()
