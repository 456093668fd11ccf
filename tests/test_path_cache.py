"""The path cache, on both tree cores of SGLang: an old answer gives the forest of a new one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from prefix_patches.radix_paths import path_reader
from prefix_patches.schedule_context import ScheduleContext
from sglang_prefix.backend.path_cache import _SPARE_PATHS, FoundPaths, PathCache
from sglang_prefix.forest import PrefixForest, forest_of_table
from tests.scheduling import Request, Scheduler, make_request

CORES = ("rust", "python")
SYSTEM = tuple(range(40))


@pytest.fixture(params=CORES)
def scheduler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    monkeypatch.setenv("SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND", request.param)
    made = Scheduler()
    assert ("Rust" in type(made.cache.tree_core).__name__) == (request.param == "rust")
    return made


def forest_of(found: FoundPaths, reqs: Sequence[Request]) -> PrefixForest:
    assert found.limits.tolist() == [req.kv.cache_protected_len for req in reqs]
    lens = np.asarray([len(req.tokens) for req in reqs])
    return forest_of_table(found.table, found.path_of, found.limits, lens, page_size=1)


def path_cache() -> PathCache:
    return PathCache(ScheduleContext())


def look_up(cache: PathCache, tree: Any, reqs: Sequence[Any]) -> FoundPaths:
    """Paths of requests that have settled."""
    cache._schedule.settle(reqs)
    found = cache.look_up(tree, reqs)
    assert found is not None
    assert found.newcomers == []
    return found


def published(scheduler: Scheduler, *prompts: Sequence[int]) -> list[Request]:
    reqs = scheduler.prefill(*prompts)
    scheduler.publish(*reqs)
    for req in reqs:
        scheduler.cache.inc_lock_ref(req.last_node)
    return reqs


def insert(scheduler: Scheduler, tokens: Sequence[int]) -> None:
    """A request comes, is inserted and has gone."""
    (req,) = scheduler.prefill(tokens)
    scheduler.publish(req)
    scheduler.free_rows.append(req.kv.req_pool_idx)


def node_ids(scheduler: Scheduler, req: Request) -> tuple[int, ...]:
    read = path_reader(scheduler.cache)
    assert read is not None
    ids: tuple[int, ...] = read([req])[0][0]
    return ids


def test_a_split_above_running_requests_makes_no_call_and_loses_nothing(
    scheduler: Scheduler,
) -> None:
    reqs = published(scheduler, (*SYSTEM, 100, 101), (*SYSTEM, 200, 201), (*SYSTEM, 200, 202))
    cache = path_cache()
    before = look_up(cache, scheduler.cache, reqs)
    old_ids = node_ids(scheduler, reqs[1])
    insert(scheduler, (*SYSTEM[:25], 300, 301))
    new_ids = node_ids(scheduler, reqs[1])
    # SGLang's rule, on which the cache rests: the parent is new, the child keeps its id.
    assert len(new_ids) == len(old_ids) + 1
    assert new_ids[1:] == old_ids
    for left in (reqs, reqs[1:], reqs[::-1]):
        after = look_up(cache, scheduler.cache, left)
        assert after.table is before.table
        fresh = forest_of(look_up(path_cache(), scheduler.cache, left), left)
        assert forest_of(after, left).sharing() == fresh.sharing()


def test_a_newcomer_shares_what_its_own_insert_has_split(scheduler: Scheduler) -> None:
    (first,) = published(scheduler, (*SYSTEM, 100, 101))
    cache = path_cache()
    before = look_up(cache, scheduler.cache, [first])
    (late,) = published(scheduler, (*SYSTEM[:25], 300, 301))
    after = look_up(cache, scheduler.cache, [first, late])
    assert after.table is not before.table
    assert forest_of(after, [first, late]).sharing() == {(0, 25, frozenset({0, 1}))}


def test_only_the_newcomers_node_is_asked_for(scheduler: Scheduler) -> None:
    """Where SGLang says how many children a node has, which is from 0.5.23 on."""
    from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import TreePathNodeInfo

    reqs = published(scheduler, (*SYSTEM, 100, 101), (*SYSTEM, 200, 201))
    cache, tree = path_cache(), CountedTree(scheduler)
    look_up(cache, tree, reqs)
    reqs += published(scheduler, (*SYSTEM, 300, 301))
    found = look_up(cache, tree, reqs)
    tells_children = "num_children" in TreePathNodeInfo.__struct_fields__
    assert tree.asked[1] == [reqs[2].last_node]
    assert len(tree.asked) == (2 if tells_children else 3)
    assert forest_of(found, reqs).sharing() == {(0, len(SYSTEM), frozenset({0, 1, 2}))}


def test_newcomers_on_both_sides_of_a_node_that_an_older_path_lacks(scheduler: Scheduler) -> None:
    """One of them below the older request's node: the new node has no child that is nobody's."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    (first,) = published(scheduler, (*SYSTEM, 100, 101))
    cache = path_cache()
    look_up(cache, scheduler.cache, [first])
    insert(scheduler, (*SYSTEM[:25], 300, 301))
    scheduler.cache.evict(EvictParams(num_tokens=2))
    reqs = [first, *published(scheduler, (*SYSTEM, 100, 101, 102), (*SYSTEM[:25], 400))]
    forest = forest_of(look_up(cache, scheduler.cache, reqs), reqs)
    assert (0, 25, frozenset({0, 1, 2})) in forest.sharing()


