"""The run of `bench serving`: servers in turn, workloads, repeats; the file after every step."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sglang_prefix.bench.results import SCHEMA, environment, read_result, write_result
from sglang_prefix.bench.serving_cells import SIDES, judge, new_cell, step_delta, sum_up
from sglang_prefix.bench.serving_process import ClientError, ClientProcess
from sglang_prefix.bench.serving_servers import (
    RunningServer,
    ServerError,
    describe,
    launch,
    read_counters,
    wait_until_ready,
)
from sglang_prefix.bench.serving_workloads import Workload

__all__ = ["EVIDENCE", "RESULT", "Plan", "Run", "steps"]

KIND = "bench-serving"
RESULT = "serving.json"
# What was said, so that a side measured later can be compared with it.
EVIDENCE = "serving-tokens.json"
# Where rounding may differ, so many tokens must come before an answer does. Broken attention leaves
# the first token of each, which prefill makes, and a few by chance.
_MIN_EQUAL_ROUNDED = 0.25


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run.

    Attributes:
        out: folder for everything that is written.
        model: folder or name; tokenizer: the same, None for the model's.
        workloads: at least one.
        absent: workloads that cannot be run, and why.
        trace: file of a trace.
        repeats: timed runs per workload and side.
        seed: of the requests and the servers.
        quick: whether the small sizes were taken.
        urls: by side, a server that runs; None to start one.
        server_args: by side, arguments of a server that is started.
        port: of servers that are started; None to choose.
        start_timeout_s: how long a server may take to start.
        min_equal: share of tokens that must agree; None for all in float32, a quarter otherwise.
        command: what the user typed.
    """

    out: Path
    model: str
    tokenizer: str | None
    workloads: Sequence[Workload]
    absent: dict[str, str]
    trace: str | None
    repeats: int
    seed: int
    quick: bool
    urls: dict[str, str | None]
    server_args: dict[str, list[str]]
    port: int | None
    start_timeout_s: float
    min_equal: float | None
    command: list[str]

    def settings(self) -> dict[str, Any]:
        """What a run that goes on must have in common with its beginning."""
        return {
            "model": self.model,
            "workload": [workload.as_dict() for workload in self.workloads],
            "trace": self.trace,
            "repeats": self.repeats,
            "seed": self.seed,
            "quick": self.quick,
            "server arguments": self.server_args,
        }


def steps(plan: Plan) -> Iterator[tuple[str, Workload, int]]:
    """Side, workload and number of every timed run, in order.

    A server that is started here serves all its runs before the next one starts. Two that run
    already take turns, and take turns at being first.
    """
    rounds = range(plan.repeats)
    if all(plan.urls.values()):
        for workload in plan.workloads:
            for number in rounds:
                order = SIDES if number % 2 == 0 else SIDES[::-1]
                yield from ((side, workload, number) for side in order)
    else:
        for side in SIDES:
            yield from ((side, w, number) for w in plan.workloads for number in rounds)


