"""Breaking our decode on purpose changes the answers, so that equal answers mean something."""

from __future__ import annotations

import pytest

from tests.engine.conftest import Results
from tests.engine.evidence import assert_evidence, assert_packed, assert_same, num_changed
from tests.engine.scenarios import CONTROLS

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.scenarios("stock", "control"),
]


@pytest.mark.parametrize("mode", CONTROLS)
def test_a_broken_decode_changes_half_of_the_requests(mode: str, results: Results) -> None:
    broken, stock = results("control").sections[mode], results("stock").sections["forest"]
    assert num_changed(broken, stock) * 2 >= len(stock.requests)
    assert_packed(broken.counters, 0.45)


def test_the_hook_itself_changes_nothing(results: Results) -> None:
    sections = results("control").sections
    stock = results("stock").sections["forest"]
    assert_evidence(sections["none"], stock, sections["zeros"], 0.45)


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


def test_the_wrapper_makes_the_plans_of_the_backend(results: Results) -> None:
    control = results("control")
    assert "test hook: plans differ" not in control.log
    # Every plan was compared but those for a first decode step, which only the backend's
    # scheduler knows to be private.
    plans = control.sections["compare-plans"].counters["plans"]
    assert control.log.count("test hook: equal plans") > plans / 2
