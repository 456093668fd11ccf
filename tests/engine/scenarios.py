"""Every engine that the tests start, by name; each is started once per test session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sglang_prefix.tiny_model import TinyModelConfig
from tests.engine import rl, workloads
from tests.engine.driver import Scenario, Section
from tests.engine.releases import BACKEND_FLAG, PAGES_ENV, has

__all__ = [
    "CONTROLS",
    "CROWD_PAGE_SIZES",
    "IDENTICAL",
    "MODELS",
    "SCALES",
    "SCENARIOS",
    "VARIANTS",
    "Variant",
    "build",
]

SCALES = ((2.0, 0.5), (0.25, 4.0))

MODELS = {
    "llama": TinyModelConfig(),
    # What a trainer might make of it.
    "other": TinyModelConfig(seed=1),
    # Layers 0 and 2 see 48 tokens, less than nearly every prompt has; 1 and 3 see all.
    "sliding": TinyModelConfig(
        arch="olmo3" if has("olmo3") else "gemma2", num_layers=4, sliding_window=48
    ),
    "scales": TinyModelConfig(kv_scales=SCALES),
    # Turned into a Qwen3: SGLang's Llama is not made for DP attention.
    "qwen3": TinyModelConfig(),
}

# Ways to break our decode, and the tests of what happens when it raises.
CONTROLS = ("zeros", "newest", "page")

FOREST = Section("forest", workloads.forest())
ABORTED = Section("aborted", workloads.aborted())
# What prefill and decode share a batch for, when the engine mixes them.
MIXED = Section("mixed", FOREST.requests, "tell-mixed", logprobs=False)
GROVE = Section("grove", workloads.grove())
CROWD = Section("crowd", workloads.crowd())
# Requests, tokens of the prompt, tokens to generate.
IDENTICAL = (64, 60, 9)
ALIKE = Section("identical", workloads.identical(*IDENTICAL), one_batch=True)
BEAMS = Section("beams", workloads.beams(), one_batch=True)
# Sections of beam search, where SGLang has it.
SEARCH = (BEAMS,) if has("beams") else ()

ROOMY = {"max_total_tokens": 20000}
# So small that requests are retracted: SGLang admits as if they were to generate four tokens.
CROWDED = {"max_total_tokens": 760, "schedule_conservativeness": 0.01}
CROWD_PAGE_SIZES = (1, 4, 16)
RETRACT = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "4"}
VERIFY = {"SGLANG_PREFIX_VERIFY": "1"}
# Tensor parallelism on a CPU without NUMA nodes.
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_NCCL_SO_PATH": "/nonexistent.so"}


@dataclass(frozen=True)
class Variant:
    """A way to run the backend that must give stock's answers.

    Attributes:
        engine: engine arguments.
        max_ratio: ``kv_read_ratio`` that the forest must stay under.
        sections: what is run.
        env: environment variables.
        retracts: whether the pool is so small that requests are retracted.
    """

    engine: Mapping[str, Any]
    max_ratio: float
    sections: tuple[Section, ...] = (FOREST,)
    env: Mapping[str, str] = field(default_factory=lambda: VERIFY)
    retracts: bool = False

    @property
    def aborts(self) -> bool:
        """Whether clients abort requests in it."""
        return ABORTED in self.sections

    @property
    def searches_beams(self) -> bool:
        """Whether requests ask for beam search in it."""
        return BEAMS in self.sections


VARIANTS = {
    "attention-backend": Variant(
        {BACKEND_FLAG: "prefix", **CROWDED},
        0.6,
        (FOREST, ABORTED),
        VERIFY | RETRACT,
        retracts=True,
    ),
    "decode-backend page-16 no-overlap": Variant(
        {
            "decode_attention_backend": "prefix",
            "page_size": 16,
            "disable_overlap_schedule": True,
            **CROWDED,
            "max_total_tokens": 800,
        },
        0.7,
        (FOREST, ABORTED),
        VERIFY | RETRACT | PAGES_ENV,
        retracts=True,
    ),
    "named-prefill chunk-64 mixed policy-chunk": Variant(
        {
            "prefill_attention_backend": "torch_native",
            "decode_attention_backend": "prefix",
            "chunked_prefill_size": 64,
            "enable_mixed_chunk": True,
            **ROOMY,
        },
        0.45,
        (FOREST, *SEARCH, MIXED),
        VERIFY | {"SGLANG_PREFIX_POLICY": "chunk"},
    ),
    "chunk-128 page-16 policy-node": Variant(
        {
            BACKEND_FLAG: "prefix",
            "chunked_prefill_size": 128,
            "page_size": 16,
            **ROOMY,
        },
        0.5,
        env=VERIFY | {"SGLANG_PREFIX_POLICY": "node"} | PAGES_ENV,
    ),
    "no-radix-cache": Variant(
        {BACKEND_FLAG: "prefix", "disable_radix_cache": True, **ROOMY}, 1.001
    ),
    "named-stock no-overlap policy-query": Variant(
        {BACKEND_FLAG: "prefix", "disable_overlap_schedule": True, **ROOMY},
        1.001,
        (FOREST, *SEARCH),
        VERIFY | {"SGLANG_PREFIX_POLICY": "query", "SGLANG_PREFIX_STOCK_BACKEND": "torch_native"},
    ),
}


def _stock(**options: Any) -> dict[str, Any]:
    return {"attention_backend": "torch_native", **ROOMY} | options


def _ours(**options: Any) -> dict[str, Any]:
    return {BACKEND_FLAG: "prefix", **ROOMY} | options


def _under(mode: str) -> Section:
    """The forest while the hooks do ``mode``."""
    return Section(mode, FOREST.requests, mode)


def _zeroed(section: Section) -> Section:
    """A section while our decode returns zeros."""
    return replace(section, name=f"{section.name} zeros", mode="zeros")


def build(models: Mapping[str, str]) -> dict[str, Scenario]:
    """All scenarios.

    Args:
        models: folder of each of ``MODELS``.
    """
    llama, sliding, scales, qwen3 = (
        models[name] for name in ("llama", "sliding", "scales", "qwen3")
    )
    modes = ("none", *CONTROLS, "plan-error", "run-error", "compare-plans")
    control = (*map(_under, modes), ALIKE, _zeroed(ALIKE), _zeroed(ABORTED))
    control += (*(s for search in SEARCH for s in (search, _zeroed(search))), _zeroed(CROWD))
    zeros = (FOREST, _under("zeros"))
    # SGLang has no quantisation scheme for float32, and only a scheme makes it load KV scales.
    float32 = {"SGLANG_PREFIX_TEST_FLOAT32_SCHEME": "1"}
    # The scheme asks for an FP8 cache, which SGLang has on a CPU with AMX only.
    wide = {"kv_cache_dtype": "bfloat16"}
    # torch_native has no length for padding rows, without which SGLang cannot pad on a CPU.
    padded = TWO_RANKS | {"SGLANG_PREFIX_TEST_PAD_ON_CPU": "1"}
    dp_attention = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}
    told = replace(FOREST, mode="tell-padding")
    variants = {
        name: Scenario(
            llama, variant.sections, variant.engine, variant.env, hooks=MIXED in variant.sections
        )
        for name, variant in VARIANTS.items()
    }
    # The kernels on the CPU; SGLang's own CPU engine runs no Triton kernel.
    graphs = {"SGLANG_PREFIX_TEST_GRAPHS": "1"}
    interpreted = {"TRITON_INTERPRET": "1", "SGLANG_PREFIX_EXECUTOR": "triton"}
    return {
        "stock": Scenario(llama, (FOREST, ABORTED, ALIKE, *SEARCH, GROVE, CROWD), _stock()),
        "triton": Scenario(
            llama, (GROVE, _zeroed(GROVE)), _ours(), VERIFY | interpreted, hooks=True
        ),
        "graphs": Scenario(
            llama,
            (GROVE, _zeroed(GROVE)),
            _ours(),
            VERIFY | interpreted | graphs | {"SGLANG_PREFIX_GATE": "always"},
            hooks=True,
        ),
        "graphs of both": Scenario(
            sliding, (GROVE, _zeroed(GROVE)), _ours(), VERIFY | interpreted | graphs, hooks=True
        ),
        **{
            f"crowd page-{page_size}": Scenario(
                llama,
                (CROWD,),
                _ours(**CROWDED | {"max_total_tokens": 560}, page_size=page_size),
                # Policy "node" packs every node, however few tokens and requests it has.
                VERIFY | RETRACT | {"SGLANG_PREFIX_POLICY": "node"},
            )
            for page_size in CROWD_PAGE_SIZES
        },
        **variants,
        "control": Scenario(llama, control, _ours(), hooks=True),
        "gate-never": Scenario(llama, (FOREST,), _ours(), {"SGLANG_PREFIX_GATE": "never"}),
        "tp-2 stock": Scenario(llama, (FOREST,), _stock(tp_size=2), TWO_RANKS),
        "tp-2": Scenario(llama, zeros, _ours(tp_size=2), VERIFY | TWO_RANKS, hooks=True),
        "dp-attention stock": Scenario(
            qwen3, (FOREST,), _stock(**dp_attention), padded, hooks=True
        ),
        "dp-attention": Scenario(
            qwen3, (told, _under("zeros")), _ours(**dp_attention), VERIFY | padded, hooks=True
        ),
        "sliding stock": Scenario(sliding, (FOREST, GROVE), _stock()),
        "sliding": Scenario(sliding, zeros, _ours(), VERIFY, hooks=True),
        **rl.build(llama, models["other"], _stock(), _ours(), VERIFY),
        "scales stock": Scenario(scales, (FOREST,), _stock(**wide), float32, hooks=True),
        "scales": Scenario(
            scales, (*zeros, _under("scales")), _ours(**wide), VERIFY | float32, hooks=True
        ),
    }


SCENARIOS = tuple(build(dict.fromkeys(MODELS, "")))
