"""The child process that runs engines, and the hooks in it, with a stand-in for SGLang's engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil  # type: ignore[import-untyped]
import pytest

from sglang_prefix.bench.child import ChildError
from sglang_prefix.bench.engine import (
    EngineProcess,
    counter_difference,
    engine_environment,
    free_port,
    sum_of_ranks,
)

# An engine with one more process, as SGLang's has its scheduler.
STAND_IN = """
import subprocess, sys

__version__ = "0.0"
MARK = "plain"

class Engine:
    def __init__(self, **arguments):
        print("starting with", arguments)
        if arguments.get("fails"):
            raise ValueError("no such model")
        self.below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.state = {"internal_states": [{"sglang_prefix": [{"plans": 3}]}]}

    def get_server_info(self):
        return self.state | {"max_total_num_tokens": 8, "load_format": "auto"}
"""
CALLS = """
import time
import sglang

def pid_below(engine, add=0):
    return engine.below.pid + add

def mark(engine):
    return sglang.MARK

def sleep(engine):
    time.sleep(600)
"""
HOOK = """
from sglang_prefix.bench.hooks import patch_after_import

def patch(module):
    module.MARK += " {name}"

patch_after_import({{"sglang": patch}})
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place with the stand-in, functions to call, and two hooks."""
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "calls.py").write_text(CALLS)
    for name in ("first", "second"):
        (tmp_path / f"{name}_hook.py").write_text(HOOK.format(name=name))
    return tmp_path


@pytest.fixture
def engine(folder: Path) -> Iterator[EngineProcess]:
    """An engine that starts, under both hooks."""
    with start(folder, hooks=["first_hook", "second_hook"]) as process:
        yield process


def start(folder: Path, hooks: list[str], **arguments: Any) -> EngineProcess:
    environment = engine_environment({}, hooks=hooks, paths=[folder])
    return EngineProcess(arguments, environment=environment, log=folder / "log")


def has_ended(pid: int) -> bool:
    """Whether a process ends within some seconds; a zombie has."""
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def test_it_calls_functions_with_a_hooked_engine_and_describes_it(engine: EngineProcess) -> None:
    below = engine.ask("calls:pid_below")
    assert engine.ask("calls:pid_below", add=1) == below + 1
    assert engine.ask("sglang_prefix.bench.engine:counters") == {"plans": 3}
    assert engine.description["sglang"] == "0.0"
    assert engine.description["max_total_num_tokens"] == 8
    assert engine.ask("calls:mark") == "plain first second"  # the hooks, in their order
    assert engine.description["arguments"]["nccl_port"] > engine.description["arguments"]["port"]
    engine.stop()
    assert has_ended(below)


@pytest.mark.parametrize(
    ("hooks", "arguments", "told"),
    [
        (["nonesuch"], {}, ["its process ended: ", "nonesuch", "its log ends"]),
        ([], {"fails": True}, ["ValueError: no such model", "its log ends", "starting with"]),
    ],
)
def test_a_failure_is_told_with_the_end_of_the_log(
    folder: Path, hooks: list[str], arguments: dict[str, Any], told: list[str]
) -> None:
    with start(folder, hooks, **arguments) as engine:
        with pytest.raises(ChildError, match="engine ended at 'start'") as failure:
            engine.wait_until_ready()
        assert all(part in str(failure.value) for part in told)
        assert "\n" not in failure.value.summary


def test_a_call_that_takes_too_long_is_given_up(engine: EngineProcess) -> None:
    engine.wait_until_ready()
    with pytest.raises(TimeoutError, match="did not answer 'sleep' in time"):
        engine.ask("calls:sleep", time.monotonic() + 0.2)
    with pytest.raises(LookupError):  # as a server that has died meanwhile does
        engine.ask("calls:sleep", watch=Mock(side_effect=LookupError))


def test_it_ends_with_the_process_that_started_it(folder: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
from sglang_prefix.bench.engine import EngineProcess, engine_environment
environment = engine_environment({{}}, paths=[{str(folder)!r}])
engine = EngineProcess({{}}, environment=environment, log=Path({str(folder / "log")!r}))
print(engine.ask("calls:pid_below"), flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env=engine_environment({}),
        text=True,
    )
    assert parent.stdout is not None
    below = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert has_ended(below)


def test_counters_are_subtracted_and_the_newest_states_kept() -> None:
    before = {"plans": 1, "stock_reasons": {"a": 1, "b": 2}, "num_packs": 7}
    before |= {"kv_tokens_read": 10, "kv_tokens_logical": 20}
    after = {"plans": 4, "stock_reasons": {"a": 1, "b": 5, "c": 1}, "num_packs": 5}
    after |= {"kv_tokens_read": 40, "kv_tokens_logical": 80, "kv_read_ratio": 0.5}
    assert counter_difference(before, after) == {
        "plans": 3,
        "stock_reasons": {"b": 3, "c": 1},
        "num_packs": 5,
        "kv_tokens_read": 30,
        "kv_tokens_logical": 60,
        "kv_read_ratio": 0.5,
    }
    # So are those of another kind of pass, of which an older release says nothing.
    assert counter_difference({"extend": before}, {"extend": after}) == {
        "extend": counter_difference(before, after)
    }
    assert counter_difference({}, {"extend": after}) == {"extend": after}


def test_counters_of_ranks_are_added_by_kind_and_reason() -> None:
    one = {"plans": 1, "stock_reasons": {"a": 1}, "num_packs": 7}
    other = {"plans": 3, "stock_reasons": {"a": 1, "b": 2}, "num_packs": 5}
    both = {"plans": 4, "stock_reasons": {"a": 2, "b": 2}, "num_packs": 5}
    states = [{"sglang_prefix": [counts | {"extend": counts}, {}]} for counts in (one, other)]
    assert sum_of_ranks({"internal_states": [*states, {}]}) == both | {"extend": both}


def test_ports_given_out_one_after_the_other_differ() -> None:
    ports = [free_port() for _ in range(8)]
    assert len(set(ports)) == 8
