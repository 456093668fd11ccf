"""The run of `bench serving`: servers in turn, workloads, repeats; the file after every step."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from sglang_prefix.bench.results import ResultError, check_same, check_type, write_result
from sglang_prefix.bench.run import BenchRun, Case
from sglang_prefix.bench.serving.client import ClientError, ClientProcess, ClientTimeoutError
from sglang_prefix.bench.serving.compare import SIDES, aggregate, compare, new_case, step_delta
from sglang_prefix.bench.serving.plan import Plan, steps
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

__all__ = ["OUTPUTS", "Run"]

# The answers of both sides, so that a side measured later can be compared with the other.
OUTPUTS = "serving-tokens.json"
# Where rounding may differ, so many tokens must come before an answer does. Broken attention leaves
# the first token of each, which prefill makes, and a few by chance.
_MIN_EQUAL_ROUNDED = 0.25
# A server with a smaller KV pool keeps less of what is shared, and runs fewer requests at once.
_MAX_POOL_DIFFERENCE = 0.01


class Output(TypedDict):
    """The answers of one side to one workload.

    ``tokens`` are the ids of each answer to the requests of this ``fingerprint``, ``texts`` the
    hashes of the answers of each timed run.
    """

    fingerprint: str
    tokens: list[list[int]]
    texts: list[list[str]]


Outputs = dict[str, dict[Literal["stock", "prefix"], Output]]


class Run(BenchRun):
    """The run of `bench serving`: one step per workload, side and repeat, in turn.

    Args:
        plan: what to run.
        resume: go on with the result in the folder; else it is replaced before a server starts.

    Raises:
        ValueError: ``resume`` without a result, or with one of other options, of another machine
            or software, or that is not whole.
    """

    kind, file_name = "bench-serving", "serving.json"

    def __init__(self, plan: Plan, *, resume: bool = False) -> None:
        self._plan = plan
        super().__init__(
            plan.out, command=plan.command, options=plan.options(), seed=plan.seed, resume=resume
        )
        self._outputs_file = plan.out / OUTPUTS
        self._outputs: dict[str, Any] = {}
        self._cases = {workload.name: new_case(workload) for workload in plan.workloads}
        if resume:
            self._resume()
        self._is_written = resume  # the file in the folder is of this run
        self._wall_s = self.data["wall_s"] or 0.0
        self._prepared: dict[str, Any] = {}
        self._warm: set[tuple[str, str]] = set()
        for side in SIDES:
            known = self.data.get(side) or {}
            self.data[side] = known | {"server_args": plan.server_args[side]}
        self.data |= {
            "absent": plan.absent,
            "model": plan.model,
            "dtype": self.data.get("dtype"),
            "method": {
                "one_process": False,
                "servers": "taking turns" if all(plan.urls.values()) else "one after the other",
                "before_each_workload": "cache emptied; all its requests once, whose tokens are "
                "compared; cache emptied again before each timed run",
                "sampling": "greedy, end token ignored",
                "server_environment": {} if self.data["environment"]["gpu"] else cpu_environment(),
            },
        }
        self.conclude()

    def use(self, options: Mapping[str, Any]) -> None:
        """The plan has them."""

    def cases(self) -> list[Case]:
        """None: a case is measured in several steps, see :meth:`run`."""
        return []

    @property
    def order(self) -> list[str]:
        """The steps that are left."""
        return [f"{side}, {workload.name}" for side, workload, _ in self.pending()]

    def problems(self) -> list[str]:
        """Cases whose tokens differ, or that nothing that shares was compared in any."""
        cases = self.data["cases"]
        wrong = [c for c in cases if not c["is_comparison"] and not c["unpacked_ratios"]]
        if wrong:
            return [f"no comparison: {case['name']}: {case['why_not']}" for case in wrong]
        sharing = [case for case in cases if case["group"] != "random"]
        if sharing and not any(case["is_comparison"] for case in sharing):
            return ["no workload that shares prefixes was packed: this run compares nothing"]
        return []

    def _resume(self) -> None:
        """Take up the runs in the file; what they come to is concluded again."""
        options = self._plan.options().items()
        check_same(self.path, self.data, {f"options.{name}": value for name, value in options})
        self._outputs = _read_outputs(self._outputs_file)
        for found in self.data["cases"]:
            name = found["name"]
            if name not in self._cases:
                continue
            self._cases[name]["requests"] = found["requests"]
            for side, measured in found["sides"].items():
                runs = measured.get("raw", {}).get("runs", [])
                output = self._outputs.get(name, {}).get(side, {"texts": [], "tokens": []})
                answers = {len(output["tokens"]), *map(len, output["texts"])}
                if len(output["texts"]) < len(runs) or len(answers) > 1:
                    raise ResultError(f"{self._outputs_file} lacks the answers of {side} to {name}")
                if runs:
                    flags = {"flags": measured.get("flags")}
                    self._cases[name]["sides"][side] = aggregate(runs) | flags

    def pending(self) -> list[tuple[str, Workload, int]]:
        """The steps that are left."""
        return [step for step in steps(self._plan) if step[2] >= len(self._runs(*step[:2]))]

    def _runs(self, side: str, workload: Workload) -> list[dict[str, Any]]:
        case = self._cases[workload.name]
        runs: list[dict[str, Any]] = case["sides"].get(side, {}).get("raw", {}).get("runs", [])
        return runs

    def run(
        self, budget_s: float, begin: Callable[[str], None], progress: Callable[[str], None]
    ) -> None:
        """Do what is left, without a budget; see :class:`BenchRun`.

        Raises:
            ServerError: a server cannot be used; ClientError: the load generator failed. What was
            measured before is in the file.
        """
        self.progress = progress
        pending = self.pending()
        if not pending:
            return
        servers: dict[str, RunningServer] = {}
        try:
            with ExitStack() as stack:
                stack.callback(lambda: _stop(servers))
                self._run(pending, servers, stack, begin)
        except KeyboardInterrupt:
            if self._is_written:
                raise
            # A file of an earlier run is not this one's to go on with.
            raise ServerError("interrupted; nothing was measured") from None
        self._write()

    def _run(
        self,
        pending: list[tuple[str, Workload, int]],
        servers: dict[str, RunningServer],
        stack: ExitStack,
        begin: Callable[[str], None],
    ) -> None:
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
            self.progress(f"{name}: making requests")
            self._prepare(client, name, servers[first])
        self._await(servers[first])
        for side, workload, number in pending:
            begin(f"{side}, {workload.name}")
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
            self.progress("server: starting")
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
        try:
            if (side, name) not in self._warm:
                self.progress("tokens")
                self._keep_tokens(name, side, self._order(client, "check", name, server))
            self.progress(f"run {number + 1} of {self._plan.repeats}")
            before = read_counters(server)
            found = self._order(client, "measure", name, server)
            found["counters"] = step_delta(before, read_counters(server))
            # Shows whether other programs were running, which one side may have met more.
            found["load_per_cpu"] = os.getloadavg()[0] / (os.cpu_count() or 1)
        except ClientTimeoutError:
            raise  # a server that hangs would not answer the next question either
        except ClientError as error:
            server.raise_if_dead()
            raise ClientError(f"{side}, {name}: {error}") from None
        texts = [hashlib.sha256(t.encode()).hexdigest()[:16] for t in found.pop("texts")]
        output = self._outputs[name][side]
        # A run whose file was not written, because the process ended, is run again.
        output["texts"] = [*output["texts"][:number], texts]
        side_now = aggregate([*self._runs(side, workload)[:number], found])
        self._cases[name]["sides"][side] = side_now | {"flags": self._prepared[name]["flags"]}
        self._write()

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

    def _keep_tokens(self, name: str, side: str, tokens: list[list[int]]) -> None:
        self._warm.add((side, name))
        known = self._outputs.setdefault(name, {}).get(side, {"texts": []})
        fingerprint = self._prepared[name]["fingerprint"]
        self._outputs[name][side] = known | {"fingerprint": fingerprint, "tokens": tokens}
        self._cases[name]["requests"] = len(tokens)

    def min_equal(self) -> float:
        """The share of tokens that must agree."""
        if self._plan.min_equal is not None:
            return self._plan.min_equal
        return 1.0 if self.data["dtype"] in ("float32", "float") else _MIN_EQUAL_ROUNDED

    def conclude(self) -> None:
        """Compare the sides of all cases."""
        for name, case in self._cases.items():
            compare(
                case,
                self._outputs.get(name, {}),
                repeats=self._plan.repeats,
                min_equal=self.min_equal(),
            )
        left = (workload.name for _, workload, _ in self.pending())
        self.data |= {
            "not_run": dict.fromkeys(left, "interrupted"),
            "min_equal": self.min_equal(),
            "cases": list(self._cases.values()),
        }

    def _write(self) -> None:
        self.conclude()
        self.data["wall_s"] = self._wall_s + time.monotonic() - self._began
        # In this order: tokens without their run are measured again, a run without its tokens
        # could not be compared.
        write_result(self._outputs_file, self._outputs)
        write_result(self.path, self.data)
        self._is_written = True


def _read_outputs(path: Path) -> dict[str, Any]:
    from pydantic import TypeAdapter

    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ResultError(f"{path} is not JSON: {error}") from None
    check_type(path, found, TypeAdapter(Outputs), "is not whole")
    return found


def _stop(servers: dict[str, RunningServer]) -> None:
    """Stop and remove those that were started here."""
    for side in [side for side, server in servers.items() if server.process is not None]:
        servers.pop(side).stop()
