"""From what a decode planner plans, and when it reuses a plan."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefix_patches.install import install
from prefix_patches.schedule_context import BATCH_ATTRIBUTE
from sglang_prefix.backend import decode_batch, decode_planner
from sglang_prefix.backend.decode_planner import DecodePlanner
from tests.scheduling import Request, Scheduler, make_request

# From the requests that decode, and one that could, to the next batch if it is another one.
Change = Callable[[Scheduler, list[Request], Request], list[Request] | None]

_rng = random.Random(0)
SYSTEM = [_rng.randrange(256) for _ in range(50)]
# Of equal length, so that a plan kept when two requests change places fits but for its slots.
A, B, C, D = ([*SYSTEM, i, *range(12)] for i in range(4))


class CannotBeAsked:
    """A radix cache whose core has none of the methods that our adapters know."""

    tree_core = object()


def plans_of(scheduler: Scheduler, reqs: list[Request], steps: int = 3) -> list[int]:
    """Plans that each of the next steps makes."""
    return [scheduler.decode(reqs).plans for _ in range(steps)]


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_plan_is_reused_while_the_same_requests_grow_by_one(page_size: int) -> None:
    scheduler = Scheduler(page_size=page_size)
    reqs = scheduler.start(A, B, C)
    stats = scheduler.counters.decode.num_packs, scheduler.counters.decode.num_partials
    for _ in range(20):
        step = scheduler.decode(reqs)
        shared = scheduler.distinct_slots(reqs)
        assert step == (0, shared, sum(len(req.tokens) for req in reqs))
    counters, decode = scheduler.counters, scheduler.counters.decode
    assert (decode.num_packs, decode.num_partials) == stats == (1 + len(reqs), 2 * len(reqs))
    assert 0 < counters.path_seconds < counters.plan_seconds


def test_every_first_decode_step_is_private_and_the_second_plans_again() -> None:
    scheduler = Scheduler()
    reqs = scheduler.prefill(A, B)
    first = scheduler.decode(reqs)
    assert first == (1, first.logical, first.logical)
    scheduler.publish(*reqs)
    assert scheduler.decode(reqs) == (1, scheduler.distinct_slots(reqs), first.logical + 2)
    assert scheduler.decode(reqs) == (0, scheduler.distinct_slots(reqs), first.logical + 4)


def test_a_newcomer_is_private_beside_requests_that_share() -> None:
    scheduler = Scheduler()
    reqs = scheduler.start(A, B)
    # Its row holds the tree's slots already; only the scheduler knows when that is certain.
    (late,) = scheduler.prefill(C)
    assert late.kv.cache_protected_len == len(SYSTEM)
    step = scheduler.decode([*reqs, late])
    assert step[:2] == (1, scheduler.distinct_slots(reqs) + len(late.tokens))
    scheduler.publish(late)
    step = scheduler.decode([*reqs, late])
    assert step[:2] == (1, scheduler.distinct_slots([*reqs, late]))
    assert scheduler.decode([*reqs, late]).plans == 0


def retract(req: Request) -> None:
    """SGLang's method, on a request that stays where it is."""
    row, node, owned = req.kv.req_pool_idx, req.last_node, req.kv.cache_protected_len
    req.kv.req_pool_idx = None
    req.reset_for_retract()
    req.kv.req_pool_idx, req.last_node, req.kv.cache_protected_len = row, node, owned


def comes_back(scheduler: Scheduler, reqs: list[Request], other: Request) -> None:
    """As retracted requests do, through a prefill."""
    retract(reqs[1])
    scheduler.run_pass("EXTEND", [reqs[1]])


def is_replaced(scheduler: Scheduler, reqs: list[Request], other: Request) -> list[Request]:
    """By one of the same length."""
    scheduler.grow(other, reqs[1].tokens[len(other.tokens) :])
    return [reqs[0], other, reqs[2]]


