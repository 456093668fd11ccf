"""The real engine: our decode gives stock's tokens and logprobs, however it is set up.

One file, because engines are started once for all tests of a process, and pytest-xdist sends the
tests of a file to one process. Tests of engines that are not in the default list of
``scenarios.py`` run in `make test-all`.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from tests.engine.comparisons import (
    LOGPROB_TOLERANCE,
    LOGPROB_TOLERANCE_BF16_CACHE,
    assert_packed,
    assert_same,
    changes_half,
    num_changed,
    num_retracted,
)
from tests.engine.conftest import Results
from tests.engine.driver import Section, SectionResult
from tests.engine.releases import needs
from tests.engine.scenarios import (
    CONTROLS,
    ERRORS,
    FEW_QUESTIONS,
    GROVE,
    HOLD,
    IDENTICAL,
    POLICIES,
    QUESTIONS,
    RETRACT,
    ROLLOUTS,
    SAMPLES,
    SCENARIOS,
    SWITCH,
    TRAINED,
    comparison,
)
from tests.engine.transformers_answers import transformers_answers

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]


def compared_sections() -> list[Any]:
    """Parameters for all sections that are compared, each marked with the engines that it needs."""
    found = []
    for engine, scenario in SCENARIOS.items():
        marks = [needs(scenario.needs)] if scenario.needs else []
        for section in (s for s in scenario.sections if s.max_ratio is not None):
            engines = dict.fromkeys(run.engine for run in comparison(engine, section))
            marked = [*marks, pytest.mark.scenarios(*engines)]
            found.append(pytest.param(engine, section, marks=marked, id=f"{engine}-{section.name}"))
    return found


@pytest.mark.parametrize(("engine", "section"), compared_sections())
def test_our_decode_gives_stock_answers(engine: str, section: Section, results: Results) -> None:
    """The same answers, really packed, on requests whose answers attention decides."""
    ours, stock, control, uncontrolled = (
        results(run.engine).sections[run.section] for run in comparison(engine, section)
    )
    scenario = SCENARIOS[engine]
    coarse = scenario.engine.get("kv_cache_dtype") == "bfloat16"
    assert_same(ours, stock, LOGPROB_TOLERANCE_BF16_CACHE if coarse else LOGPROB_TOLERANCE)
    assert stock.counters.get("packed_steps", 0) == 0
    assert section.max_ratio is not None
    assert_packed(ours.counters, section.max_ratio)
    assert changes_half(control, uncontrolled)
    retracts = RETRACT.items() <= scenario.env.items()
    assert (num_retracted(results(engine).log) > 0) == retracts


# The main engine, with the true stock engine beside it.

MAIN = pytest.mark.scenarios("stock", "main")


@MAIN
@pytest.mark.parametrize("section", ["forest", "forest stock"])
def test_the_stock_backend_that_we_own_gives_stock_answers(section: str, results: Results) -> None:
    ours = results("main").sections[section]
    assert_same(ours, results("stock").sections["forest"])
    if section == "forest stock":
        assert ours.counters["stock_steps"] > 50
        assert ours.counters["packed_steps"] == ours.counters["plans"] == 0


@MAIN
@pytest.mark.parametrize("mode", CONTROLS)
def test_a_broken_decode_changes_half_of_the_requests(mode: str, results: Results) -> None:
    broken = results("main").sections[f"forest {mode}"]
    assert changes_half(broken, results("stock").sections["forest"])
    assert_packed(broken.counters, 0.45)


@MAIN
@pytest.mark.parametrize("mode", ERRORS)
def test_an_exception_hands_every_step_to_stock(mode: str, results: Results) -> None:
    sections = results("main").sections
    failed, counters = sections[f"forest {mode}"], sections[f"forest {mode}"].counters
    assert_same(failed, results("stock").sections["forest"])
    assert counters["packed_steps"] == 0
    assert counters["fallback_reasons"] == {"error": counters["fallback_steps"]}
    assert counters["fallback_steps"] > 50
    # The engine lived on, and packed again.
    assert sections["forest compare-plans"].counters["packed_steps"] > 50


@MAIN
@pytest.mark.parametrize("policy", POLICIES)
def test_policy_query_alone_shares_nothing(policy: str, results: Results) -> None:
    counters = results("main").sections[f"forest {policy}"].counters
    assert (counters["kv_read_ratio"] == 1.0) == (policy == "query")


@MAIN
def test_the_wrapper_makes_the_plans_of_the_backend(results: Results) -> None:
    main = results("main")
    assert "test hook: plans differ" not in main.log
    # Every plan was compared, twice, but those for a first decode step, of which only the
    # scheduler knows that nothing is shared yet.
    plans = main.sections["forest compare-plans"].counters["plans"]
    assert main.log.count("test hook: equal plans") > plans


@MAIN
def test_identical_prompts_are_packed_from_their_second_decode_step_on(results: Results) -> None:
    ours = results("main").sections["identical"]
    assert len({tuple(request["output_ids"]) for request in ours.requests.values()}) == 1
    # None of them found the prompt in the cache: they were prefilled side by side.
    assert {request["cached_tokens"] for request in ours.requests.values()} == {0}
    count, length, max_new_tokens = IDENTICAL
    counters = ours.counters
    # The first token comes from the prefill. SGLang 0.5.17 launches a step more before it sees that
    # all have finished, 0.5.23 does not.
    assert counters["packed_steps"] in (max_new_tokens - 1, max_new_tokens)
    steps = range(1, counters["packed_steps"] + 1)
    assert counters["kv_tokens_logical"] == sum(count * (length + step) for step in steps)
    later = sum(length + count * step for step in steps[1:])
    assert counters["kv_tokens_read"] == count * (length + 1) + later


@needs("any-name-on-cpu")
@pytest.mark.parametrize(
    ("engine", "section"),
    [
        pytest.param("main", QUESTIONS, marks=MAIN),
        pytest.param(
            "extends by kernels",
            FEW_QUESTIONS,
            marks=pytest.mark.scenarios("extends by kernels"),
        ),
    ],
)
def test_extends_over_a_cached_prefix(engine: str, section: Section, results: Results) -> None:
    """Every answer is the extend's alone. Stock's, logprobs of the questions' own tokens, too."""
    sections = results(engine).sections
    ours, stock, zeros = (sections[f"questions{mode}"] for mode in ("", " stock", " zeros"))
    # An engine that verifies ends at an error.
    failed = [sections["questions run-error"]] if engine == "main" else []
    for found in (ours, *failed):
        assert_same(found, stock)
        for rid, request in stock.requests.items():
            near = pytest.approx(request["input_logprobs"], rel=0, abs=LOGPROB_TOLERANCE)
            assert len(request["input_logprobs"]) > 0
            assert found.requests[rid]["input_logprobs"] == near, rid
    assert changes_half(zeros, stock)
    cached = [request["cached_tokens"] for request in ours.requests.values()]
    assert set(sorted(cached)[1:]) == {section.input_logprobs}
    for found, packs in (
        (ours, True),
        (zeros, True),
        (stock, False),
        *((f, False) for f in failed),
    ):
        assert (found.counters["extend"]["packed_steps"] > 0) == packs
        assert found.counters.get("packed_steps", 0) == 0


