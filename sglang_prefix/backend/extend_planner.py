"""Extends over cached prefixes: plans whose requests have several query tokens.

SGLang's ``torch_native`` (0.5.17 to 0.5.23) computes attention of every token of a request, of the
cached ones too, and throws those rows away; it reads a prefix once per request. Here a request's
new tokens are its queries, and a prefix is read once for all requests that have it cached. Requests
that are decoded in the same pass have one query each.

The stock backends of a GPU do not compute cached tokens again. There the gate decides, and nothing
is packed unless ``SGLANG_PREFIX_EXTENDS=always`` asks for it, since nothing has been measured.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.plan import verify_plan, verify_slots
from prefix_patches.attributes import ForwardBatch
from prefix_patches.radix_paths import path_reader
from prefix_patches.schedule_context import ScheduleContext
from sglang_prefix.backend.counters import BackendCounters
from sglang_prefix.backend.decode_planner import DecodePlanner
from sglang_prefix.backend.fallback import batch_reason
from sglang_prefix.backend.path_cache import limits_of
from sglang_prefix.backend.step_state import EXTEND, StepState
from sglang_prefix.checks import check_same_sharing
from sglang_prefix.forest import PathTable, PrefixForest, forest_of_table
from sglang_prefix.gate import Gate, SharingGate
from sglang_prefix.packing.layout import CostedPlan

__all__ = ["EXTENDED_STOCK", "LEAST_SAVED", "ExtendPlanner", "pays"]

IntArray = NDArray[np.int64]

logger = logging.getLogger(__name__)

# Stock backends that compute a whole request for its new tokens. Others are not known to lose.
EXTENDED_STOCK = ("torch_native",)
# How many times fewer (query, position) pairs a pass must have here. Measured on two cores with 9:3
# heads of 64, float32 and bfloat16, prefixes of 40 to 2,048 tokens: with 1.1 times fewer ours took
# 0.7 of stock's time or less.
_LEAST_GAIN = 1.2
# How many fewer, by the executors that a CPU has: torch's calls take their time. With 33,000 fewer
# or more a layer took 0.81 of stock's time or less, with up to 8,000 as much as 1.43 times as long
# (docs/performance.md); the plan comes on top, once per pass.
LEAST_SAVED = {"native": 0, "torch": 64_000}
_MODES = ("EXTEND", "MIXED")  # by SGLang's names; others carry drafts, or blocks to denoise


class ExtendPlanner:
    """Makes plans for passes that extend cached prefixes, and loads them.

    Only the cached prefixes are shared, new tokens never. A plan serves one pass.

    Args:
        decode: what plans decode; the executors are shared, so its plan is not reused afterwards.
        schedule: what is known of the requests.
        counters: which say what is left to the stock backend.
        least_saved: of :func:`pays`.
        from_paths: whether what is shared is read from SGLang's tree. Otherwise it is read from the
            slot rows, which then stand on the CPU, and the stock backend is ``torch_native``.
        gate: decides from paths whether a pass is packed; None to pack every one.
        verify: check every plan against the slot rows, and raise what goes wrong.
    """

    def __init__(
        self,
        decode: DecodePlanner,
        schedule: ScheduleContext,
        counters: BackendCounters,
        *,
        least_saved: int = 0,
        from_paths: bool = False,
        gate: Gate | SharingGate | None = None,
        verify: bool = False,
    ) -> None:
        self._decode = decode
        self._schedule = schedule
        self._counters = counters
        self._least_saved = least_saved
        self._from_paths = from_paths
        self._gate = gate
        self._verify = verify
        self._counts: list[int] | None = None  # of the pass that was prepared: SGLang's own list
        self._kv_tokens = 0, 0  # of the pass that was prepared, for one layer: read, logical
        self._failed = False

    def serves(self, batch: ForwardBatch) -> bool:
        """Whether this very pass has been prepared: where graphs hold all but attention, SGLang
        runs it as another object with the same lists."""
        return self._counts is not None and batch.extend_seq_lens_cpu is self._counts

    def prepare(self, batch: ForwardBatch) -> StepState | None:
        """Load plans for a pass, if it is worth it. Tests break this method.

        Returns:
            What to run and count; None for a pass that is none of ours to judge.

        Raises:
            Exception: planning failed, with ``verify``; otherwise the pass is stock's.
        """
        self._counts = None
        try:
            step = self._load(batch)
        except Exception:
            if self._verify:
                raise
            logger.error("prefix attention: an extend failed", exc_info=not self._failed)
            self._failed = True
            return self._fall_back("error")
        if step is EXTEND:
            self._counts = batch.extend_seq_lens_cpu
        return step

    def _load(self, batch: ForwardBatch) -> StepState | None:
        prefixes, counts = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
        if batch.forward_mode.name not in _MODES or not prefixes or not counts:
            return None
        if self._from_paths:
            scheduled = self._schedule.batch
            # Warm-ups and captures have none. What a request that is decoded meanwhile has in its
            # row is not known from its path.
            if scheduled is None or scheduled.decoding_reqs:
                return None
        if batch_reason(batch) is not None:
            return None
        if len(prefixes) != len(counts):
            return self._fall_back("query-lengths")
        query_lens = np.array(counts, dtype=np.int64)
        seq_lens = np.array(prefixes, dtype=np.int64) + query_lens
        # Stock goes by these lengths, which SGLang computes on another way.
        lens = batch.seq_lens_cpu
        confirmed = lens is not None and np.array_equal(seq_lens, lens)
        if not confirmed or (query_lens < 1).any() or (query_lens > seq_lens).any():
            return self._fall_back("query-lengths")
        if self._from_paths:
            forest = self._forest_of_paths(seq_lens, query_lens)
            if forest is None:
                return self._fall_back("no-radix-paths")
            if self._gate is not None and forest.num_nodes == 0:
                return self._fall_back("gate-nothing-shared")
        elif pays(seq_lens, query_lens, self._least_saved):
            forest = self._forest_of_rows(self._rows(batch, seq_lens), seq_lens, query_lens)
        else:
            return self._fall_back("gate-no-gain")
        plans: list[CostedPlan] = []
        num_rows = int(query_lens.sum())
        for planner, _, _, workspace in self._decode.groups:
            most = planner.max_partials
            if workspace is not None:
                most = workspace.capacity.batch_rows
            if most is not None and num_rows > most:
                return self._fall_back("workspace")
            plan = planner.plan(forest, query_lens=query_lens)
            # Over the bound it is one without sharing, which still leaves out the cached tokens.
            if self._from_paths and plan.refused_partials:
                return self._fall_back("workspace")
            if workspace is not None and plan.num_slots > workspace.capacity.slots:
                return self._fall_back("workspace")
            plans.append(plan)
        if self._gate is not None:
            layers = [group.num_layers for group in self._decode.groups]
            decision = self._gate.choose(list(zip(plans, layers, strict=True)), forest)
            if decision.reason is not None:
                return self._fall_back(decision.reason)
        if self._verify:
            rows = self._rows(batch, seq_lens)
            if self._from_paths:
                check_same_sharing(forest, self._forest_of_rows(rows, seq_lens, query_lens))
            for plan in plans:
                verify_plan(plan)
                verify_slots(plan, rows)
        self._decode.give_up_executors()
        for group, plan in zip(self._decode.groups, plans, strict=True):
            group.executor.load(plan, self._decode.req_to_token, batch.req_pool_indices)
        self._counters.count_plan(plan.num_packs, plan.num_partials, "extend")
        self._kv_tokens = plan.kv_tokens_read, int(seq_lens.sum())
        if self._decode.on_plan is not None:
            told = forest, self._decode.groups, None, (None, None), self._decode.page_size
            self._decode.on_plan(*told, num_rows, kind="extend", query_lens=query_lens)
        return EXTEND

    def _rows(self, batch: ForwardBatch, seq_lens: IntArray) -> NDArray[np.integer]:
        """[B, longest] slot rows on the host; from a GPU, for ``verify`` alone."""
        rows = self._decode.req_to_token[batch.req_pool_indices, : int(seq_lens.max())]
        return np.asarray(rows.cpu().numpy())

    def _forest_of_rows(
        self, rows: NDArray[np.integer], seq_lens: IntArray, query_lens: IntArray
    ) -> PrefixForest:
        return PrefixForest.from_rows(
            rows,
            seq_lens,
            limits=seq_lens - query_lens,
            page_size=self._decode.page_size,
            prefix_closed=True,
        )

    def _forest_of_paths(self, seq_lens: IntArray, query_lens: IntArray) -> PrefixForest | None:
        """What the requests hold of the tree; None where that is not known.

        A request's row begins with the tree's slots up to where its new tokens begin: SGLang has
        just matched them (0.5.17 to 0.5.23), and its last node is where the match ends.
        """
        scheduled = self._schedule.batch
        read = None if scheduled is None else path_reader(scheduled.tree_cache)
        if scheduled is None or read is None or len(scheduled.reqs) != len(seq_lens):
            return None
        table, every = PathTable.of(read(scheduled.reqs)), np.arange(len(seq_lens))
        owned = limits_of(scheduled.reqs, table, every)
        limits = np.minimum(owned, seq_lens - query_lens)
        return forest_of_table(table, every, limits, seq_lens, page_size=self._decode.page_size)

    def count_step(self) -> None:
        """Count the pass prepared last as packed, with what it read. Called when it has ended."""
        self._counters.count_packed("extend", *self._kv_tokens)

    def _fall_back(self, reason: str) -> StepState:
        self._counters.say(reason)
        return StepState(reason=reason, counts=True, kind="extend")


def pays(seq_lens: IntArray, query_lens: IntArray, least_saved: int = 0) -> bool:
    """Whether a pass has enough fewer pairs of a query and a position than ``torch_native``.

    That has half a square of each request's length. With no cached prefix both have the same.

    Args:
        seq_lens, query_lens: [B] tokens of each request, and those that are new, each at least 1.
        least_saved: pairs that it must have fewer, however many times that is.
    """
    ours = (query_lens * (seq_lens - (query_lens - 1) / 2)).sum()
    stock = (seq_lens * (seq_lens + 1) / 2).sum()
    return bool(stock >= _LEAST_GAIN * ours and stock - ours >= least_saved)
