"""What the backend did: counters that say whether, and how much, it packed."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sglang_prefix.fallback import REASONS

__all__ = ["BackendCounters"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class BackendCounters:
    """Decode steps by the way they took, and the KV read for one layer.

    Attributes:
        packed_steps: decode steps that ran under a plan of ours.
        stock_steps: decode steps left to the stock backend because the gate says so.
        fallback_steps: decode steps that the stock backend served for another reason.
        fallback_reasons: the same by reason; layers that are always delegated are not counted
            here but listed in ``delegated_layers``.
        plans: plans made.
        packs, partials: of the newest plan.
        kv_tokens_read, kv_tokens_logical: KV tokens read by packed steps, and the tokens of all
            their requests, for one layer.
        plan_seconds, path_seconds: host time spent on making plans, and of it on SGLang's radix
            path call or, where its answer is cached, on finding that.
    """

    packed_steps: int = 0
    stock_steps: int = 0
    fallback_reasons: Counter[str] = field(default_factory=Counter)
    plans: int = 0
    packs: int = 0
    partials: int = 0
    kv_tokens_read: int = 0
    kv_tokens_logical: int = 0
    plan_seconds: float = 0.0
    path_seconds: float = 0.0
    delegated_layers: dict[int, str] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    @property
    def fallback_steps(self) -> int:
        """Decode steps that the stock backend served against the gate."""
        return sum(self.fallback_reasons.values())

    def fall_back(self, reason: str, detail: str = "") -> None:
        """Count a step for the stock backend, and say why the first time."""
        if reason == "gate-never":
            self.stock_steps += 1
        else:
            self.fallback_reasons[reason] += 1
        if reason not in self._said:
            self._said.add(reason)
            text = f"{REASONS[reason]}{': ' if detail else ''}{detail}"
            logger.warning("prefix attention: decode goes to the stock backend (%s)", text)

    def as_dict(self) -> dict[str, Any]:
        """All counters as plain values."""
        logical = self.kv_tokens_logical
        return {
            "packed_steps": self.packed_steps,
            "stock_steps": self.stock_steps,
            "fallback_steps": self.fallback_steps,
            "fallback_reasons": dict(self.fallback_reasons),
            "plans": self.plans,
            "num_packs": self.packs,
            "num_partials": self.partials,
            "kv_tokens_read": self.kv_tokens_read,
            "kv_tokens_logical": logical,
            "kv_read_ratio": self.kv_tokens_read / logical if logical else None,
            "plan_seconds": self.plan_seconds,
            "path_seconds": self.path_seconds,
            "delegated_layers": {str(k): v for k, v in self.delegated_layers.items()},
        }
