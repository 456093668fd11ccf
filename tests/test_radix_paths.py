"""Radix path adapters, on objects shaped like those of each SGLang release that has them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from prefix_patches.radix_paths import owned_lengths, path_reader
from prefix_patches.schedule_context import ScheduleContext

PATHS = {5: ((3, 5), (4, 9)), 6: ((3, 6), (4, 7)), 3: ((3,), (4,))}


def linked_nodes() -> dict[int, Any]:
    """Root 1 with node 3 of four tokens, and below it 5 and 6 of five and three."""
    nodes = {1: SimpleNamespace(id=1, key=[], parent=None)}
    for node, parent, length in ((3, 1, 4), (5, 3, 5), (6, 3, 3)):
        nodes[node] = SimpleNamespace(id=node, key=[0] * length, parent=nodes[parent])
    return nodes


class RustCore:
    """As in 0.5.21: the names are there and raise."""

    def node_by_id(self, node: int) -> Any:
        raise NotImplementedError

    @property
    def root_node(self) -> Any:
        raise NotImplementedError


def collect(ids: list[int]) -> list[list[Any]]:
    return [
        [SimpleNamespace(node_id=n, path_end=e) for n, e in zip(*PATHS[node], strict=True)]
        for node in ids
    ]


def read(cache: Any, last_nodes: list[Any]) -> list[Any]:
    reader = path_reader(cache)
    assert reader is not None
    return reader([SimpleNamespace(last_node=node) for node in last_nodes])


def test_each_kind_of_tree_gives_the_same_paths() -> None:
    nodes, virtual = linked_nodes(), object()  # a streaming session's last node
    by_id = SimpleNamespace(node_by_id=nodes.__getitem__, root_node=nodes[1])
    linked = read(SimpleNamespace(), [nodes[5], nodes[6], nodes[3], nodes[1], None])  # 0.5.17
    assert linked == [PATHS[5], PATHS[6], PATHS[3], ((), ()), ((), ())]
    found = read(SimpleNamespace(tree_core=by_id), [5, 6, 1, virtual])  # 0.5.19
    assert found == [PATHS[5], PATHS[6], ((), ()), ((), ())]
    collecting = SimpleNamespace(collect_path_info=collect)  # 0.5.22
    found = read(SimpleNamespace(tree_core=collecting), [5, 5, virtual, 6])
    assert found == [PATHS[5], PATHS[5], ((), ()), PATHS[6]]
    assert path_reader(SimpleNamespace(tree_core=RustCore())) is None


def test_owned_length_is_where_each_release_keeps_it() -> None:
    old = SimpleNamespace(cache_protected_len=7, kv=SimpleNamespace(kv_allocated_len=12))
    without_kv = SimpleNamespace(cache_protected_len=7, kv=None)
    new = SimpleNamespace(kv=SimpleNamespace(cache_protected_len=7))
    assert [owned_lengths([req, req]) for req in (old, without_kv, new)] == [[7, 7]] * 3
    assert owned_lengths([]) == []


class Request:
    """What is noted of a request stands on it."""

    retraction_count = 0


def test_a_request_settles_with_its_second_decode_step_and_not_across_a_retraction() -> None:
    schedule, req = ScheduleContext(), Request()
    assert schedule.settled([req]) == [False]
    schedule.settle([req])
    assert schedule.settled([req]) == [True]
    req.retraction_count = 1
    assert schedule.settled([req]) == [False]


def test_a_prefill_unsettles_its_requests_but_not_those_that_decode_beside_it() -> None:
    schedule, fresh, decoding = ScheduleContext(), Request(), Request()
    schedule.settle([fresh, decoding])
    batch = SimpleNamespace(reqs=[fresh, decoding], decoding_reqs=[decoding])
    extend = SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: False), _sglang_prefix_schedule_batch=batch
    )
    before = schedule.push(extend)
    assert schedule.batch is batch
    schedule.pop(before)
    assert schedule.batch is None
    assert schedule.epoch == 1
    assert schedule.settled([fresh]) == [False]
    assert schedule.settled([decoding]) == [True]
