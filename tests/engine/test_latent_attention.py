"""Decode of absorbed multi-head latent attention: our backend on SGLang's own pool and layers.

The pool's kernel that writes the latent and the part with RoPE apart is Triton's; one of torch
stands in for it. The engine itself is in test_engines.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from prefix_kernels.native_executor import NativeExecutor
from prefix_kernels.oracle import decode_attention_oracle
from sglang_prefix.backend.fallback import REASONS
from sglang_prefix.config import PrefixConfig
from tests.engine.bare_backend import make_runner
from tests.engine.releases import has
from tests.scheduling import make_forward_batch

RANK, ROPE, HEADS, NUM_LAYERS = 32, 8, 16, 2
DIM = RANK + ROPE
SHARED, LENGTHS = 700, (710, 731, 703, 701)
TOLERANCE = 2e-5


class LatentBench:
    """A backend over SGLang's pool of latents, which holds four requests with a shared prefix.

    Args:
        kv_dtype: of the pool.
        scale: ``k_scale`` of every layer; None for none, as where no checkpoint has any.
    """

    def __init__(self, kv_dtype: torch.dtype = torch.float32, scale: float | None = None) -> None:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        from sglang_prefix.backend.backend import PrefixAttnBackend

        seed = int(torch.randint(1 << 30, ()))
        print(f"seed {seed}")
        torch.manual_seed(seed)
        self.pool: Any = MLATokenToKVPool(1500, 1, kv_dtype, RANK, ROPE, NUM_LAYERS, "cpu", False)
        # So that it does not ask for parallel groups, of which there are none here.
        self.pool.dcp_replicated = True
        absorbed = [
            RadixAttention(HEADS, DIM, 0.2, 1, layer_id, v_head_dim=RANK)
            for layer_id in range(NUM_LAYERS)
        ]
        prefilling = [
            RadixAttention(HEADS, 24, 0.2, HEADS, layer_id, v_head_dim=16)
            for layer_id in range(NUM_LAYERS)
        ]
        for layer in absorbed if scale is not None else ():
            layer.k_scale = torch.nn.Parameter(torch.tensor(scale), requires_grad=False)
        self.layers = absorbed
        runner = make_runner(
            [*absorbed, *prefilling],
            token_to_kv_pool=self.pool,
            use_mla_backend=True,
            context_len=1024,
            flags="--attention-backend triton",
        )
        self.requests = runner.req_to_token_pool
        self.stock = TorchNativeAttnBackend(runner)
        self.backend = PrefixAttnBackend(runner, self.stock, "triton", PrefixConfig(policy="node"))
        slots = torch.randperm(1499)[: SHARED + sum(n - SHARED for n in LENGTHS)] + 1
        table, tails = (
            self.requests.req_to_token,
            torch.split(slots[SHARED:], [n - SHARED for n in LENGTHS]),
        )
        for row, tail in enumerate(tails, start=1):
            self.requests.req_to_token[row, : SHARED + len(tail)] = torch.cat(
                (slots[:SHARED], tail)
            ).int()
        for layer in absorbed:
            self.pool.set_kv_buffer(layer, slots, torch.randn(len(slots), 1, DIM), None)
        rows = range(1, len(LENGTHS) + 1)
        newest = [int(table[row, n - 1]) for row, n in zip(rows, LENGTHS, strict=True)]
        self.batch = make_forward_batch("DECODE", rows, LENGTHS, newest)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """An eager decode step; counted at its end."""
        self.backend.init_forward_metadata(self.batch)
        yield
        self.counted = self.backend._report()

    def expected(self, q: torch.Tensor, layer: Any) -> torch.Tensor:
        """The oracle's answer on what the pool holds."""
        out, _ = decode_attention_oracle(
            q,
            self.pool.get_key_buffer(layer.layer_id),
            self.pool.get_value_buffer(layer.layer_id),
            self.requests.req_to_token,
            self.batch.req_pool_indices,
            self.batch.seq_lens,
            sm_scale=layer.scaling,
        )
        return out.flatten(1)


