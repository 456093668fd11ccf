"""Host time of planning, with SGLang's own path call beside it, on a real radix tree."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.executor import AttentionParams
from prefix_kernels.launches import FUSED_ROWS
from prefix_kernels.native_executor import NativeExecutor
from prefix_kernels.plan_buffers import serialize_plan
from prefix_kernels.torch_executor import TorchExecutor
from prefix_kernels.work_list import build_work_list
from prefix_patches.radix_paths import path_reader
from prefix_patches.schedule_context import BATCH_ATTRIBUTE, ScheduleContext
from sglang_prefix.backend.counters import BackendCounters
from sglang_prefix.backend.decode_batch import DecodeBatch
from sglang_prefix.backend.decode_planner import DecodePlanner, LayerGroup
from sglang_prefix.backend.path_cache import PathCache
from sglang_prefix.bench.timing import host_seconds, interleaved
from sglang_prefix.bench.workloads.trees import TreeBatch, pat_tree
from sglang_prefix.forest import PathTable, PrefixForest, RadixPath, forest_of_table
from sglang_prefix.packing import CPU_PROFILE, GPU_PROFILE, AttentionShape
from sglang_prefix.packing.planner import PackPlanner

__all__ = ["measure_planning"]

# Of a root, the branches below it, the groups below each of those, and the requests.
LEVEL_TOKENS = "512,256,128,64"
SHAPE = AttentionShape(32, 8, 128, 128, 2, 2)
_CPU = torch.device("cpu")
_SPARE_STEPS = 16  # warm-ups among them
_NEWCOMER_STRIDE = 32  # every so manieth request
_LAYERS = 30
_DRAFTS = 4


def measure_planning(num_requests: int, rounds: int, seed: int) -> dict[str, Any]:
    """Time the stages of a plan for ``num_requests`` requests in a three-level forest.

    Returns:
        What `schema.HostCase` has of a case, without its name and group.
    """
    tree = _RadixTree(num_requests, seed, (rounds + _SPARE_STEPS) * _DRAFTS)
    read = path_reader(tree.cache)
    assert read is not None
    paths = read(tree.requests)
    schedule = ScheduleContext()
    schedule.settle(tree.requests)
    path_cache = PathCache(schedule)
    found = path_cache.look_up(tree.cache, tree.requests)
    assert found is not None
    table, path_of, limits, _ = found
    lens = limits + 1

    def make_forest() -> PrefixForest:
        return forest_of_table(table, path_of, limits, lens, page_size=1)

    def make_work_list() -> NDArray[np.int32]:
        items, partials = build_work_list(gpu_plan, SHAPE.group_size, list(FUSED_ROWS))
        return serialize_plan(gpu_plan, [items], partials, num_requests)

    forest = make_forest()
    planner = PackPlanner(SHAPE, CPU_PROFILE)
    gpu_plan = PackPlanner(SHAPE, GPU_PROFILE).plan(forest)
    batch = _DecodeBatch(
        tree, lens, LayerGroup(PackPlanner(SHAPE, GPU_PROFILE), _NoExecutor(SHAPE, _CPU))
    )
    verify = _DecodeBatch(
        tree,
        lens,
        LayerGroup(PackPlanner(SHAPE, GPU_PROFILE), _NoExecutor(SHAPE, _CPU)),
        drafts=_DRAFTS,
    )
    native = _NativeSteps(tree, lens, rounds)
    stages: dict[str, Callable[[], object]] = {
        # Where the path cache has no answer: the call, and its answer as arrays.
        "sglang_path_call": lambda: read(tree.requests),
        "path_table": lambda: PathTable.of(paths),
        "path_cache_hit": lambda: path_cache.look_up(tree.cache, tree.requests),
        # Planning: `plan` is the two before it.
        "forest": make_forest,
        "pack_and_lay_out": lambda: planner.plan(forest),
        "plan": lambda: planner.plan(make_forest()),
        # All that the backend does to plan a batch, slots left out: of requests that were in the
        # batch before; where some are new, on new nodes; where all are, which SGLang is asked for.
        "plan_batch": batch.plan,
        "plan_batch_first": batch.plan_first,
        # What loading a plan into the Triton executor costs the host, launches left out.
        "work_list": make_work_list,
        # A step that goes on as the one before: all of it in a graph.
        "reused_step": batch.keep,
        # The same where drafts are verified, of which each request has accepted some.
        "reused_verify_step": verify.keep,
        **native.stages,
    }
    timed: dict[str, Callable[[], float]] = {
        name: partial(host_seconds, work) for name, work in stages.items()
    }
    timed["plan_batch_newcomers"] = batch.newcomers_seconds
    seconds = interleaved(timed, rounds, warmups=2)
    return {
        "num_requests": num_requests,
        "us": {name: median(times) * 1e6 for name, times in seconds.items()},
        "seconds": seconds,
    }


class _DecodeBatch:
    """A decode batch as SGLang's graph runner hands it over, and the planner that serves it.

    With ``drafts`` it is a verify pass over so many tokens of each request.
    """

    def __init__(
        self,
        tree: _RadixTree,
        lens: NDArray[np.int64],
        group: LayerGroup,
        *,
        in_graph: bool = True,
        drafts: int = 0,
        # More than any run does steps, so that no tail runs out of room.
        reserved_tail_slots: int = 1 << 20,
    ) -> None:
        self._schedule, self._in_graph, self._drafts = ScheduleContext(), in_graph, drafts
        group.planner.reserved_tail_slots = reserved_tail_slots
        self._planner = DecodePlanner(
            self._schedule, tree.table, 1, [group], BackendCounters(), verify=False
        )
        self._lens = lens - drafts  # which SGLang's lengths leave out
        size = len(lens)
        self._growth = np.arange(size) % drafts + 1 if drafts else np.ones(size, np.int64)
        self._all_growth = int(self._growth.sum())
        device_lens = torch.from_numpy(self._lens)
        self._forward_batch = SimpleNamespace(
            batch_size=size,
            num_padding=0,
            forward_mode=SimpleNamespace(
                is_decode=lambda: not drafts, is_target_verify=lambda: bool(drafts)
            ),
            seq_lens=device_lens,
            seq_lens_cpu=device_lens,
            seq_lens_sum=int(self._lens.sum()),
            req_pool_indices=torch.arange(size),
            out_cache_loc=torch.zeros(size * (drafts or 1), dtype=torch.int64),
        )
        batch = SimpleNamespace(
            reqs=tree.requests, tree_cache=tree.cache, req_pool_indices_cpu=torch.arange(size)
        )
        setattr(self._forward_batch, BATCH_ATTRIBUTE, batch)
        self._schedule.settle(tree.requests)
        self._reqs, self._tree_cache = tree.requests, tree.cache
        self.plan()

    def plan(self) -> None:
        """A step for which the batch is planned anew."""
        self._planner.invalidate()
        self._step()

    def newcomers_seconds(self) -> float:
        """Time of the same where nothing is known of some requests and of their nodes."""
        self._planner.forget()
        others = [req for i, req in enumerate(self._reqs) if i % _NEWCOMER_STRIDE]
        self._planner.paths.look_up(self._tree_cache, others)
        return host_seconds(self.plan)

    def plan_first(self) -> None:
        """The same, where SGLang is asked for the path of every node."""
        self._planner.forget()
        self.plan()

    def keep(self) -> None:
        """A step that goes on under the plan, the schedule of the batch included."""
        self._lens += self._growth
        self._forward_batch.seq_lens_sum += self._all_growth
        self._step()

    def _step(self) -> None:
        before = self._schedule.push(self._forward_batch)
        reason = self._planner.prepare(
            DecodeBatch(self._forward_batch, self._schedule.batch, self._in_graph, self._drafts)
        )
        self._schedule.pop(before)
        assert reason is None


class _NativeSteps:
    """What the native executor costs beside attention; no stages where it cannot be compiled.

    Of one head with one element, so that next to nothing is computed in a layer.
    """

    def __init__(self, tree: _RadixTree, lens: NDArray[np.int64], rounds: int) -> None:
        self.stages: dict[str, Callable[[], object]] = {}
        if NativeExecutor.why_not(_CPU, torch.float32, torch.float32):
            return
        shape = AttentionShape(1, 1, 1, 1, 4, 4)
        executor, alone = NativeExecutor(shape, _CPU), NativeExecutor(shape, _CPU)
        planner = PackPlanner(shape, CPU_PROFILE)
        group = LayerGroup(planner, executor)
        batch = _DecodeBatch(
            tree, lens, group, in_graph=False, reserved_tail_slots=rounds + _SPARE_STEPS
        )
        executor.cut()  # as the first layer does
        rows, plan = torch.arange(len(lens)), executor.plan
        assert plan is not None
        loads = NativeExecutor(shape, _CPU)
        loads.load(plan, tree.table, rows)
        alone.load(
            planner.plan(PrefixForest.from_paths([RadixPath((), ())], [0], [1])),
            tree.table,
            rows[:1],
        )
        cache = torch.zeros(int(tree.table.max()) + 1, 1, 1)
        q, out, params = torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), AttentionParams(1.0)

        def run_layers() -> None:
            for _ in range(_LAYERS):
                alone.run(q, cache, cache, out, None, params)

        self.stages = {
            "native_load": lambda: loads.load(plan, tree.table, rows),
            "native_cut": loads.cut,
            # A step that goes on: tails grow by a slot, and the work with them.
            "native_step": batch.keep,
            # The calls of 30 layers, for one request of one token.
            "native_layers": run_layers,
        }


class _NoExecutor(TorchExecutor):
    """Takes plans and does nothing with them."""

    def load(self, *args: Any, **kwargs: Any) -> None:
        """Not this time."""


@dataclass(eq=False)
class _Request:
    """What is read of SGLang's ``Req``, which is equal to itself alone."""

    last_node: Any
    kv: Any
    retraction_count: int = 0


