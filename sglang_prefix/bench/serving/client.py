"""The client of `bench serving`: the process that sends all workloads to all servers.

SGLang's load generator needs SGLang to import, which on a host without a GPU takes the stand-in
kernels, and it prints a lot. So it runs in a process of its own, which answers on a connection.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sglang_prefix.bench.serving.workloads as registry
from sglang_prefix.bench.engine import engine_environment, kill_session

if TYPE_CHECKING:
    from sglang_prefix.bench.serving.drivers import Driver

__all__ = ["Client", "ClientError", "ClientProcess", "ClientTimeoutError"]

_PROGRAM = ("-m", "sglang_prefix.bench.serving.client")
_POLL_S = 1.0
_FLUSH_TRIES = 100
_FLUSH_PAUSE_S = 0.1


class ClientError(RuntimeError):
    """An order that the client could not carry out, in one line."""


class ClientTimeoutError(ClientError):
    """An order that took too long."""


class ClientProcess:
    """A :class:`Client` in a process of its own.

    Args:
        log: file for what it prints; written anew.
        settings: arguments of :class:`Client`.
    """

    def __init__(self, log: Path, settings: dict[str, Any]) -> None:
        self._log = log
        self._connection, theirs = multiprocessing.Pipe()
        with theirs, log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *_PROGRAM, str(theirs.fileno()), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=engine_environment({}, base=os.environ),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def order(
        self, order: str, /, *, limit_s: float, watch: Callable[[], None], **arguments: Any
    ) -> Any:
        """Give an order and wait for what it returns.

        Args:
            order: a method of :class:`Client`.
            limit_s: how long it may take.
            watch: called every second meanwhile; what it raises ends the wait.
            arguments: of the method.

        Raises:
            ClientTimeoutError: it took longer; the process is of no more use.
            ClientError: it failed, or the process has ended.
        """
        deadline = time.monotonic() + limit_s
        try:
            self._connection.send((order, arguments))
            while not self._connection.poll(min(_POLL_S, limit_s)):
                watch()
                if time.monotonic() > deadline:
                    raise ClientTimeoutError(f"no answer after {limit_s:g} s")
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            status = self._process.wait()
            raise ClientError(
                f"the client ended with status {status}; its log: {self._log}"
            ) from None
        if "error" in answer:
            raise ClientError(f"{answer['error']}; the client's log: {self._log}")
        return answer["result"]

    def stop(self) -> None:
        """End the process, busy or not."""
        kill_session(self._process)
        self._connection.close()


class Client:
    """Makes the requests of workloads and sends them; every public method is an order.

    Args:
        model: folder or name of the model.
        tokenizer: folder or name of its tokenizer.
        trace: file of a trace, or None.
        seed: of all requests.

    Raises:
        RuntimeError: this SGLang lacks something that the load generator needs.
        ValueError: there is no tokenizer.
    """

    def __init__(self, model: str, tokenizer: str, trace: str | None, seed: int) -> None:
        from prefix_patches import load_generator

        if missing := load_generator.missing():
            raise RuntimeError(f"this SGLang lacks {', '.join(missing)}")
        self._flags = {"model": model, "tokenizer": tokenizer, "seed": seed}
        self._trace, self._seed = trace, seed
        try:
            self._tokenizer = load_generator.load_tokenizer(tokenizer)
        except (OSError, ValueError) as error:
            cause = str(error).splitlines()[0]
            raise ValueError(f"cannot load a tokenizer from {tokenizer}: {cause}") from None
        self._drivers: dict[str, Driver] = {}

    def prepare(self, workload: dict[str, Any]) -> dict[str, Any]:
        """Make the requests of a workload; returns what identifies them."""
        given = registry.Workload(**workload)
        driver = self._drivers[given.name] = self._driver(given)
        return {
            "fingerprint": driver.fingerprint(),
            "flags": getattr(driver, "flags", None),
            "replay_s": getattr(driver, "replay_s", 0.0),
        }

    def check(self, name: str, url: str) -> list[list[int]]:
        """Send a workload for its token ids, on an empty cache."""
        _flush(url)
        return self._drivers[name].check(url)

    def measure(self, name: str, url: str) -> dict[str, Any]:
        """Send a workload for its times, on an empty cache."""
        _flush(url)
        return self._drivers[name].measure(url)

    def _driver(self, workload: registry.Workload) -> Driver:
        from sglang_prefix.bench.serving import drivers

        parameters = registry.DRIVERS[workload.driver]
        shape = parameters(**workload.parameters) if parameters else None
        if isinstance(shape, registry.Rollouts):
            return drivers.RolloutDriver(shape, self._tokenizer, self._seed)
        if isinstance(shape, registry.Forks):
            return drivers.ForkDriver(shape, self._tokenizer)
        if isinstance(shape, registry.Trace):
            return drivers.TraceDriver(shape, self._flags, self._tokenizer, self._trace or "")
        return drivers.BenchServing({**workload.parameters, **self._flags}, self._tokenizer)


def _flush(url: str) -> None:
    """Empty a server's cache; it is not idle at once when the last answer is out."""
    import requests

    for _ in range(_FLUSH_TRIES):
        if requests.post(f"{url}/flush_cache", timeout=60).status_code == 200:
            return
        time.sleep(_FLUSH_PAUSE_S)
    raise RuntimeError(f"{url} would not empty its cache: does it serve other requests?")


def _in_one_line(error: Exception) -> str:
    """An error without its traceback; the type of ours says nothing that the text does not."""
    lines = str(error).strip().splitlines()
    if not lines:
        return repr(error)
    is_ours = type(error) in (RuntimeError, ValueError)
    return lines[-1] if is_ours else f"{type(error).__name__}: {lines[-1]}"


def main() -> None:
    """Carry out orders until the connection closes: ``client FD SETTINGS``."""
    connection, settings = Connection(int(sys.argv[1])), json.loads(sys.argv[2])
    client: Client | None = None
    with contextlib.suppress(EOFError):
        while True:
            order, arguments = connection.recv()
            try:
                client = client or Client(**settings)
                answer = {"result": getattr(client, order)(**arguments)}
            except Exception as error:  # any error is for the other process to report
                traceback.print_exc()
                answer = {"error": _in_one_line(error)}
            connection.send(answer)


if __name__ == "__main__":
    main()