# Speculative decoding, whose target model verifies drafts and never decodes.


@pytest.mark.parametrize("mode", ["", " stock", " causal"])
@pytest.mark.scenarios("stock", "drafts")
def test_drafts_of_n_grams_give_the_answers_of_plain_decode(mode: str, results: Results) -> None:
    """Stock's without speculation. The control drops the causal bound among drafts."""
    plain = results("stock").sections["repeats"]
    found = results("drafts").sections[f"repeats{mode}"]
    verify = found.counters["verify"]
    if mode == " causal":
        assert changes_half(found, plain)
    else:
        assert_same(found, plain)
    assert (verify["packed_steps"] > 0) == (mode != " stock")
    assert verify["fallback_reasons"].keys() <= {"speculative-tree"}
    if not mode:
        passes = verify["packed_steps"] + verify["fallback_steps"]
        assert passes > 20
        assert verify["packed_steps"] >= 0.9 * passes
        assert verify["kv_read_ratio"] < 0.6
        assert found.counters["reused_plan_steps"] > 0.2 * passes
        # What was accepted: far fewer passes than tokens of the longest request in each wave.
        assert passes < 34 + 22 + 22


@pytest.mark.scenarios("stock", "drafts of two")
def test_drafts_that_are_always_chains_need_no_stock_backend_that_checks_any(
    results: Results,
) -> None:
    found = results("drafts of two").sections["repeats"]
    assert_same(found, results("stock").sections["repeats"])
    verify = found.counters["verify"]
    assert verify["packed_steps"] > 20
    assert (verify["stock_steps"], verify["fallback_steps"]) == (0, 0)


