"""The real engine: our decode gives stock's tokens and logprobs, however it is set up.

One file, because engines are started once for all tests of a process, and pytest-xdist sends the
tests of a file to one process. Tests of engines that are not in the default list of
``scenarios.py`` run in `make test-all`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest

from tests.engine.comparisons import (
    LOGPROB_TOLERANCE,
    LOGPROB_TOLERANCE_BF16_CACHE,
    assert_evidence,
    assert_packed,
    assert_same,
    changes_half,
    num_changed,
    num_retracted,
)
from tests.engine.conftest import Results
from tests.engine.driver import SectionResult
from tests.engine.releases import needs
from tests.engine.scenarios import (
    CONTROLS,
    ERRORS,
    HOLD,
    IDENTICAL,
    POLICIES,
    ROLLOUTS,
    TRAINED,
    VARIANTS,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

# Share of the KV tokens that an engine may read at most, in the forest and in beams.
MAX_RATIO = {
    "main": 0.45,
    "pages": 0.7,
    "attention-backend small-pool": 0.6,
    "decode-backend page-16 no-overlap small-pool": 0.7,
    "named-prefill chunk-64 mixed policy-chunk": 0.45,
    "no-radix-cache": 1.001,
    "named-stock no-overlap policy-query": 1.001,
}


def engines(names: Iterable[str], *others: str) -> list[Any]:
    """Parameters for engines, each marked with all that its test compares."""
    return [
        pytest.param(n, marks=pytest.mark.scenarios("stock", "main", n, *others)) for n in names
    ]


def running(section: str) -> list[Any]:
    """Parameters for the variants that run a section."""
    return engines(n for n, variant in VARIANTS.items() if section in {s.name for s in variant[2]})


# The main engine, with the true stock engine beside it.

MAIN = pytest.mark.scenarios("stock", "main")


@MAIN
def test_our_backend_gives_stock_answers(results: Results) -> None:
    ours, stock = results("main").sections, results("stock").sections
    assert_evidence(ours["forest"], stock["forest"], ours["forest zeros"], MAX_RATIO["main"])
    assert_evidence(ours["aborted"], stock["aborted"], ours["aborted zeros"], 0.6)


@MAIN
def test_the_stock_backend_that_we_own_gives_stock_answers(results: Results) -> None:
    ours = results("main").sections["forest stock"]
    assert_same(ours, results("stock").sections["forest"])
    assert ours.counters["stock_steps"] > 50
    assert ours.counters["packed_steps"] == ours.counters["plans"] == 0


@MAIN
@pytest.mark.parametrize("mode", CONTROLS)
def test_a_broken_decode_changes_half_of_the_requests(mode: str, results: Results) -> None:
    broken = results("main").sections[f"forest {mode}"]
    assert changes_half(broken, results("stock").sections["forest"])
    assert_packed(broken.counters, MAX_RATIO["main"])


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
def test_every_policy_gives_stock_answers(policy: str, results: Results) -> None:
    sections, stock = results("main").sections, results("stock").sections["forest"]
    ours = sections[f"forest {policy}"]
    assert_evidence(ours, stock, sections["forest zeros"], 1.001 if policy == "query" else 0.5)
    assert (ours.counters["kv_read_ratio"] == 1.0) == (policy == "query")


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
    sections = results("main").sections
    ours = sections["identical"]
    assert_evidence(ours, results("stock").sections["identical"], sections["identical zeros"], 0.2)
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


# Other set-ups, compared with the same stock engine.


@pytest.mark.parametrize("name", running("forest"))
def test_waves_of_requests_get_stock_answers(name: str, results: Results) -> None:
    ours, stock = results(name), results("stock").sections["forest"]
    control = results("main").sections["forest zeros"]
    assert_evidence(ours.sections["forest"], stock, control, MAX_RATIO[name])
    retracts = name == "pages" or "small-pool" in name
    assert (num_retracted(ours.log) > 0) == retracts


@pytest.mark.parametrize("name", running("aborted"))
def test_aborted_ids_come_back_and_get_stock_answers(name: str, results: Results) -> None:
    ours, control = results(name).sections["aborted"], results("main").sections["aborted zeros"]
    assert_evidence(ours, results("stock").sections["aborted"], control, 0.6)
    aborted = [request for rid, request in ours.requests.items() if rid.endswith("aborted")]
    assert len(aborted) == 7
    assert all(request["finish"] == "abort" for request in aborted)


@pytest.mark.parametrize("name", running("crowd"))
def test_hundreds_of_requests_that_come_and_go_get_stock_answers(
    name: str, results: Results
) -> None:
    """Overlap scheduling on, a pool so small that requests are retracted, aborts, VERIFY."""
    ours, control = results(name).sections["crowd"], results("main").sections["crowd zeros"]
    assert_evidence(ours, results("stock").sections["crowd"], control, 0.8)
    assert len(ours.requests) > 240
    assert num_retracted(results(name).log) > 0


@pytest.mark.parametrize("name", running("mixed"))
def test_passes_that_prefill_and_decode_at_once(name: str, results: Results) -> None:
    """Decoding requests in them stay settled, and the plan is made anew behind them."""
    ours, stock, main = results(name), results("stock"), results("main")
    control = main.sections["forest zeros"]
    assert_evidence(ours.sections["mixed"], stock.sections["forest"], control, MAX_RATIO[name])
    assert ours.log.count("test hook: mixed pass") > 10


@needs("beams")
@pytest.mark.parametrize("name", [*engines(["main"]), *running("beams")])
def test_beam_search_finds_stock_beams(name: str, results: Results) -> None:
    ours, control = results(name).sections["beams"], results("main").sections["beams zeros"]
    max_ratio = max(MAX_RATIO[name], 0.6)
    assert_evidence(ours, results("stock").sections["beams"], control, max_ratio)
    # Beam members have no request, and their rows change hands: a plan is good for one step.
    assert ours.counters["plans"] == ours.counters["packed_steps"]


@pytest.mark.scenarios("stock", "gate-never")
def test_a_closed_gate_leaves_every_step_to_stock(results: Results) -> None:
    ours = results("gate-never").sections["forest"]
    assert_same(ours, results("stock").sections["forest"])
    assert ours.counters["stock_steps"] > 50
    assert ours.counters["packed_steps"] == ours.counters["fallback_steps"] == 0
    assert ours.counters["plans"] == 0


@pytest.mark.scenarios("no-radix-cache")
def test_nothing_is_shared_without_a_radix_cache(results: Results) -> None:
    counters = results("no-radix-cache").sections["forest"].counters
    assert counters["kv_read_ratio"] == 1.0


# Set-ups that are compared with stock in the same engine.


def assert_evidence_within(
    name: str, section: str, results: Results, max_ratio: float, **options: float
) -> SectionResult:
    """Evidence from an engine that ran a section, its control, and stock."""
    sections = results(name).sections
    ours, stock = sections[section], sections[f"{section} stock"]
    assert stock.counters["packed_steps"] == 0
    assert_evidence(ours, stock, sections[f"{section} zeros"], max_ratio, **options)
    return ours


@pytest.mark.scenarios("tp-2")
def test_two_ranks_get_stock_answers(results: Results) -> None:
    assert_evidence_within("tp-2", "forest", results, 0.5)


# Before, our backend needs one of SGLang's to prefill with, and the pair of them cannot pad there.
@needs("any-name-on-cpu")
@pytest.mark.scenarios("dp-attention")
def test_dp_attention_pads_batches_and_they_get_stock_answers(results: Results) -> None:
    counters = assert_evidence_within("dp-attention", "forest", results, 0.75).counters
    # The log and the counters are those of both ranks.
    assert results("dp-attention").log.count("test hook: padded batch") > 10
    assert counters["plans"] < counters["packed_steps"]  # batches without padding keep their plans


@pytest.mark.scenarios("sliding")
def test_sliding_window_layers_go_to_stock_and_full_ones_are_packed(results: Results) -> None:
    ours = assert_evidence_within("sliding", "forest", results, 0.45)
    assert ours.counters["delegated_layers"] == {"0": "sliding-window", "2": "sliding-window"}


@needs("kv-scales")
@pytest.mark.scenarios("scales")
def test_scales_in_the_checkpoint_do_what_they_do_in_stock(results: Results) -> None:
    tolerance = LOGPROB_TOLERANCE_BF16_CACHE
    assert_evidence_within("scales", "forest", results, 0.5, tolerance=tolerance)
    # The layers do carry them: applied to a cache that holds unscaled values they do harm.
    sections = results("scales").sections
    assert changes_half(sections["forest scales"], sections["forest stock"])


@pytest.mark.scenarios("lora")
def test_adapters_get_stock_answers(results: Results) -> None:
    assert_evidence_within("lora", "adapters", results, ROLLOUT_RATIO)
    sections = results("lora").sections
    assert num_changed(sections["adapters stock"], sections["undisturbed stock"]) >= 5


# The kernels that run on a GPU, in Triton's interpreter, and SGLang's graph runner.


@pytest.mark.scenarios("triton")
def test_the_triton_kernels_give_stock_answers(results: Results) -> None:
    assert_evidence_within("triton", "grove", results, 0.6)
    assert "executor triton" in results("triton").log


@pytest.mark.parametrize("name", engines(["triton", "graphs of one kind", "graphs"]))
def test_nothing_is_compiled_once_the_server_is_ready(name: str, results: Results) -> None:
    log = results(name).log
    assert log.count("test hook: compiled at start") >= 4
    assert "test hook: compiled at serving" not in log
    assert "prefix attention: kernels compiled and run once in" in log


@pytest.mark.scenarios("graphs of one kind")
def test_graphs_of_sglangs_own_runner_give_stock_answers(results: Results) -> None:
    """Captured under batches of nothing, replayed under every plan that the engine makes."""
    assert_evidence_within("graphs of one kind", "grove", results, 0.6)
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
# Of the rollouts, the prompts and what is generated before the trainer steps in.
ROLLOUT_RATIO = 0.6


def trained(name: str, results: Results) -> SectionResult:
    """Our section of that name, after comparing it with stock's."""
    sections = results("trainer").sections
    assert_same(sections[name], sections[f"{name} stock"])
    assert_packed(sections[name].counters, ROLLOUT_RATIO)
    return sections[name]