def random_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, Hq, D] and k [B, 1, D]."""
    return torch.randn(len(LENGTHS), HEADS, DIM), torch.randn(len(LENGTHS), 1, DIM)


def write_with_torch(pool: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the pool write what comes in two parts, at a place as this release has it.

    Returns:
        The layers of all writes, of parts or of the whole, which goes on.
    """
    written: list[int] = []
    whole = pool.set_kv_buffer

    def write_whole(layer: Any, *args: Any) -> None:
        written.append(layer.layer_id)
        whole(layer, *args)

    def write(layer: Any, place: Any, latent: torch.Tensor, rope: torch.Tensor) -> None:
        assert isinstance(place, torch.Tensor) is not has("located-latents")
        slots = place if isinstance(place, torch.Tensor) else place.loc
        written.append(layer.layer_id)
        buffer = pool.kv_buffer[layer.layer_id]
        buffer[slots] = torch.cat((latent, rope), dim=-1).to(buffer.dtype)

    monkeypatch.setattr(pool, "set_mla_kv_buffer", write)
    monkeypatch.setattr(pool, "set_kv_buffer", write_whole)
    return written


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("apart", [False, True], ids=["joined", "rope-apart"])
def test_decode_is_packed_and_the_latent_is_written_once(
    apart: bool, kv_dtype: torch.dtype, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = LatentBench(kv_dtype, scale)
    writes = write_with_torch(bench.pool, monkeypatch)
    with bench.step():
        for layer in bench.layers:
            q, k = random_inputs()
            latent, rope = k[..., :RANK], k[..., RANK:]
            if apart:
                parts: dict[str, Any] = {"q_rope": q[..., RANK:], "k_rope": rope}
                call = (q[..., :RANK], latent, latent)
                out = bench.backend.forward(*call, layer, bench.batch, **parts)
            else:
                out = bench.backend.forward(q.flatten(1), k, latent, layer, bench.batch)
            written = bench.pool.get_key_buffer(layer.layer_id)[bench.batch.out_cache_loc]
            assert torch.equal(written, k.to(kv_dtype))
            expected = bench.expected(q, layer)
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE)
            if kv_dtype == torch.float32:
                stock = bench.stock.forward(q.flatten(1), None, None, layer, bench.batch, False)
                torch.testing.assert_close(out, stock, rtol=0, atol=TOLERANCE)
    assert writes == [layer.layer_id for layer in bench.layers]
    assert bench.counted["packed_steps"] == 1
    assert bench.counted["kv_read_ratio"] < 0.4
    assert bench.counted["delegated_layers"] == {}


def test_layers_that_only_prefill_are_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        LatentBench()
    assert f"{NUM_LAYERS} of {NUM_LAYERS} layers, executor native" in caplog.text


def given_to_stock(bench: LatentBench, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Run a layer in parts, which stock gets as they came; its arguments by position."""
    seen: list[Any] = []
    monkeypatch.setattr(bench.stock, "forward", lambda *args, **kwargs: seen.append((args, kwargs)))
    (q, k), layer = random_inputs(), bench.layers[0]
    parts: dict[str, Any] = {"q_rope": q[..., RANK:], "k_rope": k[..., RANK:]}
    with bench.step():
        given = (q[..., :RANK], k[..., :RANK], k[..., :RANK])
        bench.backend.forward(*given, layer, bench.batch, **parts)
    ((args, kwargs),) = seen
    assert args[0] is given[0]
    assert kwargs == parts
    return tuple(args)


def test_a_stock_step_gets_the_parts_as_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = LatentBench()
    monkeypatch.setattr(bench.backend._planner, "prepare", lambda *args, **kwargs: "gate-no-gain")
    given_to_stock(bench, monkeypatch)
    assert bench.counted["stock_reasons"] == {"gate-no-gain": 1}
    assert bench.counted["delegated_layers"] == {}


def test_after_a_failure_stock_gets_the_parts_as_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """And writes no KV: that has been done."""
    bench = LatentBench()
    writes = write_with_torch(bench.pool, monkeypatch)
    monkeypatch.setattr(NativeExecutor, "run", lambda *args: 1 / 0)
    assert given_to_stock(bench, monkeypatch)[-1] is False
    assert writes == [0]
    assert bench.counted["fallback_reasons"] == {"error": 1}


def test_rope_that_is_left_to_the_kernel_is_stocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with 8-bit latents under trtllm_mla."""
    bench = LatentBench()
    monkeypatch.setattr(bench.stock, "forward", lambda *args, **kwargs: None)
    (q, k), layer = random_inputs(), bench.layers[0]
    parts: dict[str, Any] = {"q_rope": q[..., RANK:], "k_rope": k[..., RANK:]}
    fused: dict[str, Any] = parts | {"cos_sin_cache": torch.zeros(8), "is_neox": False}
    with bench.step():
        bench.backend.forward(q[..., :RANK], k[..., :RANK], None, layer, bench.batch, **fused)
    assert bench.counted["delegated_layers"] == {"0": "unknown-argument"}


def test_scales_of_latents_are_stocks() -> None:
    bench = LatentBench(scale=0.5)
    assert bench.backend._server_reason == "no-layer"
    assert bench.backend._report()["delegated_layers"] == {"0": "kv-scales", "1": "kv-scales"}


def test_an_executor_without_a_kernel_for_it_leaves_the_layers_to_stock(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(NativeExecutor, "why_not_shape", lambda *_: "v in k")
    with caplog.at_level("INFO"):
        bench = LatentBench()
    assert bench.backend._server_reason == "no-layer"
    assert f"layers [0, 1] are stock's ({REASONS['latent-attention']})" in caplog.text
