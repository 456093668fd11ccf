"""The real engine: our decode gives stock's tokens and logprobs, however it is set up.

One file, because engines are started once for all tests of a process, and pytest-xdist sends the
tests of a file to one process. First whether answers are stock's; then controls, which break our
decode on purpose, so that equal answers mean something; then the gate, layers that are left to
stock, and KV scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest

from tests.engine.conftest import Results
from tests.engine.driver import SectionResult
from tests.engine.evidence import (
    LOGPROB_TOLERANCE,
    LOGPROB_TOLERANCE_BF16_CACHE,
    assert_evidence,
    assert_packed,
    assert_same,
    num_changed,
    num_retracted,
)
from tests.engine.releases import needs
from tests.engine.rl import HOLD, UNDISTURBED
from tests.engine.scenarios import CONTROLS, CROWD_PAGE_SIZES, IDENTICAL, VARIANTS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

# Scenarios whose every part another one has, too.
EXTENDED = {"chunk-128 page-16 policy-node", "crowd page-4"}


def with_engines(names: Iterable[str]) -> list[Any]:
    """Parameters for variants, each marked with the engines that its test compares."""
    return [
        pytest.param(
            n,
            marks=[
                pytest.mark.scenarios("stock", n, "control"),
                *[pytest.mark.extended] * (n in EXTENDED),
            ],
        )
        for n in names
    ]


@pytest.mark.parametrize("name", with_engines(VARIANTS))
def test_waves_of_requests_get_stock_answers(name: str, results: Results) -> None:
    stock, ours, control = results("stock"), results(name), results("control")
    assert_evidence(
        ours.sections["forest"],
        stock.sections["forest"],
        control.sections["zeros"],
        VARIANTS[name].max_ratio,
    )
    assert (num_retracted(ours) > 0) == VARIANTS[name].retracts


@pytest.mark.parametrize("name", with_engines(n for n, v in VARIANTS.items() if v.aborts))
def test_aborted_ids_come_back_and_get_stock_answers(name: str, results: Results) -> None:
    ours, control = results(name).sections["aborted"], results("control").sections["aborted zeros"]
    assert_evidence(ours, results("stock").sections["aborted"], control, 0.6)
    aborted = [request for rid, request in ours.requests.items() if rid.endswith("aborted")]
    assert len(aborted) == 7
    assert all(request["finish"] == "abort" for request in aborted)


CROWDS = [f"crowd page-{size}" for size in CROWD_PAGE_SIZES]


@pytest.mark.parametrize("name", with_engines(CROWDS))
def test_hundreds_of_requests_that_come_and_go_get_stock_answers(
    name: str, results: Results
) -> None:
    """Overlap scheduling on, a pool so small that requests are retracted, aborts, VERIFY."""
    ours, control = results(name).sections["crowd"], results("control").sections["crowd zeros"]
    assert_evidence(ours, results("stock").sections["crowd"], control, 0.8)
    assert len(ours.requests) > 240
    assert num_retracted(results(name)) > 0


SEARCHES = {n: v.max_ratio for n, v in VARIANTS.items() if v.searches_beams}


@needs("beams")
@pytest.mark.parametrize("name", with_engines(["control", *SEARCHES]))
def test_beam_search_finds_stock_beams(name: str, results: Results) -> None:
    ours, control = results(name).sections["beams"], results("control").sections["beams zeros"]
    max_ratio = max(SEARCHES.get(name, 0), 0.6)
    assert_evidence(ours, results("stock").sections["beams"], control, max_ratio)
    # Beam members have no request, and their rows change hands: a plan is good for one step.
    assert ours.counters["plans"] == ours.counters["packed_steps"]


MIXING = "named-prefill chunk-64 mixed policy-chunk"


@pytest.mark.scenarios("stock", MIXING, "control")
def test_passes_that_prefill_and_decode_at_once(results: Results) -> None:
    """Decoding requests in them stay settled, and the plan is made anew behind them."""
    ours, stock, control = results(MIXING), results("stock"), results("control")
    max_ratio = VARIANTS[MIXING].max_ratio
    assert_evidence(
        ours.sections["mixed"], stock.sections["forest"], control.sections["zeros"], max_ratio
    )
    assert ours.log.count("test hook: mixed pass") > 10


@pytest.mark.scenarios("stock", "triton")
def test_the_triton_kernels_give_stock_answers(results: Results) -> None:
    """The kernels that run on a GPU, in Triton's interpreter."""
    ours, control = results("triton").sections["grove"], results("triton").sections["grove zeros"]
    assert_evidence(ours, results("stock").sections["grove"], control, 0.6)
    assert "executor triton" in results("triton").log


@pytest.mark.scenarios("triton", "graphs", "graphs of both")
@pytest.mark.parametrize("name", ["triton", "graphs", "graphs of both"])
def test_nothing_is_compiled_once_the_server_is_ready(name: str, results: Results) -> None:
    log = results(name).log
    assert log.count("test hook: compiled at start") >= 4
    assert "test hook: compiled at serving" not in log
    assert "prefix attention: kernels compiled and run once in" in log