@needs("any-name-on-cpu")
@pytest.mark.scenarios("drafts of a model")
def test_drafts_of_a_model_are_packed_and_checked_as_by_stock(results: Results) -> None:
    """What the target itself drafts is accepted, so a pass that is wrong shows."""
    sections = results("drafts of a model").sections
    ours, stock = (sections[f"samples{mode}"] for mode in ("", " stock"))
    assert_same(ours, stock)
    verify = ours.counters["verify"]
    assert verify["fallback_steps"] == verify["stock_steps"] == 0
    assert 4 <= verify["packed_steps"] <= 8  # of up to four tokens, 16 tokens
    assert verify["kv_read_ratio"] < 0.6
    assert stock.counters["verify"]["packed_steps"] == 0


@pytest.mark.scenarios("drafts graphs")
def test_verify_passes_replay_graphs_of_both_labels(results: Results) -> None:
    """Of SGLang's own runner, padded; the launches are those of the capture."""
    engine = results("drafts graphs")
    ours, stock, zeros = (engine.sections[f"grove{mode}"] for mode in ("", " stock", " zeros"))
    assert_same(ours, stock)
    assert changes_half(zeros, stock)
    packed, stock_reasons = paths_of(ours.counters["verify"], zeros.counters["verify"])
    assert (packed >= 3, stock_reasons["gate-no-gain"] >= 3) == (True, True)
    for label in ("packed", "stock"):
        assert f"captured ShapeKey(size=4, stream_idx=None, variant_label='/{label}'" in engine.log
        assert re.search(f"padded batch\ntest hook: replay /{label} ", engine.log)


# Other set-ups: what each is there for has happened.


def engines_with(section: str) -> list[Any]:
    """Parameters for the engines that compare a section."""
    return [
        pytest.param(name, marks=pytest.mark.scenarios(name))
        for name, scenario in SCENARIOS.items()
        if any(s.name == section and s.max_ratio is not None for s in scenario.sections)
    ]


@pytest.mark.parametrize("name", engines_with("crowd"))
def test_aborted_ids_come_back(name: str, results: Results) -> None:
    requests = results(name).sections["crowd"].requests
    aborted = {rid for rid, request in requests.items() if request["finish"] == "abort"}
    # All 35, unless the client lagged behind the engine.
    assert len(aborted) > 25
    assert {rid.removesuffix(" aborted") for rid in aborted} < requests.keys() - aborted


@pytest.mark.parametrize("name", engines_with("mixed"))
def test_passes_that_prefill_and_decode_at_once(name: str, results: Results) -> None:
    """Decoding requests in them stay settled, and the plan is made anew behind them."""
    assert results(name).log.count("test hook: mixed pass") > 5


@needs("beams")
@pytest.mark.parametrize("name", engines_with("beams"))
def test_beam_members_change_rows_and_no_plan_is_reused(name: str, results: Results) -> None:
    counters = results(name).sections["beams"].counters
    assert counters["plans"] == counters["packed_steps"]


@pytest.mark.scenarios("stock", "gate-never")
def test_a_closed_gate_leaves_every_step_to_stock(results: Results) -> None:
    ours = results("gate-never").sections["forest"]
    assert_same(ours, results("stock").sections["forest"])
    assert ours.counters["stock_steps"] > 50
    assert ours.counters["packed_steps"] == ours.counters["fallback_steps"] == 0
    assert ours.counters["plans"] == 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.scenarios(name))
        for name, scenario in SCENARIOS.items()
        if scenario.env.items() >= SWITCH.items()
    ],
)
def test_the_switch_builds_one_backend_of_ours(name: str, results: Results) -> None:
    log, engine = results(name).log, SCENARIOS[name].engine
    assert log.count("prefix attention: settings") == 1
    flags = ("decode_attention_backend", "attention_backend")
    named = (engine.get(flag, "prefix") for flag in flags)
    stock = next((name for name in named if name != "prefix"), "torch_native")
    assert f"stock backend {stock}" in log


@needs("sinks")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.scenarios(name)) for name in ("sinks", "gpt-oss")],
)
def test_attention_sinks_give_the_answers_of_transformers(
    name: str, results: Results, models: dict[str, str]
) -> None:
    ours = results(name).sections["samples"]
    assert_same(ours, transformers_answers(models[name], SAMPLES.requests))
    assert changes_half(transformers_answers(models[name], SAMPLES.requests, sinks=False), ours)
    delegated = {"gpt-oss": {"0": "sliding-window"}}.get(name, {})
    assert ours.counters["delegated_layers"] == delegated


@needs("latents")
@pytest.mark.scenarios("latent")
def test_latent_attention_gives_the_answers_of_transformers(
    results: Results, models: dict[str, str]
) -> None:
    latent = results("latent")
    assert_same(latent.sections["grove"], transformers_answers(models["latent"], GROVE.requests))
    assert "2 of 2 layers, executor native" in latent.log


