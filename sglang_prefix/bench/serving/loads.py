"""What `bench serving --engine` measures: trees of requests, and the engines that run them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_prefix.tiny_model import TinyModelConfig

__all__ = [
    "LLAMA_8B",
    "OURS",
    "STOCK",
    "SYNC",
    "TINY",
    "Load",
    "Measurement",
    "engine_arguments",
    "measurements",
    "prompts",
]

OURS = "prefix"
# Stock backends with what must be imported for them; the one expected to be the fastest first.
STOCK = {
    "fa3": ("sgl_kernel.flash_attn", "sgl_kernel.flash_ops"),
    "flashinfer": ("flashinfer",),
    "triton": ("sglang.srt.layers.attention.triton_backend",),
}
# On the CPU.
DRY_STOCK = "torch_native"
# Groups of engines that are alive together; PAIR is ours and the best stock backend.
PAIR, SYNC = "pair", "sync"
# Llama-3.1-8B but for its 128,256 tokens and 131,072 positions: those of random weights would cost
# disk and time on both sides of a comparison alike.
LLAMA_8B = TinyModelConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    vocab_size=32000,
    context_length=65536,
    dtype="bfloat16",
    scales_with_inputs=True,
)
TINY = TinyModelConfig(scales_with_inputs=True)
# KV tokens of an engine that shares the device with another. On 80 GB, two engines of 14.5 GB of
# weights and 13.7 GiB of KV each leave room for activations and graphs; the largest load of two
# engines, 64 unrelated requests, takes 106,496.
_PAIR_TOKENS = 112_000
_DRY_TOKENS = 4096
_MAX_BATCH = 64


@dataclass(frozen=True, slots=True)
class Load:
    """Requests whose prompts form a tree, and that all generate equally much.

    Attributes:
        name: key of its result.
        num_requests: all sent at once.
        levels: from the root down, the number of nodes and the tokens of each; a level's nodes
            are spread evenly over those above.
        output_tokens: of each request.
    """

    name: str
    num_requests: int
    levels: tuple[tuple[int, int], ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One case of a run.

    Attributes:
        kind: "decode" times steps, "alternate" does so on both backends in turn, "logprobs"
            compares answers, "churn" lets requests join and leave under a guard.
        group: the engines that are alive; nothing else is on the device.
        backends: of them the ones that it uses.
        load: what they run.
        seconds: that it is expected to take on a GPU, without starting engines.
        rounds: of "alternate".
    """

    kind: str
    group: str
    backends: tuple[str, ...]
    load: Load
    seconds: float = 30
    rounds: int = 10

    @property
    def name(self) -> str:
        """Unique in a run."""
        return f"{self.group}/{self.load.name}"


_UNRELATED = Load("unrelated", 64, ((64, 1536),), 128)
_AGENTS = Load("agents", 64, ((1, 4096), (4, 2048), (64, 256)), 256)
_FOREST = Load("logprobs", 16, ((1, 512), (4, 256), (16, 64)), 32)
_CHURN = Load("no-device-sync", 16, ((1, 4096), (4, 512), (16, 32)), 40)
# Samples of one prompt.
_WIDE = Load("rollouts-64x8k", 64, ((1, 8192),), 512)
_SMALL = Load("rollouts-16x2k", 16, ((1, 2048),), 256)
_LONG = Load("rollouts-64x32k", 64, ((1, 32768),), 512)


def measurements(
    stock: Sequence[str] = tuple(STOCK), *, long_output: int = 8192, dry: bool = False
) -> list[Measurement]:
    """Measurements against the stock backends, the most valuable first, in the order of the run.

    Args:
        stock: names of the backends, the one that is expected to be the fastest first.
        long_output: tokens of the long rollouts.
        dry: the same kinds on the CPU, so small that they mean nothing; two engines run them all.
    """
    if dry:
        return _dry_measurements()
    best, *others = stock
    both = (OURS, best)
    many = Load(f"rollouts-64x1k-out{long_output}", 64, ((1, 1024),), long_output)
    many_seconds = 20 + long_output / 60
    found = [
        Measurement("decode", PAIR, both, _WIDE, 40),
        Measurement("alternate", PAIR, both, _UNRELATED, 60),
        Measurement("decode", PAIR, both, _SMALL, 15),
        Measurement("decode", PAIR, both, _AGENTS, 25),
        Measurement("decode", PAIR, both, _LONG, 70),
        Measurement("logprobs", PAIR, both, _FOREST, 15),
        # Half of the memory would not hold the KV of these.
        *(Measurement("decode", f"alone-{one}", (one,), many, many_seconds) for one in both),
        Measurement("churn", SYNC, (OURS,), _CHURN, 30),
    ]
    loads = {_WIDE: 30, _SMALL: 10, _AGENTS: 15, _LONG: 60, many: many_seconds}
    for name in others:
        alone = f"alone-{name}", (name,)
        found += [Measurement("decode", *alone, load, seconds) for load, seconds in loads.items()]
    return found


def _dry_measurements() -> list[Measurement]:
    both = (OURS, DRY_STOCK)
    # Long enough for a busy machine: steps are timed if the client hears of two of them.
    agents = Load("agents", 6, ((1, 256), (2, 128), (6, 8)), 64)
    return [
        Measurement("decode", PAIR, both, Load("rollouts-64x8k", 8, ((1, 512),), 64)),
        Measurement("alternate", PAIR, both, Load("unrelated", 3, ((3, 40),), 64), rounds=2),
        Measurement("decode", PAIR, both, agents),
        Measurement("logprobs", PAIR, both, Load("logprobs", 4, ((1, 64), (2, 16), (4, 4)), 8)),
        Measurement("churn", PAIR, (OURS,), Load("no-device-sync", 4, ((1, 64), (4, 8)), 6)),
    ]


def prompts(load: Load, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids of every request; equal arguments give equal prompts in every process."""
    rng = random.Random(f"{seed} {load}")
    found: list[list[int]] = [[] for _ in range(load.num_requests)]
    for num_nodes, tokens in load.levels:
        nodes = [rng.choices(range(vocab_size), k=tokens) for _ in range(num_nodes)]
        for number, prompt in enumerate(found):
            prompt += nodes[number * num_nodes // load.num_requests]
    return found


def engine_arguments(model: Path, backend: str, group: str, *, dry: bool) -> dict[str, Any]:
    """Keyword arguments of ``sglang.Engine``, the same for all backends of a group."""
    arguments: dict[str, Any] = {
        "model_path": str(model),
        "skip_tokenizer_init": True,
        "random_seed": 0,
        "log_level": "info",
        "page_size": 1,
        "schedule_policy": "fcfs",
        "max_running_requests": _MAX_BATCH,
    }
    if dry:
        # SGLang 0.5.17 cannot have all of it on the CPU.
        return arguments | {
            "prefill_attention_backend": DRY_STOCK,
            "decode_attention_backend": backend,
            "device": "cpu",
            "dtype": "float32",
            "mem_fraction_static": 0.7,
            "max_total_tokens": _DRY_TOKENS,
        }
    arguments |= {
        "attention_backend": backend,
        "dtype": "bfloat16",
        "mem_fraction_static": 0.85,
        "cuda_graph_max_bs_decode": _MAX_BATCH,
        # Prefill is not measured, and its graphs take long to capture.
        "disable_prefill_cuda_graph": True,
        "sampling_backend": "pytorch",
        "chunked_prefill_size": 8192,
    }
    if group in (PAIR, SYNC):
        arguments["max_total_tokens"] = _PAIR_TOKENS
    return arguments
