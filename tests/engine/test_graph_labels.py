"""Which graph a step captures and replays, decided by our backend on SGLang's pools, no engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_prefix.backend import backend as backend_module
from sglang_prefix.backend.decode_planner import DecodePlanner
from sglang_prefix.config import PrefixConfig
from sglang_prefix.gate import Decision
from tests.engine.bare_backend import NUM_KV_HEADS, NUM_QO_HEADS, make_layer, make_runner
from tests.scheduling import make_forward_batch

DP_ATTENTION = "--tp-size 2 --dp-size 2 --enable-dp-attention"
MAX_BATCH_SIZE = 8  # that the workspace is sure to hold


class FixedGate:
    """Says what it is told."""

    packs = True

    def choose(self, plans: Any, forest: Any) -> Decision:
        """As told."""
        return Decision(self.packs, None if self.packs else "gate-no-gain", 1.0, 2.0)

    def leave(self) -> None:
        """Nothing to do."""


def recording_stock(prepared: list[tuple[str, int]]) -> Any:
    """A stock backend that notes how it is prepared for graphs, and computes nothing."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    class Stock(AttentionBackend):
        def forward(self, q: Any, *args: Any, **kwargs: Any) -> Any:
            return q

        def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
            """Nothing to do."""

        def init_forward_metadata_out_graph(self, batch: Any, in_capture: bool = False) -> None:
            prepared.append(("capture" if in_capture else "replay", batch.batch_size))

    return Stock()