def test_a_request_that_is_prefilled_again_or_retracted_is_read_anew(scheduler: Scheduler) -> None:
    from prefix_patches.install import install
    from tests.test_decode_planner import retract

    install()
    req, other = published(scheduler, SYSTEM, SYSTEM[:9])
    cache = path_cache()
    schedule = cache._schedule
    look_up(cache, scheduler.cache, [req, other])
    prefilled = partial(scheduler.run_pass, "EXTEND", [req])
    for happens in (prefilled, partial(retract, req)):
        req.kv.cache_protected_len -= 1
        known = look_up(cache, scheduler.cache, [req, other])
        happens()
        found = cache.look_up(scheduler.cache, [req, other])
        assert found is not None
        assert found.newcomers == [req]
        assert found.limits.tolist() == [0, 9]
        schedule.settle([req])
        assert look_up(cache, scheduler.cache, [req, other]).limits[0] == known.limits[0] - 1


def test_what_nobody_holds_any_more_is_dropped(scheduler: Scheduler) -> None:
    (req,) = published(scheduler, SYSTEM)
    cache = path_cache()
    for token in range(_SPARE_PATHS + 5):
        insert(scheduler, (*SYSTEM[:5], 100 + token))
        node = scheduler._match((*SYSTEM[:5], 100 + token))[0]
        look_up(cache, scheduler.cache, [req, make_request(9, (), node)])
        assert len(cache._row_of) <= _SPARE_PATHS + 5
        assert len(cache._known) == 2
    look_up(cache, scheduler.cache, [req])
    assert list(cache._known) == [req]


