"""What makes two runs equal, and when equality says something about our decode."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from tests.engine.driver import SectionResult

__all__ = [
    "LOGPROB_TOLERANCE",
    "LOGPROB_TOLERANCE_BF16_CACHE",
    "assert_packed",
    "assert_same",
    "changes_half",
    "num_changed",
    "num_retracted",
]

# float32 sums in another order differ by a few 1e-6 in these logprobs of -1 to -5; a wrong token
# or a missing page moves them by 1e-1.
LOGPROB_TOLERANCE = 1e-4
# With a bfloat16 cache such a difference now and then rounds a value to its neighbour, 2**-8 away.
LOGPROB_TOLERANCE_BF16_CACHE = 2e-3


def assert_packed(counters: Mapping[str, Any], max_ratio: float) -> None:
    """At least 90% of the decode steps packed, no fallback, and less KV read than ``max_ratio``."""
    steps = counters["packed_steps"] + counters["stock_steps"] + counters["fallback_steps"]
    assert counters["packed_steps"] >= max(1, 0.9 * steps)
    assert counters["fallback_reasons"] == {}
    assert counters["kv_read_ratio"] < max_ratio


def assert_same(
    ours: SectionResult, stock: SectionResult, tolerance: float = LOGPROB_TOLERANCE
) -> None:
    """The same output ids and logprobs, if asked for, up to where a client aborted, or to a tie."""
    assert ours.requests.keys() == stock.requests.keys()
    num_ties = 0
    for rid, expected in stock.requests.items():
        found = ours.requests[rid]
        count = len(expected["output_ids"])
        if rid.endswith("aborted"):
            # A client that lags behind the engine aborts too late, and has all the tokens.
            assert {found["finish"], expected["finish"]} <= {"abort", "length"}, rid
            count = min(count, len(found["output_ids"]))
        else:
            assert found["finish"] == "length"
            assert len(found["output_ids"]) == count
        tie = _first_tie(found, expected, tolerance / 10)
        num_ties += tie < count
        count = min(count, tie)
        assert found["output_ids"][:count] == expected["output_ids"][:count], rid
        if found["logprobs"]:
            near = pytest.approx(expected["logprobs"][:count], rel=0, abs=tolerance)
            assert found["logprobs"][:count] == near, rid
    assert num_ties <= 1 + len(stock.requests) // 100


def _first_tie(found: Mapping[str, Any], expected: Mapping[str, Any], gap: float) -> int:
    """The first token that differs, if its logprob does not; else the number of tokens.

    Greedy decoding has two best tokens there, and how float32 rounds chooses. In the tests' model
    request m019 of the crowd has two that are 2e-6 apart in float64.
    """
    ids, logprobs = (
        list(zip(found[name], expected[name], strict=False)) for name in ("output_ids", "logprobs")
    )
    first = next((i for i, (a, b) in enumerate(ids) if a != b), len(ids))
    is_tie = first < len(logprobs) and abs(logprobs[first][0] - logprobs[first][1]) <= gap
    return first if is_tie else max(len(found["output_ids"]), len(expected["output_ids"]))


def num_changed(control: SectionResult, stock: SectionResult) -> int:
    """Requests with other output ids."""
    assert control.requests.keys() == stock.requests.keys()
    return sum(
        control.requests[rid]["output_ids"] != expected["output_ids"]
        for rid, expected in stock.requests.items()
    )


def changes_half(control: SectionResult, stock: SectionResult) -> bool:
    """Whether at least half of the requests have other output ids."""
    return num_changed(control, stock) * 2 >= len(stock.requests)


def num_retracted(log: str) -> int:
    """Requests that SGLang says it retracted because the KV pool was full."""
    found = re.findall(r"KV cache pool is full\. Retract requests\. #retracted_reqs: (\d+)", log)
    return sum(map(int, found))
