"""Radix path adapters, and what is noted of requests, on SGLang's own trees, nodes and requests."""

from __future__ import annotations

from typing import Any

import pytest

from prefix_patches.radix_paths import owned_lengths, path_reader
from prefix_patches.schedule_context import BATCH_ATTRIBUTE, ScheduleContext
from tests.scheduling import Request, Scheduler, make_forward_batch, make_request

SYSTEM = tuple(range(40))
PROMPTS = ((*SYSTEM, 100, 101), (*SYSTEM, 200, 201), (*SYSTEM, 200, 202))


class EarlierCore:
    """A tree core of SGLang's, without what it can do from 0.5.22 on."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def node_by_id(self, node: int) -> Any:
        return self._core.node_by_id(node)

    @property
    def root_node(self) -> Any:
        return self._core.root_node


class Tree:
    """A cache, as far as it is asked for paths."""

    def __init__(self, core: Any) -> None:
        self.tree_core = core


def start(monkeypatch: pytest.MonkeyPatch, core: str) -> tuple[Any, list[Request]]:
    """A tree, and requests that stand on its nodes; the last on a streaming session's."""
    from sglang.srt.session.streaming_session import _VirtualNode

    monkeypatch.setenv("SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND", core)
    scheduler = Scheduler()
    reqs = scheduler.start(*PROMPTS)
    return scheduler.cache, [*reqs, make_request(9, (), _VirtualNode())]


def read(cache: Any, reqs: list[Request]) -> list[Any]:
    reader = path_reader(cache)
    assert reader is not None
    return reader(reqs)


def test_each_kind_of_tree_gives_the_same_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.mem_cache.radix_cache import RadixCache

    cache, reqs = start(monkeypatch, "python")
    paths = read(cache, reqs)  # 0.5.22
    assert [ends for _, ends in paths] == [(40, 43), (40, 41, 43), (40, 41, 43), ()]
    assert paths[1][0][:2] == paths[2][0][:2]
    assert read(Tree(EarlierCore(cache.tree_core)), reqs) == paths  # 0.5.19
    # 0.5.17: requests hold the nodes themselves, in a cache that knows of no ids.
    for req in reqs[:-1]:
        req.last_node = cache.tree_core.node_by_id(req.last_node)
    linked = object.__new__(RadixCache)
    assert read(linked, reqs) == paths
    reqs[0].last_node, reqs[1].last_node = cache.tree_core.root_node, None
    assert read(linked, reqs[:2]) == [((), ())] * 2


def test_a_tree_that_cannot_be_read_is_no_tree_without_sharing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.mem_cache.radix_cache import RadixCache

    cache, reqs = start(monkeypatch, "rust")
    # As in 0.5.21: the names are there and raise.
    assert path_reader(Tree(EarlierCore(cache.tree_core))) is None
    # As if `tree_core` had got another name: requests hold ids, and nobody knows their nodes.
    with pytest.raises(TypeError, match="no tree_core to ask"):
        read(object.__new__(RadixCache), reqs)


def test_owned_length_is_where_each_release_keeps_it() -> None:
    new, without_kv, old = (make_request(row, (), owned=7) for row in range(1, 4))
    without_kv.kv, without_kv.cache_protected_len = None, 7
    old.kv, old.cache_protected_len = object(), 7
    assert [owned_lengths([req, req]) for req in (new, without_kv, old)] == [[7, 7]] * 3
    assert owned_lengths([]) == []


def test_a_request_settles_with_its_second_decode_step_and_not_across_a_retraction() -> None:
    schedule, req = ScheduleContext(), make_request(1, ())
    assert schedule.settled([req]) == [False]
    schedule.settle([req])
    assert schedule.settled([req]) == [True]
    req.retraction_count = 1
    assert schedule.settled([req]) == [False]


def test_a_prefill_unsettles_its_requests_but_not_those_that_decode_beside_it() -> None:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    schedule, fresh, decoding = ScheduleContext(), make_request(1, ()), make_request(2, ())
    schedule.settle([fresh, decoding])
    batch: Any = ScheduleBatch(reqs=[fresh, decoding], decoding_reqs=[decoding])
    extend = make_forward_batch("EXTEND", (1, 2), (1, 1), (0, 0))
    setattr(extend, BATCH_ATTRIBUTE, batch)
    before = schedule.push(extend)
    assert schedule.batch is batch
    schedule.pop(before)
    assert schedule.batch is None
    assert schedule.epoch == 1
    assert schedule.settled([fresh]) == [False]
    assert schedule.settled([decoding]) == [True]
