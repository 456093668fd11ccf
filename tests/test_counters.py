"""What is counted, what is said of it, and what of it reaches prometheus."""

from __future__ import annotations

import logging

import pytest
from prometheus_client import REGISTRY

from prefix_patches.observability import append_with
from sglang_prefix.backend.counters import KINDS, BackendCounters
from sglang_prefix.backend.fallback import REASONS
from sglang_prefix.backend.metrics import PrefixMetrics

LOG = "sglang.srt.managers.scheduler_components.metrics_reporter"


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_passes_gate_and_fallback_are_counted_apart(kind: str) -> None:
    counters = BackendCounters()
    nothing = counters.as_dict()
    for _ in range(5):
        counters.count_packed(kind, 10, 40)
    for reason in ("gate-no-gain", "gate-never", "error", "gate-no-gain"):
        counters.count_stock_step(reason, kind)
    counters.count_plan(7, 30, kind)
    counts = counters.of[kind]
    assert (counts.stock_steps, counts.fallback_steps, counts.steps) == (3, 1, 9)
    expected = {
        "packed_steps": 5,
        "stock_steps": 3,
        "stock_reasons": {"gate-no-gain": 2, "gate-never": 1},
        "fallback_steps": 1,
        "fallback_reasons": {"error": 1},
        "plans": 1,
        "num_packs": 7,
        "num_partials": 30,
        "kv_tokens_read": 50,
        "kv_tokens_logical": 200,
        "kv_read_ratio": 0.25,
    }
    # Those of decode steps have no name around them.
    shown = expected if kind == "decode" else {kind: expected}
    assert counters.as_dict() == nothing | shown


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
    counters = BackendCounters()
    counters.count_packed("extend")
    for step in range(2500):
        counters.count_stock_step("gate-nothing-shared" if step % 4 else "gate-no-gain")
        counters.count_stock_step("gate-no-gain", "extend")
    counters.count_packed("decode")
    for _ in range(1200):
        counters.count_stock_step("speculative-verify", "verify")
    decode, verify = caplog.records
    assert decode.levelno == logging.WARNING
    text = decode.getMessage()
    assert "none of the first 1000 decode steps was packed; 750 of them because" in text
    assert REASONS["gate-nothing-shared"] in text
    assert "first 1000 verify passes was packed; 1000 of them because" in verify.getMessage()


def test_sglangs_line_about_decode_gets_what_happened_since_the_last_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counters = BackendCounters()
    logger = logging.getLogger(LOG)
    filters, logger.filters[:] = list(logger.filters), []  # of backends that other tests made
    append_with(counters.log_text)
    try:
        with caplog.at_level(logging.INFO, logger=LOG):
            counters.count_plan(7, 9)
            counters.count_packed("decode", 250, 1000)
            logger.info("Decode batch, #running-req: 4, gen throughput (token/s): 1.0, ")
            for _ in range(10):
                counters.count_stock_step("gate-no-gain")
            logger.info("Decode batch, #running-req: 4")
            logger.info("Prefill batch, #new-seq: 1")
            counters.count_plan(3, 9, "verify")
            for _ in range(3):
                counters.count_packed("verify", 30, 100)
            counters.count_stock_step("speculative-verify", "verify")
            counters.count_packed("extend", 10, 100)
            logger.info("Decode batch, #running-req: 4")
            logger.info("Decode batch, #running-req: 4")
    finally:
        logger.filters[:] = filters
    first, second, other, kinds, last = [record.getMessage() for record in caplog.records]
    assert first.endswith("1.0, prefix packed: 100%, prefix packs: 7, prefix kv read: 0.25")
    assert second.endswith("#running-req: 4, prefix packed: 0%")
    assert other == "Prefill batch, #new-seq: 1"
    assert kinds.endswith(
        "#running-req: 4, prefix verify packed: 75%, prefix verify packs: 3, "
        "prefix verify kv read: 0.30, prefix extend packed: 100%, prefix extend packs: 0, "
        "prefix extend kv read: 0.10"
    )
    assert last.endswith("#running-req: 4, prefix packed: 0%")


def test_metrics_follow_the_counters_ten_times_a_second() -> None:
    labels = {"model_name": "tiny", "tp_rank": "0"}
    metrics = PrefixMetrics(labels, "torch (no compiler)")
    counters = BackendCounters()

    def value(name: str, **more: str) -> float | None:
        return REGISTRY.get_sample_value(f"sglang_prefix_{name}", labels | more)

    assert value("executor_info", executor="torch (no compiler)") == 1
    metrics.update(counters, now=True)
    for kind in KINDS:
        assert value("plans_total", kind=kind) == 0
        assert value("steps_total", kind=kind, path="packed") == 0
    for kind, times in (("decode", 3), ("verify", 2), ("extend", 1)):
        for _ in range(times):
            counters.count_plan(5, 9, kind)
            counters.count_packed(kind, 100, 400)
            counters.count_stock_step("error", kind)
    metrics.update(counters)
    assert value("plans_total", kind="decode") == 0  # not so soon
    metrics.update(counters, now=True)
    metrics.update(counters, now=True)
    for kind, times in (("decode", 3), ("verify", 2), ("extend", 1)):
        assert value("plans_total", kind=kind) == times
        assert value("steps_total", kind=kind, path="packed") == times
        assert value("steps_total", kind=kind, path="fallback") == times
        assert value("unpacked_steps_total", kind=kind, reason="error") == times
        assert value("kv_tokens_read_total", kind=kind) == 100 * times
        assert value("kv_tokens_logical_total", kind=kind) == 400 * times
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        PrefixMetrics(labels, "torch")
