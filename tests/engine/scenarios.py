"""Every engine that the tests start, by name; each is started once per test session.

Answers are compared with those of stock: of the one true stock engine, or of mode "stock" in the
same engine, in which our backend hands every step to the stock backend that it owns. The main
engine shows that the two are the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from tests.engine import workloads
from tests.engine.driver import Scenario, Section
from tests.engine.models import ADAPTERS
from tests.engine.releases import BACKEND_FLAG, PAGES_ENV, has
from tests.engine.trainer import Step

__all__ = [
    "CONTROLS",
    "ERRORS",
    "EXTENDED",
    "FEW_QUESTIONS",
    "GROVE",
    "HOLD",
    "IDENTICAL",
    "POLICIES",
    "QUESTIONS",
    "RETRACT",
    "ROLLOUTS",
    "SAMPLES",
    "SCENARIOS",
    "SWITCH",
    "TRAINED",
    "Comparison",
    "Run",
    "comparison",
]

# Ways to break our decode; ways to make it raise; packing policies other than the default.
CONTROLS = ("zeros", "newest", "page")
ERRORS = ("plan-error", "run-error")
POLICIES = ("query", "chunk", "node")
# Requests, tokens of the prompt, tokens to generate.
IDENTICAL = (64, 60, 9)

FOREST = Section("forest", workloads.forest())
GROVE = Section("grove", workloads.grove())
CROWD = Section("crowd", workloads.crowd())
SAMPLES = Section("samples", workloads.samples(), one_batch=True)
REPEATS = Section("repeats", workloads.repeats(), logprobs=False)
ALIKE = Section("identical", workloads.identical(*IDENTICAL), one_batch=True)
BEAMS = Section("beams", workloads.beams())
# Of a document that is cached; the one token of an answer comes from the extend.
QUESTIONS = Section("questions", workloads.questions(600), input_logprobs=600)
# For kernels in the interpreter, where our backend asks SGLang's tree what is cached.
FEW_QUESTIONS = Section("questions", workloads.questions(96)[:6], input_logprobs=96)
# The forest without logprobs, for which prefill and decode share a batch when the engine mixes.
MIXED = replace(FOREST, name="mixed", like="forest", logprobs=False)

ROLLOUTS = Section("undisturbed", workloads.rollouts(), max_ratio=0.6, one_batch=True)
ADAPTED = replace(
    ROLLOUTS,
    name="adapters",
    requests=tuple(
        replace(request, lora=(None, *ADAPTERS)[i % 3])
        for i, request in enumerate(ROLLOUTS.requests)
    ),
)
# The decode pass before which a trainer steps in; the shortest request has 15.
HOLD = 6
RETRACT_ALL, IN_PLACE, CONTINUE = ("pause", "retract"), ("pause", "in_place"), ("continue",)

STOCK = {"attention_backend": "torch_native", "max_total_tokens": 20000}
OURS = {BACKEND_FLAG: "prefix", "max_total_tokens": 20000}
# The only backend that knows attention sinks on a CPU without AMX; in Triton's interpreter.
TRITON = {"attention_backend": "triton", "max_total_tokens": 20000}
# So small that requests are retracted: SGLang admits as if they were to generate four tokens.
CROWDED = {"max_total_tokens": 760, "schedule_conservativeness": 0.01}
RETRACT = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "4"}
VERIFY = {"SGLANG_PREFIX_VERIFY": "1"}
# Ours over whatever SGLang chooses or is told.
SWITCH = {"SGLANG_PREFIX": "1"}
# Policy "node" packs every node, however few tokens and requests it has.
NODES = {"SGLANG_PREFIX_POLICY": "node"}
# The kernels on the CPU; SGLang's own CPU engine runs no Triton kernel.
INTERPRETED = {"TRITON_INTERPRET": "1", "SGLANG_PREFIX_EXECUTOR": "triton"}
# SGLang's drafts that need no model; with a breadth of 1 a chain where a match is long enough.
N_GRAMS = {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 1} | {
    "speculative_attention_mode": "decode"
}
# Tensor parallelism on a CPU without NUMA nodes.
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_NCCL_SO_PATH": "/nonexistent.so"}


def _under(section: Section, *modes: str) -> tuple[Section, ...]:
    """A section once for each mode, named "SECTION MODE", of which nothing is asked yet."""
    return tuple(
        replace(section, name=f"{section.name} {mode}", mode=mode, max_ratio=None) for mode in modes
    )


def _reads(max_ratio: float, *sections: Section) -> tuple[Section, ...]:
    """Sections that are compared with stock, and whose decode must share KV."""
    return tuple(replace(section, max_ratio=max_ratio) for section in sections)


def _compared(section: Section, max_ratio: float, *modes: str) -> tuple[Section, ...]:
    """A section, its stock answers and its control, in one engine."""
    return (*_reads(max_ratio, section), *_under(section, "stock", "zeros", *modes))


def _beams(max_ratio: float) -> tuple[Section, ...]:
    """Beam search, where SGLang has it."""
    return _reads(max_ratio, BEAMS) if has("beams") else ()


def _main_sections() -> tuple[Section, ...]:
    forest = _compared(FOREST, 0.45, *CONTROLS[1:], *ERRORS, *POLICIES, "compare-plans")
    ratios = {"forest query": 1.001, "forest chunk": 0.5, "forest node": 0.5}
    forest = tuple(
        replace(s, max_ratio=ratios.get(s.name, s.max_ratio), like="forest") for s in forest
    )
    others = (*_reads(0.2, ALIKE), *_beams(0.6))
    controls = (s for section in (*others, CROWD) for s in _under(section, "zeros"))
    questions = (QUESTIONS, *_under(QUESTIONS, "stock", "zeros", "run-error"))
    return (*forest, *others, *controls, *questions)


def _trained_sections() -> tuple[Section, ...]:
    """What a trainer does to rollouts."""
    # Before, SGLang refuses to flush while requests wait, retracted or not.
    flush = "flush" if has("flush-while-paused") else "keep"
    # Another id for the second sample of a prompt: results of aborted requests are named so.
    with_aborted = tuple(
        replace(r, rid="r2 aborted") if r.rid == "r2" else r for r in ROLLOUTS.requests
    )
    rollouts = replace(ROLLOUTS, like="undisturbed")

    def stepping(name: str, *steps: Step) -> Section:
        return replace(rollouts, name=name, hold=HOLD, steps=steps)

    found = [
        ROLLOUTS,
        replace(rollouts, name="all logprobs", input_logprobs=0),
        stepping("paused in place", IN_PLACE, CONTINUE),
        stepping("paused and retracted", RETRACT_ALL, CONTINUE),
        replace(stepping("sample aborted", ("abort", "r2 aborted")), requests=with_aborted),
        # Only KV of the new weights, then KV of two models in one row, then new KV again.
        stepping("weights from disk", RETRACT_ALL, ("disk", "other", flush), CONTINUE),
        stepping("weights as tensors", IN_PLACE, ("tensor", "llama", "keep"), CONTINUE),
        stepping("weights broadcast", RETRACT_ALL, ("distributed", "other", flush), CONTINUE),
        replace(stepping("memory released", ("release",), ("resume",)), hold=0),
    ]
    if has("flush-while-paused"):
        steps = (RETRACT_ALL, ("flush",), ("release",), ("resume",), CONTINUE)
        found.append(stepping("memory released in a pause", *steps))
    return tuple(found)


TRAINED = _trained_sections()
_TRAINED_STOCK = tuple(section for one in TRAINED for section in _under(one, "stock"))
_RELOAD = Section("reload", (), steps=(("disk", "llama", "flush"),))

# In `make test`.
_DEFAULT = {
    "stock": Scenario(
        (FOREST, ALIKE, *((BEAMS,) if has("beams") else ()), CROWD, REPEATS), STOCK, hooks=()
    ),
    "main": Scenario(_main_sections(), OURS),
    "pages": Scenario(
        (*_reads(0.7, FOREST, MIXED), *_reads(0.8, CROWD)),
        OURS
        | CROWDED
        | {"page_size": 16, "max_total_tokens": 800}
        | {"chunked_prefill_size": 64, "enable_mixed_chunk": True},
        VERIFY | RETRACT | PAGES_ENV | NODES,
    ),
    # No name given: our backend stands over the one that SGLang chooses.
    "switch": Scenario(_compared(FOREST, 0.45), {"max_total_tokens": 20000}, VERIFY | SWITCH),
    # Absorbed multi-head latent attention, which goes by the name of the stock backend. "triton" is
    # for the experts: on the CPU, torch runs them.
    "latent": Scenario(
        _compared(GROVE, 0.6),
        STOCK | {"moe_runner_backend": "triton"},
        VERIFY | SWITCH | NODES,
        ("controls", "latent"),
        model="latent",
        needs="latents",
    ),
    # Without its flag SGLang insists on a layer with a window.
    "sinks": Scenario(
        (*_reads(0.5, SAMPLES), *_under(SAMPLES, "stock", "sinkless")),
        TRITON | {"disable_hybrid_swa_memory": True},
        VERIFY | SWITCH | {"TRITON_INTERPRET": "1"},
        model="sinks",
        needs="sinks",
    ),
    # Two labels of graphs, in a model of which some layers are stock's in either; the gate flips.
    "graphs": Scenario(
        (GROVE, *_under(GROVE, "stock", "zeros", "packed")),
        OURS,
        VERIFY | INTERPRETED,
        ("controls", "graphs"),
        model="sliding",
    ),
    # SGLang has no length for padding rows of torch_native. Before this release, our backend needs
    # one of SGLang's to prefill with, and the pair of them cannot pad there.
    "dp-attention": Scenario(
        _compared(FOREST, 0.75),
        OURS
        | {"tp_size": 2, "dp_size": 2}
        | {"enable_dp_attention": True, "disable_overlap_schedule": True},
        VERIFY | TWO_RANKS,
        ("controls", "cpu"),
        model="qwen3",
        needs="any-name-on-cpu",
    ),
    # Drafts of n-grams, three behind each token: chains where the tables know as many.
    "drafts": Scenario(
        (REPEATS, *_under(REPEATS, "stock", "causal")),
        OURS | N_GRAMS | {"speculative_num_draft_tokens": 4},
        VERIFY,
        ("controls", "drafts"),
    ),
    "trainer": Scenario(
        (*_under(ROLLOUTS, "zeros"), *_TRAINED_STOCK, _RELOAD, *TRAINED),
        OURS,
        VERIFY,
        ("controls", "cpu"),
    ),
}

# In `make test-all` only: they repeat what the others show, or show it of a rarer set-up.
EXTENDED = {
    # A draft model, the target itself, and SGLang's worker of EAGLE and its kin. On a CPU without
    # AMX it drafts in Triton's interpreter.
    "drafts of a model": Scenario(
        (SAMPLES, *_under(SAMPLES, "stock")),
        OURS
        | {"speculative_algorithm": "STANDALONE", "speculative_draft_model_path": "llama"}
        | {"speculative_num_steps": 3, "speculative_num_draft_tokens": 4}
        | {"speculative_eagle_topk": 1, "speculative_attention_mode": "decode"}
        | {"speculative_draft_attention_backend": "triton"},
        VERIFY | NODES | {"TRITON_INTERPRET": "1"},
        ("controls", "drafts"),
        needs="any-name-on-cpu",
    ),
    # As users have it: torch_native checks nothing. Two drafts are a chain whatever tables say.
    "drafts of two": Scenario(
        (REPEATS,), OURS | N_GRAMS | {"speculative_num_draft_tokens": 2}, VERIFY
    ),
    # Graphs of verify passes, of both labels.
    "drafts graphs": Scenario(
        (GROVE, *_under(GROVE, "stock", "zeros")),
        OURS | N_GRAMS | {"speculative_num_draft_tokens": 2},
        VERIFY | INTERPRETED,
        ("controls", "graphs", "drafts"),
    ),
    "attention-backend small-pool": Scenario(
        (*_reads(0.6, FOREST), *_reads(0.8, CROWD)),
        OURS | CROWDED,
        VERIFY | RETRACT | NODES,
    ),
    "decode-backend page-4 no-overlap small-pool": Scenario(
        (*_reads(0.6, FOREST), *_reads(0.8, CROWD)),
        {"decode_attention_backend": "prefix", "disable_overlap_schedule": True}
        | CROWDED
        | {"page_size": 4},
        VERIFY | RETRACT | PAGES_ENV | NODES,
    ),
    "named-prefill chunk-64 mixed policy-chunk": Scenario(
        (*_reads(0.45, FOREST), *_beams(0.6), *_reads(0.45, MIXED)),
        {"prefill_attention_backend": "torch_native", "decode_attention_backend": "prefix"}
        | {"chunked_prefill_size": 64, "enable_mixed_chunk": True, "max_total_tokens": 20000},
        VERIFY | SWITCH | {"SGLANG_PREFIX_POLICY": "chunk"},
    ),
    "switch named-stock": Scenario(_reads(0.45, FOREST), STOCK, VERIFY | SWITCH),
    # SGLang's prefill kernel in the interpreter is slow.
    "switch two backends": Scenario(
        _compared(GROVE, 0.6),
        {"prefill_attention_backend": "triton", "decode_attention_backend": "torch_native"}
        | {"max_total_tokens": 20000},
        VERIFY | SWITCH | {"TRITON_INTERPRET": "1"},
    ),
    # "triton" is for the experts: on the CPU, torch runs them.
    "gpt-oss": Scenario(
        (*_reads(0.5, SAMPLES), *_under(SAMPLES, "stock", "sinkless")),
        TRITON | {"moe_runner_backend": "triton"},
        VERIFY | SWITCH | NODES | {"TRITON_INTERPRET": "1"},
        model="gpt-oss",
        needs="sinks",
    ),
    "no-radix-cache": Scenario(_reads(1.001, FOREST), OURS | {"disable_radix_cache": True}, VERIFY),
    "named-stock no-overlap policy-query": Scenario(
        (*_reads(1.001, FOREST), *_beams(1.001)),
        OURS | {"disable_overlap_schedule": True},
        VERIFY | {"SGLANG_PREFIX_POLICY": "query", "SGLANG_PREFIX_STOCK_BACKEND": "torch_native"},
    ),
    "trainer stock": Scenario(
        tuple(replace(section, max_ratio=None) for section in TRAINED),
        STOCK,
        hooks=("controls", "cpu"),
    ),
    "gate-never": Scenario((FOREST,), OURS, {"SGLANG_PREFIX_GATE": "never"}),
    "triton": Scenario(_compared(GROVE, 0.6), OURS, VERIFY | INTERPRETED),
    # As on a GPU, over a stock backend of a GPU.
    "extends by kernels": Scenario(
        (FEW_QUESTIONS, *_under(FEW_QUESTIONS, "stock", "zeros")),
        TRITON,
        VERIFY | SWITCH | INTERPRETED | {"SGLANG_PREFIX_EXTENDS": "always"},
    ),
    "graphs of one kind": Scenario(
        _compared(GROVE, 0.6),
        OURS,
        VERIFY | INTERPRETED | {"SGLANG_PREFIX_GATE": "always"},
        ("controls", "graphs"),
    ),
    # Two labels of graphs, on which ranks with batches of their own agree; their gates flip.
    "dp-attention graphs": Scenario(
        (GROVE, *_under(GROVE, "stock", "zeros", "packed", "alone")),
        OURS
        | {"tp_size": 2, "dp_size": 2}
        | {"enable_dp_attention": True, "disable_overlap_schedule": True},
        VERIFY | TWO_RANKS | INTERPRETED,
        ("controls", "cpu", "graphs"),
        model="qwen3",
        needs="any-name-on-cpu",
    ),
    "tp-2": Scenario(_compared(FOREST, 0.5), OURS | {"tp_size": 2}, VERIFY | TWO_RANKS),
    "sliding": Scenario(_compared(FOREST, 0.45), OURS, VERIFY, model="sliding"),
    # Three requests with the same adapter are too few for the default policy to pack on a CPU.
    "lora": Scenario(
        (*_compared(ADAPTED, 0.6), *_under(ROLLOUTS, "stock")),
        OURS | {"enable_lora": True, "max_loras_per_batch": 3, "lora_backend": "torch_native"},
        VERIFY | NODES,
        ("controls", "cpu"),
    ),
    # SGLang loads KV scales with a quantisation scheme only, which it has none of for float32,
    # and the scheme asks for an FP8 cache, which SGLang has on a CPU with AMX only.
    "scales": Scenario(
        _compared(FOREST, 0.5, "scales"),
        OURS | {"kv_cache_dtype": "bfloat16"},
        VERIFY,
        ("controls", "cpu"),
        model="scales",
        needs="kv-scales",
    ),
}

SCENARIOS = _DEFAULT | EXTENDED


class Run(NamedTuple):
    """A section in an engine."""

    engine: str
    section: str


class Comparison(NamedTuple):
    """What shows that a section got stock's answers, on requests whose answers attention decides.

    ``control`` ran the requests of ``uncontrolled`` under a broken decode.
    """

    ours: Run
    stock: Run
    control: Run
    uncontrolled: Run


def comparison(engine: str, section: Section) -> Comparison:
    """What a section is compared with: runs of its own engine if there are, else of others."""
    runs = {Run(name, s.name) for name, scenario in SCENARIOS.items() for s in scenario.sections}
    like = section.like or section.name

    def first(*choices: Run) -> Run:
        return next(run for run in choices if run in runs)

    uncontrolled = first(Run(engine, f"{like} stock"), Run("stock", like))
    return Comparison(
        ours=Run(engine, section.name),
        stock=first(Run(engine, f"{section.name} stock"), uncontrolled),
        control=first(
            Run(engine, f"{like} sinkless"),
            Run(engine, f"{like} zeros"),
            Run("main", f"{like} zeros"),
        ),
        uncontrolled=uncontrolled,
    )