@pytest.mark.scenarios("no-radix-cache")
def test_nothing_is_shared_without_a_radix_cache(results: Results) -> None:
    counters = results("no-radix-cache").sections["forest"].counters
    assert counters["kv_read_ratio"] == 1.0


@needs("any-name-on-cpu")
@pytest.mark.scenarios("dp-attention")
def test_dp_attention_pads_batches(results: Results) -> None:
    # The log and the counters are those of both ranks.
    assert results("dp-attention").log.count("test hook: padded batch") > 10
    counters = results("dp-attention").sections["forest"].counters
    assert counters["plans"] < counters["packed_steps"]  # batches without padding keep their plans


@pytest.mark.scenarios("sliding")
def test_sliding_window_layers_go_to_stock_and_full_ones_are_packed(results: Results) -> None:
    counters = results("sliding").sections["forest"].counters
    assert counters["delegated_layers"] == {"0": "sliding-window", "2": "sliding-window"}


@needs("kv-scales")
@pytest.mark.scenarios("scales")
def test_layers_carry_the_scales_of_the_checkpoint(results: Results) -> None:
    """Applied to a cache that holds unscaled values they do harm."""
    sections = results("scales").sections
    assert changes_half(sections["forest scales"], sections["forest stock"])


@pytest.mark.scenarios("lora")
def test_adapters_change_answers(results: Results) -> None:
    sections = results("lora").sections
    assert num_changed(sections["adapters stock"], sections["undisturbed stock"]) >= 5


# The kernels that run on a GPU, in Triton's interpreter, and SGLang's graph runner.


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.scenarios(name))
        for name in ("triton", "graphs of one kind", "graphs")
    ],
)
def test_nothing_is_compiled_once_the_server_is_ready(name: str, results: Results) -> None:
    log = results(name).log
    assert "executor triton" in log
    assert log.count("test hook: compiled at start") >= 4
    assert "test hook: compiled at serving" not in log
    assert "prefix attention: kernels compiled and run once in" in log


@pytest.mark.scenarios("graphs of one kind")
def test_steps_replay_the_graphs_of_sglangs_own_runner(results: Results) -> None:
    """Captured under batches of nothing, replayed under every plan that the engine makes."""
    ours = results("graphs of one kind")
    assert "graph labels packed" in ours.log
    # SGLang has sized its pool, by the memory that is left, before we allocate anything.
    assert ours.log.index("KV Cache is allocated") < ours.log.index("prefix attention: ")
    steps = sum(section.counters["packed_steps"] for section in ours.sections.values())
    assert len(replays(ours.log, "packed")) >= steps
    # Batches were padded, and sizes changed between replays.
    assert set(replays(ours.log, "packed")) == {2, 4, 10}


@pytest.mark.scenarios("graphs")
def test_each_step_replays_the_graph_that_the_gate_chose(results: Results) -> None:
    """In a model of which some layers are stock's in either graph."""
    log, sections = results("graphs").log, results("graphs").sections
    flipping, stock = sections["grove"], sections["grove stock"]
    assert_same(flipping, stock)
    assert flipping.counters["fallback_reasons"] == {}
    packed, stock_reasons = paths_of(flipping.counters, sections["grove zeros"].counters)
    assert (packed >= 3, stock_reasons["gate-no-gain"] >= 3) == (True, True)
    # With the gate open, every step that shares anything is packed.
    packing = sections["grove packed"]
    assert_same(packing, stock)
    assert packing.counters["stock_reasons"].keys() == {"gate-nothing-shared"}
    assert packing.counters["kv_read_ratio"] < 0.6
    assert changes_half(sections["grove zeros"], stock)
    assert "graph labels packed/stock" in log
    assert "graphs with label stock took" in log
    assert log.index("KV Cache is allocated") < log.index("prefix attention: ")
    for label in ("packed", "stock"):
        steps = sum(section.counters[f"{label}_steps"] for section in sections.values())
        assert len(replays(log, label)) >= steps > 0
        # Batches were padded, and sizes changed between replays.
        assert set(replays(log, label)) >= {4, 10}


