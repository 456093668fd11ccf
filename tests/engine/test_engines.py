"""The real engine: our decode gives stock's tokens and logprobs, however it is set up.

One file, because engines are started once for all tests of a process, and pytest-xdist sends the
tests of a file to one process. Tests of engines that are not in the default list of
``scenarios.py`` run in `make test-all`.
"""

from __future__ import annotations

import re
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
    HOLD,
    IDENTICAL,
    POLICIES,
    RETRACT,
    ROLLOUTS,
    SCENARIOS,
    SWITCH,
    TRAINED,
    comparison,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


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
    assert results(name).log.count("test hook: mixed pass") > 10


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
    log = results(name).log
    assert log.count("prefix attention: settings") == 1
    assert "stock backend torch_native" in log


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
    assert flipping.counters["packed_steps"] >= 3
    assert flipping.counters["stock_reasons"]["gate-no-gain"] >= 3
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
