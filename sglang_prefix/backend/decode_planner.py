"""From SGLang's decode batch to plans in use: from what to plan, and when to reuse a plan.

Verify passes of speculative decoding are batches of the same requests with several query tokens
each, the drafts. They grow by as many tokens as are accepted, and the positions of those that are
not are written again. No draft is ever shared.

No device is read here: lengths, requests and radix paths are on the CPU. Only
``SGLANG_PREFIX_VERIFY=1`` looks at slot rows, and so do batches on the CPU engine whose tree
cannot be asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import compress
from operator import not_
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.executor import PlanExecutor
from prefix_kernels.plan import PackPlan, verify_plan, verify_slots
from prefix_patches.attributes import Request
from prefix_patches.schedule_context import ScheduleContext
from sglang_prefix.backend.counters import BackendCounters
from sglang_prefix.backend.decode_batch import DecodeBatch
from sglang_prefix.backend.path_cache import FoundPaths, PathCache
from sglang_prefix.backend.planned_batch import PlannedBatch, advance, grown
from sglang_prefix.backend.workspace import Workspace
from sglang_prefix.checks import check_same_sharing
from sglang_prefix.forest import PrefixForest, forest_of_neighbours, forest_of_table
from sglang_prefix.gate import Gate, SharingGate
from sglang_prefix.packing.planner import PackPlanner

__all__ = ["DecodePlanner", "LayerGroup"]

IntArray = NDArray[np.int64]


class LayerGroup(NamedTuple):
    """Planner and executor for the layers of one attention shape, and how many layers that is."""

    planner: PackPlanner
    executor: PlanExecutor
    num_layers: int = 1
    workspace: Workspace | None = None  # of the executor; None where it takes what it needs


class DecodePlanner:
    """Keeps the plans of a model runner's decode batches and verify passes.

    A plan is reused from step to step while the same requests decode, each in the row that it had,
    and nothing but decode has run in between. A new one is made when a request joins or leaves,
    after any prefill or retraction, when a tail has used up its reserved slots, and after the first
    step of a freshly prefilled request. That covers every event after which KV stands elsewhere: a
    request that is aborted and sent again comes back through a prefill; a flush or a release of
    memory waits until nothing runs; a pause that keeps requests, and new weights, move no slot.
    ``verify`` checks that at every step.

    What the gate decides holds as long as the plan would: a batch that is left to the stock
    backend costs no more per step than one that is packed.

    Where ranks must agree, a step is decided ahead, when it has been scheduled
    (:meth:`decide_ahead`), and prepared as they agreed. A batch then has a plan also where its own
    rank would not pack it.

    Args:
        schedule: what is known of the batches' requests.
        req_to_token: SGLang's table, [rows, context] int32 on the device.
        page_size: tokens per KV page.
        groups: a planner and an executor for each attention shape of the model.
        counters: where plans are counted.
        gate: decides whether a batch is packed; None to pack every one.
        ranks_agree: whether a batch may have to be packed against its own gate.
        verify: compare the forest with the slot rows at every plan; raise on a difference.
        on_plan: told of every batch that was planned, with the arguments of `LastPlan.note`.

    Attributes:
        max_batch_size: rows of the largest batch that can be served, padding included; None for
            any.
    """

    def __init__(
        self,
        schedule: ScheduleContext,
        req_to_token: torch.Tensor,
        page_size: int,
        groups: Sequence[LayerGroup],
        counters: BackendCounters,
        *,
        gate: Gate | SharingGate | None = None,
        ranks_agree: bool = False,
        verify: bool = False,
        on_plan: Callable[..., None] | None = None,
    ) -> None:
        self.req_to_token = req_to_token
        self.page_size = page_size
        self.groups = groups
        self.on_plan = on_plan
        sizes = [group.workspace.capacity.batch_rows for group in groups if group.workspace]
        # Each row has a partial.
        sizes += [most for group in groups if (most := group.planner.max_partials) is not None]
        self.max_batch_size = min(sizes, default=None)
        # Lengths with drafts: a graph reads them where it did when it was captured.
        most = max(self.max_batch_size or 0, len(req_to_token))
        self._lens = torch.empty(most, dtype=torch.int64, device=req_to_token.device)
        self._schedule = schedule
        self._counters = counters
        self._gate = gate
        self._ranks_agree = ranks_agree
        self._verify = verify
        self.paths = PathCache(schedule)
        self._loaded_padding = 0  # rows of the batch of nothing but padding that is loaded
        self._planned: PlannedBatch | None = None
        nothing = np.zeros(1, dtype=np.int64)
        advance(nothing, 0, nothing.copy(), nothing.copy())  # compiled here, not in a verify pass

    def prepare(self, batch: DecodeBatch, *, packed: bool | None = None) -> str | None:
        """Make the executors ready for a decode batch: by the plan in use, or by a new one.

        Controls of tests replace this method.

        Args:
            batch: the batch.
            packed: whether ranks agreed to pack the step; None to do as :meth:`decide` says.

        Returns:
            None when they are, else the reason to leave the batch to the stock backend, a key of
            :data:`sglang_prefix.backend.fallback.REASONS`.

        Raises:
            RuntimeError: ``verify`` found a difference.
        """
        planned = self._planned
        if planned is None or planned.decided_ahead is None or not planned.is_decided(batch):
            reason = self.decide(batch)
            planned = self._planned
            if planned is None:
                return reason
        planned.decided_ahead = None
        if packed is None:
            packed = planned.reason is None
        if not packed or not planned.plans:
            return planned.reason or ("gate-other-ranks" if self.fits(batch) else "workspace")
        self._make_ready(planned, batch)
        return None

    def decide(self, batch: DecodeBatch) -> str | None:
        """Plan a batch, or see that its plan still holds, and ask the gate; loads nothing.

        Returns:
            None where it should be packed, else as :meth:`prepare` does.
        """
        began = time.perf_counter()
        planned = self._planned
        if planned is not None and self._follow(planned, batch):
            self._counters.count_reused_step(time.perf_counter() - began)
            return planned.reason
        self._planned = None
        lens = batch.host_lengths(batch.num_requests)
        if lens is None or len(lens) == 0:
            return "no-request-info"
        reason = self.replan(batch, lens)
        self._counters.plan_seconds += time.perf_counter() - began
        return reason

    def decide_ahead(self, batch: DecodeBatch) -> tuple[float, float] | None:
        """Decide a step that has been scheduled, and whose batch comes to :meth:`prepare` next.

        Returns:
            Microseconds predicted for it packed, and stock; None where it cannot be packed.
        """
        self.decide(batch)
        planned = self._planned
        if planned is None:
            return None
        scheduled = batch.schedule_batch
        planned.decided_ahead = None if scheduled is None else scheduled.seq_lens_cpu
        if not planned.plans:
            return None
        return (0.0, 1.0) if self._gate is None else (planned.packed_us, planned.stock_us)

    def _make_ready(self, planned: PlannedBatch, batch: DecodeBatch) -> None:
        """Bring the executors to the step at hand: by a slot per tail, or by loading the plan."""
        size, before = batch.padded_batch_size, planned.ready
        planned.ready = size, planned.steps
        if before == (size, planned.steps - 1):
            if not batch.in_graph:
                self.append(batch, planned.num_new)
                if self._verify:
                    self._verify_tails(planned, batch)
            return
        began = time.perf_counter()
        for group, plan in zip(self.groups, planned.plans, strict=True):
            # Padding may have changed, or a step have been stock's, since the plan was made.
            self._load(group, grown(plan, planned.growth), batch)
        if before is None:
            self._counters.count_plan(plan.num_packs, plan.num_partials, batch.kind)
        self._counters.plan_seconds += time.perf_counter() - began

    def count_step(self) -> None:
        """Count the step prepared last as packed, with what it read. Called when it has ended."""
        planned, counters = self._planned, self._counters
        if planned is None:
            counters.count_packed("decode")
            return
        # Tails are read by their own request alone: what they have grown by, read and logical.
        grown, kind = planned.num_grown, "verify" if planned.drafts else "decode"
        read, logical = planned.kv_tokens_read + grown, planned.kv_tokens_logical + grown
        counters.count_packed(kind, read, logical)
        # Below zero where other ranks want the step packed; what is counted only rises.
        counters.predicted_gain_us += max(0.0, planned.stock_us - planned.packed_us)

    def append(self, batch: DecodeBatch, num_new: IntArray | None = None) -> None:
        """Let every tail grow by this step's slots. A graph holds the call, other steps make it.

        Args:
            batch: the batch.
            num_new: [B] tokens by which each grows; None for one each, and in a graph, where
                executors read the lengths on the device.
        """
        lens, slots = batch.seq_lens, batch.new_slots
        if batch.drafts:
            lens = torch.add(lens, batch.drafts, out=self._lens[: len(lens)])
        for group in self.groups:
            group.executor.append(lens, slots, num_new=num_new)

    def prepare_private(self, batch: DecodeBatch) -> None:
        """Make the executors ready for a batch of which nothing is known to be shared.

        For warm-up and capture, which have no requests, and for graphs that hold no stock kernel,
        where :meth:`prepare` cannot serve a batch. Only there, and only if SGLang itself has no
        lengths on the CPU, they are read from the device. A batch of nothing but padding is served
        as if it had requests, whose answers nobody reads; the plan of the last one serves again.
        """
        self.invalidate()
        padding = 0 if batch.num_requests else batch.padded_batch_size
        if padding and padding == self._loaded_padding:
            return
        count = batch.num_requests or batch.padded_batch_size
        lens = batch.host_lengths(count)
        if lens is None:
            lens = batch.device_lengths(count)
        forest, query_lens = _private_forest(lens), _query_lens(batch, count)
        for group in self.groups:
            plan = group.planner.plan(forest, batch.num_rows, query_lens=query_lens)
            self._load(group, plan, batch)
        self._loaded_padding = padding

    def fits(self, batch: DecodeBatch) -> bool:
        """Whether some plan of the batch's size can be served."""
        return self.max_batch_size is None or batch.num_rows <= self.max_batch_size

    def give_up_executors(self) -> None:
        """Let no later step use what is loaded: other plans will be."""
        self.invalidate()
        self._loaded_padding = 0

    def invalidate(self) -> None:
        """Let no later step reuse the plan."""
        if self._planned is not None:
            self._planned.reqs = None

    def forget(self) -> None:
        """Read everything of every request and of its tree anew, for the next plan."""
        self.invalidate()
        self.paths.forget()

    def _follow(self, planned: PlannedBatch, batch: DecodeBatch) -> bool:
        """Go on under a plan, if it serves this step too: same requests, same rows, same tree.

        In decode, nothing here asks torch or NumPy for anything: with the processor's caches full
        of other things, that alone takes longer than all the rest.
        """
        if (
            planned.reqs is None
            or planned.epoch != self._schedule.epoch
            or not batch.is_of(planned.reqs, planned.padded_batch_size, planned.drafts)
            or not planned.has_same_rows(batch)
            or not planned.follow(batch)
        ):
            return False
        if self._verify:
            planned.verify_step(batch)
        return True

    def replan(self, batch: DecodeBatch, lens: IntArray) -> str | None:
        """Plan a batch of lengths ``lens`` [B]; returns as :meth:`prepare` does."""
        room = self.req_to_token.shape[1] - int(lens.max())
        if room < 0:
            return "query-lengths"
        reqs = list(batch.reqs)
        complete = len(reqs) == len(lens)
        found = self._look_up(batch, reqs) if complete else None
        if found is not None:
            newcomers = found.newcomers
            forest = self._forest_of(found, batch, lens)
        elif self.req_to_token.device.type != "cpu":
            return "no-radix-paths" if complete else "no-request-info"
        else:
            newcomers = list(compress(reqs, map(not_, self._schedule.settled(reqs))))
            forest = PrefixForest.from_rows(
                self._slot_rows(batch, lens), lens, page_size=self.page_size, prefix_closed=True
            )
        planned = PlannedBatch(lens, batch.sum_of_lengths, batch.padded_batch_size)
        if batch.drafts:
            planned.drafts = batch.drafts
            planned.newest_lens, planned.num_new = lens.copy(), np.zeros_like(lens)
        planned.reason = self._plan_forest(planned, forest, batch)
        if self.on_plan is not None:
            predicted = self._counters.predicted_packed_us, self._counters.predicted_stock_us
            told = forest, self.groups, planned.reason, predicted, self.page_size
            query_lens = _query_lens(batch, len(lens))
            self.on_plan(*told, batch.num_rows, kind=batch.kind, query_lens=query_lens)
        if complete:
            # Their rows hold the tree's slots from the next step on, so that step plans again.
            self._schedule.settle(newcomers)
        if complete and not newcomers:
            planned.reqs, planned.epoch = reqs, self._schedule.epoch
            planned.pool_indices = batch.pool_indices
            planned.states = batch.kv_states() if self._verify else ()
            slots = [group.planner.reserved_tail_slots for group in self.groups]
            planned.max_growth = min(room, *slots)
        self._planned = planned
        return planned.reason

    def _plan_forest(
        self, planned: PlannedBatch, forest: PrefixForest, batch: DecodeBatch
    ) -> str | None:
        """Plan, and ask the gate; the reason to leave the batch to stock, or None."""
        nothing_shared = self._gate is not None and forest.num_nodes == 0
        if self._gate is not None and nothing_shared and not self._ranks_agree:
            self._gate.leave()
            return "gate-nothing-shared"
        if not self.fits(batch):
            return "workspace"
        query_lens = _query_lens(batch, len(planned.lens))
        plans = [
            group.planner.plan(forest, batch.num_rows, query_lens=query_lens)
            for group in self.groups
        ]
        if any(plan.refused_partials for plan in plans):
            return "workspace"
        reason = None
        if self._gate is not None:
            layers = [group.num_layers for group in self.groups]
            decision = self._gate.choose(list(zip(plans, layers, strict=True)), forest)
            planned.packed_us, planned.stock_us = decision.packed_us, decision.stock_us
            if decision.stock_us > 0:
                self._counters.predicted_packed_us = decision.packed_us
                self._counters.predicted_stock_us = decision.stock_us
            reason = decision.reason
            if nothing_shared:
                self._gate.leave()
                reason = "gate-nothing-shared"
        if reason is not None and not self._ranks_agree:
            return reason
        for group, plan in zip(self.groups, plans, strict=True):
            if group.workspace and plan.num_slots > group.workspace.capacity.slots:
                return "workspace"
        if self._verify:
            for plan in plans:
                verify_plan(plan)
                verify_slots(plan, self._slot_rows(batch, planned.lens))
        planned.plans = plans
        planned.kv_tokens_read = plans[-1].kv_tokens_read
        planned.kv_tokens_logical = int(planned.lens.sum())
        return reason

    def _load(self, group: LayerGroup, plan: PackPlan, batch: DecodeBatch) -> None:
        self._loaded_padding = 0
        group.executor.load(
            plan,
            self.req_to_token,
            batch.req_pool_indices,
            padded_batch_size=batch.num_rows,
        )

    def _look_up(self, batch: DecodeBatch, reqs: list[Request]) -> FoundPaths | None:
        """The requests' paths, or None if this tree cannot be read on the CPU."""
        began = time.perf_counter()
        found = self.paths.look_up(batch.tree_cache, reqs)
        self._counters.path_seconds += time.perf_counter() - began
        return found

    def _forest_of(self, found: FoundPaths, batch: DecodeBatch, lens: IntArray) -> PrefixForest:
        """The forest of the requests' paths."""
        table, path_of, limits, _ = found
        forest = forest_of_table(table, path_of, limits, lens, page_size=self.page_size)
        if self._verify:
            rows = self._slot_rows(batch, lens)
            check_same_sharing(
                forest,
                PrefixForest.from_rows(rows, lens, limits=limits, page_size=self.page_size),
            )
        return forest

    def _verify_tails(self, planned: PlannedBatch, batch: DecodeBatch) -> None:
        """Compare the slots of tails that have grown with the slot rows."""
        lens = planned.lens + planned.growth
        rows = self._slot_rows(batch, lens)
        for group, plan in zip(self.groups, planned.plans, strict=True):
            slots = group.executor.kv_slots.cpu().numpy()
            tails = zip(rows, plan.tail_start, lens, plan.tail_offset, strict=True)
            for row, start, end, offset in tails:
                if not np.array_equal(slots[offset : offset + end - start], row[start:end]):
                    raise RuntimeError("SGLANG_PREFIX_VERIFY: a tail does not have its row's slots")

    def _slot_rows(self, batch: DecodeBatch, lens: IntArray) -> NDArray[np.integer]:
        indices = batch.req_pool_indices[: len(lens)]
        return np.asarray(self.req_to_token[indices, : int(lens.max())].cpu().numpy())


def _private_forest(lens: IntArray) -> PrefixForest:
    """A forest in which nobody shares anything."""
    nothing = np.zeros(max(len(lens) - 1, 0), dtype=np.int64)
    return forest_of_neighbours(np.arange(len(lens)), nothing, lens)


def _query_lens(batch: DecodeBatch, num_requests: int) -> IntArray | None:
    """[num_requests] query tokens of each request; None for one each."""
    return np.full(num_requests, batch.drafts, dtype=np.int64) if batch.drafts else None
