"""Who writes KV, and with which scales: our backend on SGLang's pools and layers, no engine."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefix_kernels.oracle import decode_attention_oracle
from sglang_prefix.config import PrefixConfig

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64
SHARED, LENGTHS = 1500, (1510, 1531, 1503, 1515, 1501, 1520)
SCALES = ((2.0, 0.5), (0.25, 4.0))
# Against the oracle on the same 8-bit values; the rest is float32 arithmetic.
TOLERANCE = 2e-5


class Bench:
    """A backend over real pools that hold six requests with a shared prefix, two layers."""

    def __init__(self, kv_dtype: torch.dtype, verify: bool = False) -> None:
        # Here, because importing SGLang takes ten seconds, and collecting tests should not.
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool

        from sglang_prefix.backend.backend import PrefixAttnBackend

        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(map(scaled_layer, range(len(SCALES))))
        self.pool = MHATokenToKVPool(
            2000, 1, kv_dtype, NUM_KV_HEADS, HEAD_DIM, len(SCALES), "cpu", False
        )
        self.requests = ReqToTokenPool(8, 2048, "cpu", False)
        runner = SimpleNamespace(
            token_to_kv_pool=self.pool,
            req_to_token_pool=self.requests,
            model=self.layers,
            server_args=SimpleNamespace(),
            model_config=SimpleNamespace(),
            is_draft_worker=False,
            use_mla_backend=False,
            device="cpu",
            dtype=torch.float32,
            page_size=1,
        )
        self.stock = TorchNativeAttnBackend(runner)
        config = PrefixConfig(verify=verify)
        self.backend = PrefixAttnBackend(
            runner,
            self.stock,
            "triton",  # in name only: torch_native ignores scales, so we leave it layers with
            config,
        )
        self.batch = self._fill()

    def _fill(self) -> Any:
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        slots = torch.randperm(1999)[: SHARED + sum(n - SHARED for n in LENGTHS)] + 1
        shared, own = slots[:SHARED], slots[SHARED:]
        for row, tail in enumerate(torch.split(own, [n - SHARED for n in LENGTHS]), start=1):
            self.requests.req_to_token[row, : SHARED + len(tail)] = torch.cat((shared, tail)).int()
        lengths, rows = torch.tensor(LENGTHS), torch.arange(1, len(LENGTHS) + 1)
        for layer in self.layers:
            k, v = torch.randn(2, len(slots), NUM_KV_HEADS, HEAD_DIM)
            self.pool.set_kv_buffer(layer, slots, k, v)
        return ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=len(LENGTHS),
            input_ids=torch.zeros(len(LENGTHS), dtype=torch.int64),
            req_pool_indices=rows,
            seq_lens=lengths,
            seq_lens_cpu=lengths,
            seq_lens_sum=int(lengths.sum()),
            out_cache_loc=self.requests.req_to_token[rows, lengths - 1].long(),
        )

    def decode(self, layer: Any, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One call of one layer, with k and v that may be changed in place: queries, output."""
        q = torch.randn(len(LENGTHS), NUM_QO_HEADS * HEAD_DIM)
        return q, self.backend.forward(q, k, v, layer, self.batch)

    def expected(self, q: torch.Tensor, layer: Any, k_scale: Any, v_scale: Any) -> torch.Tensor:
        """The oracle's answer on what the pool holds."""
        out, _ = decode_attention_oracle(
            q.view(-1, NUM_QO_HEADS, HEAD_DIM),
            self.pool.get_key_buffer(layer.layer_id),
            self.pool.get_value_buffer(layer.layer_id),
            self.requests.req_to_token,
            self.batch.req_pool_indices,
            self.batch.seq_lens,
            sm_scale=layer.scaling,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return out.flatten(1)


def scaled_layer(layer_id: int) -> Any:
    from sglang.srt.layers.radix_attention import RadixAttention

    layer = RadixAttention(NUM_QO_HEADS, HEAD_DIM, HEAD_DIM**-0.5, NUM_KV_HEADS, layer_id)
    for name, value in zip(("k_scale", "v_scale"), SCALES[layer_id], strict=True):
        setattr(layer, name, torch.nn.Parameter(torch.tensor(value), requires_grad=False))
        setattr(layer, f"{name}_float", value)
    return layer


def new_kv() -> tuple[torch.Tensor, torch.Tensor]:
    k, v = torch.randn(2, len(LENGTHS), NUM_KV_HEADS, HEAD_DIM)
    return k, v


def counted(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Positional arguments of every call of a method, which still does its work."""
    calls: list[tuple[Any, ...]] = []
    original: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_caches_are_written_and_read_with_the_scales_of_each_layer(
    kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(kv_dtype)
    assert bench.pool.store_dtype == torch.uint8
    writes = counted(bench.pool, "set_kv_buffer", monkeypatch)
    bench.backend.init_forward_metadata(bench.batch)
    for layer, (k_scale, v_scale) in zip(bench.layers, SCALES, strict=True):
        k, v = new_kv()
        stored = (k / k_scale).to(kv_dtype), (v / v_scale).to(kv_dtype)
        q, out = bench.decode(layer, k.clone(), v.clone())
        where = bench.batch.out_cache_loc
        assert torch.equal(
            bench.pool.get_key_buffer(layer.layer_id)[where].float(), stored[0].float()
        )
        assert torch.equal(
            bench.pool.get_value_buffer(layer.layer_id)[where].float(), stored[1].float()
        )
        expected = bench.expected(q, layer, k_scale, v_scale)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE * v_scale)
    assert len(writes) == len(SCALES)
    assert bench.backend.counters.packed_steps == 1
    assert bench.backend.counters.as_dict()["kv_read_ratio"] < 0.3


def test_wide_caches_ignore_the_scales_as_stock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(torch.float32)
    writes = counted(bench.pool, "set_kv_buffer", monkeypatch)
    bench.backend.init_forward_metadata(bench.batch)
    for layer in bench.layers:
        q, out = bench.decode(layer, *new_kv())
        torch.testing.assert_close(
            out.double(), bench.expected(q, layer, 1.0, 1.0), rtol=0, atol=TOLERANCE
        )
        stock = bench.stock.forward(q, None, None, layer, bench.batch, False)
        torch.testing.assert_close(out, stock, rtol=0, atol=TOLERANCE)
    assert len(writes) == len(SCALES)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn])
def test_stock_does_not_write_again_what_we_wrote_before_an_exception(
    kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(kv_dtype)
    backend = bench.backend
    writes = counted(bench.pool, "set_kv_buffer", monkeypatch)
    stock_calls = counted(bench.stock, "forward", monkeypatch)
    runner = next(iter(backend._runner_of.values()))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("raised on purpose by a test")

    monkeypatch.setattr(runner, "run", fail)
    backend.init_forward_metadata(bench.batch)
    first, second = bench.layers
    k, v = new_kv()
    scaled = kv_dtype != torch.float32
    stored = (k / SCALES[0][0] if scaled else k).to(kv_dtype)
    q, out = bench.decode(first, k.clone(), v.clone())
    found = bench.pool.get_key_buffer(0)[bench.batch.out_cache_loc]
    assert torch.equal(found.float(), stored.float())
    # torch_native reads 8-bit values without their scales.
    torch.testing.assert_close(
        out.double(), bench.expected(q, first, 1.0, 1.0), rtol=0, atol=TOLERANCE
    )
    assert stock_calls[0][5] is False
    assert len(writes) == 1
    bench.decode(second, *new_kv())
    assert stock_calls[1][5] is True
    assert len(writes) == 2  # the stock backend's own, once
    assert dict(backend.counters.fallback_reasons) == {"error": 1}
    assert backend.counters.packed_steps == 0


def test_verify_lets_the_exception_through(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(torch.float32, verify=True)
    runner = next(iter(bench.backend._runner_of.values()))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("raised on purpose by a test")

    monkeypatch.setattr(runner, "run", fail)
    bench.backend.init_forward_metadata(bench.batch)
    with pytest.raises(RuntimeError, match="on purpose"):
        bench.decode(bench.layers[0], *new_kv())


def test_an_unknown_argument_hands_the_layer_to_stock() -> None:
    bench = Bench(torch.float32)
    backend = bench.backend
    backend.init_forward_metadata(bench.batch)
    first, second = bench.layers
    q = torch.randn(len(LENGTHS), NUM_QO_HEADS * HEAD_DIM)
    with pytest.raises(TypeError, match="sinks"):  # torch_native does not know them either
        backend.forward(q, *new_kv(), first, bench.batch, sinks=torch.zeros(NUM_QO_HEADS))
    # That layer from now on, and no other; the step goes on.
    assert backend.counters.delegated_layers == {first.layer_id: "unknown-argument"}
    bench.decode(second, *new_kv())
    assert backend.counters.packed_steps == 1
    assert dict(backend.counters.fallback_reasons) == {}
    assert list(backend._runner_of) == [second]
