"""`bench serving` without SGLang: traces, workloads, and what is concluded from two sides."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_prefix.bench.serving.compare import aggregate, compare, new_case, step_delta
from sglang_prefix.bench.serving.drivers import Answer, summarize
from sglang_prefix.bench.serving.workloads import Trace, Workload, load_workloads, scale_trace
from sglang_prefix.bench.workloads.traces import TraceRequest

# -- traces and workloads -------------------------------------------------------------------------


SHAPE = Trace(
    requests=9,
    block_tokens=16,
    max_prompt_tokens=99,
    max_output_tokens=99,
    speed=1.0,
    max_concurrency=9,
)


def prompts_of(*requests: tuple[int, tuple[int, ...]], seed: int = 3, **changes: Any) -> Any:
    """Prompts of requests, from their lengths and block ids."""
    trace = [TraceRequest(0, length, 64, ids) for length, ids in requests]
    shape: Any = {**SHAPE, **changes}
    rows = scale_trace(trace, range(1000, 2000), shape, seed)
    assert [tokens for _, tokens, _ in rows] == [2] * len(trace)
    return [prompt for prompt, _, _ in rows]


def test_requests_that_begin_with_the_same_ids_begin_with_the_same_tokens() -> None:
    whole = (1100, (0, 7, 9))
    a, b, c = prompts_of(whole, (1100, (0, 7, 8)), (1100, (1, 7, 9)))
    assert len(a) == round(1100 * 16 / 512)
    assert set(a) <= set(range(1000, 2000))
    assert a[:32] == b[:32]
    assert a[32:] != b[32:]
    assert c[:16] != b[:16]
    assert c[16:] == a[16:]
    # Long prompts lose their end, and another seed draws other tokens.
    assert prompts_of(whole, max_prompt_tokens=20) == [a[:20]]
    assert prompts_of(whole, seed=4) != [a]


def test_the_registry_has_every_group_in_both_sizes() -> None:
    for quick in (False, True):
        groups = {workload.group for workload in load_workloads(quick=quick)}
        assert groups == {"shared-prefix", "random", "trace", "rollouts", "questions", "forks"}
    (one,) = load_workloads(quick=True, names=["trace"], overrides={"requests": 3})
    assert one.parameters["requests"] == 3


# -- conclusions -----------------------------------------------------------------------------------

ANSWERS = ["1 2 3", "4 5 6"]
COUNTERS = {
    "packed_steps": 10,
    "stock_steps": 2,
    "fallback_steps": 0,
    "stock_reasons": {"gate-no-gain": 2},
    "fallback_reasons": {},
    "kv_tokens_read": 100,
    "kv_tokens_logical": 400,
}


def a_run(scale: float = 1.0, packed: int | None = None, stock: int = 0) -> dict[str, Any]:
    """A timed run; ``packed`` and ``stock`` are its steps, None on a stock server."""
    times = {f"{m}_ms": {"median": 10 * scale, "p99": 20 * scale} for m in ("ttft", "tpot", "itl")}
    rates = {"output_tokens_per_s": 100 / scale, "requests_per_s": 1 / scale, "duration_s": scale}
    counters = None
    if packed is not None:
        after = COUNTERS | {
            "packed_steps": 10 + packed,
            "stock_steps": 2 + stock,
            "stock_reasons": {"gate-no-gain": 2 + stock},
            "kv_tokens_read": 100 + packed,
            "kv_tokens_logical": 400 + 4 * packed,
        }
        counters = step_delta(COUNTERS, after)
    return {**times, **rates, "counters": counters, "texts": ["a", "b"]}


def compared(
    prefix: dict[str, Any], min_equal: float = 1.0, texts: list[str] | None = None, **answers: Any
) -> dict[str, Any]:
    """A case whose sides have the same answers, but for ``answers`` and ``texts`` of ours."""
    case = new_case(Workload("rollouts", "rollouts", "rollouts", {}))
    said = {"fingerprint": "f", "tokens": ANSWERS}
    ours = prefix | {"texts": texts or ["a", "b"]}
    case["sides"] = {
        "stock": aggregate({**said, "runs": [a_run(2.0)]}),
        "prefix": aggregate({**said, "runs": [ours], **answers}),
    }
    compare(case, repeats=1, min_equal=min_equal)
    return case


def test_verify_passes_are_steps_and_extends_are_counted_beside_them() -> None:
    after = COUNTERS | {
        "packed_steps": 12,
        "verify": {"packed_steps": 5, "fallback_steps": 2, "fallback_reasons": {"error": 2}},
        "extend": {"packed_steps": 3, "stock_steps": 1},
    }
    found = step_delta(COUNTERS, after)
    assert found["steps"] == {"packed": 7, "stock": 0, "fallback": 2}
    assert found["reasons"] == {"error": 2}
    assert found["extends"] == {"packed": 3, "stock": 1, "fallback": 0}


def test_a_comparison_has_ratios_of_prefix_over_stock() -> None:
    case = compared(a_run(packed=19, stock=1))
    assert case["is_comparison"]
    assert case["why_not"] is None
    assert case["ratios"] == {"ttft": 0.5, "tpot": 0.5, "itl": 0.5, "throughput": 2.0}
    assert case["requests_equal"] == case["requests"] == 2
    assert case["tokens_compared"] == case["tokens_equal"] == 6
    side = case["sides"]["prefix"]
    assert side["steps"] == {"packed": 19, "stock": 1, "fallback": 0}
    assert side["packed_share"] == 0.95
    assert side["kv_read_ratio"] == 0.25
    assert side["reasons"] == {"gate-no-gain": 1}


def test_a_run_that_was_not_packed_is_no_comparison() -> None:
    case = compared(a_run(packed=8, stock=2))
    assert not case["is_comparison"]
    assert case["why_not"] == "only 80% of the decode steps were packed (gate-no-gain)"
    assert set(case["ratios"].values()) == {None}
    assert case["unpacked_ratios"]["tpot"] == 0.5
    assert not compared(a_run(packed=0))["is_comparison"]  # nothing decoded is not all packed


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"tokens": ["1 2 3", "4 5 7"]},
            "tokens differ in 1 of 2 answers (83% of tokens agree)",
        ),
        ({"tokens": ["1 9 3", "4 5 6"]}, "differ in 1 of 2 answers (67% of tokens agree)"),
        ({"tokens": ["1 2 3", "4 5 6 7"]}, "differ in 1 of 2 answers (100% of tokens agree)"),
        ({"tokens": ["1 2 3"]}, "1 answers for 2 requests"),
        ({"fingerprint": "g"}, "did not get the same requests"),
        ({"texts": ["a", "c"]}, "answers of the timed runs differ in 1 of 2 requests"),
    ],
)
def test_sides_with_other_answers_are_no_comparison(changes: dict[str, Any], told: str) -> None:
    case = compared(a_run(packed=20), **changes)
    assert not case["is_comparison"]
    assert case["why_not"].endswith(told)
    assert set(case["ratios"].values()) == {None}
    assert case["unpacked_ratios"] is None


def test_where_rounding_differs_a_share_of_the_tokens_is_enough() -> None:
    tokens = ["1 2 9", "4 9 9"]
    assert compared(a_run(packed=20), 0.5, tokens=tokens)["is_comparison"]
    assert compared(a_run(packed=20), 0.5, tokens=tokens)["requests_equal"] == 0
    assert not compared(a_run(packed=20), 0.6, tokens=tokens)["is_comparison"]


def test_the_median_run_counts() -> None:
    runs = [a_run(scale, packed=10) for scale in (1.0, 9.0, 2.0)]
    side = aggregate({"runs": runs})
    assert side["ttft_ms"] == {"median": 20.0, "p99": 40.0}
    assert side["output_tokens_per_s"] == 50
    assert side["steps"]["packed"] == 30
    assert side["raw"]["runs"] == runs


def test_times_are_summed_up_as_bench_serving_does() -> None:
    # Two tokens at once share their time; a first chunk of two tokens has no time between them.
    one = Answer(began=1.0, chunks=[(1.5, 1), (1.7, 3), (1.8, 4)], text="one")
    other = Answer(began=1.0, chunks=[(2.0, 2), (2.4, 3)], text="other")
    found = summarize([one, other], 2.0)
    assert found["ttft_ms"]["median"] == pytest.approx(750)
    assert found["tpot_ms"] == pytest.approx({"median": 250, "p99": 100 + 0.99 * 300})
    assert found["itl_ms"]["median"] == pytest.approx(100)  # of 100, 100, 100 and 400
    assert found["output_tokens_per_s"] == 7 / 2
    assert found["texts"] == ["one", "other"]
    assert summarize([Answer(1.0, [(2.0, 1)])], 1.0)["tpot_ms"] is None
