"""Runs of `bench serving` without processes: servers and clients that answer at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.serving import run as serving_run
from sglang_prefix.bench.serving.cells import step_delta
from sglang_prefix.bench.serving.process import ClientError
from sglang_prefix.bench.serving.run import Plan, Run
from sglang_prefix.bench.serving.servers import RunningServer
from sglang_prefix.bench.serving.workloads import Workload

ROLLOUTS = {"prompts": 2, "samples": 2, "prompt_tokens": 8, "output_tokens": 4}

COUNTERS = {
    "packed_steps": 10,
    "stock_steps": 2,
    "fallback_steps": 0,
    "stock_reasons": {"gate-no-gain": 2},
    "fallback_reasons": {},
    "kv_tokens_read": 100,
    "kv_tokens_logical": 400,
}

WORKLOAD = Workload("rollouts", "rollouts", "rollouts", "", ROLLOUTS)


def a_run(scale: float = 1.0, packed: int | None = None, stock: int = 0) -> dict[str, Any]:
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
    return {**times, **rates, "counters": counters}


class FakeClient:
    """Answers what an SGLang client would; ``fails_at`` is the measurement that raises."""

    fails_at: int | None = None
    measured: tuple[str, ...] = ()

    def __init__(self, log: Path, settings: dict[str, Any]) -> None:
        pass

    @classmethod
    def begin(cls, fails_at: int | None = None) -> None:
        cls.measured, cls.fails_at = (), fails_at

    def order(self, order: str, /, *, url: str = "", **arguments: Any) -> Any:
        if order == "prepare":
            return {"fingerprint": "f", "flags": None}
        if order == "check":
            return [[1, 2], [3, 4]]
        if FakeClient.fails_at == len(FakeClient.measured):
            raise ClientError("gone")
        FakeClient.measured += (f"{url} {arguments['name']}",)
        found = a_run(1.0 if "prefix" in url else 2.0)
        del found["counters"]
        return found | {"texts": ["a", "b"]}

    def stop(self) -> None:
        pass


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes: servers answer at once, and pack everything."""
    packed = iter(range(0, 1000, 10))

    def counters(server: RunningServer) -> dict[str, Any] | None:
        return COUNTERS | {"packed_steps": next(packed)} if server.side == "prefix" else None

    def described(server: RunningServer) -> dict[str, Any]:
        return {"model": "m", "dtype": "float32"}

    FakeClient.begin()
    monkeypatch.setattr(serving_run, "ClientProcess", FakeClient)
    monkeypatch.setattr(serving_run, "launch", lambda side, *_: RunningServer(side, side))
    monkeypatch.setattr(serving_run, "describe", described)
    monkeypatch.setattr(serving_run, "read_counters", counters)
    monkeypatch.setattr(RunningServer, "raise_if_dead", lambda self: None)


def plan(out: Path, **changes: Any) -> Plan:
    workloads = [Workload(name, "rollouts", "rollouts", "", ROLLOUTS) for name in ("a", "b")]
    given: dict[str, Any] = {
        "out": out,
        "model": "m",
        "tokenizer": None,
        "workloads": workloads,
        "absent": {},
        "trace": None,
        "repeats": 1,
        "seed": 0,
        "quick": True,
        "urls": {"stock": None, "prefix": None},
        "server_args": {"stock": [], "prefix": []},
        "port": None,
        "start_timeout_s": 1.0,
        "workload_timeout_s": 9.0,
        "min_equal": None,
        "command": ["x"],
    }
    return Plan(**(given | changes))


def go(given: Plan, *, resume: bool = False) -> dict[str, Any]:
    run = Run(given, resume=resume, tell=lambda text, is_done: None)
    run.run()
    return read_result(given.out / "serving.json", "bench-serving")
