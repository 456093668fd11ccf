"""The path cache, on both tree cores of SGLang: an old answer gives the forest of a new one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from prefix_patches.radix_paths import path_reader
from sglang_prefix.backend.path_cache import FoundPaths, PathCache
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
    limits = found.table.lengths[found.path_of]
    assert limits.tolist() == [req.kv.cache_protected_len for req in reqs]
    lens = np.asarray([len(req.tokens) for req in reqs])
    return forest_of_table(*found, limits, lens, page_size=1)


def look_up(cache: PathCache, tree: Any, reqs: Sequence[Any]) -> FoundPaths:
    found = cache.look_up(tree, reqs)
    assert found is not None
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
    cache = PathCache()
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
        fresh = forest_of(look_up(PathCache(), scheduler.cache, left), left)
        assert forest_of(after, left).sharing() == fresh.sharing()


def test_a_newcomer_shares_what_its_own_insert_has_split(scheduler: Scheduler) -> None:
    (first,) = published(scheduler, (*SYSTEM, 100, 101))
    cache = PathCache()
    before = look_up(cache, scheduler.cache, [first])
    (late,) = published(scheduler, (*SYSTEM[:25], 300, 301))
    after = look_up(cache, scheduler.cache, [first, late])
    assert after.table is not before.table
    assert forest_of(after, [first, late]).sharing() == {(0, 25, frozenset({0, 1}))}


@pytest.mark.parametrize("seed", range(6))
def test_an_old_answer_gives_the_forest_of_a_new_one(scheduler: Scheduler, seed: int) -> None:
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    rng = random.Random(seed)
    base = [rng.randrange(5) for _ in range(48)]

    def prompt() -> list[int]:
        return [*base[: rng.randrange(1, 48)], *(rng.randrange(3) for _ in range(rng.randrange(9)))]

    cache, running, old_table = PathCache(), published(scheduler, prompt(), prompt()), None
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
        fresh = look_up(PathCache(), scheduler.cache, running)
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
    cache = PathCache()
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
        self._collect, self.calls = scheduler.cache.tree_core.collect_path_info, 0
        self.tree_core = self

    def collect_path_info(self, ids: list[int]) -> Any:
        self.calls += 1
        return self._collect(ids)


def test_another_tree_with_the_same_ids_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trees of SGLang's Rust core give the same ids to nodes that end elsewhere."""
    monkeypatch.setenv("SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND", "rust")
    cache, one, other = PathCache(), Scheduler(), Scheduler()
    (short,), (long,) = published(one, SYSTEM[:10]), published(other, SYSTEM)
    assert short.last_node == long.last_node
    trees = CountedTree(one), CountedTree(other)
    for tree, req in ((0, short), (0, short), (1, long), (0, short)):
        found = look_up(cache, trees[tree], [req])
        assert found.table.ends.tolist() == [len(req.tokens)]
    assert [tree.calls for tree in trees] == [2, 1]


def test_what_is_no_stable_id_is_asked_for_each_time(scheduler: Scheduler) -> None:
    from sglang.srt.mem_cache.radix_cache import RadixCache, TreeNode
    from sglang.srt.session.streaming_session import _VirtualNode

    # The virtual node of a session, whose path is empty.
    (req,), cache, tree = published(scheduler, SYSTEM), PathCache(), CountedTree(scheduler)
    virtual = make_request(9, (), _VirtualNode())
    for calls in (1, 2):
        found = look_up(cache, tree, [virtual, req])
        assert found.table.lengths[found.path_of].tolist() == [0, len(SYSTEM)]
        assert tree.calls == calls
    # A node of a tree of linked nodes, whose ids SGLang hands out again.
    node, linked = TreeNode(), object.__new__(RadixCache)
    node.parent = TreeNode()
    for length in (4, 6):
        node.key = [0] * length
        assert look_up(cache, linked, [make_request(9, (), node)]).table.ends.tolist() == [length]
    # A tree that cannot be read has no paths.
    tree.tree_core = object()  # type: ignore[assignment]
    assert PathCache().look_up(tree, [req]) is None
