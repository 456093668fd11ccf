"""Who serves each step: chosen when it begins, counted when it ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from prefix_patches.attributes import ForwardBatch, ModelRunner, ReplayView
from prefix_patches.schedule_context import ensure_schedule_context
from sglang_prefix.backend.counters import BackendCounters
from sglang_prefix.backend.decode_batch import DecodeBatch
from sglang_prefix.backend.decode_planner import DecodePlanner
from sglang_prefix.backend.delegation import DelegatingBackend
from sglang_prefix.backend.extend_planner import ExtendPlanner
from sglang_prefix.backend.fallback import batch_reason, server_reason
from sglang_prefix.backend.graph_labels import GraphLabels
from sglang_prefix.backend.layers import find_layers
from sglang_prefix.backend.metrics import metrics_of
from sglang_prefix.backend.step_state import NO_STEP, OTHER_GRAPH, PACKED_REPLAYS, StepState
from sglang_prefix.backend.verification import Verification
from sglang_prefix.config import PrefixConfig

if TYPE_CHECKING:
    from sglang_prefix.explain.last_plan import LastPlan

__all__ = ["SteppingBackend"]

logger = logging.getLogger(__name__)


class SteppingBackend(DelegatingBackend):
    """A backend that chooses, step by step, between itself and the stock backend, and counts.

    What is counted are decode steps, verify passes of speculative decoding, and extends that could
    be packed. Each is in a :class:`StepState` from its beginning on. It is counted when the next
    one begins, or somebody asks for the counters.

    Args:
        model_runner: SGLang's model runner.
        stock: the backend to delegate to.
        stock_names: its name, and that of the backend that serves prefill.
        config: settings.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        stock: AttentionBackend,
        stock_names: Sequence[str],
        config: PrefixConfig,
    ) -> None:
        super().__init__(stock)
        self._schedule = ensure_schedule_context(model_runner)
        self._labels = GraphLabels(self._schedule)
        self._server_reason = server_reason(model_runner, config.gate)
        self._verification = Verification(model_runner, stock, serves=self._server_reason is None)
        if self._server_reason is None and not self._may_pack(config):
            self._server_reason = self._verification.passed_by_reason
        self._layers = find_layers(
            model_runner,
            set(stock_names),
            config,
            serve=self._server_reason is None,
            drafts=self._verification.drafts,
        )
        self.counters = BackendCounters(delegated_layers=self._layers.delegated)
        self._metrics = metrics_of(model_runner, self._layers.executor_text)
        self._last_plan: LastPlan | None = None
        if config.keep_plan:
            from sglang_prefix.explain.last_plan import LastPlan

            self._last_plan = LastPlan(config)
        self._verify = config.verify
        self._planner: DecodePlanner | None = None
        self._extends: ExtendPlanner | None = None
        self._step = NO_STEP
        self._failed = False  # a failure has been logged with its traceback

    def _may_pack(self, config: PrefixConfig) -> bool:
        """Whether any kind of pass may be packed: verify passes may all be another backend's."""
        verification = self._verification
        if verification.drafts or not verification.is_all_there_is:
            return True
        return config.extends == "always" or (config.extends == "auto" and verification.is_on_cpu)

    def _stay_out(self, reason: str) -> None:
        """Serve no layer after all."""
        self._server_reason, self._planner, self._extends = reason, None, None
        self._layers = replace(self._layers, group_of={}, groups=[])
        self._labels.withdraw()

    def _batch_of(
        self, forward_batch: ForwardBatch | ReplayView, *, in_graph: bool = False
    ) -> DecodeBatch | None:
        """The decode step or verify pass that SGLang hands over; None for other passes."""
        if forward_batch.forward_mode.is_decode():
            return DecodeBatch(forward_batch, self._schedule.batch, in_graph)
        return self._verification.batch_of(forward_batch, self._schedule.batch, in_graph)

    def _predict(self, batch: DecodeBatch) -> tuple[float, float] | None:
        """Plan a batch that has been scheduled; the gate's predictions, None if it is stock's."""
        self._end_step()
        if self._planner is None or self._server_reason or batch_reason(batch.forward_batch):
            return None
        return self._planner.decide_ahead(batch)

    def _plan(self, batch: DecodeBatch, *, packed: bool | None = None) -> str | None:
        """Prepare a batch, as ranks agreed; why it is the stock backend's, None if it is packed."""
        reason, planner = self._server_reason, self._planner
        if reason is None:
            assert planner is not None
            try:
                reason = self._reason_of(batch)
                if reason is None:
                    reason = planner.prepare(batch, packed=packed)
                elif batch.drafts:
                    planner.invalidate()  # lengths alone do not tell that a pass was left out
            except Exception:
                planner.forget()
                alone = batch.in_graph and packed is None and self._labels.ranks_must_agree
                if self._verify or alone:
                    raise
                self._log_failure("planning")
                reason = "error"
        if reason is not None:
            self.counters.say(reason)
        return reason

    def _reason_of(self, batch: DecodeBatch) -> str | None:
        """Why a batch is the stock backend's, whatever it shares; None to plan it."""
        reason = batch_reason(batch.forward_batch, verifies=batch.drafts > 0)
        if reason is None and batch.drafts:
            reason = self._verification.reason(batch)
        if reason is None and batch.in_graph and not self._labels.names:
            # After a switch of PD roles SGLang captures what it was started not to capture.
            reason = "late-graph"
        return reason

    def _begin_eager(self, batch: DecodeBatch) -> StepState:
        """Plan the batch."""
        reason = self._plan(batch)
        return StepState(reason is None, reason, counts=True, kind=batch.kind)

    def _begin_capture(self, batch: DecodeBatch) -> StepState:
        """Capture our kernels under their label, unless no plan of this size would ever fit."""
        planner = self._planner
        if planner is None or self._server_reason or not self._labels.captures_packed:
            return OTHER_GRAPH
        if not planner.fits(batch):
            return OTHER_GRAPH
        planner.prepare_private(batch)
        return StepState(packed=True, in_graph=True, kind=batch.kind)

    def _begin_replay(self, batch: DecodeBatch) -> StepState:
        """Plan the batch, and choose the graph that serves it."""
        agreed = self._labels.agreed if self._labels.agrees else None
        if agreed and self._planner is not None:
            # As on every other rank: workspaces are of one size, and batches are padded to one.
            # Where they are not, SGLang itself lets ranks replay graphs of different sizes.
            agreed = self._planner.fits(batch)
        counts = not batch.is_idle
        reason = self._plan(batch, packed=agreed) if counts else None
        if counts and reason is None:
            self._labels.choose(packed=True)
            return PACKED_REPLAYS[batch.kind]
        packed = self._labels.without_stock or bool(agreed)
        if packed:
            assert self._planner is not None
            self._planner.prepare_private(batch)
        self._labels.choose(packed=packed)
        return StepState(packed, reason, in_graph=True, counts=counts, kind=batch.kind)

    def _end_step(self) -> None:
        """Count the step under way, once: packed, or under the reason why it was not."""
        step = self._step
        if not step.counts:
            return
        self._step = NO_STEP
        if step.reason is not None:
            self.counters.count_stock_step(step.reason, step.kind)
        elif step.kind == "extend" and self._extends is not None:
            self._extends.count_step()
        elif self._planner is not None:
            self._planner.count_step()
        if self._metrics is not None:
            self._metrics.update(self.counters)

    def _count_passed_by(self, reason: str) -> None:
        """Count a pass that generates tokens on the stock backend and is no decode step."""
        kind = "extend"
        if reason == "speculative-verify":
            if self._verification.drafts:
                return  # it is counted when it is prepared
            kind, reason = "verify", self._verification.passed_by_reason
        self._end_step()
        self.counters.say(reason)
        self._step = StepState(reason=reason, counts=True, kind=kind)
        self._end_step()

    def _give_up_step(self, reason: str) -> None:
        """Leave the rest of this step to the stock backend, and count it there."""
        if self._planner is not None:
            self._planner.invalidate()
        if self._step.reason is None:
            self._step = self._step._replace(packed=False, reason=reason)
            self.counters.say(reason)

    def _log_failure(self, what: str) -> None:
        """Log the exception at hand, with its traceback the first time only."""
        logger.error("prefix attention: %s failed", what, exc_info=not self._failed)
        self._failed = True

    def _log_text(self) -> str:
        """What is appended to SGLang's line about decode batches."""
        self._end_step()
        return self.counters.log_text()

    def _report(self) -> dict[str, Any]:
        """All counters as plain values, for who asks the server; metrics then are up to date."""
        self._end_step()
        if self._metrics is not None:
            self._metrics.update(self.counters, now=True)
        seconds = self._schedule.seconds
        report = self.counters.as_dict() | {
            "hook_us": 1e6 * median(seconds) if seconds else None,
            "executor": self._layers.executor_text,
        }
        if self._last_plan is not None:
            report["last_plan"] = self._last_plan.as_dict()
        return report
