"""What a scheduler keeps of its newest plan, and shows to who asks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sglang_prefix.config import PrefixConfig
from sglang_prefix.explain import last_plan
from sglang_prefix.explain.last_plan import LastPlan
from sglang_prefix.explain.record import PlanRecord
from sglang_prefix.explain.segments import explain
from sglang_prefix.forest import PrefixForest
from tests.scheduling import Scheduler

SYSTEM = list(range(50))
PROMPTS = [[*SYSTEM, 60 + i, *range(70, 75 + i)] for i in range(3)]


def test_the_newest_plan_is_shown_if_it_is_to_be_kept() -> None:
    """As a record that says what runs, and that survives being written as JSON."""
    scheduler = Scheduler()
    last = LastPlan(PrefixConfig(keep_plan=True))
    scheduler.planner.on_plan = last.note
    assert last.as_dict() is None
    scheduler.start(*PROMPTS)
    shown = json.loads(json.dumps(last.as_dict()))
    record = PlanRecord.from_dict(shown)
    assert len(record.plans) == len(scheduler.groups)
    for found, shape in zip(record.plans, scheduler.groups, strict=True):
        assert shape.executor.plan is not None
        assert found.plan.same_as(shape.executor.plan)
    (node, *tails) = explain(record).segments
    assert (node.tokens, node.num_readers) == (len(SYSTEM), 3)
    own = len(PROMPTS[0]) - len(SYSTEM) + 2  # of its prompt, and two generated
    assert [tail.tokens for tail in sorted(tails, key=lambda tail: tail.index)] == [
        own,
        own + 1,
        own + 2,
    ]


def test_too_large_a_plan_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_plan, "MAX_NUMBERS", 10)
    forest = PrefixForest.from_neighbours(np.arange(4), np.full(3, 500), np.full(4, 510))
    keeper = LastPlan(PrefixConfig())
    keeper.note(forest, [], "gate-no-gain", (1.0, 2.0), 1, 4)
    shown = keeper.as_dict()
    assert shown is not None
    assert shown.keys() == {"left_out"}