class Graphs:
    """A backend whose decode is captured, and SGLang's views of batches.

    Args:
        gate: the setting.
        flags: of the server.
        windows: layers with a sliding window, which are the stock backend's.
    """

    def __init__(self, gate: str = "auto", *, windows: int = 0, flags: str = "") -> None:
        self.layers = [
            make_layer(i, sliding_window_size=16 if i < windows else -1) for i in range(2)
        ]
        self.prepared: list[tuple[str, int]] = []  # how the stock backend was prepared
        stock = recording_stock(self.prepared)
        config = PrefixConfig(gate=gate, executor="triton", workspace_mib=8)
        runner = make_runner(self.layers, flags=flags)
        self.backend = backend_module.PrefixAttnBackend(runner, stock, "torch_native", config)
        self.schedule = self.backend._schedule

    @property
    def counted(self) -> dict[str, Any]:
        """The backend's counters."""
        return self.backend._report()

    @property
    def labels(self) -> list[str]:
        """What each graph is captured under."""
        return list(self.schedule.graph_labels)

    def view(self, num_requests: int, batch_size: int, mode: str = "DECODE") -> Any:
        """What the graph runner hands over; padding rows at the end."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        num_padding = batch_size - num_requests

        rows, lens, new_slots = ([n] * num_requests for n in (0, 1, 0))
        view = make_forward_batch("DECODE", rows, lens, new_slots, num_padding)
        view.num_padding, view.actual_forward_mode = num_padding, ForwardMode[mode]
        return view

    def capture(self, label: str, batch_size: int) -> None:
        self.schedule.graph_label = label
        self.backend.init_forward_metadata_out_graph(self.view(batch_size, batch_size), True)
        self.backend.init_forward_metadata_in_graph(self.view(batch_size, batch_size))

    def replay(self, num_requests: int, batch_size: int, mode: str = "DECODE") -> str:
        """The label of the graph for a step."""
        view = self.view(num_requests, batch_size, mode)
        self.backend.init_forward_metadata_out_graph(view)
        return self.schedule.graph_label

    def decode(self, layer: Any, batch_size: int, **kwargs: Any) -> Any:
        q = torch.randn(batch_size, NUM_QO_HEADS * 64)
        k, v = torch.randn(2, batch_size, NUM_KV_HEADS, 64)
        view = self.view(batch_size, batch_size)
        return self.backend.forward_decode(q, k, v, layer, view, False, **kwargs)


@pytest.fixture(autouse=True)
def captured(monkeypatch: pytest.MonkeyPatch) -> type[FixedGate]:
    """Decode is captured, and the gate says what a test wants."""
    monkeypatch.setattr(backend_module, "captures_decode", lambda runner: True)
    monkeypatch.setattr(backend_module, "warm_up", lambda *_: "")  # minutes in the interpreter
    monkeypatch.setattr("sglang_prefix.backend.fallback.captures_decode", lambda runner: True)
    monkeypatch.setattr(FixedGate, "packs", True)
    monkeypatch.setattr(
        backend_module, "make_gate", lambda name, *_: FixedGate() if name == "auto" else None
    )
    return FixedGate


@pytest.mark.parametrize(
    ("gate", "max_batch_size", "flags", "labels"),
    [
        ("auto", MAX_BATCH_SIZE, "", ["packed", "stock"]),
        ("auto", 100_000, "", ["packed", "stock"]),
        ("always", MAX_BATCH_SIZE, "", ["packed"]),
        # A batch that outgrows the workspace needs a graph, too.
        ("always", 100_000, "", ["packed", "stock"]),
        ("never", MAX_BATCH_SIZE, "", []),
        ("auto", MAX_BATCH_SIZE, DP_ATTENTION, ["packed", "stock"]),
        ("auto", 100_000, DP_ATTENTION, ["packed", "stock"]),
        ("always", MAX_BATCH_SIZE, DP_ATTENTION, ["packed"]),
    ],
)
def test_labels_follow_the_setting_the_workspace_and_the_ranks(
    gate: str, max_batch_size: int, flags: str, labels: list[str]
) -> None:
    graphs = Graphs(gate, flags=flags)
    graphs.backend.init_cuda_graph_state(max_batch_size, max_batch_size)
    assert graphs.labels == labels


def test_ranks_with_batches_of_their_own_need_a_workspace_for_every_batch() -> None:
    graphs = Graphs("always", flags=DP_ATTENTION)
    with pytest.raises(ValueError, match="change SGLANG_PREFIX_WORKSPACE_MIB"):
        graphs.backend.init_cuda_graph_state(100_000, 100_000)


def fail(*args: Any, **options: Any) -> None:
    raise RuntimeError("raised on purpose by a test")


def test_kernels_that_do_not_run_here_leave_everything_to_stock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend_module, "warm_up", fail)
    graphs = Graphs("auto")
    assert graphs.labels == []
    assert graphs.backend._server_reason == "kernels"
    assert graphs.backend._layers.group_of == {}
    with pytest.raises(RuntimeError, match="on purpose"):
        Graphs("auto", flags="--tp-size 2")


@pytest.mark.parametrize(
    ("gate", "max_batch_size"), [("auto", MAX_BATCH_SIZE), ("always", 100_000)]
)
def test_a_rank_that_cannot_plan_does_not_choose_another_graph_than_the_others(
    gate: str, max_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecodePlanner, "prepare", fail)
    alone, one_of_two = Graphs(gate), Graphs(gate, flags="--tp-size 2")
    for graphs in (alone, one_of_two):
        graphs.backend.init_cuda_graph_state(max_batch_size, max_batch_size)
    assert alone.replay(2, 2) == "stock"
    assert alone.counted["fallback_reasons"] == {"error": 1}
    with pytest.raises(RuntimeError, match="on purpose"):
        one_of_two.replay(2, 2)
    assert one_of_two.counted["fallback_reasons"] == {}


@pytest.mark.parametrize("can_plan", [True, False])
@pytest.mark.parametrize("label", ["packed", "stock", None])
def test_a_step_replays_the_label_that_ranks_agreed_on(
    label: str | None, can_plan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a rank's gate says, and whether it can plan or is idle."""
    graphs = Graphs(flags=DP_ATTENTION)
    graphs.backend.init_cuda_graph_state(MAX_BATCH_SIZE, MAX_BATCH_SIZE)
    monkeypatch.setattr(type(graphs.schedule), "agreed_label", label)
    if not can_plan:
        monkeypatch.setattr(DecodePlanner, "decide", fail)
    expected = label or "stock"
    for FixedGate.packs in (True, False):
        assert graphs.replay(2, 4) == graphs.replay(0, 4, "IDLE") == expected
    counted = graphs.counted
    if not can_plan:
        assert counted["fallback_reasons"] == {"error": 2}
    elif label == "packed":
        assert counted["packed_steps"] == 2
    else:
        assert counted["stock_reasons"] == {"gate-other-ranks": 1, "gate-no-gain": 1}


def test_a_padded_size_that_no_plan_fits_is_stocks_on_every_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs = Graphs(flags=DP_ATTENTION)
    monkeypatch.setattr(type(graphs.schedule), "agreed_label", "packed")
    assert graphs.backend._planner is not None
    graphs.backend._planner.max_batch_size = 2
    assert graphs.replay(1, 4) == graphs.replay(0, 4, "IDLE") == "stock"
    assert graphs.counted["fallback_reasons"] == {"workspace": 1}
    assert graphs.replay(1, 2) == graphs.replay(0, 2, "IDLE") == "packed"


def test_steps_are_counted_under_the_graph_that_they_replay() -> None:
    graphs = Graphs()
    for packs, label in ((True, "packed"), (False, "stock"), (True, "packed")):
        FixedGate.packs = packs
        assert graphs.replay(2, 4) == label
    assert graphs.prepared == [("replay", 4)]
    counted = graphs.counted
    assert (counted["packed_steps"], counted["stock_reasons"]) == (2, {"gate-no-gain": 1})
    assert counted == graphs.counted  # asking again counts nothing


