"""The backend's counters on the server's ``/metrics``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prefix_patches.attributes import ModelRunner
from prefix_patches.observability import metric_labels
from sglang_prefix.backend.counters import BackendCounters

__all__ = ["PrefixMetrics", "metrics_of"]

# An increment writes to a file that all processes share, which a decode step should not wait for.
_INTERVAL_S = 0.1


class PrefixMetrics:
    """Exports what has been counted, some ten times a second.

    Args:
        labels: of SGLang's own metrics, by name.
        executor: what runs the plans, and why not a faster one.

    Raises:
        ValueError: another backend of this process exports already.
    """

    def __init__(self, labels: Mapping[str, str], executor: str) -> None:
        # Not at the top: the import decides whether this process shares its metrics with others,
        # and SGLang says so only after it has read its arguments.
        from prometheus_client import Counter, Gauge

        self._labels = dict(labels)
        names = tuple(labels)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"sglang_prefix_{name}", text, (*names, *more))

        self._plans = counter("plans_total", "Plans made, by kind of pass.", "kind")
        self._steps = counter(
            "steps_total",
            "Passes of the model, by kind (decode, verify, extend) and who served them.",
            *("kind", "path"),
        )
        self._reasons = counter(
            "unpacked_steps_total",
            "Passes that were not packed, by kind and reason.",
            *("kind", "reason"),
        )
        self._read = counter(
            "kv_tokens_read_total", "KV tokens read by packed passes, for one layer.", "kind"
        )
        self._logical = counter(
            "kv_tokens_logical_total",
            "KV tokens of all requests of packed passes, for one layer.",
            "kind",
        )
        self._plan_seconds = counter("plan_seconds_total", "Host time spent on making plans.")
        self._gain = counter(
            "predicted_gain_seconds_total",
            "Time that the gate expects packed steps to have saved.",
        )
        used = Gauge(
            "sglang_prefix_executor_info",
            "1; what runs the plans is in the label.",
            (*names, "executor"),
            multiprocess_mode="max",
        )
        used.labels(**self._labels, executor=executor).set(1)
        self._shown: dict[tuple[Any, ...], float] = {}  # by counter and our labels
        self._next = 0.0

    def update(self, counters: BackendCounters, *, now: bool = False) -> None:
        """Export what has been counted since the last time, if that is long enough ago."""
        clock = time.monotonic()
        if clock < self._next and not now:
            return
        self._next = clock + _INTERVAL_S
        self._add(self._plan_seconds, counters.plan_seconds)
        self._add(self._gain, counters.predicted_gain_us / 1e6)
        for kind, counts in counters.of.items():
            self._add(self._plans, counts.plans, kind=kind)
            self._add(self._read, counts.kv_tokens_read, kind=kind)
            self._add(self._logical, counts.kv_tokens_logical, kind=kind)
            for path in ("packed", "stock", "fallback"):
                self._add(self._steps, getattr(counts, f"{path}_steps"), kind=kind, path=path)
            for reasons in (counts.stock_reasons, counts.fallback_reasons):
                for reason, count in reasons.items():
                    self._add(self._reasons, count, kind=kind, reason=reason)

    def _add(self, counter: Any, value: float, **labels: str) -> None:
        key = (counter, *labels.values())
        added = value - self._shown.get(key, 0)
        if added > 0 or key not in self._shown:
            counter.labels(**self._labels, **labels).inc(added)
            self._shown[key] = value


def metrics_of(model_runner: ModelRunner, executor: str) -> PrefixMetrics | None:
    """Metrics of this process, if this rank exports any and no other backend of it does."""
    labels = metric_labels(model_runner)
    if labels is None:
        return None
    try:
        return PrefixMetrics(labels, executor)
    except ValueError:  # prometheus knows each name once
        return None