@pytest.mark.parametrize("seed", range(6))
def test_an_old_answer_gives_the_forest_of_a_new_one(scheduler: Scheduler, seed: int) -> None:
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    rng = random.Random(seed)
    base = [rng.randrange(5) for _ in range(48)]

    def prompt() -> list[int]:
        return [*base[: rng.randrange(1, 48)], *(rng.randrange(3) for _ in range(rng.randrange(9)))]

    cache, running, old_table = path_cache(), published(scheduler, prompt(), prompt()), None
    hits = stale_hits = 0
    for _ in range(25):
        what = rng.randrange(4)
        if what == 0 and len(running) < 10:
            running += published(scheduler, [*prompt(), 7])
        elif what == 1 and len(running) > 2:  # finishes, which inserts what it has generated
            done = running.pop(rng.randrange(len(running)))
            scheduler.grow(done, [rng.randrange(3)])
            scheduler.publish(done)
            scheduler.free_rows.append(done.kv.req_pool_idx)
        elif what == 2:
            scheduler.cache.evict(EvictParams(num_tokens=rng.randrange(1, 20)))
        else:
            insert(scheduler, [*prompt(), 8])
        rng.shuffle(running)
        found = look_up(cache, scheduler.cache, running)
        fresh = look_up(path_cache(), scheduler.cache, running)
        hits += found.table is old_table
        stale_hits += bool(set(fresh.table.node_ids.tolist()) - set(found.table.node_ids.tolist()))
        old_table = found.table
        cached, read_anew = forest_of(found, running), forest_of(fresh, running)
        assert cached.sharing() == read_anew.sharing()
        assert cached.order.tolist() == read_anew.order.tolist()
        assert cached.shared_lens.tolist() == read_anew.shared_lens.tolist()
    assert hits >= 5
    assert stale_hits >= 1, "no answer outlived a split"


def test_ids_of_a_tree_that_was_reset_are_not_found(scheduler: Scheduler) -> None:
    reqs = published(scheduler, (*SYSTEM, 100), (*SYSTEM, 200))
    cache = path_cache()
    look_up(cache, scheduler.cache, reqs)
    old_ids = {node for req in reqs for node in node_ids(scheduler, req)}
    scheduler.cache.reset()
    new = published(scheduler, (*SYSTEM[:9], 100), (*SYSTEM[:9], 200))
    assert not old_ids & {node for req in new for node in node_ids(scheduler, req)}
    forest = forest_of(look_up(cache, scheduler.cache, new), new)
    assert forest.sharing() == {(0, 9, frozenset({0, 1}))}


class CountedTree:
    """A tree of SGLang's, and how often it was asked."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._collect = scheduler.cache.tree_core.collect_path_info
        self.asked: list[list[int]] = []
        self.tree_core = self

    def collect_path_info(self, ids: list[int]) -> Any:
        self.asked.append(ids)
        return self._collect(ids)


def test_another_tree_with_the_same_ids_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trees of SGLang's Rust core give the same ids to nodes that end elsewhere."""
    monkeypatch.setenv("SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND", "rust")
    cache, one, other = path_cache(), Scheduler(), Scheduler()
    (short,), (long,) = published(one, SYSTEM[:10]), published(other, SYSTEM)
    assert short.last_node == long.last_node
    trees = CountedTree(one), CountedTree(other)
    for tree, req in ((0, short), (0, short), (1, long), (0, short)):
        found = look_up(cache, trees[tree], [req])
        assert found.table.ends.tolist() == [len(req.tokens)]
    assert [len(tree.asked) for tree in trees] == [2, 1]


def test_what_is_no_stable_id_is_not_kept(scheduler: Scheduler) -> None:
    from sglang.srt.mem_cache.radix_cache import RadixCache, TreeNode
    from sglang.srt.session.streaming_session import _VirtualNode

    # The virtual node of a session, whose path is empty.
    (req,), cache, tree = published(scheduler, SYSTEM), path_cache(), CountedTree(scheduler)
    virtual = make_request(9, (), _VirtualNode(), owned=7)
    for _ in range(2):
        found = look_up(cache, tree, [virtual, req])
        assert (found.path_of[0], found.limits.tolist()) == (-1, [0, len(SYSTEM)])
    virtual.last_node = req.last_node
    assert look_up(cache, tree, [virtual, req]).limits.tolist() == [7, len(SYSTEM)]
    # A node of a tree of linked nodes, whose ids SGLang hands out again.
    node, linked = TreeNode(), object.__new__(RadixCache)
    node.parent = TreeNode()
    for length in (4, 6):
        node.key = [0] * length
        assert look_up(cache, linked, [make_request(9, (), node)]).table.ends.tolist() == [length]
    # A tree that cannot be read has no paths.
    tree.tree_core = object()  # type: ignore[assignment]
    assert path_cache().look_up(tree, [req]) is None
