"""What is counted, what is said of it, and what of it reaches prometheus."""

from __future__ import annotations

import logging

import pytest
from prometheus_client import REGISTRY

from prefix_patches.observability import append_with
from sglang_prefix.backend.counters import BackendCounters
from sglang_prefix.backend.fallback import REASONS
from sglang_prefix.backend.metrics import PrefixMetrics

LOG = "sglang.srt.managers.scheduler_components.metrics_reporter"


def test_gate_and_fallback_are_counted_apart() -> None:
    counters = BackendCounters(packed_steps=5, kv_tokens_read=50, kv_tokens_logical=200)
    for reason in ("gate-no-gain", "gate-never", "error", "gate-no-gain"):
        counters.count_stock_step(reason)
    assert (counters.stock_steps, counters.fallback_steps, counters.decode_steps) == (3, 1, 9)
    shown = counters.as_dict()
    assert shown["stock_reasons"] == {"gate-no-gain": 2, "gate-never": 1}
    assert shown["fallback_reasons"] == {"error": 1}
    assert (shown["kv_read_ratio"], shown["reused_step_us"]) == (0.25, None)


def test_a_reason_is_said_once_and_the_gate_at_work_not_at_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counters = BackendCounters()
    for _ in range(3):
        counters.say("workspace")
        counters.say("gate-nothing-shared")
    (record,) = caplog.records
    assert REASONS["workspace"] in record.getMessage()


def test_a_server_that_never_packs_says_why_once(caplog: pytest.LogCaptureFixture) -> None:
    counters, packing = BackendCounters(), BackendCounters(packed_steps=1)
    for step in range(2500):
        counters.count_stock_step("gate-nothing-shared" if step % 4 else "gate-no-gain")
        packing.count_stock_step("gate-no-gain")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert "none of the first 1000 decode steps was packed; 750 of them because" in text
    assert REASONS["gate-nothing-shared"] in text


def test_sglangs_line_about_decode_gets_what_happened_since_the_last_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counters = BackendCounters()
    logger = logging.getLogger(LOG)
    filters, logger.filters[:] = list(logger.filters), []  # of backends that other tests made
    append_with(counters.log_text)
    try:
        with caplog.at_level(logging.INFO, logger=LOG):
            counters.packed_steps, counters.num_packs = 30, 7
            counters.kv_tokens_read, counters.kv_tokens_logical = 250, 1000
            logger.info("Decode batch, #running-req: 4, gen throughput (token/s): 1.0, ")
            for _ in range(10):
                counters.count_stock_step("gate-no-gain")
            logger.info("Decode batch, #running-req: 4")
            logger.info("Prefill batch, #new-seq: 1")
    finally:
        logger.filters[:] = filters
    first, second, other = [record.getMessage() for record in caplog.records]
    assert first.endswith("1.0, prefix packed: 100%, prefix packs: 7, prefix kv read: 0.25")
    assert second.endswith("#running-req: 4, prefix packed: 0%")
    assert other == "Prefill batch, #new-seq: 1"


def test_metrics_follow_the_counters_ten_times_a_second() -> None:
    labels = {"model_name": "tiny", "tp_rank": "0"}
    metrics = PrefixMetrics(labels, "torch (no compiler)")
    counters = BackendCounters()

    def value(name: str, **more: str) -> float | None:
        return REGISTRY.get_sample_value(f"sglang_prefix_{name}", labels | more)

    assert value("executor_info", executor="torch (no compiler)") == 1
    metrics.update(counters, now=True)
    assert value("plans_total") == value("steps_total", path="packed") == 0
    counters.plans, counters.packed_steps = 3, 40
    counters.kv_tokens_read, counters.kv_tokens_logical = 100, 400
    counters.count_stock_step("error")
    metrics.update(counters)
    assert value("plans_total") == 0  # not so soon
    metrics.update(counters, now=True)
    metrics.update(counters, now=True)
    assert value("plans_total") == 3
    assert value("steps_total", path="packed") == 40
    assert value("steps_total", path="fallback") == 1
    assert value("unpacked_steps_total", reason="error") == 1
    assert (value("kv_tokens_read_total"), value("kv_tokens_logical_total")) == (100, 400)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        PrefixMetrics(labels, "torch")