def row_moves(scheduler: Scheduler, reqs: list[Request], other: Request) -> None:
    row, reqs[1].kv.req_pool_idx = reqs[1].kv.req_pool_idx, scheduler.free_rows.pop()
    scheduler.table[reqs[1].kv.req_pool_idx] = scheduler.table[row]
    # Its newest slots go to whoever has the old row now.
    scheduler.table[row] = 1


def moves_in_the_tree(scheduler: Scheduler, reqs: list[Request], other: Request) -> None:
    before = reqs[1].last_node
    scheduler.publish(reqs[1])
    assert reqs[1].last_node != before
    scheduler.run_pass("EXTEND", [])


def is_another_object(scheduler: Scheduler, reqs: list[Request], other: Request) -> list[Request]:
    """Under the old id, in the old row, as when it was aborted and sent again."""
    old = reqs[1]
    new = make_request(old.kv.req_pool_idx, old.tokens, old.last_node, old.kv.cache_protected_len)
    assert new.rid == old.rid
    return [reqs[0], new, reqs[2]]


def all_grow(scheduler: Scheduler, reqs: list[Request], other: Request) -> None:
    """As when a step was run as a prefill of one token, or left to the stock backend."""
    for req in reqs:
        scheduler.grow(req, [7])


@pytest.mark.parametrize(
    ("change", "plans"),
    [
        (lambda scheduler, reqs, other: None, [0, 0, 0]),
        # From another running batch: no prefill has run in between.
        (lambda scheduler, reqs, other: [*reqs, other], [1, 0, 0]),
        (is_replaced, [1, 0, 0]),
        (lambda scheduler, reqs, other: reqs[:-1], [1, 0, 0]),
        (lambda scheduler, reqs, other: reqs[1:], [1, 0, 0]),
        (lambda scheduler, reqs, other: reqs[::-1], [1, 0, 0]),
        (row_moves, [1, 0, 0]),
        (moves_in_the_tree, [1, 0, 0]),
        (lambda scheduler, reqs, other: scheduler.run_pass("EXTEND", []), [1, 0, 0]),
        (lambda scheduler, reqs, other: scheduler.run_pass("IDLE", []), [1, 0, 0]),
        (all_grow, [1, 0, 0]),
        (lambda scheduler, reqs, other: scheduler.grow(reqs[1], [7]), [1, 0, 0]),
        (lambda scheduler, reqs, other: scheduler.planner.invalidate(), [1, 0, 0]),
        # All may be retracted and come back without a pass, as the same batch on other slots.
        (lambda scheduler, reqs, other: retract(other), [1, 0, 0]),
        # Not known to be settled, so the second step plans again.
        (comes_back, [1, 1, 0]),
        (is_another_object, [1, 1, 0]),
    ],
)
def test_a_plan_ends_with_what_it_was_made_for(change: Change, plans: list[int]) -> None:
    install()
    scheduler = Scheduler()
    *reqs, other = scheduler.start(A, B, C, D)
    scheduler.decode(reqs)
    assert scheduler.decode(reqs).plans == 0
    assert plans_of(scheduler, change(scheduler, reqs, other) or reqs) == plans


@pytest.mark.parametrize("what", ["retraction_count", "last_node"])
def test_verify_refuses_that_kv_moves_without_a_prefill(what: str) -> None:
    """SGLang never does that, and a reused plan does not ask every request for it."""
    scheduler = Scheduler()
    reqs = scheduler.start(A, B)
    setattr(reqs[1], what, getattr(reqs[1], what) + 1)
    with pytest.raises(RuntimeError, match="without a prefill"):
        scheduler.decode(reqs)


def test_verify_refuses_lengths_that_only_sum_up_to_one_token_more_each() -> None:
    scheduler = Scheduler()
    batch = scheduler.decode_batch(scheduler.start(A, B))
    batch.seq_lens_cpu += torch.tensor([1, -1])
    with pytest.raises(RuntimeError, match="one token to each request"):
        scheduler.prepare(batch)


