"""The run of `bench serving`: servers in turn, workloads, repeats; the file after every step."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sglang_prefix.api_key import ApiKey
from sglang_prefix.bench.child import ChildError, ChildProcess
from sglang_prefix.bench.engine import engine_environment
from sglang_prefix.bench.results import check_same, write_result
from sglang_prefix.bench.run import BenchRun, Case
from sglang_prefix.bench.serving.compare import SIDES, aggregate, compare, new_case, step_delta
from sglang_prefix.bench.serving.servers import (
    RunningServer,
    ServerError,
    cpu_environment,
    describe,
    launch,
    read_counters,
    wait_until_ready,
)
from sglang_prefix.bench.serving.workloads import REGISTRY, Workload, load_workloads
from sglang_prefix.bench.workloads.traces import read_trace
from sglang_prefix.tiny_model import TinyModelConfig, build_once

__all__ = ["ServingRun"]

_CLIENT = "sglang_prefix.bench.serving.drivers"
_LOG = "client.log"
# Where rounding may differ, so many tokens must come before an answer does. Broken attention leaves
# the first token of each, which prefill makes, and a few by chance.
_MIN_EQUAL_ROUNDED = 0.25
# A server with a smaller KV pool keeps less of what is shared, and runs fewer requests at once.
_MAX_POOL_DIFFERENCE = 0.01
# As the demo's. Of more tokens, few are halves of characters: SGLang's tool takes the first text
# for the first token.
_TINY = TinyModelConfig(num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64, vocab_size=4096)
# Both get the same arguments, so that ours stands over the backend that stock decodes with.
_SWITCH = {"stock": {"SGLANG_PREFIX": "0"}, "prefix": {"SGLANG_PREFIX": "1"}}
# Arguments of a server for which this command has options, or that it chooses.
_SET_HERE = ("--model-path", "--model", "--tokenizer-path", "--host", "--port")
# A server that is started here listens to this host alone; a key would stand in the result file.
_NEEDLESS = ("--api-key", "--admin-api-key")


class ServingRun(BenchRun):
    """The run of `bench serving`: one step per workload, side and repeat, in turn.

    Args:
        command: what the user typed.
        resume: go on with the result in the folder; else it is replaced before a server starts.
        chosen: the options of the command, by its names for them.

    Raises:
        ValueError: an option is not legal, a file is not what it should be, or the result cannot
            be resumed: it is of other options, another machine or software, or not whole.
        ServerError: a server that runs cannot be used.
        OSError: the folder cannot be written.
    """

    kind, file_name = "bench-serving", "serving.json"

    def __init__(self, *, command: Sequence[str], resume: bool = False, **chosen: Any) -> None:
        self._chosen = given = SimpleNamespace(**chosen)
        urls = zip(SIDES, (given.stock_url, given.prefix_url), strict=True)
        self._urls: dict[str, str | None] = {side: url and url.rstrip("/") for side, url in urls}
        self._key = ApiKey.find(given.api_key)
        _check_server_args(given.server_args or (), all(self._urls.values()))
        self._workloads, absent = _choose_workloads(given)
        model = given.model_path or _choose_model(given.out, self._urls, self._key)
        both = _server_arguments(model, given)
        arguments = {side: [] if self._urls[side] else both for side in SIDES}
        # What a resumed run must have in common with its beginning.
        options = {
            "model": model,
            "tokenizer": given.tokenizer,
            "urls": self._urls,
            "workloads": [[w.name, w.driver, dict(w.parameters)] for w in self._workloads],
            "trace": str(given.trace) if given.trace else None,
            "repeats": given.repeats,
            "seed": given.seed or 0,
            "quick": given.quick,
            "server_args": arguments,
        }
        super().__init__(
            given.out, command=command, options=options, seed=given.seed or 0, resume=resume
        )
        self._wall_s = self.data["wall_s"] or 0.0
        self._servers: dict[str, RunningServer] = {}
        self._client: ChildProcess | None = None
        self._checked: set[tuple[str, str]] = set()
        self._prepared: dict[str, Any] = {}
        # By side and workload what was measured, from which all else follows.
        self._raw: dict[tuple[str, str], dict[str, Any]] = {
            (s, w.name): {"runs": []} for s in SIDES for w in self._workloads
        }
        if resume:
            check_same(self.path, self.data, {f"options.{n}": v for n, v in options.items()})
            for case in self.data["cases"]:
                measured = {(side, case["name"]): one["raw"] for side, one in case["sides"].items()}
                self._raw |= {key: raw for key, raw in measured.items() if key in self._raw}
        for_cpu = {} if self.data["environment"].get("gpu") else cpu_environment()
        given_settings = {k: v for k, v in os.environ.items() if k.startswith("SGLANG_PREFIX_")}
        for side in SIDES:
            self.data[side] = (self.data.get(side) or {}) | {
                "server_args": arguments[side],
                "variables": {} if self._urls[side] else for_cpu | given_settings | _SWITCH[side],
            }
        self.data |= {
            "absent": absent,
            "model": model,
            "dtype": self.data.get("dtype"),
            "method": {
                "servers": "taking turns" if all(self._urls.values()) else "one after the other",
            },
        }
        self.conclude()

    def use(self, options: Mapping[str, Any]) -> None:
        """Those of a resumed run must be the same."""

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

    def steps(self) -> Iterator[tuple[str, Workload, int]]:
        """Side, workload and number of every timed run, in order.

        A server that is started here serves all its runs before the next one starts. Two that run
        already take turns, and take turns at being first.
        """
        rounds = range(self._chosen.repeats)
        if not all(self._urls.values()):
            yield from ((side, w, n) for side in SIDES for w in self._workloads for n in rounds)
            return
        for workload in self._workloads:
            for number in rounds:
                order = SIDES if number % 2 == 0 else SIDES[::-1]
                yield from ((side, workload, number) for side in order)

    def run(
        self, budget_s: float, begin: Callable[[str], None], progress: Callable[[str], None]
    ) -> None:
        """Do what is left, without a budget; see :class:`BenchRun`.

        Raises:
            ServerError: a server cannot be used, or the load generator failed. What was measured
                before is in the file.
        """
        self.progress = progress
        pending = self._pending()
        if not pending:
            return
        try:
            for side, url in self._urls.items():
                if url is not None:
                    self._servers[side] = RunningServer(side, url, key=self._key)
                    self._describe(self._servers[side])
            # Before the first step: what was in the folder is not to be taken up as this run.
            self._write()
            self._client = self._start_client()  # it imports SGLang while the server starts
            server = self._server(pending[0][0])
            for workload in {step[1].name: step[1] for step in pending}.values():
                found = self._ask(server, "prepare", workload.name, workload=workload)
                self._prepared[workload.name] = found
            for side, workload, number in pending:
                begin(f"{side}, {workload.name}")
                self._step(self._server(side), workload.name, number)
        finally:
            if self._client is not None:
                self._client.stop()
            self._stop_servers()
        self._write()

    def conclude(self) -> None:
        """Compare the sides of all cases."""
        exact = self.data["dtype"] in ("float32", "float")
        given, default = self._chosen.min_equal, 1.0 if exact else _MIN_EQUAL_ROUNDED
        min_equal = default if given is None else given
        cases = []
        for workload in self._workloads:
            case = new_case(workload)
            raw = {side: self._raw[side, workload.name] for side in SIDES}
            case["sides"] = {side: aggregate(one) for side, one in raw.items() if one["runs"]}
            compare(case, repeats=self._chosen.repeats, min_equal=min_equal)
            cases.append(case)
        left = (workload.name for _, workload, _ in self._pending())
        self.data |= {
            "not_run": dict.fromkeys(left, "interrupted"),
            "min_equal": min_equal,
            "cases": cases,
        }

    def _pending(self) -> list[tuple[str, Workload, int]]:
        return [(s, w, n) for s, w, n in self.steps() if n >= len(self._raw[s, w.name]["runs"])]

    def _write(self) -> None:
        self.conclude()
        self.data["wall_s"] = self._wall_s + time.monotonic() - self._began
        write_result(self.path, self.data)

    def _start_client(self) -> ChildProcess:
        options = self.data["options"]
        settings = {name: options[name] for name in ("model", "tokenizer", "trace", "seed")}
        return ChildProcess(
            f"{_CLIENT}:start_client",
            settings,
            name="the client",
            environment=engine_environment(self._key.environment, base=os.environ),
            log=self.path.with_name(_LOG),
        )

    def _server(self, side: str) -> RunningServer:
        """The server of a side; it may have to be started, in place of the other."""
        if side not in self._servers:
            self._stop_servers()
            self.progress("server: starting")
            log = self.path.with_name(f"{side}-server.log")
            variables = self.data[side]["variables"]
            arguments = self.data[side]["server_args"]
            server = launch(side, arguments, self._chosen.port, log, variables)
            self._servers[side] = server
            wait_until_ready(server, self._chosen.start_timeout)
            self._describe(server)
        return self._servers[side]

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
        raw = self._raw[server.side, name]
        if (server.side, name) not in self._checked:
            found = self._ask(server, "check", name, name=name, url=server.url)
            raw["tokens"] = [" ".join(map(str, answer)) for answer in found]
            raw["fingerprint"] = self._prepared[name]["fingerprint"]
            self._checked.add((server.side, name))
        before = read_counters(server)
        run = self._ask(
            server,
            "measure",
            f"{name}, run {number + 1} of {self._chosen.repeats}",
            self._prepared[name]["replay_s"],
            name=name,
            url=server.url,
        )
        run |= {
            "counters": step_delta(before, read_counters(server)),
            "texts": [hashlib.sha256(t.encode()).hexdigest()[:16] for t in run["texts"]],
            # Shows whether other programs were running, which one side may have met more.
            "load_per_cpu": os.getloadavg()[0] / (os.cpu_count() or 1),
        }
        raw["runs"].append(run)
        self._write()

    def _ask(
        self, server: RunningServer, order: str, what: str, more_s: float = 0.0, **arguments: Any
    ) -> Any:
        """Give the client an order, a method of `drivers.Client`, while a server lives."""
        assert self._client is not None
        self.progress(f"{what}: {order}")
        limit = self._chosen.workload_timeout + more_s
        deadline = time.monotonic() + limit
        function = f"{_CLIENT}:Client.{order}"
        try:
            return self._client.ask(function, deadline, server.raise_if_ended, **arguments)
        except TimeoutError:
            problem = f"no answer to {order!r} within {limit:g} s; --workload-timeout gives longer"
        except ChildError as error:
            server.raise_if_ended()
            problem = f"{error.summary}; its log: {self.path.with_name(_LOG)}"
        raise ServerError(f"{server.side}, {what}: {problem}")


def _check_server_args(arguments: Sequence[str], both_run: bool) -> None:
    for name in (argument.partition("=")[0] for argument in arguments):
        if name in _SET_HERE:
            raise ValueError(f"server argument {name} is set by this command; see its options")
        # SGLang takes a beginning for the whole.
        if len(name) > len("--ap") and any(one.startswith(name) for one in _NEEDLESS):
            raise ValueError(f"server argument {name}: legal: none; servers started here need none")
    if arguments and both_run:
        raise ValueError("server arguments are for servers started here; both run already")


def _choose_workloads(chosen: Any) -> tuple[list[Workload], dict[str, str]]:
    """At least one workload; those that cannot be run, and why."""
    changes = {
        "requests": chosen.trace_requests,
        "block_tokens": chosen.trace_block_tokens,
        "speed": chosen.trace_speed,
    }
    found = load_workloads(
        chosen.workload_file or REGISTRY,
        quick=chosen.quick,
        names=chosen.workload or (),
        overrides={name: value for name, value in changes.items() if value is not None},
    )
    if chosen.trace is not None:
        read_trace(chosen.trace)  # for its errors, before anything is started
        return found, {}
    left = [one.name for one in found if one.driver == "trace"]
    if len(left) == len(found):
        raise ValueError(f"--workload {', '.join(left)} needs --trace FILE")
    absent = dict.fromkeys(left, "no --trace FILE was given")
    return [one for one in found if one.name not in absent], absent


def _choose_model(out: Path, urls: Mapping[str, str | None], key: ApiKey) -> str:
    """The model of a server that runs, or a tiny one with real random weights."""
    for side, url in urls.items():
        if url is not None:
            return str(describe(RunningServer(side, url, key=key))["model"])
    folder = out / "tiny-model"
    build_once(folder, _TINY)
    return str(folder)


def _server_arguments(model: str, chosen: Any) -> list[str]:
    """Of a server that is started; the user's last, so that they count."""
    import torch

    found = ["--model-path", model, "--random-seed", str(chosen.seed or 0)]
    if chosen.tokenizer:
        found += ["--tokenizer-path", chosen.tokenizer]
    if not torch.cuda.is_available():
        # Tokens can only be required to be equal where rounding hardly matters; the pool is
        # bounded by tokens, the fraction only has to be enough.
        found += ["--device", "cpu", "--dtype", "float32"]
        found += ["--mem-fraction-static", "0.7", "--max-total-tokens", "65536"]
    return [*found, *(chosen.server_args or ())]