@TRAINER
def test_a_broken_decode_changes_rollouts(results: Results) -> None:
    sections = results("trainer").sections
    assert changes_half(sections["undisturbed zeros"], sections["undisturbed stock"])


@pytest.mark.scenarios("trainer", "trainer stock")
@pytest.mark.parametrize("name", TRAINED)
def test_stock_answers_are_the_same_without_our_backend(name: str, results: Results) -> None:
    ours = results("trainer").sections[f"{name} stock"]
    assert_same(ours, results("trainer stock").sections[name])


@TRAINER
@pytest.mark.parametrize("name", ["undisturbed", "paused in place", "all logprobs"])
def test_a_pause_in_place_keeps_the_plan(name: str, results: Results) -> None:
    ours, undisturbed = trained(name, results), trained("undisturbed", results)
    assert num_changed(ours, undisturbed) == 0
    assert ours.counters["plans"] == undisturbed.counters["plans"]


@TRAINER
def test_logprobs_of_all_tokens_are_those_of_stock(results: Results) -> None:
    ours = trained("all logprobs", results)
    stock = results("trainer").sections["all logprobs stock"]
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


@TRAINER
@pytest.mark.parametrize("name", TRAINED[-(len(TRAINED) - 8) :])
def test_memory_comes_back(name: str, results: Results) -> None:
    trained(name, results)