def test_a_reused_step_asks_torch_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With cold caches each call into torch takes longer than all the rest of such a step."""
    scheduler = Scheduler(verify=False)
    reqs = scheduler.start(A, B)
    first, second = scheduler.decode_batch(reqs), scheduler.decode_batch(reqs)
    # SGLang makes a new tensor only when a row changes.
    rows = getattr(first, BATCH_ATTRIBUTE).req_pool_indices_cpu
    getattr(second, BATCH_ATTRIBUTE).req_pool_indices_cpu = rows
    assert scheduler.prepare(first, in_graph=True) is None
    second.seq_lens_cpu = second.seq_lens = None
    for module in (decode_planner, decode_batch):
        for name in ("torch", "np"):
            monkeypatch.setattr(module, name, None)
    plans = scheduler.counters.decode.plans
    assert scheduler.prepare(second, in_graph=True) is None
    assert scheduler.counters.decode.plans == plans


def test_a_plan_ends_when_a_tail_has_used_up_its_reserved_slots() -> None:
    scheduler = Scheduler(reserved_tail_slots=3)
    reqs = scheduler.start(A, B)
    assert plans_of(scheduler, reqs, 9) == [0, 0, 0, 1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("options", [{"published": False}, {"pads": 1}, {"pads": 3}], ids=str)
@pytest.mark.parametrize("page_size", [1, 16])
def test_without_a_request_per_row_rows_are_compared_and_no_plan_is_reused(
    page_size: int, options: dict[str, Any]
) -> None:
    scheduler = Scheduler(page_size=page_size)
    reqs = scheduler.start(A, B)
    pads = options.get("pads", 0)
    # Slot 0 is read by every row of padding; only a whole page of it could be shared.
    padding = min(pads, 1) if page_size == 1 else pads
    for _ in range(3):
        step = scheduler.decode(reqs, **options)
        logical = sum(len(req.tokens) for req in reqs) + pads
        assert step == (1, scheduler.distinct_slots(reqs) + padding, logical)
    assert plans_of(scheduler, reqs) == [1, 0, 0]


def test_padded_requests_stay_unsettled() -> None:
    scheduler = Scheduler()
    reqs = scheduler.prefill(A, B)
    scheduler.decode(reqs, pads=1)
    scheduler.publish(*reqs)
    first = scheduler.decode(reqs)
    assert first == (1, first.logical, first.logical)
    assert scheduler.decode(reqs)[:2] == (1, scheduler.distinct_slots(reqs))
    assert scheduler.decode(reqs).plans == 0


def test_a_plan_over_the_bound_on_partials_is_left_to_stock() -> None:
    """Rather than run without what is shared: one pack of three requests, and three tails."""
    scheduler = Scheduler()
    reqs = scheduler.start(A, B, C)
    planner = scheduler.groups[1].planner
    for bound, reason in ((5, "workspace"), (6, None)):
        planner.max_partials = bound
        scheduler.run_pass("EXTEND", [])
        counted = scheduler.counted()
        for _ in range(2):  # the second step asks no planner
            assert scheduler.prepare(scheduler.decode_batch(reqs)) == reason
            for req in reqs:
                scheduler.grow(req, [7])
        assert (scheduler.counted() == counted) == (reason is not None)


def test_a_batch_larger_than_the_bound_on_partials_is_left_to_stock() -> None:
    scheduler = Scheduler()
    reqs = scheduler.start(A, B, C)
    scheduler.groups[0].planner.max_partials = 2
    small = DecodePlanner(
        scheduler.schedule, scheduler.table, 1, scheduler.groups, scheduler.counters
    )
    scheduler.planner = small
    assert scheduler.prepare(scheduler.decode_batch(reqs)) == "workspace"
    assert scheduler.prepare(scheduler.decode_batch(reqs[:2])) != "error"


def test_beam_members_change_rows_at_every_step_and_no_plan_is_reused() -> None:
    scheduler = Scheduler()
    leader, other = scheduler.start(A, B)
    prompt = len(leader.tokens)
    members = [scheduler.fork(leader) for _ in range(3)]
    for survivor in (0, 2, 2, 1, 0):
        step = scheduler.decode([leader, other], members=members)
        assert step[:2] == (1, scheduler.distinct_slots([leader, other, *members]))
        # The others go on from one of them: they take over all that it has generated.
        parent = (leader, *members)[survivor]
        rows = [req.kv.req_pool_idx for req in (leader, *members)]
        generated = scheduler.table[parent.kv.req_pool_idx, prompt : len(parent.tokens)].clone()
        scheduler.table[rows, prompt : len(parent.tokens)] = generated
    assert plans_of(scheduler, [leader, other]) == [1, 0, 0]


def test_a_tree_that_cannot_be_asked_has_its_rows_compared() -> None:
    scheduler = Scheduler()
    reqs = scheduler.prefill(A, B)
    scheduler.publish(*reqs)
    scheduler.cache = CannotBeAsked()
    # Rows are what they are, so that the first step shares as well; its plan is still not reused.
    for plans in (1, 1, 0, 0):
        assert scheduler.decode(reqs)[:2] == (plans, scheduler.distinct_slots(reqs))


def test_a_row_is_shared_no_further_than_the_tree_can_show() -> None:
    scheduler = Scheduler()
    first, second = scheduler.start(A, A)
    # As a streaming session leaves it: one row behind both, owned past the end of their node.
    scheduler.table[second.kv.req_pool_idx] = scheduler.table[first.kv.req_pool_idx]
    end = first.kv.cache_protected_len
    for req in (first, second):
        req.last_node = first.last_node
        req.kv.cache_protected_len = len(req.tokens)
    assert end < len(first.tokens)
    scheduler.run_pass("EXTEND", [first, second])
    scheduler.decode([first, second])
    step = scheduler.decode([first, second])
    assert step[:2] == (1, step.logical - end)


@pytest.mark.parametrize(
    ("published", "reason"), [(True, "no-radix-paths"), (False, "no-request-info")]
)
def test_rows_are_not_compared_on_a_device(published: bool, reason: str) -> None:
    scheduler = Scheduler()
    reqs = scheduler.start(A, B)
    scheduler.cache = CannotBeAsked()
    scheduler.run_pass("EXTEND", [])
    counted = scheduler.counted()
    scheduler.planner.req_to_token = torch.empty_like(scheduler.table, device="meta")
    assert scheduler.prepare(scheduler.decode_batch(reqs, published=published)) == reason
    assert scheduler.counted() == counted
    scheduler.planner.req_to_token = scheduler.table
    assert plans_of(scheduler, reqs, 2) == [1, 0]


def test_lengths_that_only_a_device_knows_are_no_request_info() -> None:
    scheduler = Scheduler()
    reqs = scheduler.start(A, B)
    counted = scheduler.counted()
    batch = scheduler.decode_batch(reqs)
    batch.seq_lens_cpu, batch.seq_lens_sum = None, None
    batch.seq_lens = batch.seq_lens.to("meta")
    assert scheduler.prepare(batch) == "no-request-info"
    assert scheduler.prepare(scheduler.decode_batch([])) == "no-request-info"
    assert scheduler.counted() == counted
    # On the CPU engine they may come from either of the two.
    batch = scheduler.decode_batch(reqs)
    batch.seq_lens_cpu = None
    assert scheduler.prepare(batch) is None
    scheduler.check_attention(batch)


def test_a_row_that_contradicts_the_tree_raises_and_the_next_batch_is_planned_again() -> None:
    scheduler = Scheduler()
    reqs = scheduler.start(A, B)
    slot = scheduler.table[reqs[1].kv.req_pool_idx, len(SYSTEM) // 2]
    true_slot = slot.clone()
    slot += 1
    # A reused plan has its slots already, and reads no row.
    assert scheduler.prepare(scheduler.decode_batch(reqs)) is None
    scheduler.run_pass("EXTEND", [])
    counted = scheduler.counted()
    with pytest.raises(RuntimeError, match="SGLANG_PREFIX_VERIFY: the forest claims a node"):
        scheduler.prepare(scheduler.decode_batch(reqs))
    assert scheduler.counted() == counted
    slot.copy_(true_slot)
    assert plans_of(scheduler, reqs) == [1, 0, 0]


def test_no_plan_is_reused_after_only_one_group_got_its_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = Scheduler()
    reqs = scheduler.start(A, B)
    scheduler.decode(reqs)

    def fail(*_: Any, **options: Any) -> None:
        raise RuntimeError("raised on purpose by a test")

    counted = scheduler.counted()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.groups[1].planner, "plan", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            scheduler.prepare(scheduler.decode_batch(reqs[::-1]))
    assert scheduler.counted() == counted
    # Of the lengths that the new plan of the first group expects, in the order of the old ones.
    assert plans_of(scheduler, reqs) == [1, 0, 0]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("drafts", [1, 2, 5])
@pytest.mark.parametrize("bigrams", [False, True])
def test_a_plan_outlives_passes_that_accept_different_numbers_of_drafts(
    bigrams: bool, drafts: int, page_size: int
) -> None:
    """Rejected positions are written again, on other slots."""
    seed = int(torch.randint(1 << 30, ()))
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    # Less than the sum of what passes accept at most, so that the exact growth must be known.
    slots = 9
    scheduler = Scheduler(page_size=page_size, reserved_tail_slots=slots, bigrams=bigrams)
    assert scheduler.cache.tree_core.is_eagle == bigrams
    reqs = scheduler.prefill(A, B, C)
    scheduler.verify(reqs, drafts, [1, 1, 1])
    scheduler.publish(*reqs)
    assert scheduler.verify(reqs, drafts, [drafts, 1, 1]).plans == 1
    grown = torch.tensor([0, 0, 0])
    last = torch.tensor([drafts, 1, 1])
    for _ in range(6):
        grown += last
        accepted = torch.randint(1, drafts + 1, (3,), generator=generator)
        step = scheduler.verify(reqs, drafts, accepted.tolist())
        assert step.plans == int(grown.max() > slots)
        if step.plans:
            grown[:] = 0
        last = accepted
        # Pairs of tokens end in one that is not shared.
        shared = (len(SYSTEM) - bigrams) // page_size * page_size
        assert step.logical - step.read == 2 * shared
    assert scheduler.counters.of["verify"].packed_steps == 8
    assert scheduler.counters.decode.packed_steps == 0


def test_a_plan_ends_where_lengths_do_not_follow_or_passes_are_of_another_kind() -> None:
    scheduler = Scheduler()
    reqs = scheduler.prefill(A, B)
    scheduler.verify(reqs, 3, [1, 1])
    scheduler.publish(*reqs)
    assert scheduler.verify(reqs, 3, [1, 2]).plans == 1
    assert scheduler.verify(reqs, 3, [2, 3]).plans == 0
    scheduler.grow(reqs[0], [7, 7])  # more than were drafted
    assert scheduler.verify(reqs, 3, [1, 1]).plans == 1
    assert scheduler.verify(reqs, 2, [1, 1]).plans == 1
    assert scheduler.decode(reqs).plans == 1
    assert scheduler.verify(reqs, 2, [1, 1]).plans == 1
    scheduler.planner.invalidate()
    assert scheduler.verify(reqs, 2, [1, 1]).plans == 1
    assert scheduler.verify(reqs[::-1], 2, [1, 0]).plans == 1
    assert scheduler.verify(reqs[::-1], 2, [1, 1]).plans == 1
    assert scheduler.verify(reqs[::-1], 2, [1, 1]).plans == 0
