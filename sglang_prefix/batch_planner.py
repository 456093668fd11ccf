"""From SGLang's decode batch to plans in use: when to plan, from what, and when a plan goes on.

No device is read here: lengths, requests and radix paths are on the CPU. Only
``SGLANG_PREFIX_VERIFY=1`` looks at slot rows, and so do batches on the CPU engine whose tree
cannot be asked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_patches.handover import Handover
from prefix_patches.radix_paths import owned_length
from sglang_prefix.checks import check_same_sharing
from sglang_prefix.counters import BackendCounters
from sglang_prefix.forest import PrefixForest
from sglang_prefix.path_cache import PathCache
from sglang_prefix.plan import verify_plan, verify_slots
from sglang_prefix.planner import PackPlanner
from sglang_prefix.runner import PlanRunner

__all__ = ["BatchPlanner", "ShapeRunner"]

IntArray = NDArray[np.int64]


class ShapeRunner(NamedTuple):
    """Planner and runner for the layers of one attention shape."""

    planner: PackPlanner
    runner: PlanRunner


class BatchPlanner:
    """Keeps the plans of a model runner's decode batches.

    A plan goes on from step to step, at the cost of appending one slot per request, while the
    same requests decode and nothing but decode has run in between. It is made anew when a request
    joins or leaves, after any prefill (which includes every request that was retracted), when a
    tail has used up its growth room, and after the first step of a freshly prefilled request.

    Args:
        handover: where the batch behind a forward pass is published.
        req_to_token: SGLang's table, [rows, context] int32 on the device.
        page_size: tokens per KV page.
        shapes: a planner and a runner for each attention shape of the model.
        counters: where plans and tokens are counted.
        verify: compare the forest with the slot rows at every plan; raise on a difference.
    """

    def __init__(
        self,
        handover: Handover,
        req_to_token: torch.Tensor,
        page_size: int,
        shapes: Sequence[ShapeRunner],
        counters: BackendCounters,
        *,
        verify: bool,
    ) -> None:
        self._handover = handover
        self._req_to_token = req_to_token
        self._page_size = page_size
        self._shapes = shapes
        self._counters = counters
        self._verify = verify
        self._paths = PathCache()
        self._reqs: list[Any] | None = None  # of the plan in use; None if it must not go on
        self._states: list[Any] = []
        self._rows: IntArray | None = None
        self._epoch = -1
        self._plan_tokens = (0, 0)  # read and logical KV tokens of a step under the plan in use

    def prepare(self, forward_batch: Any) -> str | None:
        """Make the runners ready for a decode batch.

        Returns:
            None when they are, else the reason to leave the batch to the stock backend.

        Raises:
            RuntimeError: ``verify`` found a difference.
        """
        lens = _host_lengths(forward_batch)
        if lens is None or len(lens) == 0:
            return "no-request-info"
        if self._goes_on(lens):
            for _, runner in self._shapes:
                runner.append(
                    lens, forward_batch.out_cache_loc, forward_batch.seq_lens[: len(lens)]
                )
            # Tails are read by their own request alone: one token more, read and logical.
            read, logical = self._plan_tokens
            self._plan_tokens = (read + len(lens), logical + len(lens))
            self._count_step()
            return None
        self._reqs = None
        reason = self._plan_anew(forward_batch, lens)
        if reason is None:
            self._count_step()
        return reason

    def forget(self) -> None:
        """Make the next batch plan anew."""
        self._reqs = None

    def uncount_step(self) -> None:
        """Take back the tokens of a step that was prepared and then left to the stock backend."""
        read, logical = self._plan_tokens
        self._counters.kv_tokens_read -= read
        self._counters.kv_tokens_logical -= logical

    def _goes_on(self, lens: IntArray) -> bool:
        """Whether the plan in use serves this step too: same requests, same rows, same tree."""
        batch = self._handover.batch
        if self._reqs is None or batch is None or self._epoch != self._handover.epoch:
            return False
        if len(lens) != len(self._reqs) or batch.reqs != self._reqs:
            return False
        if _states(batch.reqs) != self._states:
            return False
        rows = _host_rows_of(batch)
        if self._rows is not None and rows is not None and not np.array_equal(self._rows, rows):
            return False
        runner = self._shapes[0].runner
        plan = runner.plan
        assert plan is not None
        grown_by_one = np.array_equal(lens, runner.seq_lens + 1)
        return grown_by_one and bool((lens <= plan.seq_lens + plan.growth_room).all())

    def _plan_anew(self, forward_batch: Any, lens: IntArray) -> str | None:
        began = time.perf_counter()
        batch = self._handover.batch
        reqs = list(batch.reqs) if batch is not None else []
        complete = len(reqs) == len(lens)
        settled = [self._handover.is_settled(req) for req in reqs]
        forest = self._forest_from_paths(forward_batch, reqs, settled, lens) if complete else None
        if forest is None:
            if self._req_to_token.device.type != "cpu":
                return "no-radix-paths" if complete else "no-request-info"
            rows = self._rows_on_host(forward_batch, lens)
            forest = PrefixForest.from_rows(
                rows, lens, page_size=self._page_size, prefix_closed=True
            )
        for planner, runner in self._shapes:
            plan = planner.plan(forest)
            if self._verify:
                verify_plan(plan)
                verify_slots(plan, self._rows_on_host(forward_batch, lens))
            runner.load(plan, self._req_to_token, forward_batch.req_pool_indices)
            stats = plan.stats()
            self._counters.packs, self._counters.partials = stats.num_packs, stats.num_partials
            self._plan_tokens = (stats.kv_tokens_read, stats.kv_tokens_logical)
        if complete:
            # Their rows hold the tree's slots from the next step on, so that step plans again.
            self._handover.settle(reqs)
        if complete and all(settled):
            self._reqs, self._epoch = reqs, self._handover.epoch
            self._states = _states(reqs)
            self._rows = _host_rows_of(batch)
        self._counters.plans += 1
        self._counters.plan_seconds += time.perf_counter() - began
        return None

    def _forest_from_paths(
        self, forward_batch: Any, reqs: list[Any], settled: list[bool], lens: IntArray
    ) -> PrefixForest | None:
        """Forest from the tree, or None if this tree cannot be read on the CPU."""
        known = [req for req, is_settled in zip(reqs, settled, strict=True) if is_settled]
        began = time.perf_counter()
        found = self._paths.look_up(self._handover.batch.tree_cache, known)
        self._counters.path_seconds += time.perf_counter() - began
        if found is None:
            return None
        path_of, limits = np.full(len(reqs), -1), np.zeros(len(reqs), dtype=np.int64)
        path_of[settled] = found.path_of
        # A session's row may be owned past the path that the tree can show.
        owned = [owned_length(req) for req in known]
        limits[settled] = np.minimum(owned, found.table.lengths[found.path_of])
        forest = PrefixForest.from_path_table(
            found.table, path_of, limits, lens, page_size=self._page_size
        )
        if self._verify:
            rows = self._rows_on_host(forward_batch, lens)
            check_same_sharing(
                forest,
                PrefixForest.from_rows(rows, lens, limits=limits, page_size=self._page_size),
            )
        return forest

    def _rows_on_host(self, forward_batch: Any, lens: IntArray) -> NDArray[np.integer]:
        rows = self._req_to_token[forward_batch.req_pool_indices, : int(lens.max())]
        return np.asarray(rows.cpu().numpy())

    def _count_step(self) -> None:
        read, logical = self._plan_tokens
        self._counters.kv_tokens_read += read
        self._counters.kv_tokens_logical += logical


def _states(reqs: list[Any]) -> list[Any]:
    """What changes when a request's KV moves although the same requests decode."""
    return [(req.retraction_count, req.last_node) for req in reqs]


def _host_lengths(forward_batch: Any) -> IntArray | None:
    """Lengths of the batch where the CPU knows them, else None."""
    lens = getattr(forward_batch, "seq_lens_cpu", None)
    if lens is None:
        lens = forward_batch.seq_lens
    if lens.device.type != "cpu":
        return None
    # A copy: SGLang adds to the lengths in place.
    return np.array(lens.numpy()[: forward_batch.batch_size], dtype=np.int64)


def _host_rows_of(batch: Any) -> IntArray | None:
    """Rows of ``req_to_token`` as the scheduler knows them on the CPU."""
    rows = getattr(batch, "req_pool_indices_cpu", None)
    if rows is None:
        rows = batch.req_pool_indices
    return np.asarray(rows.numpy()).copy() if rows.device.type == "cpu" else None
