"""Every engine that the tests start, by name; each is started once per test session.

Answers are compared with those of stock: of the one true stock engine, or of mode "stock" in the
same engine, in which our backend hands every step to the stock backend that it owns. The main
engine shows that the two are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.engine import workloads
from tests.engine.driver import Scenario, Section
from tests.engine.models import ADAPTERS
from tests.engine.releases import BACKEND_FLAG, PAGES_ENV, has
from tests.engine.trainer import Step

__all__ = [
    "CONTROLS",
    "ERRORS",
    "EXTENDED",
    "HOLD",
    "IDENTICAL",
    "POLICIES",
    "ROLLOUTS",
    "TRAINED",
    "VARIANTS",
    "build",
]

# Ways to break our decode; ways to make it raise; packing policies other than the default.
CONTROLS = ("zeros", "newest", "page")
ERRORS = ("plan-error", "run-error")
POLICIES = ("query", "chunk", "node")

FOREST = Section("forest", workloads.forest())
ABORTED = Section("aborted", workloads.aborted())
# The forest without logprobs, for which prefill and decode share a batch when the engine mixes.
MIXED = replace(FOREST, name="mixed", logprobs=False)
GROVE = Section("grove", workloads.grove())
CROWD = Section("crowd", workloads.crowd())
# Requests, tokens of the prompt, tokens to generate.
IDENTICAL = (64, 60, 9)
ALIKE = Section("identical", workloads.identical(*IDENTICAL), one_batch=True)
BEAMS = Section("beams", workloads.beams(), one_batch=True)
# Sections of beam search, where SGLang has it.
SEARCH = (BEAMS,) if has("beams") else ()

ROLLOUTS = Section("undisturbed", workloads.rollouts(), one_batch=True)
# The decode pass before which a trainer steps in; the shortest request has 15.
HOLD = 6
RETRACT_ALL, IN_PLACE, CONTINUE = ("pause", "retract"), ("pause", "in_place"), ("continue",)
ADAPTED = replace(
    ROLLOUTS,
    name="adapters",
    requests=tuple(
        replace(request, lora=(None, *ADAPTERS)[i % 3])
        for i, request in enumerate(ROLLOUTS.requests)
    ),
)

ROOMY = {"max_total_tokens": 20000}
# So small that requests are retracted: SGLang admits as if they were to generate four tokens.
CROWDED = {"max_total_tokens": 760, "schedule_conservativeness": 0.01}
CROWDED_PAGES = CROWDED | {"page_size": 16, "max_total_tokens": 800}
RETRACT = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "4"}
VERIFY = {"SGLANG_PREFIX_VERIFY": "1"}
# The kernels on the CPU; SGLang's own CPU engine runs no Triton kernel.
INTERPRETED = {"TRITON_INTERPRET": "1", "SGLANG_PREFIX_EXECUTOR": "triton"}
# Tensor parallelism on a CPU without NUMA nodes.
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_NCCL_SO_PATH": "/nonexistent.so"}


def _under(section: Section, *modes: str) -> tuple[Section, ...]:
    """A section once for each mode, named "SECTION MODE"."""
    return tuple(replace(section, name=f"{section.name} {mode}", mode=mode) for mode in modes)


def _compared(section: Section, *modes: str) -> tuple[Section, ...]:
    """A section, its stock answers and its control, in one engine."""
    return (section, *_under(section, "stock", "zeros", *modes))


def _ours(**options: Any) -> dict[str, Any]:
    return {BACKEND_FLAG: "prefix", **ROOMY} | options


# Engines that run the forest, and other sections of the stock engine.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, str], tuple[Section, ...]]] = {
    "pages": (
        {BACKEND_FLAG: "prefix", "chunked_prefill_size": 64, "enable_mixed_chunk": True}
        | CROWDED_PAGES,
        # Policy "node" packs every node, however few tokens and requests it has.
        VERIFY | RETRACT | PAGES_ENV | {"SGLANG_PREFIX_POLICY": "node"},
        (FOREST, MIXED, ABORTED, CROWD),
    ),
    "attention-backend small-pool": (
        {BACKEND_FLAG: "prefix", **CROWDED},
        VERIFY | RETRACT,
        (FOREST, ABORTED),
    ),
    "decode-backend page-16 no-overlap small-pool": (
        {"decode_attention_backend": "prefix", "disable_overlap_schedule": True} | CROWDED_PAGES,
        VERIFY | RETRACT | PAGES_ENV,
        (FOREST, ABORTED),
    ),
    "named-prefill chunk-64 mixed policy-chunk": (
        {
            "prefill_attention_backend": "torch_native",
            "decode_attention_backend": "prefix",
            "chunked_prefill_size": 64,
            "enable_mixed_chunk": True,
            **ROOMY,
        },
        VERIFY | {"SGLANG_PREFIX_POLICY": "chunk"},
        (FOREST, *SEARCH, MIXED),
    ),
    "no-radix-cache": (_ours(disable_radix_cache=True), VERIFY, (FOREST,)),
    "named-stock no-overlap policy-query": (
        _ours(disable_overlap_schedule=True),
        VERIFY | {"SGLANG_PREFIX_POLICY": "query", "SGLANG_PREFIX_STOCK_BACKEND": "torch_native"},
        (FOREST, *SEARCH),
    ),
    **{
        f"crowd page-{page_size} small-pool": (
            _ours(**CROWDED | {"max_total_tokens": 560}, page_size=page_size),
            VERIFY | RETRACT | {"SGLANG_PREFIX_POLICY": "node"},
            (CROWD,),
        )
        for page_size in (1, 4)
    },
}


def _trainer_sections(llama: str, other: str) -> tuple[Section, ...]:
    """What a trainer does, with two models of one shape; the first is loaded at the start."""
    # Before, SGLang refuses to flush while requests wait, retracted or not.
    flush = "flush" if has("flush-while-paused") else "keep"
    # Another id for the second sample of a prompt: results of aborted requests are named so.
    with_aborted = tuple(
        replace(r, rid="r2 aborted") if r.rid == "r2" else r for r in ROLLOUTS.requests
    )

    def stepping(name: str, *steps: Step) -> Section:
        return replace(ROLLOUTS, name=name, hold=HOLD, steps=steps)

    found = [
        ROLLOUTS,
        replace(ROLLOUTS, name="all logprobs", input_logprobs=True),
        stepping("paused in place", IN_PLACE, CONTINUE),
        stepping("paused and retracted", RETRACT_ALL, CONTINUE),
        replace(stepping("sample aborted", ("abort", "r2 aborted")), requests=with_aborted),
        # Only KV of the new weights, then KV of two models in one row, then new KV again.
        stepping("weights from disk", RETRACT_ALL, ("disk", other, flush), CONTINUE),
        stepping("weights as tensors", IN_PLACE, ("tensor", llama, "keep"), CONTINUE),
        stepping("weights broadcast", RETRACT_ALL, ("distributed", other, flush), CONTINUE),
        replace(stepping("memory released", ("release",), ("resume",)), hold=0),
    ]
    if has("flush-while-paused"):
        steps = (RETRACT_ALL, ("flush",), ("release",), ("resume",), CONTINUE)
        found.append(stepping("memory released in a pause", *steps))
    return tuple(found)


# Names of what is compared in the trainer's engine.
TRAINED = tuple(section.name for section in _trainer_sections("", ""))


def build(models: Mapping[str, str]) -> dict[str, Scenario]:
    """All scenarios.

    Args:
        models: folder of each of ``MODELS``.
    """
    llama, sliding, scales, qwen3 = (
        models[name] for name in ("llama", "sliding", "scales", "qwen3")
    )
    everything = (FOREST, ABORTED, ALIKE, *SEARCH)
    stock = {"attention_backend": "torch_native", **ROOMY}
    main = _compared(FOREST, *CONTROLS[1:], *ERRORS, *POLICIES, "compare-plans")
    main += (*everything[1:], *(s for section in everything[1:] for s in _under(section, "zeros")))
    main += _under(CROWD, "zeros")
    found = {
        "stock": Scenario(llama, (*everything, CROWD), stock),
        "main": Scenario(llama, main, _ours(), hooks=("controls",)),
        "graphs": Scenario(
            sliding,
            _compared(GROVE, "packed"),
            _ours(),
            VERIFY | INTERPRETED,
            ("controls", "graphs"),
        ),
        # SGLang has no length for padding rows of torch_native.
        "dp-attention": Scenario(
            qwen3,
            _compared(FOREST),
            _ours(tp_size=2, dp_size=2, enable_dp_attention=True, disable_overlap_schedule=True),
            VERIFY | TWO_RANKS,
            ("controls", "cpu"),
        ),
    }
    trained = _trainer_sections(llama, models["other"])
    reload = replace(ROLLOUTS, name="reload", requests=(), steps=(("disk", llama, "flush"),))
    in_stock = tuple(s for section in trained for s in _under(section, "stock"))
    found["trainer"] = Scenario(
        llama,
        (*_under(ROLLOUTS, "zeros"), *in_stock, reload, *trained),
        _ours(),
        VERIFY,
        ("controls", "cpu"),
    )
    for name, (engine, env, sections) in VARIANTS.items():
        found[name] = Scenario(llama, sections, engine, env, ("controls",))
    always = {"SGLANG_PREFIX_GATE": "always"}
    adapters = {
        "enable_lora": True,
        "lora_paths": {name: f"{llama}/{name}" for name in ADAPTERS},
        "max_loras_per_batch": 3,
        "lora_backend": "torch_native",
    }
    return found | {
        "trainer stock": Scenario(llama, trained, stock, hooks=("controls", "cpu")),
        "gate-never": Scenario(llama, (FOREST,), _ours(), {"SGLANG_PREFIX_GATE": "never"}),
        "triton": Scenario(
            llama, _compared(GROVE), _ours(), VERIFY | INTERPRETED, hooks=("controls",)
        ),
        "graphs of one kind": Scenario(
            llama,
            _compared(GROVE),
            _ours(),
            VERIFY | INTERPRETED | always,
            ("controls", "graphs"),
        ),
        "tp-2": Scenario(
            llama, _compared(FOREST), _ours(tp_size=2), VERIFY | TWO_RANKS, ("controls",)
        ),
        "sliding": Scenario(sliding, _compared(FOREST), _ours(), VERIFY, ("controls",)),
        # Three requests with the same adapter are too few for the default policy to pack on a CPU.
        "lora": Scenario(
            llama,
            (*_compared(ADAPTED), *_under(ROLLOUTS, "stock")),
            _ours(**adapters),
            VERIFY | {"SGLANG_PREFIX_POLICY": "node"},
            ("controls", "cpu"),
        ),
        # SGLang loads KV scales with a quantisation scheme only, which it has none of for float32,
        # and the scheme asks for an FP8 cache, which SGLang has on a CPU with AMX only.
        "scales": Scenario(
            scales,
            _compared(FOREST, "scales"),
            _ours(kv_cache_dtype="bfloat16"),
            VERIFY,
            ("controls", "cpu"),
        ),
    }


# In `make test-all` only: they repeat what the others show, or show it of a rarer set-up.
EXTENDED = frozenset(build(dict.fromkeys(("llama", "other", "sliding", "scales", "qwen3"), ""))) - {
    "stock",
    "main",
    "pages",
    "graphs",
    "dp-attention",
    "trainer",
}
