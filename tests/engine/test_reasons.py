"""What goes to stock, on SGLang's own layers, pools and batches of the installed release."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from prefix_kernels import launch, native_library
from prefix_kernels.executor import PlanExecutor
from prefix_patches import rank_agreement
from prefix_patches.attention_layers import attention_layers, attention_sinks
from prefix_patches.kv_pool import is_slot_major
from prefix_patches.schedule_context import PASSED_BY
from sglang_prefix.backend import backend as backend_module
from sglang_prefix.backend.fallback import (
    GATE_REASONS,
    REASONS,
    argument_reason,
    layer_reason,
    server_reason,
)
from sglang_prefix.config import PrefixConfig
from tests.engine.bare_backend import NUM_QO_HEADS, Bench, make_layer, make_runner
from tests.engine.server_args import model_folder
from tests.scheduling import make_forward_batch

# What differs from a server that packs, from a layer that is packed, from a batch that is.
SERVERS: dict[str, dict[str, Any]] = {
    "draft-model": {"is_draft_worker": True},
    "encoder-decoder": {"model_config.is_encoder_decoder": True},
    "deterministic": {
        "flags": "--attention-backend triton --decode-attention-backend prefix "
        "--enable-deterministic-inference"
    },
    "context-parallel": {"flags": "--tp-size 2 --dcp-size 2"},
    "kv-quantized": {"token_to_kv_pool": "MHATokenToKVPoolMXFP8"},
    "kv-layout": {"token_to_kv_pool.kv_cache_layout": "hnd"},
    "kv-dtype": {"dtype": torch.float64},
    "cpu-graph": {"flags": "--enable-torch-compile"},
    "torch-compile": {"device": "cuda", "flags": "--enable-torch-compile"},
    "two-batch-overlap": {"flags": "--enable-two-batch-overlap"},
    "pd-multiplexing": {"flags": "--enable-pdmux"},
    "adaptive-drafts": {
        "flags": "--attention-backend prefix --speculative-algorithm EAGLE --speculative-adaptive "
        f"--speculative-draft-model-path {model_folder()}"
    },
    "gate-never": {"gate": "never"},
}
VARIABLES = {
    "metadata-glue-graph": "SGLANG_ENABLE_METADATA_GLUE_GRAPH",
    "kv-layout": "SGLANG_USE_HND_KVCACHE",
    "dp-attention": "SGLANG_SCHEDULER_SKIP_ALL_GATHER",
}
DP_ATTENTION = {
    "device": "cuda",
    "flags": "--tp-size 2 --dp-size 2 --enable-dp-attention",
    "gate": "auto",
}
SCALED = {"k_scale": torch.ones(()), "v_scale": torch.ones(())}
LAYERS: dict[str, dict[str, Any]] = {
    "sliding-window": {"sliding_window_size": 64},
    "cross-attention": {"is_cross_attention": True},
    "attention-type": {"attn_type": "ENCODER_ONLY"},
    "position-encoding": {"use_irope": True},
    "logit-capping": {"logit_cap": 30.0},
    "kv-scales": {"kv_is_8_bit": True, **SCALED},
    "head-groups": {"tp_q_head_num": 7},
}
BATCHES: dict[str, tuple[str, Any]] = {
    "speculative": ("spec_info", object()),
    "two-batch-overlap": ("tbo_children", [object(), object()]),
    "two-batch-overlap, a half": ("tbo_parent_token_range", (0, 3)),
}
# Reasons that need more than one changed value, and where they are.
ELSEWHERE = {
    "unknown-attributes": "test_attributes",
    "late-graph": "test_graph_labels",
    "kernels": "test_graph_labels",
    "error": "test_kv_write",
    "unknown-argument": "test_kv_write",
    "latent-attention": "test_latent_attention",
    "workspace": "test_graph_labels",
    "gate-no-gain": "test_gate",
    "gate-other-ranks": "test_rank_agreement",
    "gate-nothing-shared": "test_no_device_sync",
    "no-request-info": "test_decode_planner",
    "no-radix-paths": "test_decode_planner",
    "speculative-tree": "test_speculation",
    "speculative-ranks": "test_speculation",
    "query-lengths": "test_speculation",
}
HERE = {
    *("no-layer", "no-attention", "cuda-graph", "other-batch", "attention-sinks"),
    *PASSED_BY.values(),
}


def reason_of(changes: dict[str, Any]) -> str | None:
    """Of a server that packs but for these changes; a dot leads into an object of its runner."""
    changes = dict(changes)
    gate = changes.pop("gate", "always")
    inner = {name: changes.pop(name) for name in list(changes) if "." in name}
    if pool := changes.pop("token_to_kv_pool", None):
        changes["token_to_kv_pool"] = make_pool(pool)
    runner = make_runner(**changes)
    for path, value in inner.items():
        owner, _, name = path.partition(".")
        assert hasattr(getattr(runner, owner), name)
        setattr(getattr(runner, owner), name, value)
    return server_reason(runner, gate)


def make_pool(name: str) -> Any:
    """A pool of SGLang's that stores values with a scale per block."""
    from sglang.srt.mem_cache import memory_pool

    return getattr(memory_pool, name)(64, 1, torch.float8_e4m3fn, 2, 64, 1, "cpu", False)