@needs("any-name-on-cpu")
@pytest.mark.scenarios("dp-attention graphs")
def test_ranks_with_batches_of_their_own_replay_the_same_label(results: Results) -> None:
    """Each has a gate of its own, and both flip."""
    log, sections = results("dp-attention graphs").log, results("dp-attention graphs").sections
    stock = sections["grove stock"]
    for name in ("grove", "grove packed", "grove alone"):
        assert_same(sections[name], stock)
        assert sections[name].counters["fallback_reasons"] == {}
    assert changes_half(sections["grove zeros"], stock)
    assert stock.counters["packed_steps"] == 0
    packing = sections["grove packed"].counters
    assert packing["packed_steps"] >= 10
    assert packing["kv_read_ratio"] < 0.75
    # While another rank prefills, a step has no graph, and its rank alone decides.
    assert packing["stock_reasons"].keys() <= {"gate-nothing-shared"}
    packed, stock_reasons = paths_of(sections["grove"].counters, sections["grove zeros"].counters)
    assert packed >= 3
    assert stock_reasons.keys() >= {"gate-no-gain", "gate-other-ranks"}
    # Idle ranks replay, too, so each step is in both lists; the mode may change within one.
    first, second = (labels_of(log, rank) for rank in (0, 1))
    steps = list(zip(first, second, strict=True))
    for modes in (("none", "zeros"), ("stock",), ("packed",), ("alone",)):
        labels = [(a, b) for (a, of_a), (b, of_b) in steps if of_a == of_b and of_a in modes]
        assert len(labels) > 10
        # Ranks that choose each for itself show that a difference would be seen.
        assert all(a == b for a, b in labels) is (modes != ("alone",))
        if "none" in modes:
            assert {a for a, _ in labels} == {"packed", "stock"}


def paths_of(*counters: dict[str, Any]) -> tuple[int, Counter[str]]:
    """Packed steps of sections in which the gate flips, and reasons of the others.

    It flips when requests join, so that one section alone may have hardly any of one kind.
    """
    reasons = sum((Counter(one["stock_reasons"]) for one in counters), Counter[str]())
    return sum(one["packed_steps"] for one in counters), reasons


def labels_of(log: str, rank: int) -> list[tuple[str, str]]:
    """Labels of the graphs that a rank replayed, one after the other, and the modes meanwhile."""
    return re.findall(rf"test hook: replay /(\w+) \d+ on rank {rank} in mode (\w+)", log)


def replays(log: str, label: str) -> list[int]:
    """Batch sizes of the graphs with a label that were replayed."""
    return [int(size) for size in re.findall(rf"test hook: replay /{label} (\d+)", log)]


# In the hands of a trainer.

TRAINER = pytest.mark.scenarios("trainer")


def trained(name: str, results: Results) -> SectionResult:
    """Our section of that name."""
    return results("trainer").sections[name]


@pytest.mark.scenarios("trainer", "trainer stock")
@pytest.mark.parametrize("name", [section.name for section in TRAINED])
def test_stock_answers_are_the_same_without_our_backend(name: str, results: Results) -> None:
    assert_same(trained(f"{name} stock", results), results("trainer stock").sections[name])


@TRAINER
@pytest.mark.parametrize("name", ["paused in place", "all logprobs"])
def test_a_pause_in_place_keeps_the_plan(name: str, results: Results) -> None:
    ours, undisturbed = trained(name, results), trained("undisturbed", results)
    assert num_changed(ours, undisturbed) == 0
    assert ours.counters["plans"] == undisturbed.counters["plans"]


@TRAINER
def test_logprobs_of_all_tokens_are_those_of_stock(results: Results) -> None:
    ours, stock = (trained(name, results) for name in ("all logprobs", "all logprobs stock"))
    for request in ROLLOUTS.requests:
        found, expected = (run.requests[request.rid]["input_logprobs"] for run in (ours, stock))
        assert len(found) == len(expected) == len(request.prompt) - 1
        assert found == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


@TRAINER
def test_requests_retracted_by_a_pause_are_planned_anew(results: Results) -> None:
    ours, undisturbed = (trained(n, results) for n in ("paused and retracted", "undisturbed"))
    assert num_changed(ours, undisturbed) == 0
    # After their second prefill: their first decode step, and the second.
    assert ours.counters["plans"] == undisturbed.counters["plans"] + 2


@TRAINER
def test_one_sample_of_a_group_is_aborted(results: Results) -> None:
    aborted = trained("sample aborted", results).requests["r2 aborted"]
    assert aborted["finish"] == "abort"
    assert HOLD <= len(aborted["output_ids"]) < ROLLOUTS.requests[2].max_new_tokens


@TRAINER
@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("weights from disk", "undisturbed"),
        ("weights as tensors", "weights from disk"),
        ("weights broadcast", "undisturbed"),
    ],
)
def test_new_weights_amid_decoding(name: str, before: str, results: Results) -> None:
    assert changes_half(trained(name, results), trained(before, results))
