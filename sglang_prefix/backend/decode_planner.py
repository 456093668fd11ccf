"""From SGLang's decode batch to plans in use: when to plan, from what, and when a plan goes on.

No device is read here: lengths, requests and radix paths are on the CPU. Only
``SGLANG_PREFIX_VERIFY=1`` looks at slot rows, and so do batches on the CPU engine whose tree
cannot be asked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import compress
from operator import not_
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.plan import PackPlan, verify_plan, verify_slots
from prefix_patches.radix_paths import owned_lengths
from prefix_patches.schedule_context import ScheduleContext
from sglang_prefix.backend.counters import BackendCounters
from sglang_prefix.backend.path_cache import PathCache
from sglang_prefix.backend.workspace import Workspace
from sglang_prefix.checks import check_same_sharing
from sglang_prefix.forest import PrefixForest
from sglang_prefix.gate import Gate
from sglang_prefix.packing.planner import PackPlanner
from sglang_prefix.runner import PlanRunner

__all__ = ["DecodePlanner", "LayerGroup", "is_idle", "num_requests_of"]

IntArray = NDArray[np.int64]


class LayerGroup(NamedTuple):
    """Planner and runner for the layers of one attention shape, and how many layers that is."""

    planner: PackPlanner
    runner: PlanRunner
    num_layers: int = 1
    workspace: Workspace | None = None  # of the runner; None where it takes what it needs


class DecodePlanner:
    """Keeps the plans of a model runner's decode batches.

    A plan goes on from step to step while the same requests decode, each in the row that it had,
    and nothing but decode has run in between. It is made anew when a request joins or leaves,
    after any prefill or retraction, when a tail has used up its growth room, and after the first
    step of a freshly prefilled request. That covers every event after which KV stands elsewhere: a
    request that is aborted and sent again comes back through a prefill; a flush or a release of
    memory waits until nothing runs; a pause that keeps requests, and new weights, move no slot.
    ``verify`` checks that at every step.

    What the gate decides holds as long as the plan would: a batch that is left to the stock
    backend costs no more per step than one that is packed.

    Args:
        schedule: where the batch behind a forward pass is published.
        req_to_token: SGLang's table, [rows, context] int32 on the device.
        page_size: tokens per KV page.
        shapes: a planner and a runner for each attention shape of the model.
        counters: where plans and tokens are counted.
        gate: decides whether a batch is packed; None to pack every one.
        verify: compare the forest with the slot rows at every plan; raise on a difference.

    Attributes:
        max_rows: rows of the largest batch that can be served, padding included; None for any.
    """

    def __init__(
        self,
        schedule: ScheduleContext,
        req_to_token: torch.Tensor,
        page_size: int,
        shapes: Sequence[LayerGroup],
        counters: BackendCounters,
        *,
        gate: Gate | None = None,
        verify: bool,
    ) -> None:
        self._schedule = schedule
        self._req_to_token = req_to_token
        self._page_size = page_size
        self._shapes = shapes
        self._counters = counters
        self._gate = gate
        self._verify = verify
        self._paths = PathCache()
        rows = [shape.workspace.capacity.batch_rows for shape in shapes if shape.workspace]
        self.max_rows = min(rows, default=None)
        # Of the plan in use, or of the decision to do without one.
        self._reqs: list[Any] | None = None  # None if it must not go on
        self._reason: str | None = None  # why the stock backend serves; None if packed
        self._states: list[Any] = []
        self._rows: torch.Tensor | None = None
        self._lens = np.zeros(0, dtype=np.int64)  # that were planned for
        self._steps = 0  # taken since then, each of which adds a token to every request
        self._sum = 0  # of those lengths, and of padding's
        self._max_steps = 0
        self._num_rows = 0
        self._epoch = -1
        self._plan_tokens = (0, 0)  # read and logical KV tokens of a step under the plan in use
        self._gain_us = 0.0  # that the gate expects of such a step

    def prepare(self, forward_batch: Any, *, in_graph: bool = False) -> str | None:
        """Make the runners ready for a decode batch.

        Args:
            forward_batch: what SGLang hands to the backend.
            in_graph: the step is a graph's: tails grow inside it, and rows at the end may be
                padding.

        Returns:
            None when they are, else the reason to leave the batch to the stock backend.

        Raises:
            RuntimeError: ``verify`` found a difference.
        """
        began = time.perf_counter()
        if self.can_reuse(forward_batch):
            self._advance()
            if self._reason is None and in_graph:
                for shape in self._shapes:
                    shape.runner.note_growth()
            self._counters.count_reused_step(time.perf_counter() - began)
            if self._reason is None and not in_graph:
                self._grow_tails(forward_batch)
            return self._reason
        self._reqs = None
        lens = _host_lengths(forward_batch, num_requests_of(forward_batch))
        if lens is None or len(lens) == 0:
            return "no-request-info"
        self._reason = self.replan(forward_batch, lens)
        self._lens, self._steps, self._num_rows = lens, 0, forward_batch.batch_size
        self._sum = _sum_of_lengths(forward_batch)
        if self._reason is None:
            self._count_step()
        self._counters.plan_seconds += time.perf_counter() - began
        return self._reason

    def prepare_private(self, forward_batch: Any) -> None:
        """Make the runners ready for a batch of which nothing is known to be shared.

        For warm-up and capture, which have no requests, and for graphs that hold no stock kernel,
        where :meth:`prepare` cannot serve a batch. Only there, and only if SGLang itself has no
        lengths on the CPU, they are read from the device. A batch of nothing but padding is served
        as if it had requests, whose answers nobody reads.
        """
        self._reqs = None
        count = num_requests_of(forward_batch) or forward_batch.batch_size
        lens = _host_lengths(forward_batch, count)
        if lens is None:
            lens = np.asarray(forward_batch.seq_lens[:count].cpu().numpy(), dtype=np.int64)
        forest = _private_forest(lens)
        for shape in self._shapes:
            self._load(shape, shape.planner.plan(forest), forward_batch)

    def forget(self) -> None:
        """Make the next batch plan anew."""
        self._reqs = None

    def uncount_step(self) -> None:
        """Take back the tokens of a step that was prepared and then left to the stock backend."""
        read, logical = self._plan_tokens
        self._counters.kv_tokens_read -= read
        self._counters.kv_tokens_logical -= logical
        self._counters.predicted_gain_us -= self._gain_us

    def can_reuse(self, forward_batch: Any) -> bool:
        """Whether the plan in use serves this step too: same requests, same rows, same tree.

        Each step of the same requests adds a token to each, so the lengths are those planned for
        plus the steps since then, and their sum, which SGLang hands over, tells whether that is
        so. Nothing here asks torch or NumPy for anything: with the processor's caches full of
        other things, that alone takes longer than all the rest.
        """
        batch = self._schedule.batch
        if (
            self._reqs is None
            or batch is None
            or self._steps == self._max_steps
            or self._epoch != self._schedule.epoch
            or self._num_rows != forward_batch.batch_size
            or batch.reqs != self._reqs
            or _sum_of_lengths(forward_batch) != self._sum + (self._steps + 1) * len(self._lens)
            or not self._has_same_rows(batch)
        ):
            return False
        if self._verify:
            self._verify_step(forward_batch, batch)
        return True

    def _has_same_rows(self, batch: Any) -> bool:
        """Whether requests have kept their rows of ``req_to_token``, as far as the CPU knows."""
        rows = _rows_of(batch)
        if rows is self._rows:  # SGLang makes a new tensor whenever a row changes
            return True
        if rows is None or self._rows is None or not torch.equal(rows, self._rows):
            return False
        self._rows = rows
        return True

    def _verify_step(self, forward_batch: Any, batch: Any) -> None:
        if _states(batch) != self._states:
            raise RuntimeError(
                "SGLANG_PREFIX_VERIFY: a request moved in the radix tree or to another row, or was "
                "retracted, without a prefill"
            )
        lens = _host_lengths(forward_batch, len(self._lens))
        expected = self._lens + self._steps + 1
        if not np.array_equal(expected, expected if lens is None else lens):
            raise RuntimeError("SGLANG_PREFIX_VERIFY: a step did not add one token to each request")

    def _advance(self) -> None:
        """Note a step under the plan in use, or under the decision to do without one."""
        count = len(self._lens)
        self._steps += 1
        if self._reason is None:
            # Tails are read by their own request alone: one token more, read and logical.
            read, logical = self._plan_tokens
            self._plan_tokens = (read + count, logical + count)
            self._count_step()

    def _grow_tails(self, forward_batch: Any) -> None:
        lens = self._lens + self._steps
        device_lens = forward_batch.seq_lens[: len(lens)]
        for shape in self._shapes:
            shape.runner.append(lens, forward_batch.out_cache_loc, device_lens)

    def replan(self, forward_batch: Any, lens: IntArray) -> str | None:
        batch = self._schedule.batch
        reqs = list(batch.reqs) if batch is not None else []
        complete = len(reqs) == len(lens)
        settled = self._schedule.settled(reqs)
        all_settled = all(settled)
        forest = self._forest_from_paths(forward_batch, reqs, settled, lens) if complete else None
        if forest is None:
            if self._req_to_token.device.type != "cpu":
                return "no-radix-paths" if complete else "no-request-info"
            rows = self._rows_on_host(forward_batch, lens)
            forest = PrefixForest.from_rows(
                rows, lens, page_size=self._page_size, prefix_closed=True
            )
        reason = self._plan_forest(forest, forward_batch, lens)
        if (last := self._counters.last_plan) is not None:
            predicted = self._counters.packed_us, self._counters.stock_us
            size = forward_batch.batch_size
            last.note(forest, self._shapes, reason, predicted, self._page_size, size)
        if complete and not all_settled:
            # Their rows hold the tree's slots from the next step on, so that step plans again.
            self._schedule.settle(list(compress(reqs, map(not_, settled))))
        if complete and all_settled:
            self._reqs, self._epoch = reqs, self._schedule.epoch
            self._states = _states(batch) if self._verify else []
            self._rows = _rows_of(batch)
            self._max_steps = min(shape.planner.reserved_tail_slots for shape in self._shapes)
        return reason

    def _plan_forest(self, forest: PrefixForest, forward_batch: Any, lens: IntArray) -> str | None:
        """Plan, ask the gate, and take the plans into use."""
        if self._gate is not None and forest.num_nodes == 0:
            self._gate.leave()
            return "gate-nothing-shared"
        if self.max_rows is not None and forward_batch.batch_size > self.max_rows:
            return "workspace"
        plans = [shape.planner.plan(forest) for shape in self._shapes]
        if self._gate is not None:
            layers = [shape.num_layers for shape in self._shapes]
            decision = self._gate.choose(list(zip(plans, layers, strict=True)), forest)
            self._gain_us = decision.stock_us - decision.packed_us
            self._counters.packed_us, self._counters.stock_us = decision[2:]
            if not decision.packs:
                return decision.reason
        for shape, plan in zip(self._shapes, plans, strict=True):
            if shape.workspace and plan.num_slots > shape.workspace.capacity.slots:
                return "workspace"
        for shape, plan in zip(self._shapes, plans, strict=True):
            if self._verify:
                verify_plan(plan)
                verify_slots(plan, self._rows_on_host(forward_batch, lens))
            self._load(shape, plan, forward_batch)
        plan = plans[-1]
        self._counters.packs, self._counters.partials = plan.num_packs, plan.num_partials
        self._plan_tokens = (plan.kv_tokens_read, int(lens.sum()))
        self._counters.plans += 1
        return None

    def _load(self, shape: LayerGroup, plan: PackPlan, forward_batch: Any) -> None:
        shape.runner.load(
            plan,
            self._req_to_token,
            forward_batch.req_pool_indices,
            num_rows=forward_batch.batch_size,
        )

    def _forest_from_paths(
        self, forward_batch: Any, reqs: list[Any], settled: list[bool], lens: IntArray
    ) -> PrefixForest | None:
        """Forest from the tree, or None if this tree cannot be read on the CPU."""
        known = reqs if all(settled) else list(compress(reqs, settled))
        began = time.perf_counter()
        found = self._paths.look_up(self._schedule.batch.tree_cache, known)
        self._counters.path_seconds += time.perf_counter() - began
        if found is None:
            return None
        # A session's row may be owned past the path that the tree can show.
        owned = np.fromiter(owned_lengths(known), np.int64, len(known))
        path_of, limits = found.path_of, np.minimum(owned, found.table.lengths[found.path_of])
        if len(known) < len(reqs):
            known_paths, known_limits = path_of, limits
            path_of, limits = (np.full(len(reqs), nothing) for nothing in (-1, 0))
            path_of[settled], limits[settled] = known_paths, known_limits
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
        indices = forward_batch.req_pool_indices[: len(lens)]
        return np.asarray(self._req_to_token[indices, : int(lens.max())].cpu().numpy())

    def _count_step(self) -> None:
        read, logical = self._plan_tokens
        self._counters.kv_tokens_read += read
        self._counters.kv_tokens_logical += logical
        self._counters.predicted_gain_us += self._gain_us


def num_requests_of(forward_batch: Any) -> int:
    """Rows of a batch that are not padding of a graph; padding rows stand at the end."""
    return int(forward_batch.batch_size - getattr(forward_batch, "num_padding", 0))


def is_idle(forward_batch: Any) -> bool:
    """Whether a rank without requests replays a graph for the sake of the others."""
    mode = getattr(forward_batch, "actual_forward_mode", None)
    return mode is not None and bool(mode.is_idle())


def _private_forest(lens: IntArray) -> PrefixForest:
    """A forest in which nobody shares anything."""
    nothing = np.zeros(max(len(lens) - 1, 0), dtype=np.int64)
    return PrefixForest.from_neighbours(np.arange(len(lens)), nothing, lens)


def _states(batch: Any) -> list[Any]:
    """What changes when a request's KV moves although the same requests decode."""
    rows = _rows_of(batch)
    states: list[Any] = [(req.retraction_count, req.last_node) for req in batch.reqs]
    return states if rows is None else [*states, *rows.tolist()]


def _host_lengths(forward_batch: Any, num_requests: int) -> IntArray | None:
    """Lengths [num_requests] of the batch where the CPU knows them, else None."""
    lens = getattr(forward_batch, "seq_lens_cpu", None)
    if lens is None:
        lens = forward_batch.seq_lens
    if lens.device.type != "cpu":
        return None
    # A copy: SGLang adds to the lengths in place.
    return np.array(lens.numpy()[:num_requests], dtype=np.int64)


def _sum_of_lengths(forward_batch: Any) -> int:
    """Sum of the lengths in a batch, padding included, of which the CPU knows the lengths."""
    total = forward_batch.seq_lens_sum
    if isinstance(total, int):
        return total
    lens = _host_lengths(forward_batch, forward_batch.batch_size)
    return -1 if lens is None else int(lens.sum())


def _rows_of(batch: Any) -> torch.Tensor | None:
    """Rows of ``req_to_token`` as the scheduler knows them on the CPU."""
    rows = getattr(batch, "req_pool_indices_cpu", None)
    if rows is None:
        rows = batch.req_pool_indices
        return rows if rows.device.type == "cpu" else None
    return rows  # type: ignore[no-any-return]
