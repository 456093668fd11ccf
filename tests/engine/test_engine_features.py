"""The gate, layers that are left to stock, and KV scales, in the real engine."""

from __future__ import annotations

import pytest

from tests.engine.conftest import Results
from tests.engine.evidence import (
    LOGPROB_TOLERANCE_BF16_CACHE,
    assert_evidence,
    assert_same,
    num_changed,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


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
