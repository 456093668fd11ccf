"""Runs of `bench serving` without processes: servers and clients that answer at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from sglang_prefix.bench.child import ChildError
from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.serving import run as serving_run
from sglang_prefix.bench.serving.compare import step_delta
from sglang_prefix.bench.serving.plan import Plan
from sglang_prefix.bench.serving.run import Run
from sglang_prefix.bench.serving.servers import RunningServer

ROLLOUTS = {"prompts": 2, "samples": 2, "prompt_tokens": 8, "output_tokens": 4}
ENTRY = {"name": "a", "group": "rollouts", "driver": "rollouts", "about": "", "full": ROLLOUTS}
ENTRY |= {"quick": ROLLOUTS}

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


class FakeClient:
    """Answers what an SGLang client would; ``fails_at`` is the measurement that raises."""

    fails_at: int | None = None
    measured: tuple[str, ...] = ()

    def __init__(self, make: str, settings: dict[str, Any], **more: Any) -> None:
        pass

    @classmethod
    def begin(cls, fails_at: int | None = None) -> None:
        cls.measured, cls.fails_at = (), fails_at

    def ask(
        self, function: str, deadline: float, watch: Any, *, url: str = "", **arguments: Any
    ) -> Any:
        order = function.rpartition(".")[2]
        if order == "prepare":
            return {"fingerprint": "f", "replay_s": 0.0}
        if order == "check":
            return [[1, 2], [3, 4]]
        if FakeClient.fails_at == len(FakeClient.measured):
            raise ChildError("gone", "log")
        FakeClient.measured += (f"{url} {arguments['name']}",)
        return a_run(1.0 if "prefix" in url else 2.0)

    def stop(self) -> None:
        pass


@contextmanager
def fake_servers(**described: dict[str, Any]) -> Iterator[None]:
    """No processes: servers answer at once, and pack everything.

    Args:
        described: by side, what the server is, beside a model "m" in float32.
    """
    packed = iter(range(0, 100_000, 10))

    def counters(server: RunningServer) -> dict[str, Any] | None:
        return COUNTERS | {"packed_steps": next(packed)} if server.side == "prefix" else None

    def describe(server: RunningServer) -> dict[str, Any]:
        return {"model": "m", "dtype": "float32"} | described.get(server.side, {})

    FakeClient.begin()
    with (
        patch.object(serving_run, "ChildProcess", FakeClient),
        patch.object(serving_run, "launch", lambda side, *_: RunningServer(side, side)),
        patch.object(serving_run, "describe", describe),
        patch.object(serving_run, "read_counters", counters),
        patch.object(RunningServer, "raise_if_dead", lambda self: None),
    ):
        yield


@pytest.fixture
def fakes() -> Iterator[None]:
    """See :func:`fake_servers`."""
    with fake_servers():
        yield


def plan(out: Path, **changes: Any) -> Plan:
    """A plan of two workloads, "a" and "b"."""
    out.mkdir(exist_ok=True)
    file = out / "workloads.txt"
    file.write_text(json.dumps({"workloads": [ENTRY, ENTRY | {"name": "b"}]}))
    given: dict[str, Any] = {"model_path": "m", "workload_file": file, "workload_timeout": 9}
    return Plan(out, **(given | changes))


def measure(run: Run) -> None:
    run.run(inf, lambda name: None, lambda what: None)


def go(given: Plan, *, resume: bool = False) -> dict[str, Any]:
    measure(Run(given, resume=resume))
    return read_result(given.out / "serving.json", "bench-serving")