@pytest.mark.scenarios("stock", "graphs")
def test_graphs_of_sglangs_own_runner_give_stock_answers(results: Results) -> None:
    """Captured under batches of nothing, replayed under every plan that the engine makes."""
    ours, stock = results("graphs"), results("stock")
    assert_evidence(
        ours.sections["grove"], stock.sections["grove"], ours.sections["grove zeros"], 0.6
    )
    assert "graph labels packed" in ours.log
    # SGLang has sized its pool, by the memory that is left, before we allocate anything.
    assert ours.log.index("KV Cache is allocated") < ours.log.index("prefix attention: ")
    steps = sum(section.counters["packed_steps"] for section in ours.sections.values())
    assert len(replays(ours.log, "packed")) >= steps
    assert not replays(ours.log, "stock")
    # Batches were padded, and sizes changed between replays.
    assert set(replays(ours.log, "packed")) == {2, 4, 10}


@pytest.mark.scenarios("sliding stock", "graphs of both")
def test_each_step_replays_the_graph_that_the_gate_chose(results: Results) -> None:
    """Also in a model of which some layers are stock's in either graph."""
    ours, stock = results("graphs of both"), results("sliding stock")
    found, expected = ours.sections["grove"], stock.sections["grove"]
    assert_same(found, expected)
    assert num_changed(ours.sections["grove zeros"], expected) * 2 >= len(expected.requests)
    assert found.counters["fallback_reasons"] == {}
    assert found.counters["packed_steps"] >= 3
    assert found.counters["stock_reasons"]["gate-no-gain"] >= 3
    for label in ("packed", "stock"):
        steps = sum(section.counters[f"{label}_steps"] for section in ours.sections.values())
        assert len(replays(ours.log, label)) >= steps > 0
    assert "graph labels packed/stock" in ours.log
    assert "graphs with label stock took" in ours.log


def replays(log: str, label: str) -> list[int]:
    """Batch sizes of the graphs with a label that were replayed."""
    return [int(size) for size in re.findall(rf"test hook: replay /{label} (\d+)", log)]


@pytest.mark.scenarios("no-radix-cache")
def test_nothing_is_shared_without_a_radix_cache(results: Results) -> None:
    counters = results("no-radix-cache").sections["forest"].counters
    assert counters["kv_read_ratio"] == 1.0


@pytest.mark.scenarios("stock", "tp-2 stock", "tp-2")
def test_two_ranks_get_stock_answers(results: Results) -> None:
    ours, stock = results("tp-2"), results("tp-2 stock")
    assert_evidence(ours.sections["forest"], stock.sections["forest"], ours.sections["zeros"], 0.5)


# Before, our backend needs one of SGLang's to prefill with, and the pair of them cannot pad there.
@needs("any-name-on-cpu")
@pytest.mark.scenarios("dp-attention stock", "dp-attention")
def test_dp_attention_pads_batches_and_they_get_stock_answers(results: Results) -> None:
    ours, stock = results("dp-attention"), results("dp-attention stock")
    assert_evidence(ours.sections["forest"], stock.sections["forest"], ours.sections["zeros"], 0.75)
    # The log is that of both ranks, the counters are those of the first.
    assert ours.log.count("test hook: padded batch") > 10
    counters = ours.sections["forest"].counters
    assert counters["plans"] < counters["packed_steps"]  # batches without padding keep their plans


@pytest.mark.scenarios("stock", "control")
def test_identical_prompts_are_packed_from_their_second_decode_step_on(results: Results) -> None:
    sections = results("control").sections
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


# Controls.


@pytest.mark.scenarios("stock", "control")
@pytest.mark.parametrize("mode", CONTROLS)
def test_a_broken_decode_changes_half_of_the_requests(mode: str, results: Results) -> None:
    broken, stock = results("control").sections[mode], results("stock").sections["forest"]
    assert num_changed(broken, stock) * 2 >= len(stock.requests)
    assert_packed(broken.counters, 0.45)


@pytest.mark.scenarios("stock", "control")
def test_the_hook_itself_changes_nothing(results: Results) -> None:
    sections = results("control").sections
    stock = results("stock").sections["forest"]
    assert_evidence(sections["none"], stock, sections["zeros"], 0.45)


@pytest.mark.scenarios("stock", "control")
@pytest.mark.parametrize("mode", ["plan-error", "run-error"])
def test_an_exception_hands_every_step_to_stock(mode: str, results: Results) -> None:
    sections = results("control").sections
    assert_same(sections[mode], results("stock").sections["forest"])
    counters = sections[mode].counters
    assert counters["packed_steps"] == 0
    assert counters["fallback_reasons"] == {"error": counters["fallback_steps"]}
    assert counters["fallback_steps"] > 50
    # The engine lived on, and the next section packed again.
    assert sections["compare-plans"].counters["packed_steps"] > 50


@pytest.mark.scenarios("stock", "control")
def test_the_wrapper_makes_the_plans_of_the_backend(results: Results) -> None:
    control = results("control")
    assert "test hook: plans differ" not in control.log
    # Every plan was compared but those for a first decode step, which only the backend's
    # scheduler knows to be private.
    plans = control.sections["compare-plans"].counters["plans"]
    assert control.log.count("test hook: equal plans") > plans / 2


