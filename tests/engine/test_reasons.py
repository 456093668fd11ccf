"""What goes to stock, on SGLang's own layers, pools and batches of the installed release."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_prefix.backend.fallback import layer_reason, server_reason
from tests.engine.test_kv_write import NUM_KV_HEADS, NUM_QO_HEADS, Bench


def runner(**changes: Any) -> Any:
    """What ``server_reason`` looks at, with nothing in it that goes to stock."""
    pool = SimpleNamespace(dtype=torch.float32)
    plain = {
        "token_to_kv_pool": pool,
        "server_args": SimpleNamespace(),
        "model_config": SimpleNamespace(is_encoder_decoder=False),
        "is_draft_worker": False,
        "use_mla_backend": False,
        "device": "cpu",
        "dtype": torch.float32,
    }
    return SimpleNamespace(**plain | changes)


SERVERS: dict[str, dict[str, Any]] = {
    "draft-model": {"is_draft_worker": True},
    "mla": {"use_mla_backend": True},
    "encoder-decoder": {"model_config": SimpleNamespace(is_encoder_decoder=True)},
    "deterministic": {"server_args": SimpleNamespace(enable_deterministic_inference=True)},
    "context-parallel": {"server_args": SimpleNamespace(dcp_size=2)},
    "kv-quantized": {"server_args": SimpleNamespace(kv_cache_dtype="fp4_e2m1")},
    "kv-layout": {"token_to_kv_pool": SimpleNamespace(dtype=torch.float32, kv_cache_layout="hnd")},
    "kv-dtype": {"dtype": torch.float64},
    "cpu-graph": {"server_args": SimpleNamespace(enable_torch_compile=True)},
    "torch-compile": {"device": "cuda", "server_args": SimpleNamespace(enable_torch_compile=True)},
    "two-batch-overlap": {"server_args": SimpleNamespace(enable_two_batch_overlap=True)},
    "pd-multiplexing": {"server_args": SimpleNamespace(enable_pdmux=True)},
}


@pytest.mark.parametrize("reason", SERVERS)
def test_servers_that_go_to_stock(reason: str) -> None:
    assert server_reason(runner(), "always") is None
    assert server_reason(runner(**SERVERS[reason]), "always") == reason


def test_decode_graphs_alone_are_no_reason_but_with_dp_attention_the_gate_must_be_set() -> None:
    assert server_reason(runner(device="cuda"), "auto") is None
    ranks = runner(device="cuda", server_args=SimpleNamespace(enable_dp_attention=True))
    assert server_reason(ranks, "auto") == "dp-attention"
    assert server_reason(ranks, "always") is None


@pytest.mark.parametrize(
    ("variable", "reason"),
    [
        ("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "metadata-glue-graph"),
        ("SGLANG_USE_HND_KVCACHE", "kv-layout"),
    ],
)
def test_environment_variables_that_go_to_stock(
    variable: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    assert server_reason(runner(), "always") == reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"sliding_window_size": 64}, "sliding-window"),
        ({"is_cross_attention": True}, "cross-attention"),
        ({"attn_type": "encoder_only"}, "attention-type"),
        ({"use_irope": True}, "position-encoding"),
        ({"logit_cap": 30.0}, "logit-capping"),
    ],
    ids=["plain", "window", "cross", "encoder", "irope", "cap"],
)
def test_layers_that_go_to_stock(options: dict[str, Any], reason: str | None) -> None:
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    if "attn_type" in options:
        options = {"attn_type": AttentionType(options["attn_type"])}
    layer = RadixAttention(NUM_QO_HEADS, 64, 0.125, NUM_KV_HEADS, 0, **options)
    found = layer_reason(layer, {"torch_native"}, kv_is_8_bit=False, same_dtype=True)
    assert found == reason


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("spec_info", object(), "speculative"),
        ("tbo_children", [object(), object()], "two-batch-overlap"),
        ("tbo_parent_token_range", (0, 3), "two-batch-overlap"),
    ],
)
def test_batches_that_go_to_stock(attribute: str, value: Any, reason: str) -> None:
    bench = Bench(torch.float32)
    assert hasattr(bench.batch, attribute)
    setattr(bench.batch, attribute, value)
    bench.backend.init_forward_metadata(bench.batch)
    assert dict(bench.backend.counters.fallback_reasons) == {reason: 1}
    assert bench.backend.counters.packed_steps == 0


def test_idle_batches_are_no_decode_steps() -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    bench = Bench(torch.float32)
    bench.batch.forward_mode = ForwardMode.IDLE
    bench.backend.forward_metadata = None  # as SGLang's own runner does on an idle rank
    kv = torch.empty(0, NUM_KV_HEADS, 64)
    q = torch.empty(0, NUM_QO_HEADS * 64)
    out = bench.backend.forward(q, kv, kv, bench.layers[0], bench.batch)
    assert out.shape == q.shape
    counters = bench.backend.counters
    assert counters.packed_steps == counters.stock_steps == counters.fallback_steps == 0