class _RadixTree:
    """SGLang's own radix cache over real pools, with a three-level forest inserted.

    Rows of ``req_to_token`` have room for ``max_growth`` tokens more.
    """

    def __init__(self, num_requests: int, seed: int, max_growth: int) -> None:
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
        from sglang.srt.mem_cache.radix_cache import RadixKey
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        branches = min(4, num_requests)
        groups = max(num_requests // 8, branches)
        tree = pat_tree(f"1,{branches},{groups},{num_requests}_{LEVEL_TOKENS}")
        # Its slots differ from node to node: they serve as tokens.
        tokens = TreeBatch.lay_out(tree, seed=seed).table
        size, length = tokens.size, tokens.shape[1]
        kv_pool = MHATokenToKVPool(size, 1, torch.float16, 1, 16, 1, "cpu", False)
        pool = ReqToTokenPool(num_requests, length + max_growth, "cpu", False)
        allocator = TokenToKVPoolAllocator(size, torch.int64, "cpu", kv_pool, False)
        self.cache: Any = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=pool,
                token_to_kv_pool_allocator=allocator,
                page_size=1,
                tree_components=(ComponentType.FULL,),
            )
        )
        self.requests: list[Any] = []
        for request, row in enumerate(tokens):
            key = RadixKey(array("q", row.tolist()))
            self.cache.insert(InsertParams(key=key, value=allocator.alloc(length)))
            node = self.cache.match_prefix(MatchPrefixParams(key=key)).last_device_node
            kv = SimpleNamespace(cache_protected_len=length)
            self.requests.append(_Request(node, kv))
            pool.req_to_token[request, :length] = self.cache.path_device_indices(node).int()
        self.table = pool.req_to_token[:num_requests]
