"""Which graph a step captures and replays, decided by our backend on SGLang's pools, no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_prefix.backend import backend as backend_module
from sglang_prefix.config import PrefixConfig
from sglang_prefix.gate import Decision

HEADS, KV_HEADS, DIM, ROWS, CONTEXT = 4, 2, 32, 8, 64


class FixedGate:
    """Says what it is told."""

    packs = True

    def choose(self, plans: Any, forest: Any) -> Decision:
        """As told."""
        return Decision(self.packs, None if self.packs else "gate-no-gain", 1.0, 2.0)

    def leave(self) -> None:
        """Nothing to do."""


class Graphs:
    """A backend whose decode is captured, and SGLang's views of batches.

    Args:
        gate: the setting.
        args: what SGLang's settings say.
        windows: layers with a sliding window, which are the stock backend's.
    """

    def __init__(self, gate: str = "auto", *, windows: int = 0, **args: Any) -> None:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool

        layers = torch.nn.ModuleList(
            RadixAttention(
                HEADS, DIM, DIM**-0.5, KV_HEADS, i, sliding_window_size=16 if i < windows else -1
            )
            for i in range(2)
        )
        self.layers = list(layers)
        runner = SimpleNamespace(
            token_to_kv_pool=MHATokenToKVPool(
                200, 1, torch.float32, KV_HEADS, DIM, len(layers), "cpu", False
            ),
            req_to_token_pool=ReqToTokenPool(ROWS, CONTEXT, "cpu", False),
            model=layers,
            server_args=SimpleNamespace(**args),
            model_config=SimpleNamespace(context_len=CONTEXT),
            is_draft_worker=False,
            use_mla_backend=False,
            device="cpu",
            dtype=torch.float32,
            page_size=1,
        )
        stock: Any = TorchNativeAttnBackend(runner)
        self.prepared: list[tuple[str, int]] = []  # how the stock backend was prepared
        stock.init_cuda_graph_state = lambda max_bs, tokens: None
        stock.init_forward_metadata_out_graph = lambda batch, in_capture=False: (
            self.prepared.append(("capture" if in_capture else "replay", batch.batch_size))
        )
        stock.init_forward_metadata_in_graph = lambda batch: None
        config = PrefixConfig(gate=gate, executor="triton", workspace_mib=4)
        self.backend = backend_module.PrefixAttnBackend(runner, stock, "torch_native", config)
        self.schedule = self.backend._schedule

    @property
    def labels(self) -> list[str]:
        """What each graph is captured under."""
        return list(self.schedule.graph_labels)

    def view(self, num_requests: int, batch_size: int, mode: str = "DECODE") -> Any:
        """What the graph runner hands over; padding rows at the end."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        lens = torch.ones(batch_size, dtype=torch.int64)
        return SimpleNamespace(
            batch_size=batch_size,
            num_padding=batch_size - num_requests,
            forward_mode=ForwardMode.DECODE,
            actual_forward_mode=ForwardMode[mode],
            req_pool_indices=torch.zeros(batch_size, dtype=torch.int64),
            seq_lens=lens,
            seq_lens_cpu=lens,
            seq_lens_sum=batch_size,
            out_cache_loc=torch.zeros(batch_size, dtype=torch.int64),
            spec_info=None,
        )

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
        q = torch.randn(batch_size, HEADS * DIM)
        k, v = torch.randn(2, batch_size, KV_HEADS, DIM)
        view = self.view(batch_size, batch_size)
        return self.backend.forward_decode(q, k, v, layer, view, False, **kwargs)


@pytest.fixture(autouse=True)
def captured(monkeypatch: pytest.MonkeyPatch) -> type[FixedGate]:
    """Decode is captured, and the gate says what a test wants."""
    monkeypatch.setattr(backend_module, "captures_decode", lambda runner: True)
    monkeypatch.setattr(backend_module, "warm_up", lambda *_: 0.0)  # minutes in the interpreter
    monkeypatch.setattr("sglang_prefix.backend.fallback.captures_decode", lambda runner: True)
    monkeypatch.setattr(FixedGate, "packs", True)
    monkeypatch.setattr(
        backend_module, "make_gate", lambda name, *_: FixedGate() if name == "auto" else None
    )
    return FixedGate


def test_labels_follow_the_setting() -> None:
    assert Graphs("auto").labels == ["packed", "stock"]
    assert Graphs("always").labels == ["packed"]
    assert Graphs("never").labels == []


