"""The run of `bench serving`: servers in turn, workloads, repeats; the file after every step."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sglang_prefix.bench.results import SCHEMA, environment, write_result
from sglang_prefix.bench.serving.cells import SIDES, judge, new_cell, step_delta, sum_up
from sglang_prefix.bench.serving.process import ClientError, ClientProcess, ClientTimeoutError
from sglang_prefix.bench.serving.resume import take_up
from sglang_prefix.bench.serving.servers import (
    RunningServer,
    ServerError,
    cpu_environment,
    describe,
    launch,
    read_counters,
    wait_until_ready,
)
from sglang_prefix.bench.serving.workloads import Workload

__all__ = ["EVIDENCE", "RESULT", "Plan", "Run", "steps"]

KIND = "bench-serving"
RESULT = "serving.json"
# What was said, so that a side measured later can be compared with it.
EVIDENCE = "serving-tokens.json"
# Where rounding may differ, so many tokens must come before an answer does. Broken attention leaves
# the first token of each, which prefill makes, and a few by chance.
_MIN_EQUAL_ROUNDED = 0.25
# A server with a smaller KV pool keeps less of what is shared, and runs fewer requests at once.
_MAX_POOL_DIFFERENCE = 0.01


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
        workload_timeout_s: how long requests may take to be made, or to be answered once; beyond
            the time over which a trace sends them.
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
    workload_timeout_s: float
    min_equal: float | None
    command: list[str]

    def settings(self) -> dict[str, Any]:
        """What a run that goes on must have in common with its beginning."""
        return {
            "model": self.model,
            "tokenizer": self.tokenizer,
            "server URLs": self.urls,
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
        resume: go on with the result in the folder; else it is replaced before a server starts.
        tell: called with what is being done, and whether that is a step that has ended.

    Raises:
        ValueError: ``resume`` without a result, or with one of other settings, of another machine
            or software, or that is not whole.

    Attributes:
        data: the result so far.
        path: the result file.
        is_written: whether the file in the folder is of this run.
    """

    def __init__(self, plan: Plan, *, resume: bool, tell: Callable[[str, bool], None]) -> None:
        self._plan, self._tell = plan, tell
        self.path, self._evidence_file = plan.out / RESULT, plan.out / EVIDENCE
        self._began = time.monotonic()
        self.data = self._begin()
        self._evidence: dict[str, Any] = {}
        if resume:
            files = (self.path, self._evidence_file)
            self.data, self._evidence = take_up(*files, self.data, plan.workloads)
        self.is_written = resume
        self._wall_s = self.data["wall_s"]
        self._cells = {cell["name"]: cell for cell in self.data["cells"]}
        self._prepared: dict[str, Any] = {}
        self._warm: set[tuple[str, str]] = set()
        self._judge()

    def _begin(self) -> dict[str, Any]:
        plan, machine = self._plan, environment()
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": plan.command,
            "quick": plan.quick,
            "seed": plan.seed,
            "environment": machine,
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
                "server_environment": {} if machine["gpu"] else cpu_environment(),
            },
            "wall_s": 0.0,
            "cells": [new_cell(workload) for workload in plan.workloads],
        }

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
            # Before the first step: what was in the folder is not to be taken up as this run.
            self._write()
            first = pending[0][0]
            if first not in servers:
                servers[first] = self._launch(first)  # and import SGLang here at the same time
            client = self._client()
            stack.callback(client.stop)
            for name in dict.fromkeys(step[1].name for step in pending):
                self._tell(f"{name}: making requests", False)
                self._prepare(client, name, servers[first])
            self._await(servers[first])
            for side, workload, number in pending:
                if side not in servers:
                    _stop(servers)
                    servers[side] = self._launch(side)
                    self._await(servers[side])
                self._step(client, servers[side], workload, number)
        self._write()

    def _client(self) -> ClientProcess:
        plan = self._plan
        settings = {
            "model": plan.model,
            "tokenizer": plan.tokenizer or plan.model,
            "trace": plan.trace,
            "seed": plan.seed,
        }
        return ClientProcess(plan.out / "client.log", settings)

    def _prepare(self, client: ClientProcess, name: str, server: RunningServer) -> None:
        (workload,) = (w for w in self._plan.workloads if w.name == name)
        limit = self._plan.workload_timeout_s
        try:
            self._prepared[name] = client.order(
                "prepare",
                limit_s=limit,
                watch=server.raise_if_ended,
                workload=workload.as_dict(),
            )
        except ClientTimeoutError:
            raise ClientTimeoutError(
                f"{name}: its requests were not made within {limit:g} s; --workload-timeout gives "
                "them longer"
            ) from None

    def _launch(self, side: str) -> RunningServer:
        plan = self._plan
        log = plan.out / f"{side}-server.log"
        variables = self.data["method"].get("server_environment")
        return launch(side, plan.server_args[side], plan.port, log, variables)

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
        pools = [self.data[side].get("max_total_num_tokens") for side in SIDES]
        if all(pools) and max(pools) - min(pools) > _MAX_POOL_DIFFERENCE * max(pools):
            stock, prefix = pools
            raise ServerError(
                f"the servers differ in the tokens that their KV pools hold: {stock} (stock) and "
                f"{prefix} (prefix); give both the same --max-total-tokens"
            )

    def _step(
        self, client: ClientProcess, server: RunningServer, workload: Workload, number: int
    ) -> None:
        name, side = workload.name, server.side
        began = time.monotonic()
        try:
            if (side, name) not in self._warm:
                self._tell(f"{side}, {name}: tokens", False)
                self._note_tokens(name, side, self._order(client, "check", name, server))
            self._tell(f"{side}, {name}: run {number + 1} of {self._plan.repeats}", False)
            before = read_counters(server)
            found = self._order(client, "measure", name, server)
            found["counters"] = step_delta(before, read_counters(server))
            # Servers in turn meet other programs in turn; this tells of them.
            found["load_per_cpu"] = os.getloadavg()[0] / (os.cpu_count() or 1)
        except ClientTimeoutError:
            raise  # a server that hangs would not answer the next question either
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
        self._judge()
        self._write()
        self._tell(f"{side}, {name}: done in {time.monotonic() - began:.0f} s", True)

    def _order(self, client: ClientProcess, order: str, name: str, server: RunningServer) -> Any:
        replay_s = self._prepared[name].get("replay_s", 0.0) if order == "measure" else 0.0
        limit = self._plan.workload_timeout_s + replay_s
        try:
            # Not `raise_if_dead`, which has an idle server generate a token, within the times.
            return client.order(
                order, limit_s=limit, watch=server.raise_if_ended, name=name, url=server.url
            )
        except ClientTimeoutError:
            raise ClientTimeoutError(
                f"{server.side}, {name}: the server at {server.url} did not answer all requests "
                f"within {limit:g} s; --workload-timeout gives it longer"
            ) from None

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

    def _judge(self) -> None:
        for name, cell in self._cells.items():
            judge(
                cell,
                self._evidence.get(name, {}),
                repeats=self._plan.repeats,
                min_equal=self.min_equal(),
            )
        left = dict.fromkeys(workload.name for _, workload, _ in self.pending())
        self.data |= {"not_run": list(left), "min_equal": self.min_equal()}

    def _write(self) -> None:
        self.data["wall_s"] = self._wall_s + time.monotonic() - self._began
        # In this order: tokens without their run are measured again, a run without its tokens
        # could not be compared.
        write_result(self._evidence_file, self._evidence)
        write_result(self.path, self.data)
        self.is_written = True


def _stop(servers: dict[str, RunningServer]) -> None:
    """Stop and forget those that were started here."""
    for side in [side for side, server in servers.items() if server.process is not None]:
        servers.pop(side).stop()
