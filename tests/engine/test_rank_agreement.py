"""How ranks of DP attention agree on a graph: the rule, SGLang's exchange, and plans made ahead.

Two real ranks are in ``test_engines.py``; here each piece is alone.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from prefix_patches import rank_agreement
from prefix_patches.patch import resolve
from prefix_patches.schedule_context import ensure_schedule_context
from sglang_prefix.backend.rank_agreement import RankAgreement, Vote
from sglang_prefix.gate import Decision
from tests.engine.bare_backend import make_runner
from tests.scheduling import Request, Scheduler

IDLE = Vote(0, 0, 0)
NEVER = Vote(1 << 40, 0, 0)


def votes(*predicted: tuple[int, int], packs: int = 0) -> list[Vote]:
    """Of ranks that predict so many nanoseconds packed, and stock."""
    return [Vote(*one, packs) for one in predicted]


@pytest.mark.parametrize(
    ("of_ranks", "packs"),
    [
        (votes((50, 100)), True),
        (votes((100, 50)), False),
        (votes((100, 50), packs=1), False),
        # The slowest rank decides, whatever the others and however many they are.
        (votes((50, 100), (30, 20), (30, 20)), True),
        (votes((10, 20), (10, 20), (110, 100)), False),
        # What one rank loses is less than what keeps all of them waiting.
        (votes((60, 55), (40, 100)), True),
        # A gain of 5% begins, and any goes on.
        (votes((96, 100), (1, 1)), False),
        ([*votes((96, 100)), Vote(1, 1, 1)], True),
        ([*votes((96, 100)), Vote(0, 0, 1)], True),
        (votes((101, 100), packs=1), False),
        # Ranks that decode nothing have no say.
        ([IDLE, *votes((50, 100)), IDLE], True),
        ([IDLE, *votes((100, 50)), IDLE], False),
        # A batch that cannot be packed keeps all others from it.
        ([*votes((1, 100), (1, 100)), NEVER], False),
    ],
)
def test_the_slowest_rank_decides_and_every_rank_hears_the_same(
    of_ranks: list[Vote], packs: bool
) -> None:
    others = RankAgreement(lambda batch: None), RankAgreement(lambda batch: None)
    others[0].agree(votes((50, 100)))  # another past
    for agreement in others:
        for order in (of_ranks, of_ranks[::-1]):
            assert agreement.agree([list(vote) for vote in order]) is packs


class Scheduled:
    """A schedule batch as far as a vote asks for it."""

    def __init__(self, mode: str) -> None:
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        self.forward_mode = ForwardMode[mode]
        self.seq_lens = self.seq_lens_cpu = torch.ones(1)
        self.out_cache_loc = self.req_pool_indices = torch.ones(1)
        self.spec_info: Any = None
        self.inner_idle_batch: Any = None


def fails(batch: Any) -> tuple[float, float]:
    raise RuntimeError("raised on purpose by a test")


@pytest.mark.parametrize(
    ("mode", "predict", "vote"),
    [
        ("DECODE", lambda batch: (1.5, 2.25), Vote(1500, 2250, 0)),
        ("DECODE", lambda batch: None, NEVER),
        ("DECODE", fails, NEVER),
        ("IDLE", fails, IDLE),
        ("EXTEND", fails, IDLE),
        ("MIXED", fails, IDLE),
        ("PREBUILT", fails, IDLE),
        (None, fails, IDLE),
    ],
)
def test_what_a_rank_votes(mode: str | None, predict: Any, vote: Vote) -> None:
    agreement = RankAgreement(predict)
    batch: Any = None if mode is None else Scheduled(mode)
    assert agreement.vote(batch) == vote
    agreement.agree(votes((1, 2)))
    assert agreement.vote(batch) == vote._replace(packs=1)
    agreement.agree([IDLE, IDLE])  # changes nothing
    assert agreement.vote(batch).packs == 1


class Adapter:
    """What SGLang calls before a step, around its exchange.

    Args:
        runner: the model runner.
        others: rows of other ranks; None where SGLang gathers nothing.
    """

    def __init__(self, runner: Any, others: Sequence[Vote] | None) -> None:
        self.model_runner = runner
        self.others = others
        self.width = 0

    def exchange(self, batch: Any) -> Any:
        """What it calls, with our part in it."""
        return rank_agreement._prepare_mlp_sync_batch(Adapter._gather, self, batch)

    def _gather(self, batch: Any) -> Any:
        """SGLang's own rows, of its own class, one for this rank and one for each other."""
        info_class = resolve(rank_agreement._INFO)
        parameters = inspect.signature(info_class).parameters
        needed = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
        info = info_class(**dict.fromkeys(needed, 0))
        if self.others is None:
            return batch
        own, gone = info._get_local_tensor(device="cpu"), info._get_fallback_tensor(device="cpu")
        assert own.shape == gone.shape
        self.width = len(own)
        rows = [torch.cat((gone[:-3], torch.tensor(vote))) for vote in self.others]
        table = next(name for name in rank_agreement._TABLES if name in parameters)
        setattr(info, table, torch.stack([own, *rows, gone]))
        return batch


def label_of(schedule: Any, batch: Any) -> str | None:
    """What ranks agreed on for a batch."""
    schedule.batch = batch
    found: str | None = schedule.agreed_label
    return found


