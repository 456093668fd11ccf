"""Our backend on SGLang's own pools, layers and batches, without an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from prefix_kernels.oracle import decode_attention_oracle
from sglang_prefix.config import PrefixConfig
from tests.engine.server_args import model_folder, server_args
from tests.scheduling import make_forward_batch

__all__ = [
    "LENGTHS",
    "NUM_KV_HEADS",
    "NUM_QO_HEADS",
    "SCALES",
    "Bench",
    "make_layer",
    "make_runner",
]

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64
SHARED, LENGTHS = 1500, (1510, 1531, 1503, 1515, 1501, 1520)
# k and v scale of each layer.
SCALES = ((2.0, 0.5), (0.25, 4.0))


def make_layer(layer_id: int, **options: Any) -> Any:
    """An attention layer of SGLang's, without scales."""
    # Here, because importing SGLang takes ten seconds, and collecting tests should not.
    from sglang.srt.layers.radix_attention import RadixAttention

    return RadixAttention(NUM_QO_HEADS, HEAD_DIM, HEAD_DIM**-0.5, NUM_KV_HEADS, layer_id, **options)


def make_runner(
    layers: Sequence[Any] = (),
    *,
    kv_dtype: torch.dtype = torch.float32,
    context_len: int = 64,
    flags: str = "",
    **changes: Any,
) -> Any:
    """SGLang's model runner, with what our backend reads of it; nothing in it goes to stock.

    Args:
        layers: attention layers of the model.
        kv_dtype: of the KV cache.
        context_len: tokens of the longest request.
        flags: of the server, resolved by SGLang.
        changes: other attributes of the runner.
    """
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
    from sglang.srt.model_executor.model_runner import ModelRunner

    plain = {
        "token_to_kv_pool": MHATokenToKVPool(
            2000, 1, kv_dtype, NUM_KV_HEADS, HEAD_DIM, max(len(layers), 1), "cpu", False
        ),
        "req_to_token_pool": ReqToTokenPool(8, context_len, "cpu", False),
        "model": torch.nn.ModuleList(layers),
        "server_args": server_args(flags),
        "model_config": ModelConfig(model_folder(), context_length=context_len),
        "is_draft_worker": False,
        "use_mla_backend": False,
        "device": "cpu",
        "dtype": torch.float32,
        "page_size": 1,
        "prefill_attention_backend_str": "torch_native",
        "decode_attention_backend_str": "prefix",
    }
    # Its own initialisation would load the model and start the ranks.
    runner: Any = object.__new__(ModelRunner)
    for name, value in (plain | changes).items():
        setattr(runner, name, value)
    return runner


_OVER_TRITON = "--attention-backend triton --decode-attention-backend prefix"


class Bench:
    """A backend over real pools that hold six requests with a shared prefix, two layers."""

    def __init__(self, kv_dtype: torch.dtype = torch.float32, *, verify: bool = False) -> None:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        from sglang_prefix.backend.backend import PrefixAttnBackend

        torch.manual_seed(0)
        self.layers = [make_layer(i) for i in range(len(SCALES))]
        for layer, scales in zip(self.layers, SCALES, strict=True):
            for name, value in zip(("k_scale", "v_scale"), scales, strict=True):
                setattr(layer, name, torch.nn.Parameter(torch.tensor(value), requires_grad=False))
                setattr(layer, f"{name}_float", value)
        runner = make_runner(self.layers, kv_dtype=kv_dtype, context_len=2048, flags=_OVER_TRITON)
        self.pool, self.requests = runner.token_to_kv_pool, runner.req_to_token_pool
        self.stock = TorchNativeAttnBackend(runner)
        # Stock in name only: torch_native ignores scales, so we leave it layers that have some.
        self.backend = PrefixAttnBackend(runner, self.stock, "triton", PrefixConfig(verify=verify))
        self.batch = self._fill()

    def _fill(self) -> Any:
        slots = torch.randperm(1999)[: SHARED + sum(n - SHARED for n in LENGTHS)] + 1
        shared, own = slots[:SHARED], slots[SHARED:]
        for row, tail in enumerate(torch.split(own, [n - SHARED for n in LENGTHS]), start=1):
            self.requests.req_to_token[row, : SHARED + len(tail)] = torch.cat((shared, tail)).int()
        for layer in self.layers:
            k, v = torch.randn(2, len(slots), NUM_KV_HEADS, HEAD_DIM)
            self.pool.set_kv_buffer(layer, slots, k, v)
        rows = range(1, len(LENGTHS) + 1)
        table = self.requests.req_to_token
        new_slots = [int(table[row, n - 1]) for row, n in zip(rows, LENGTHS, strict=True)]
        return make_forward_batch("DECODE", rows, LENGTHS, new_slots)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """An eager decode step; counted at its end."""
        self.backend.init_forward_metadata(self.batch)
        yield
        self.counted = self.backend._report()

    def decode(
        self,
        layer: Any,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One call of one layer, with k and v that may be changed in place: queries, output."""
        q = torch.randn(len(LENGTHS), NUM_QO_HEADS * HEAD_DIM)
        if k is None or v is None:
            k, v = torch.randn(2, len(LENGTHS), NUM_KV_HEADS, HEAD_DIM)
        return q, self.backend.forward(q, k, v, layer, self.batch, **kwargs)

    def expected(
        self, q: torch.Tensor, layer: Any, k_scale: Any, v_scale: Any, sinks: Any = None
    ) -> torch.Tensor:
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
            sinks=sinks,
        )
        return out.flatten(1)