class Run:
    """One run, new or going on.

    Args:
        plan: what to run.
        resume: go on with the result in the folder; else the first step that ends replaces it.
        tell: called with what is being done, and whether that is a step that has ended.

    Raises:
        ValueError: ``resume`` without a result, or with one of other settings.
    """

    def __init__(self, plan: Plan, *, resume: bool, tell: Callable[[str, bool], None]) -> None:
        self._plan, self._tell = plan, tell
        self._result, self._evidence_file = plan.out / RESULT, plan.out / EVIDENCE
        self.data, self._evidence = self._load() if resume else self._begin()
        self._cells = {cell["name"]: cell for cell in self.data["cells"]}
        self._prepared: dict[str, Any] = {}
        self._warm: set[tuple[str, str]] = set()

    def _begin(self) -> tuple[dict[str, Any], dict[str, Any]]:
        plan = self._plan
        data = {
            "schema": SCHEMA,
            "kind": KIND,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": plan.command,
            "quick": plan.quick,
            "seed": plan.seed,
            "environment": environment(),
            "absent": plan.absent,
            "not_run": [workload.name for workload in plan.workloads],
            "model": plan.model,
            "dtype": None,
            "stock": {"server_args": plan.server_args["stock"]},
            "prefix": {"server_args": plan.server_args["prefix"]},
            "settings": plan.settings(),
            "method": {
                "one_process": False,
                "servers": "taking turns" if all(plan.urls.values()) else "one after the other",
                "before_each_workload": "cache emptied; all its requests once, whose tokens are "
                "compared; cache emptied again before each timed run",
                "sampling": "greedy, end token ignored",
            },
            "cells": [new_cell(workload) for workload in plan.workloads],
        }
        return data, {}

    def _load(self) -> tuple[dict[str, Any], dict[str, Any]]:
        data = read_result(self._result, KIND)
        now = {"settings": self._plan.settings(), "versions": environment()["versions"]}
        was = {"settings": data.get("settings", {}), "versions": data["environment"]["versions"]}
        for name, value in now["settings"].items():
            # Through JSON, as the file has been.
            if json.loads(json.dumps(value)) != was["settings"].get(name):
                raise ValueError(f"--resume: {self._result} was made with another {name}")
        if now["versions"] != was["versions"]:
            raise ValueError(f"--resume: {self._result} was made with other versions of packages")
        try:
            evidence = json.loads(self._evidence_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--resume: {self._evidence_file} cannot be read: {error}") from None
        return data, evidence

    def pending(self) -> list[tuple[str, Workload, int]]:
        """The steps that are left."""
        return [step for step in steps(self._plan) if step[2] >= len(self._runs(*step[:2]))]

    def _runs(self, side: str, workload: Workload) -> list[dict[str, Any]]:
        cell = self._cells[workload.name]
        runs: list[dict[str, Any]] = cell["sides"].get(side, {}).get("raw", {}).get("runs", [])
        return runs

    def run(self) -> None:
        """Do what is left.

        Raises:
            ServerError: a server cannot be used; ClientError: the load generator failed. What was
            measured before is in the file.
        """
        pending = self.pending()
        if not pending:
            return
        servers: dict[str, RunningServer] = {}
        with ExitStack() as stack:
            stack.callback(lambda: _stop(servers))
            for side, url in self._plan.urls.items():
                if url is not None:
                    servers[side] = RunningServer(side, url)
                    self._describe(servers[side])
            first = pending[0][0]
            if first not in servers:
                servers[first] = self._launch(first)  # and import SGLang here at the same time
            client = self._client()
            stack.callback(client.stop)
            for name in dict.fromkeys(step[1].name for step in pending):
                self._tell(f"{name}: making requests", False)
                self._prepare(client, name)
            self._await(servers[first])
            for side, workload, number in pending:
                if side not in servers:
                    _stop(servers)
                    servers[side] = self._launch(side)
                    self._await(servers[side])
                self._step(client, servers[side], workload, number)

    def _client(self) -> ClientProcess:
        plan = self._plan
        settings = {
            "model": plan.model,
            "tokenizer": plan.tokenizer or plan.model,
            "trace": plan.trace,
            "seed": plan.seed,
        }
        return ClientProcess(plan.out / "client.log", settings)

    def _prepare(self, client: ClientProcess, name: str) -> None:
        (workload,) = (w for w in self._plan.workloads if w.name == name)
        self._prepared[name] = client.order("prepare", workload=workload.as_dict())

    def _launch(self, side: str) -> RunningServer:
        plan = self._plan
        log = plan.out / f"{side}-server.log"
        return launch(side, plan.server_args[side], plan.port, log)

    def _await(self, server: RunningServer) -> None:
        if server.process is not None:
            self._tell(f"{server.side} server: starting", False)
            wait_until_ready(server, self._plan.start_timeout_s)
            self._describe(server)

    def _describe(self, server: RunningServer) -> None:
        self.data[server.side] |= {"url": server.url, **describe(server)}
        models = {self.data[side].get("model") for side in SIDES} - {None}
        dtypes = {self.data[side].get("dtype") for side in SIDES} - {None}
        for name, found in (("model", models), ("dtype", dtypes)):
            if len(found) > 1:
                raise ServerError(f"the servers differ in {name}: {' and '.join(sorted(found))}")
        self.data["dtype"] = next(iter(dtypes), None)

    def _step(
        self, client: ClientProcess, server: RunningServer, workload: Workload, number: int
    ) -> None:
        name, side = workload.name, server.side
        began = time.monotonic()
        try:
            if (side, name) not in self._warm:
                self._tell(f"{side}, {name}: tokens", False)
                self._note_tokens(name, side, client.order("check", name=name, url=server.url))
            self._tell(f"{side}, {name}: run {number + 1} of {self._plan.repeats}", False)
            before = read_counters(server)
            found = client.order("measure", name=name, url=server.url)
            found["counters"] = step_delta(before, read_counters(server))
            # Servers in turn meet other programs in turn; this tells of them.
            found["load_per_cpu"] = os.getloadavg()[0] / (os.cpu_count() or 1)
        except ClientError as error:
            server.raise_if_dead()
            raise ClientError(f"{side}, {name}: {error}") from None
        texts = [hashlib.sha256(t.encode()).hexdigest()[:16] for t in found.pop("texts")]
        evidence = self._evidence[name][side]
        # A run whose file was not written, because the process ended, is run again.
        evidence["texts"] = [*evidence["texts"][:number], texts]
        cell = self._cells[name]
        cell["sides"][side] = sum_up([*self._runs(side, workload)[:number], found])
        cell["sides"][side]["flags"] = self._prepared[name]["flags"]
        self._conclude()
        self._tell(f"{side}, {name}: done in {time.monotonic() - began:.0f} s", True)

    def _note_tokens(self, name: str, side: str, tokens: list[list[int]]) -> None:
        self._warm.add((side, name))
        known = self._evidence.setdefault(name, {}).get(side, {"texts": []})
        fingerprint = self._prepared[name]["fingerprint"]
        self._evidence[name][side] = known | {"fingerprint": fingerprint, "tokens": tokens}
        self._cells[name]["requests"] = len(tokens)

    def min_equal(self) -> float:
        """The share of tokens that must agree."""
        if self._plan.min_equal is not None:
            return self._plan.min_equal
        return 1.0 if self.data["dtype"] in ("float32", "float") else _MIN_EQUAL_ROUNDED

    def _conclude(self) -> None:
        for name, cell in self._cells.items():
            judge(
                cell,
                self._evidence.get(name, {}),
                repeats=self._plan.repeats,
                min_equal=self.min_equal(),
            )
        left = dict.fromkeys(workload.name for _, workload, _ in self.pending())
        self.data |= {"not_run": list(left), "min_equal": self.min_equal()}
        # In this order: tokens without their run are measured again, a run without its tokens
        # could not be compared.
        write_result(self._evidence_file, self._evidence)
        write_result(self._result, self.data)


def _stop(servers: dict[str, RunningServer]) -> None:
    """Stop and forget those that were started here."""
    for side in [side for side, server in servers.items() if server.process is not None]:
        servers.pop(side).stop()