def test_always_keeps_a_stock_graph_only_where_the_workspace_may_not_do() -> None:
    graphs = Graphs("always")
    graphs.backend.init_cuda_graph_state(ROWS, ROWS)
    assert graphs.labels == ["packed"]
    graphs.backend.init_cuda_graph_state(100_000, 100_000)
    assert graphs.labels == ["packed", "stock"]


def test_ranks_with_batches_of_their_own_get_one_label() -> None:
    """A graph's all-reduce reads what the same graph of the other ranks wrote."""
    auto = Graphs("auto", enable_dp_attention=True)
    assert auto.labels == []
    assert auto.backend._server_reason == "dp-attention"
    always = Graphs("always", enable_dp_attention=True)
    always.backend.init_cuda_graph_state(ROWS, ROWS)
    assert always.labels == ["packed"]
    with pytest.raises(ValueError, match="change SGLANG_PREFIX_WORKSPACE_MIB"):
        always.backend.init_cuda_graph_state(100_000, 100_000)


def test_a_rank_that_cannot_plan_does_not_choose_another_graph_than_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("raised on purpose by a test")

    alone, one_of_two = Graphs(), Graphs(tp_size=2)
    for graphs in (alone, one_of_two):
        monkeypatch.setattr(graphs.backend._batches, "prepare", fail)
    assert alone.replay(2, 2) == "stock"
    assert alone.backend.counters.fallback_reasons == {"error": 1}
    with pytest.raises(RuntimeError, match="on purpose"):
        one_of_two.replay(2, 2)


@pytest.mark.parametrize(("gate", "label"), [("auto", "stock"), ("always", "packed")])
def test_an_idle_rank_replays_a_graph_and_counts_nothing(gate: str, label: str) -> None:
    graphs = Graphs(gate)
    assert graphs.replay(0, 4, "IDLE") == label
    assert graphs.backend.counters.decode_steps == 0


def test_a_batch_that_nothing_is_known_of_gets_a_graph() -> None:
    """Without a schedule batch; on the CPU its rows are compared."""
    always = Graphs("always")
    always.backend._batches._req_to_token = torch.empty(0, device="meta")  # type: ignore[union-attr]
    loaded = []
    always.backend._batches._load = lambda *args: loaded.append(args)  # type: ignore[union-attr, method-assign]
    assert always.replay(3, 4) == "packed"
    assert loaded
    assert always.backend.counters.fallback_reasons == {"no-request-info": 1}


def test_a_capture_counts_nothing_and_prepares_stock_once_per_size() -> None:
    """FlashInfer's makes new buffers each time, which the other graph would not see."""
    graphs = Graphs(windows=1)
    for size in (4, 2):
        for label in graphs.labels:
            graphs.capture(label, size)
            assert graphs.backend._packed is (label == "packed")
    assert graphs.prepared == [("capture", 4), ("capture", 2)]
    # A runner that captures again, as after a change of the role, prepares again.
    graphs.backend.init_cuda_graph_state(4, 4)
    graphs.capture("packed", 2)
    assert graphs.prepared[-1] == ("capture", 2)
    assert len(graphs.prepared) == 3
    assert graphs.backend.counters.decode_steps == 0


def test_without_a_second_label_stock_is_prepared_as_sglang_asks() -> None:
    """As for LoRA, of which SGLang captures two graphs per size."""
    graphs = Graphs("never")
    for _ in range(2):
        graphs.capture("", 4)
    assert graphs.prepared == [("capture", 4)] * 2


def test_a_size_that_no_plan_fits_is_captured_without_ours() -> None:
    graphs = Graphs()
    assert graphs.backend._batches is not None
    graphs.backend._batches.max_rows = 2
    graphs.capture("packed", 4)
    assert not graphs.backend._packed
    assert graphs.replay(4, 4) == "stock"
    assert graphs.backend.counters.fallback_reasons == {"workspace": 1}
    graphs.capture("packed", 2)
    assert graphs.backend._packed


def test_arguments_found_in_a_warm_up_delegate_their_layers_and_nothing_else() -> None:
    graphs = Graphs()
    graphs.capture("packed", 2)
    assert graphs.prepared == []
    first, second = graphs.layers
    with pytest.raises(TypeError, match="sinks"):  # torch_native does not know them either
        graphs.decode(first, 2, sinks=torch.zeros(HEADS))
    # As for capture, not as for an eager step: the graph will read those buffers.
    assert graphs.prepared == [("capture", 2)]
    assert graphs.decode(second, 2).shape == (2, HEADS * DIM)
    counters = graphs.backend.counters
    assert counters.delegated_layers == {0: "unknown-argument"}
    assert (counters.packed_steps, counters.decode_steps) == (0, 0)
    assert graphs.backend._packed
