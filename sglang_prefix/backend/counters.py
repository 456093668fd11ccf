"""What the backend did: counters that say whether, and how much, it packed."""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

from sglang_prefix.backend.fallback import GATE_REASONS, REASONS

__all__ = ["KINDS", "BackendCounters", "PassCounts"]

# Of passes of the model, and what several are called: one token more for each request; the tokens
# of a draft for each, which the target model checks; new tokens behind what is cached.
KINDS = {"decode": "decode steps", "verify": "verify passes", "extend": "extends"}

# The gate at work: nothing to tell.
_USUAL = ("gate-nothing-shared", "gate-no-gain", "gate-other-ranks")

# Steps that medians are taken over.
_NEWEST = 500
_STEPS_TO_WARN_AFTER = 1000

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class PassCounts:
    """Passes of one kind by who served them, and the KV read for one layer.

    Attributes:
        packed_steps: passes that ran under a plan of ours.
        stock_reasons: passes left to the stock backend because packing them does not pay, or is not
            wanted, by reason.
        fallback_reasons: passes that the stock backend served for another reason, by reason. Layers
            that are always delegated are not counted here but listed in ``delegated_layers``.
        plans: plans made.
        num_packs, num_partials: of the newest plan.
        kv_tokens_read, kv_tokens_logical: KV tokens read by packed passes, and the tokens of all
            their requests, for one layer.
    """

    packed_steps: int = 0
    stock_reasons: Counter[str] = field(default_factory=Counter)
    fallback_reasons: Counter[str] = field(default_factory=Counter)
    plans: int = 0
    num_packs: int = 0
    num_partials: int = 0
    kv_tokens_read: int = 0
    kv_tokens_logical: int = 0

    @property
    def stock_steps(self) -> int:
        """Passes that were left to the stock backend by choice."""
        return sum(self.stock_reasons.values())

    @property
    def fallback_steps(self) -> int:
        """Passes that the stock backend served against the gate."""
        return sum(self.fallback_reasons.values())

    @property
    def steps(self) -> int:
        """All passes."""
        return self.packed_steps + self.stock_steps + self.fallback_steps

    def as_dict(self) -> dict[str, Any]:
        """What was counted as plain values."""
        logical = self.kv_tokens_logical
        return {
            "packed_steps": self.packed_steps,
            "stock_steps": self.stock_steps,
            "stock_reasons": dict(self.stock_reasons),
            "fallback_steps": self.fallback_steps,
            "fallback_reasons": dict(self.fallback_reasons),
            "plans": self.plans,
            "num_packs": self.num_packs,
            "num_partials": self.num_partials,
            "kv_tokens_read": self.kv_tokens_read,
            "kv_tokens_logical": logical,
            "kv_read_ratio": self.kv_tokens_read / logical if logical else None,
        }


@dataclass(slots=True)
class BackendCounters:
    """Passes of the model by their kind, and what planning them took.

    Attributes:
        of: what was counted of each kind in :data:`KINDS`.
        predicted_packed_us, predicted_stock_us: the gate's newest prediction for one pass through
            all layers.
        predicted_gain_us: what it expects packed steps to have saved, all layers.
        plan_seconds: host time spent on making plans, extends' aside, or on deciding to do without.
        path_seconds: of it, on SGLang's radix path call or, where its answer is cached, on finding
            that.
        reused_plan_steps, reused_plan_seconds: steps that reused the plan of the step before, and
            the host time to see that they could.
        delegated_layers: layers that are always the stock backend's: a reason by layer id.
    """

    of: dict[str, PassCounts] = field(
        default_factory=lambda: {kind: PassCounts() for kind in KINDS}
    )
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
    _logged: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)

    @property
    def decode(self) -> PassCounts:
        """What was counted of decode steps."""
        return self.of["decode"]

    def say(self, reason: str) -> None:
        """Log, the first time, why a pass goes to the stock backend."""
        if reason not in self._said and reason not in _USUAL:
            self._said.add(reason)
            logger.warning(
                "prefix attention: a pass goes to the stock backend (%s)", REASONS[reason]
            )

    def count_packed(self, kind: str, kv_tokens_read: int = 0, kv_tokens_logical: int = 0) -> None:
        """Count a pass that ran under a plan of ours, and the KV tokens of one layer."""
        counts = self.of[kind]
        counts.packed_steps += 1
        counts.kv_tokens_read += kv_tokens_read
        counts.kv_tokens_logical += kv_tokens_logical

    def count_stock_step(self, reason: str, kind: str = "decode") -> None:
        """Count a pass that the stock backend served; warn once if none of its kind is packed."""
        counts = self.of[kind]
        reasons = counts.stock_reasons if reason in GATE_REASONS else counts.fallback_reasons
        reasons[reason] += 1
        if counts.packed_steps == 0 and counts.steps == _STEPS_TO_WARN_AFTER:
            top, count = (counts.stock_reasons + counts.fallback_reasons).most_common(1)[0]
            logger.warning(
                "prefix attention: none of the first %d %s was packed; %d of them because: %s",
                counts.steps,
                KINDS[kind],
                count,
                REASONS[top],
            )

    def count_reused_step(self, seconds: float) -> None:
        """Count a step under the plan of the one before, and the host time to see that it could."""
        self.reused_plan_steps += 1
        self.reused_plan_seconds += seconds
        self._newest_reused.append(seconds)

    def count_plan(self, num_packs: int, num_partials: int, kind: str = "decode") -> None:
        """Count a plan that was taken into use."""
        counts = self.of[kind]
        counts.plans += 1
        counts.num_packs, counts.num_partials = num_packs, num_partials

    def log_text(self) -> str:
        """What has been done since the last call, for SGLang's line about decode batches.

        Decode steps stand first, unless there were passes of other kinds alone.
        """
        texts = {kind: self._text_since_the_last(kind) for kind in KINDS}
        return ", ".join(filter(None, texts.values())) or "prefix packed: 0%"

    def _text_since_the_last(self, kind: str) -> str:
        counts, name = self.of[kind], "prefix" if kind == "decode" else f"prefix {kind}"
        now = counts.packed_steps, counts.steps, counts.kv_tokens_read, counts.kv_tokens_logical
        before = self._logged.get(kind, (0, 0, 0, 0))
        self._logged[kind] = now
        packed, steps, read, logical = (n - b for n, b in zip(now, before, strict=True))
        text = f"{name} packed: {packed / steps:.0%}" if steps else ""
        if logical:
            text += f", {name} packs: {counts.num_packs}, {name} kv read: {read / logical:.2f}"
        return text

    def as_dict(self) -> dict[str, Any]:
        """All counters as plain values: those of decode steps, and of other kinds by their name."""
        public = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name != "of" and not f.name.startswith("_")
        }
        others = {kind: counts.as_dict() for kind, counts in self.of.items() if kind != "decode"}
        newest = self._newest_reused
        return (
            self.decode.as_dict()
            | others
            | public
            | {
                "reused_step_us": 1e6 * median(newest) if newest else None,
                "delegated_layers": {str(k): v for k, v in self.delegated_layers.items()},
            }
        )
