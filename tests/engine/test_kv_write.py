"""Who writes KV, and with which scales: our backend on SGLang's pools and layers, no engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefix_kernels.executor import PlanExecutor
from tests.engine.bare_backend import LENGTHS, NUM_KV_HEADS, NUM_QO_HEADS, SCALES, Bench

# Against the oracle on the same 8-bit values; the rest is float32 arithmetic.
TOLERANCE = 2e-5


def calls_of(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Positional arguments of every call of a method, which still does its work."""
    calls: list[tuple[Any, ...]] = []
    original: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


def fail(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("raised on purpose by a test")


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_kv_is_written_once_and_scaled_where_the_cache_has_8_bits(
    kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(kv_dtype)
    is_8_bit = kv_dtype != torch.float32
    writes = calls_of(bench.pool, "set_kv_buffer", monkeypatch)
    where = bench.batch.out_cache_loc
    with bench.step():
        for layer, scales in zip(bench.layers, SCALES, strict=True):
            k_scale, v_scale = scales if is_8_bit else (1.0, 1.0)
            k, v = torch.randn(2, len(LENGTHS), NUM_KV_HEADS, 64)
            q, out = bench.decode(layer, k.clone(), v.clone())
            for buffer, written in (
                (bench.pool.get_key_buffer(layer.layer_id), k / k_scale),
                (bench.pool.get_value_buffer(layer.layer_id), v / v_scale),
            ):
                assert torch.equal(buffer[where].float(), written.to(kv_dtype).float())
            expected = bench.expected(q, layer, k_scale, v_scale)
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE * v_scale)
            if not is_8_bit:  # stock ignores the scales as well
                stock = bench.stock.forward(q, None, None, layer, bench.batch, False)
                torch.testing.assert_close(out, stock, rtol=0, atol=TOLERANCE)
    assert len(writes) == len(SCALES)
    assert bench.counted["packed_steps"] == 1
    assert bench.counted["kv_read_ratio"] < 0.3


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn])
def test_stock_does_not_write_again_what_we_wrote_before_an_exception(
    kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(kv_dtype)
    writes = calls_of(bench.pool, "set_kv_buffer", monkeypatch)
    stock_calls = calls_of(bench.stock, "forward", monkeypatch)
    monkeypatch.setattr(PlanExecutor, "run", fail)
    first, second = bench.layers
    k, v = torch.randn(2, len(LENGTHS), NUM_KV_HEADS, 64)
    stored = (k if kv_dtype == torch.float32 else k / SCALES[0][0]).to(kv_dtype)
    with bench.step():
        q, out = bench.decode(first, k.clone(), v.clone())
        found = bench.pool.get_key_buffer(0)[bench.batch.out_cache_loc]
        assert torch.equal(found.float(), stored.float())
        # torch_native reads 8-bit values without their scales.
        expected = bench.expected(q, first, 1.0, 1.0)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE)
        assert stock_calls[0][5] is False
        assert len(writes) == 1
        bench.decode(second)
        assert stock_calls[1][5] is True
        assert len(writes) == 2  # the stock backend's own, once
    assert bench.counted["fallback_reasons"] == {"error": 1}
    assert bench.counted["packed_steps"] == bench.counted["kv_tokens_read"] == 0


def test_verify_lets_the_exception_through(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(verify=True)
    monkeypatch.setattr(PlanExecutor, "run", fail)
    with bench.step(), pytest.raises(RuntimeError, match="on purpose"):
        bench.decode(bench.layers[0])


def test_an_unknown_argument_hands_the_layer_to_stock() -> None:
    bench = Bench()
    first, second = bench.layers
    with bench.step():
        with pytest.raises(TypeError, match="unexpected"):  # torch_native knows neither
            bench.decode(first, sinks=torch.zeros(NUM_QO_HEADS), aux=1)
        # That layer from now on, and no other; the step goes on.
        bench.decode(second)
    assert bench.counted["delegated_layers"] == {"0": "unknown-argument"}
    assert bench.counted["packed_steps"] == 1
    assert bench.counted["fallback_reasons"] == {}
    # With the last layer goes the server.
    with bench.step(), pytest.raises(TypeError, match="aux"):
        bench.decode(second, aux=1)
    with bench.step():
        bench.decode(first)
    assert bench.counted["fallback_reasons"] == {"no-layer": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_are_served(dtype: torch.dtype) -> None:
    """As a parameter of the model's, in its dtype or in bfloat16, as SGLang has them."""
    bench = Bench()
    sinks = torch.nn.Parameter((5 + torch.randn(NUM_QO_HEADS)).to(dtype), requires_grad=False)
    for layer in bench.layers:
        layer.k_scale = layer.v_scale = None
    with bench.step():
        for layer, given in zip(bench.layers, (sinks, None), strict=True):
            q, out = bench.decode(layer, sinks=given)
            expected = bench.expected(q, layer, 1.0, 1.0, sinks=given)
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE)
    assert bench.counted["packed_steps"] == 1
    assert bench.counted["delegated_layers"] == {}


def test_after_an_exception_stock_gets_the_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, sinks = Bench(), torch.zeros(NUM_QO_HEADS)
    monkeypatch.setattr(PlanExecutor, "run", fail)
    with bench.step(), pytest.raises(TypeError, match="sinks"):  # torch_native refuses them
        bench.decode(bench.layers[0], sinks=sinks)
    assert bench.counted["fallback_reasons"] == {"error": 1}
    assert bench.counted["delegated_layers"] == {}


@pytest.mark.parametrize(
    "sinks",
    [
        torch.zeros(NUM_QO_HEADS + 1),
        torch.zeros(1, NUM_QO_HEADS),
        torch.zeros(NUM_QO_HEADS, dtype=torch.float64),
        torch.zeros(2 * NUM_QO_HEADS)[::2],
    ],
    ids=["heads", "dims", "dtype", "stride"],
)
def test_other_sinks_are_left_to_stock(sinks: torch.Tensor) -> None:
    bench = Bench()
    with bench.step(), pytest.raises(TypeError, match="sinks"):
        bench.decode(bench.layers[0], sinks=sinks)
    assert bench.counted["delegated_layers"] == {"0": "unknown-argument"}