# The gate, layers that are left to stock, KV scales.


@pytest.mark.scenarios("stock", "gate-never")
def test_a_closed_gate_leaves_every_step_to_stock(results: Results) -> None:
    ours = results("gate-never").sections["forest"]
    assert_same(ours, results("stock").sections["forest"])
    assert ours.counters["stock_steps"] > 50
    assert ours.counters["packed_steps"] == ours.counters["fallback_steps"] == 0
    assert ours.counters["plans"] == 0


@pytest.mark.scenarios("sliding stock", "sliding")
def test_sliding_window_layers_go_to_stock_and_full_ones_are_packed(results: Results) -> None:
    ours, stock = results("sliding"), results("sliding stock")
    assert_evidence(ours.sections["forest"], stock.sections["forest"], ours.sections["zeros"], 0.45)
    delegated = ours.sections["forest"].counters["delegated_layers"]
    assert delegated == {"0": "sliding-window", "2": "sliding-window"}


@needs("kv-scales")
@pytest.mark.scenarios("scales stock", "scales")
def test_scales_in_the_checkpoint_do_what_they_do_in_stock(results: Results) -> None:
    ours, stock = results("scales"), results("scales stock")
    assert_evidence(
        ours.sections["forest"],
        stock.sections["forest"],
        ours.sections["zeros"],
        0.5,
        LOGPROB_TOLERANCE_BF16_CACHE,
    )
    # The layers do carry them: applied to a cache that holds unscaled values they do harm.
    harmed = num_changed(ours.sections["scales"], stock.sections["forest"])
    assert harmed * 2 >= len(stock.sections["forest"].requests)


# In the hands of a trainer; and adapters.

TRAINED = pytest.mark.scenarios("trainer stock", "trainer")
# Of the rollouts, the prompts and what is generated before the trainer steps in.
ROLLOUT_RATIO = 0.6


def trained(name: str, results: Results) -> SectionResult:
    """Our section of that name, after comparing it with stock's."""
    ours, stock = results("trainer").sections, results("trainer stock").sections
    assert_same(ours[name], stock[name])
    assert_packed(ours[name].counters, ROLLOUT_RATIO)
    # Our decode was broken at the start of the same engine, on the same requests.
    assert num_changed(ours["zeros"], stock["undisturbed"]) * 2 >= len(UNDISTURBED.requests)
    return ours[name]


@TRAINED
@pytest.mark.parametrize("name", ["undisturbed", "paused in place", "all logprobs"])
def test_a_pause_in_place_keeps_the_plan(name: str, results: Results) -> None:
    ours, undisturbed = trained(name, results), trained("undisturbed", results)
    assert num_changed(ours, undisturbed) == 0
    assert ours.counters["plans"] == undisturbed.counters["plans"]


@TRAINED
def test_logprobs_of_all_tokens_are_those_of_stock(results: Results) -> None:
    ours = trained("all logprobs", results)
    stock = results("trainer stock").sections["all logprobs"]
    for request in UNDISTURBED.requests:
        found, expected = (run.requests[request.rid]["input_logprobs"] for run in (ours, stock))
        assert len(found) == len(expected) == len(request.prompt) - 1
        assert found == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


@TRAINED
def test_requests_retracted_by_a_pause_are_planned_anew(results: Results) -> None:
    ours, undisturbed = (trained(n, results) for n in ("paused and retracted", "undisturbed"))
    assert num_changed(ours, undisturbed) == 0
    # After their second prefill: their first decode step, and the second.
    assert ours.counters["plans"] == undisturbed.counters["plans"] + 2


@TRAINED
def test_one_sample_of_a_group_is_aborted(results: Results) -> None:
    aborted = trained("sample aborted", results).requests["r2 aborted"]
    assert aborted["finish"] == "abort"
    assert HOLD <= len(aborted["output_ids"]) < UNDISTURBED.requests[2].max_new_tokens


@TRAINED
@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("weights from disk", "undisturbed"),
        ("weights as tensors", "weights from disk"),
        ("weights broadcast", "undisturbed"),
    ],
)
def test_new_weights_amid_decoding(name: str, before: str, results: Results) -> None:
    ours, undisturbed = trained(name, results), trained(before, results)
    assert num_changed(ours, undisturbed) * 2 >= len(UNDISTURBED.requests)


@TRAINED
@pytest.mark.parametrize(
    "name",
    [
        "memory released",
        pytest.param("memory released in a pause", marks=needs("flush-while-paused")),
    ],
)
def test_memory_comes_back(name: str, results: Results) -> None:
    trained(name, results)


@pytest.mark.scenarios("lora stock", "lora")
def test_adapters_get_stock_answers(results: Results) -> None:
    ours, stock = results("lora").sections, results("lora stock").sections
    assert_evidence(ours["adapters"], stock["adapters"], ours["zeros"], ROLLOUT_RATIO)
    # They do something.
    assert num_changed(stock["adapters"], stock["undisturbed"]) >= 5