def test_every_reason_has_a_test() -> None:
    tested = set(SERVERS) | set(VARIABLES) | set(LAYERS) | set(ELSEWHERE) | HERE
    assert tested | {name.split(",")[0] for name in BATCHES} == set(REASONS)
    assert set(GATE_REASONS) < set(REASONS)


@pytest.mark.parametrize("reason", SERVERS)
def test_servers_that_go_to_stock(reason: str) -> None:
    assert reason_of({}) is None
    assert reason_of(SERVERS[reason]) == reason


@pytest.mark.parametrize("name", ["UnifiedMHATokenToKVPool", "UnifiedMLATokenToKVPool"])
def test_pools_whose_slots_are_translated_are_another_layout(name: str) -> None:
    from sglang.srt.mem_cache import unified_memory_pool

    cls = getattr(unified_memory_pool, name)
    assert not is_slot_major(object.__new__(cls))
    assert is_slot_major(object.__new__(cls.__base__))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "dp-attention"),
        ({"device": "npu:0"}, "dp-attention"),
        ({"device": "cpu"}, None),
        ({"gate": "always"}, None),
        ({"flags": ""}, None),
    ],
)
@pytest.mark.parametrize("hindrance", ["a variable", "ranks that come later", "a release"])
def test_ranks_that_cannot_agree_on_a_graph_go_to_stock_where_they_would_have_to(
    hindrance: str, changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = DP_ATTENTION | changes
    assert reason_of(server) is None
    if hindrance == "a variable":
        monkeypatch.setenv("SGLANG_SCHEDULER_SKIP_ALL_GATHER", "1")
    elif hindrance == "ranks that come later":
        server |= {"flags": f"{server['flags']} --elastic-ep-backend mooncake"}
    else:
        monkeypatch.setattr(rank_agreement, "_INFO", f"{rank_agreement._HOME}:DPSyncInfo")
        monkeypatch.setattr(
            rank_agreement,
            "TOUCHED",
            [
                replace(touch, symbol=touch.symbol.replace("MLPSyncBatchInfo", "DPSyncInfo"))
                for touch in rank_agreement.TOUCHED
            ],
        )
    assert reason_of(server) == reason


@pytest.mark.parametrize("reason", VARIABLES)
def test_environment_variables_that_go_to_stock(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = DP_ATTENTION if reason == "dp-attention" else {}
    assert reason_of(changes) is None
    monkeypatch.setenv(VARIABLES[reason], "1")
    assert reason_of(changes) == reason


@pytest.mark.parametrize("reason", [None, *LAYERS])
def test_layers_that_go_to_stock(reason: str | None) -> None:
    changes = {} if reason is None else dict(LAYERS[reason])
    is_8_bit = changes.pop("kv_is_8_bit", False)
    layer = make_layer(0)
    for name, value in changes.items():
        assert hasattr(layer, name)
        setattr(layer, name, type(layer.attn_type)[value] if name == "attn_type" else value)
    found = layer_reason(layer, {"torch_native"}, kv_is_8_bit=is_8_bit, same_dtype=True)
    assert found == reason


def test_sinks_that_prefill_would_ignore_are_left_to_stock() -> None:
    layer, sinks = make_layer(0), torch.zeros(NUM_QO_HEADS)
    for names, reason in (({"triton"}, None), ({"triton", "hpc_ops"}, "attention-sinks")):
        assert argument_reason(layer, {"sinks": sinks}, names) == reason
        assert argument_reason(layer, {"sinks": None}, names) is None
    assert argument_reason(layer, {"sinks": sinks, "other": 1}, {"triton"}) == "unknown-argument"


def build(layers: list[Any]) -> Any:
    """A backend whose stock backend is never called."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    runner = make_runner(layers)
    stock = TorchNativeAttnBackend(runner)
    config = PrefixConfig(executor="torch", gate="always")
    return backend_module.PrefixAttnBackend(runner, stock, "triton", config)


def test_a_server_without_a_layer_of_ours_or_with_graphs_on_the_torch_executor_goes_to_stock(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert build([make_layer(0, sliding_window_size=16)])._server_reason == "no-layer"
        monkeypatch.setattr(backend_module, "captures_decode", lambda runner: True)
        assert build([make_layer(0)])._server_reason == "cuda-graph"
    starts = [text for text in caplog.messages if "stock backend triton" in text]
    for text, reason in zip(starts, ("no-layer", "cuda-graph"), strict=True):
        assert "0 of 1 layers, executor none" in text
        assert text.endswith(f"graph labels none, inactive: {REASONS[reason]}")
    assert f"layers [0] are stock's ({REASONS['sliding-window']})" in caplog.text


def test_the_torch_executor_says_why_it_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert Bench().backend._report()["executor"] == "native"
        monkeypatch.setattr(native_library, "_outcome", lambda: "there is no compiler")
        bench = Bench()
    text = "torch (the native executor cannot be used: there is no compiler)"
    assert bench.backend._report()["executor"] == text
    first, second = (line for line in caplog.messages if "layers, executor" in line)
    assert "2 of 2 layers, executor native, stock" in first
    assert f"2 of 2 layers, executor {text}, stock" in second
    with bench.step():
        bench.decode(bench.layers[0])
    assert bench.counted["packed_steps"] == 1


def test_a_model_without_layers_of_sglangs_is_told_from_one_whose_layers_are_all_stocks() -> None:
    assert build([])._server_reason == "no-attention"


def test_layers_that_stand_beside_a_models_modules_are_found() -> None:
    # As SGLang's `TransformersForCausalLM` keeps them.
    layers = [make_layer(i) for i in range(2)]
    model = torch.nn.Module()
    inner: Any = torch.nn.Module()
    model.inner = inner
    inner.attention_instances = dict(enumerate(layers))
    assert attention_layers(model) == layers
    model.first = layers[0]
    assert sorted(layer.layer_id for layer in attention_layers(model)) == [0, 1]


def test_sinks_are_found_beside_their_layer_so_that_kernels_are_compiled_for_them() -> None:
    layers = [make_layer(i) for i in range(3)]
    model = torch.nn.ModuleList(torch.nn.Module() for _ in layers)
    for module, layer, name in zip(
        model, layers, ("sinks", "attention_sink_bias", "q"), strict=True
    ):
        module.attn = layer
        setattr(module, name, torch.nn.Parameter(torch.zeros(NUM_QO_HEADS)))
    found = attention_sinks(model)
    assert list(found) == layers[:2]
    assert found[layers[0]] is model[0].sinks
    given: list[Any] = []

    def record(kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        if kernel.__name__ == "pack_forward_kernel":
            given.append(arguments["sinks_ptr"])

    runner = make_runner(layers, model=model)
    config = PrefixConfig(executor="triton", gate="always")
    with launch.recorded(record, run=False):
        backend_module.PrefixAttnBackend(runner, object(), "triton", config)
    assert {None if sinks is None else id(sinks) for sinks in given} == {
        None,
        *(id(sinks) for sinks in found.values()),
    }


@pytest.mark.parametrize("mode", PASSED_BY)
def test_passes_that_go_by_us_are_counted(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    schedule = bench.backend._schedule
    with bench.step():
        bench.decode(bench.layers[0])
    for passing in (mode, "EXTEND", mode):
        batch = make_forward_batch(passing, [1, 2], [5, 6], [4, 5])
        schedule.pop(schedule.push(batch))
    counted = bench.backend._report()
    kind = "verify" if mode == "TARGET_VERIFY" else "extend"
    assert counted[kind]["fallback_reasons"] == {PASSED_BY[mode]: 2}
    assert (counted["packed_steps"], counted["fallback_reasons"]) == (1, {})
    assert caplog.text.count(REASONS[PASSED_BY[mode]]) == 1


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_go_to_stock(name: str) -> None:
    bench = Bench()
    attribute, value = BATCHES[name]
    assert hasattr(bench.batch, attribute)
    setattr(bench.batch, attribute, value)
    with bench.step():
        pass
    assert bench.counted["fallback_reasons"] == {name.split(",")[0]: 1}
    assert bench.counted["packed_steps"] == 0


def test_a_call_with_another_number_of_queries_goes_to_stock_with_the_rest_of_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    seen: list[int] = []
    stock: Callable[..., Any] = lambda q, *args, **kwargs: seen.append(len(q))  # noqa: E731
    monkeypatch.setattr(bench.stock, "forward", stock)
    monkeypatch.setattr(PlanExecutor, "run", lambda *args, **kwargs: seen.append(-1))
    with bench.step():
        bench.decode(bench.layers[0])
        q = torch.zeros(2, 8 * 64)
        bench.backend.forward(q, None, None, bench.layers[1], bench.batch)
        bench.decode(bench.layers[0])
    assert seen == [-1, 2, 6]
    assert bench.counted["fallback_reasons"] == {"other-batch": 1}
    assert bench.counted["packed_steps"] == 0


def test_idle_batches_are_no_decode_steps() -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    bench = Bench()
    bench.batch.forward_mode = ForwardMode.IDLE
    bench.backend.forward_metadata = None  # as SGLang's own runner does on an idle rank
    kv, q = torch.empty(0, 2, 64), torch.empty(0, 8 * 64)
    out = bench.backend.forward(q, kv, kv, bench.layers[0], bench.batch)
    assert out.shape == q.shape
    assert bench.backend.counters.decode.steps == 0
