"""The run of `bench serving`: servers in turn, workloads, repeats; the file after every step."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from sglang_prefix.bench.child import ChildError, ChildProcess
from sglang_prefix.bench.engine import engine_environment
from sglang_prefix.bench.results import check_same, write_result
from sglang_prefix.bench.run import BenchRun, Case
from sglang_prefix.bench.serving.compare import SIDES, aggregate, compare, new_case, step_delta
from sglang_prefix.bench.serving.plan import Plan
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

__all__ = ["Run"]

_CLIENT = "sglang_prefix.bench.serving.drivers"
_LOG = "client.log"
# Where rounding may differ, so many tokens must come before an answer does. Broken attention leaves
# the first token of each, which prefill makes, and a few by chance.
_MIN_EQUAL_ROUNDED = 0.25
# A server with a smaller KV pool keeps less of what is shared, and runs fewer requests at once.
_MAX_POOL_DIFFERENCE = 0.01


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
            plan.out, command=plan.command, options=plan.options, seed=plan.seed or 0, resume=resume
        )
        self._wall_s = self.data["wall_s"] or 0.0
        self._servers: dict[str, RunningServer] = {}
        self._client: ChildProcess | None = None
        self._prepared: dict[str, Any] = {}
        self._tokens: dict[tuple[str, str], list[str]] = {}
        self._cases = {workload.name: new_case(workload) for workload in plan.workloads}
        if resume:
            self._load_resumable()
        has_gpu = self.data["environment"].get("gpu")
        for side in SIDES:
            known = self.data.get(side) or {}
            self.data[side] = known | {"server_args": plan.arguments[side]}
        self.data |= {
            "absent": plan.absent,
            "model": plan.model_path,
            "dtype": self.data.get("dtype"),
            "method": {
                "servers": "taking turns" if all(plan.urls.values()) else "one after the other",
                "server_environment": {} if has_gpu else cpu_environment(),
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
        return [f"{side}, {workload.name}" for side, workload, _ in self._pending()]

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

    def run(
        self, budget_s: float, begin: Callable[[str], None], progress: Callable[[str], None]
    ) -> None:
        """Do what is left, without a budget; see :class:`BenchRun`.

        Raises:
            ServerError: a server cannot be used, or the load generator failed. What was measured
                before is in the file.
        """
        self.progress = progress
        if not self._pending():
            return
        try:
            self._run(begin)
        except ChildError as error:
            raise ServerError(f"{error.summary}; its log: {self._plan.out / _LOG}") from None
        finally:
            if self._client is not None:
                self._client.stop()
            self._stop_servers()
        self._write()

    def conclude(self) -> None:
        """Compare the sides of all cases."""
        exact = self.data["dtype"] in ("float32", "float")
        given, default = self._plan.min_equal, 1.0 if exact else _MIN_EQUAL_ROUNDED
        min_equal = default if given is None else given
        for case in self._cases.values():
            compare(case, repeats=self._plan.repeats, min_equal=min_equal)
        left = (workload.name for _, workload, _ in self._pending())
        self.data |= {
            "not_run": dict.fromkeys(left, "interrupted"),
            "min_equal": min_equal,
            "cases": list(self._cases.values()),
        }

    def _load_resumable(self) -> None:
        """Take up the runs in the file; what they come to is concluded again."""
        options = self._plan.options.items()
        check_same(self.path, self.data, {f"options.{name}": value for name, value in options})
        for found in self.data["cases"]:
            for side, measured in found["sides"].items():
                raw = measured.get("raw")
                if found["name"] in self._cases and raw and raw["runs"]:
                    self._cases[found["name"]]["sides"][side] = aggregate(raw)

    def _runs(self, side: str, name: str) -> list[dict[str, Any]]:
        """What was measured of one side of a workload."""
        sides = self._cases[name]["sides"]
        return list(sides[side]["raw"]["runs"]) if side in sides else []

    def _pending(self) -> list[tuple[str, Workload, int]]:
        steps = self._plan.steps()
        return [(side, w, n) for side, w, n in steps if n >= len(self._runs(side, w.name))]

    def _write(self) -> None:
        self.conclude()
        self.data["wall_s"] = self._wall_s + time.monotonic() - self._began
        write_result(self.path, self.data)

    def _run(self, begin: Callable[[str], None]) -> None:
        pending = self._pending()
        first = pending[0][0]
        for side, url in self._plan.urls.items():
            if url is not None:
                self._servers[side] = RunningServer(side, url)
                self._describe(self._servers[side])
        # Before the first step: what was in the folder is not to be taken up as this run.
        self._write()
        if first not in self._servers:
            self._launch(first)  # and import SGLang in the client at the same time
        self._client = self._start_client()
        for workload in {step[1].name: step[1] for step in pending}.values():
            self.progress(f"{workload.name}: making requests")
            what = f"{workload.name}: its requests were not made"
            found = self._ask("prepare", what, self._servers[first], workload=workload)
            self._prepared[workload.name] = found
        self._await(self._servers[first])
        for side, workload, number in pending:
            begin(f"{side}, {workload.name}")
            if side not in self._servers:
                self._stop_servers()
                self._launch(side)
                self._await(self._servers[side])
            self._step(self._servers[side], workload.name, number)

    def _start_client(self) -> ChildProcess:
        plan = self._plan
        settings = {
            "model": plan.model_path,
            "tokenizer": plan.tokenizer or plan.model_path,
            "trace": str(plan.trace) if plan.trace else None,
            "seed": plan.seed,
        }
        return ChildProcess(
            f"{_CLIENT}:start_client",
            settings,
            name="the client",
            environment=engine_environment({}, base=os.environ),
            log=plan.out / _LOG,
        )

    def _launch(self, side: str) -> None:
        plan, log = self._plan, self._plan.out / f"{side}-server.log"
        variables = self.data["method"]["server_environment"]
        self._servers[side] = launch(side, plan.arguments[side], plan.port, log, variables)

    def _await(self, server: RunningServer) -> None:
        if server.process is not None:
            self.progress("server: starting")
            wait_until_ready(server, self._plan.start_timeout)
            self._describe(server)

    def _stop_servers(self) -> None:
        """Stop and remove those that were started here."""
        for side in [side for side, one in self._servers.items() if one.process is not None]:
            self._servers.pop(side).stop()

    def _describe(self, server: RunningServer) -> None:
        self.data[server.side] |= {"url": server.url, **describe(server)}
        for name in ("model", "dtype"):
            found = {self.data[side].get(name) for side in SIDES} - {None}
            if len(found) > 1:
                raise ServerError(f"the servers differ in {name}: {' and '.join(sorted(found))}")
            self.data[name] = next(iter(found), None)
        pools = [self.data[side].get("max_total_num_tokens") for side in SIDES]
        if all(pools) and max(pools) - min(pools) > _MAX_POOL_DIFFERENCE * max(pools):
            stock, prefix = pools
            raise ServerError(
                f"the servers differ in the tokens that their KV pools hold: {stock} (stock) and "
                f"{prefix} (prefix); give both the same --max-total-tokens"
            )

    def _step(self, server: RunningServer, name: str, number: int) -> None:
        side = server.side
        if (side, name) not in self._tokens:
            self.progress("tokens")
            found = self._send("check", name, server)
            self._tokens[side, name] = [" ".join(map(str, answer)) for answer in found]
        self.progress(f"run {number + 1} of {self._plan.repeats}")
        before = read_counters(server)
        run = self._send("measure", name, server, self._prepared[name]["replay_s"])
        run |= {
            "counters": step_delta(before, read_counters(server)),
            "texts": [hashlib.sha256(t.encode()).hexdigest()[:16] for t in run["texts"]],
            # Shows whether other programs were running, which one side may have met more.
            "load_per_cpu": os.getloadavg()[0] / (os.cpu_count() or 1),
        }
        self._cases[name]["sides"][side] = aggregate(
            {
                "fingerprint": self._prepared[name]["fingerprint"],
                "tokens": self._tokens[side, name],
                "runs": [*self._runs(side, name), run],
            }
        )
        self._write()

    def _send(self, order: str, name: str, server: RunningServer, more_s: float = 0.0) -> Any:
        """Have the client send a workload."""
        what = f"{server.side}, {name}: the server at {server.url} did not answer all requests"
        try:
            return self._ask(order, what, server, more_s, name=name, url=server.url)
        except ChildError as error:
            server.raise_if_dead()
            raise ServerError(f"{server.side}, {name}: {error.summary}") from None

    def _ask(
        self,
        order: str,
        what: str,
        server: RunningServer,
        more_s: float = 0.0,
        **arguments: Any,
    ) -> Any:
        """Give the client an order, a method of `drivers.Client`, while a server lives."""
        assert self._client is not None
        limit = self._plan.workload_timeout + more_s
        function = f"{_CLIENT}:Client.{order}"
        try:
            # Not `raise_if_dead`, which has an idle server generate a token, within the times.
            return self._client.ask(
                function, time.monotonic() + limit, server.raise_if_ended, **arguments
            )
        except TimeoutError:
            raise ServerError(
                f"{what} within {limit:g} s; --workload-timeout gives it longer"
            ) from None