def test_votes_are_columns_of_sglangs_rows_and_the_label_comes_back_on_the_batch() -> None:
    assert rank_agreement.why_not() is None
    rank_agreement.install()
    runner = make_runner()
    schedule = ensure_schedule_context(runner)
    heard: list[Any] = []
    batch, others = Scheduled("DECODE"), [Vote(1, 2, 0)]
    adapter = Adapter(runner, others)
    assert adapter.exchange(batch) is batch  # where nobody votes, SGLang's rows are its own
    width = adapter.width
    assert label_of(schedule, batch) is None

    def agree(rows: Any) -> str:
        heard.append(rows)
        return "packed"

    schedule.vote, schedule.agree = (lambda batch: Vote(7, 1 << 40, 1)), agree
    assert adapter.exchange(batch) is batch
    # A rank that has left decodes nothing.
    assert heard == [[[7, 1 << 40, 1], [1, 2, 0], [0, 0, 0]]]
    assert adapter.width == width + 3
    assert label_of(schedule, batch) == "packed"
    # An idle batch may run in place of the one that was scheduled.
    batch = Scheduled("PREBUILT")
    batch.inner_idle_batch = Scheduled("IDLE")
    adapter.exchange(batch)
    assert label_of(schedule, batch.inner_idle_batch) == "packed"
    assert adapter.exchange(None) is None
    assert len(heard) == 3
    # SGLang may be told to gather nothing.
    batch = Scheduled("DECODE")
    Adapter(runner, None).exchange(batch)
    assert label_of(schedule, batch) is None


class AgainstIt:
    """A gate that never packs."""

    def choose(self, plans: Any, forest: Any) -> Decision:
        """No."""
        return Decision(False, "gate-no-gain", 3.0, 2.0)

    def leave(self) -> None:
        """Nothing to note."""


PROMPTS = [[*range(50), 60 + i, *range(12)] for i in range(4)]


def test_a_plan_made_ahead_serves_the_steps_that_ranks_agree_to_pack() -> None:
    """Against the rank's own gate, after steps of stock, and under changing padding."""
    scheduler = Scheduler(gate=AgainstIt(), ranks_agree=True)
    rng = random.Random(seed := random.randrange(1 << 30))
    print(f"seed {seed}")
    reqs: list[Request] = scheduler.prefill(*PROMPTS[:3])
    assert scheduler.decode_agreed(reqs, True) == ((3.0, 2.0), None)
    assert scheduler.counters.predicted_gain_us == 0.0  # a metric that must not fall
    scheduler.publish(*reqs)
    for step in range(40):
        if step == 20:
            (late,) = scheduler.prefill(PROMPTS[3])
            reqs.append(late)
        packed, pads = rng.random() < 0.6, rng.choice((0, 0, 0, 2))
        before = scheduler.counted()
        predicted, reason = scheduler.decode_agreed(reqs, packed, pads=pads)
        assert predicted == (3.0, 2.0)
        assert reason == (None if packed else "gate-no-gain")
        if step == 20:
            scheduler.publish(late)
        elif packed:
            read, logical = (
                a - b for a, b in zip(scheduler.counted()[1:], before[1:], strict=True)
            )
            assert read == scheduler.distinct_slots(reqs) < logical
    assert scheduler.counters.reused_plan_steps >= 36


def test_ranks_that_share_nothing_have_a_plan_for_the_others_sake() -> None:
    scheduler = Scheduler(gate=AgainstIt(), ranks_agree=True)
    reqs = scheduler.prefill([1, 2, 3], [4, 5, 6, 7])
    for packed, reason in ((False, "gate-nothing-shared"), (True, None)):
        assert scheduler.decode_agreed(reqs, packed) == ((3.0, 2.0), reason)
    # Alone, none is made.
    alone = Scheduler(gate=AgainstIt())
    assert alone.decode_agreed(alone.prefill([1, 2, 3]), True) == (None, "gate-nothing-shared")


def test_a_step_that_others_keep_from_packing_says_so() -> None:
    scheduler = Scheduler(ranks_agree=True)  # without a gate: it packs everything
    reqs = scheduler.prefill(*PROMPTS[:2])
    assert scheduler.decode_agreed(reqs, False) == ((0.0, 1.0), "gate-other-ranks")
    scheduler.planner.max_batch_size = 3
    assert scheduler.decode_agreed(reqs, False, pads=2) == ((0.0, 1.0), "workspace")
    scheduler.planner.max_batch_size = 1
    reqs = scheduler.prefill(*PROMPTS[2:])
    assert scheduler.decode_agreed(reqs, False) == (None, "workspace")


def test_a_step_that_was_decided_ahead_and_is_eager_after_all_is_planned_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when another rank prefills. A newcomer's first step is still its first."""
    scheduler = Scheduler(ranks_agree=True)
    replan = scheduler.planner.replan
    planned: list[int] = []

    def watched(batch: Any, lens: Any) -> str | None:
        planned.append(len(lens))
        return replan(batch, lens)

    monkeypatch.setattr(scheduler.planner, "replan", watched)
    reqs = scheduler.prefill(*PROMPTS[:2])
    assert scheduler.decode_agreed(reqs, None, pads=1) == ((0.0, 1.0), None)
    assert scheduler.counters.decode.kv_tokens_read == scheduler.counters.decode.kv_tokens_logical
    scheduler.publish(*reqs)
    for _ in range(3):
        assert scheduler.decode_agreed(reqs, None, pads=1) == ((0.0, 1.0), None)
    assert planned == [2, 2]
    assert scheduler.counters.decode.kv_tokens_read < scheduler.counters.decode.kv_tokens_logical