@pytest.mark.parametrize(("gate", "label"), [("auto", "stock"), ("always", "packed")])
def test_an_idle_rank_replays_a_graph_and_counts_nothing(gate: str, label: str) -> None:
    graphs = Graphs(gate)
    assert graphs.replay(0, 4, "IDLE") == label
    assert graphs.backend.counters.decode.steps == 0


def test_an_idle_rank_plans_once_for_each_padded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs("always")
    loaded: list[int] = []
    load = DecodePlanner._load

    def count(planner: DecodePlanner, group: Any, plan: Any, batch: Any) -> None:
        loaded.append(batch.padded_batch_size)
        load(planner, group, plan, batch)

    monkeypatch.setattr(DecodePlanner, "_load", count)
    for num_requests, size in ((0, 4), (0, 4), (0, 2), (0, 2), (2, 2), (0, 2), (0, 2)):
        graphs.replay(num_requests, size, "DECODE" if num_requests else "IDLE")
    assert loaded == [4, 2, 2, 2]


def test_a_batch_that_nothing_is_known_of_gets_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a schedule batch; on the CPU its rows are compared."""
    monkeypatch.setattr(DecodePlanner, "prepare", lambda self, batch, **_: "no-request-info")
    always = Graphs("always")
    assert always.replay(3, 4) == "packed"
    for group in always.backend._layers.groups:
        assert group.executor.plan is not None
        assert group.executor.plan.num_shared_packs == 0
    assert always.counted["fallback_reasons"] == {"no-request-info": 1}
    assert always.prepared == []


def test_a_capture_counts_nothing_and_prepares_stock_once_per_size() -> None:
    """FlashInfer's makes new buffers each time, which the other graph would not see."""
    graphs = Graphs(windows=1)
    for size in (4, 2):
        for label in graphs.labels:
            graphs.capture(label, size)
            assert graphs.backend._step.packed is (label == "packed")
    assert graphs.prepared == [("capture", 4), ("capture", 2)]
    # A runner that captures again, as after a change of the role, prepares again.
    graphs.backend.init_cuda_graph_state(4, 4)
    graphs.capture("packed", 2)
    assert graphs.prepared[2:] == [("capture", 2)]
    assert graphs.counted["delegated_layers"] == {"0": "sliding-window"}
    assert graphs.backend.counters.decode.steps == 0


def test_stock_is_prepared_for_every_graph_of_prefill() -> None:
    """They have no labels, and are of as many requests whatever their tokens."""
    graphs = Graphs()
    for tokens in (16, 8):
        batch = make_forward_batch("EXTEND", [0] * 4, [tokens] * 4, [0] * 4)
        graphs.backend.init_forward_metadata_out_graph(batch, in_capture=True)
    assert graphs.prepared == [("capture", 4)] * 2


def test_without_a_second_label_stock_is_prepared_as_sglang_asks() -> None:
    """As for LoRA, of which SGLang captures two graphs per size."""
    graphs = Graphs("never")
    for _ in range(2):
        graphs.capture("", 4)
    assert graphs.prepared == [("capture", 4)] * 2


def test_a_size_that_no_plan_fits_is_captured_without_ours() -> None:
    graphs = Graphs()
    assert graphs.backend._planner is not None
    graphs.backend._planner.max_batch_size = 2
    graphs.capture("packed", 4)
    assert not graphs.backend._step.packed
    assert graphs.replay(4, 4) == "stock"
    assert graphs.counted["fallback_reasons"] == {"workspace": 1}
    graphs.capture("packed", 2)
    assert graphs.backend._step.packed


def test_arguments_found_in_a_warm_up_delegate_their_layers_and_nothing_else() -> None:
    graphs = Graphs()
    graphs.capture("packed", 2)
    assert graphs.prepared == []
    first, second = graphs.layers
    graphs.decode(first, 2, aux=torch.zeros(NUM_QO_HEADS))
    # As for capture, not as for an eager step: the graph will read those buffers.
    assert graphs.prepared == [("capture", 2)]
    assert graphs.decode(second, 2).shape == (2, NUM_QO_HEADS * 64)
    counted = graphs.counted
    assert counted["delegated_layers"] == {"0": "unknown-argument"}
    assert graphs.backend.counters.decode.steps == 0
    assert graphs.backend._step.packed


def test_graphs_that_sglang_captures_after_the_start_are_stock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prefill server that becomes a decode server: it was started not to capture decode."""
    monkeypatch.setattr(backend_module, "captures_decode", lambda runner: False)
    graphs = Graphs("always")
    graphs.backend.init_cuda_graph_state(4, 4)
    graphs.capture("", 4)
    assert not graphs.backend._step.packed
    graphs.replay(2, 4)
    assert not graphs.backend._step.packed
    # Without the second one, the graph would read what was left of another batch.
    assert graphs.prepared == [("capture", 4), ("replay", 4)]
    assert graphs.counted["fallback_reasons"] == {"late-graph": 1}
