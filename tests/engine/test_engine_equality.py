"""Our decode gives stock's tokens and logprobs in the real engine, however it is set up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.engine.conftest import Results
from tests.engine.evidence import assert_evidence, num_retracted
from tests.engine.scenarios import IDENTICAL, VARIANTS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def with_engines(names: Iterable[str]) -> list[Any]:
    """Parameters for variants, each marked with the engines that its test compares."""
    return [pytest.param(n, marks=pytest.mark.scenarios("stock", n, "control")) for n in names]


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


SEARCHES = {n: v.max_ratio for n, v in VARIANTS.items() if v.searches_beams}


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


@pytest.mark.scenarios("no-radix-cache")
def test_nothing_is_shared_without_a_radix_cache(results: Results) -> None:
    counters = results("no-radix-cache").sections["forest"].counters
    assert counters["kv_read_ratio"] == 1.0


@pytest.mark.scenarios("stock", "tp-2 stock", "tp-2")
def test_two_ranks_get_stock_answers(results: Results) -> None:
    ours, stock = results("tp-2"), results("tp-2 stock")
    assert_evidence(ours.sections["forest"], stock.sections["forest"], ours.sections["zeros"], 0.5)


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
    steps = range(1, max_new_tokens)  # the first token comes from the prefill
    counters = ours.counters
    assert counters["packed_steps"] == len(steps)
    assert counters["kv_tokens_logical"] == sum(count * (length + step) for step in steps)
    later = sum(length + count * step for step in steps[1:])
    assert counters["kv_tokens_read"] == count * (length + 1) + later
