"""What the backend did: counters that say whether, and how much, it packed."""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

from sglang_prefix.backend.fallback import GATE_REASONS, REASONS

__all__ = ["BackendCounters"]

# The gate at work: nothing to tell.
_USUAL = ("gate-nothing-shared", "gate-no-gain", "gate-other-ranks")

# Steps that medians are taken over.
_NEWEST = 500
_STEPS_TO_WARN_AFTER = 1000

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class BackendCounters:
    """Decode steps by who served them, and the KV read for one layer.

    Attributes:
        packed_steps: decode steps that ran under a plan of ours.
        stock_reasons: decode steps left to the stock backend because the gate says so, by reason.
        fallback_reasons: decode steps that the stock backend served for another reason, by reason;
            layers that are always delegated are not counted here but listed in
            ``delegated_layers``.
        plans: plans made.
        num_packs, num_partials: of the newest plan.
        kv_tokens_read, kv_tokens_logical: KV tokens read by packed steps, and the tokens of all
            their requests, for one layer.
        predicted_packed_us, predicted_stock_us: the gate's newest prediction for one pass through
            all layers.
        predicted_gain_us: what it expects packed steps to have saved, all layers.
        plan_seconds: host time spent on making plans, or on deciding to do without one.
        path_seconds: of it, on SGLang's radix path call or, where its answer is cached, on finding
            that.
        reused_plan_steps, reused_plan_seconds: steps that reused the plan of the step before, and
            the host time to see that they could.
        delegated_layers: layers that are always the stock backend's: a reason by layer id.
    """

    packed_steps: int = 0
    stock_reasons: Counter[str] = field(default_factory=Counter)
    fallback_reasons: Counter[str] = field(default_factory=Counter)
    plans: int = 0
    num_packs: int = 0
    num_partials: int = 0
    kv_tokens_read: int = 0
    kv_tokens_logical: int = 0
    predicted_packed_us: float | None = None
    predicted_stock_us: float | None = None
    predicted_gain_us: float = 0.0
    reused_plan_steps: int = 0
    reused_plan_seconds: float = 0.0
    plan_seconds: float = 0.0
    path_seconds: float = 0.0
    delegated_layers: dict[int, str] = field(default_factory=dict)
    _newest_reused: deque[float] = field(default_factory=lambda: deque(maxlen=_NEWEST))
    _said: set[str] = field(default_factory=set)
    _logged: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def stock_steps(self) -> int:
        """Decode steps that the gate left to the stock backend."""
        return sum(self.stock_reasons.values())

    @property
    def fallback_steps(self) -> int:
        """Decode steps that the stock backend served against the gate."""
        return sum(self.fallback_reasons.values())

    @property
    def decode_steps(self) -> int:
        """All decode steps."""
        return self.packed_steps + self.stock_steps + self.fallback_steps

    def say(self, reason: str) -> None:
        """Log, the first time, why a decode step goes to the stock backend."""
        if reason not in self._said and reason not in _USUAL:
            self._said.add(reason)
            logger.warning(
                "prefix attention: decode goes to the stock backend (%s)", REASONS[reason]
            )

    def count_stock_step(self, reason: str) -> None:
        """Count a step that the stock backend served; warn once if no step is ever packed."""
        reasons = self.stock_reasons if reason in GATE_REASONS else self.fallback_reasons
        reasons[reason] += 1
        if self.packed_steps == 0 and self.decode_steps == _STEPS_TO_WARN_AFTER:
            top, count = (self.stock_reasons + self.fallback_reasons).most_common(1)[0]
            logger.warning(
                "prefix attention: none of the first %d decode steps was packed; %d of them "
                "because: %s",
                self.decode_steps,
                count,
                REASONS[top],
            )

    def count_reused_step(self, seconds: float) -> None:
        """Count a step under the plan of the one before, and the host time to see that it could."""
        self.reused_plan_steps += 1
        self.reused_plan_seconds += seconds
        self._newest_reused.append(seconds)

    def count_plan(self, num_packs: int, num_partials: int) -> None:
        """Count a plan that was taken into use."""
        self.plans += 1
        self.num_packs, self.num_partials = num_packs, num_partials

    def log_text(self) -> str:
        """What has been done since the last call, for SGLang's line about decode batches."""
        packed, steps = self.packed_steps, self.decode_steps
        read, logical = self.kv_tokens_read, self.kv_tokens_logical
        packed_before, steps_before, read_before, logical_before = self._logged
        self._logged = (packed, steps, read, logical)
        share = (packed - packed_before) / max(steps - steps_before, 1)
        text = f"prefix packed: {share:.0%}"
        if logical > logical_before:
            ratio = (read - read_before) / (logical - logical_before)
            text += f", prefix packs: {self.num_packs}, prefix kv read: {ratio:.2f}"
        return text

    def as_dict(self) -> dict[str, Any]:
        """All counters as plain values."""
        public = [f.name for f in fields(self) if not f.name.startswith("_")]
        logical, newest = self.kv_tokens_logical, self._newest_reused
        return {name: getattr(self, name) for name in public} | {
            "stock_steps": self.stock_steps,
            "stock_reasons": dict(self.stock_reasons),
            "fallback_steps": self.fallback_steps,
            "fallback_reasons": dict(self.fallback_reasons),
            "kv_read_ratio": self.kv_tokens_read / logical if logical else None,
            "reused_step_us": 1e6 * median(newest) if newest else None,
            "delegated_layers": {str(k): v for k, v in self.delegated_layers.items()},
        }
