"""The other end of ``serving_client``: starts that process and gives it orders."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["ClientError", "ClientProcess", "ClientTimeoutError"]

_COMMAND = (
    *(sys.executable, "-m", "sglang_prefix.cli.main", "exec", "--"),
    *(sys.executable, "-m", "sglang_prefix.bench.serving.client"),
)
_POLL_S = 1.0


class ClientError(RuntimeError):
    """An order that the client could not carry out, in one line."""


class ClientTimeoutError(ClientError):
    """An order that took too long."""


class ClientProcess:
    """SGLang's load generator, and what goes with it, in a process of its own.

    Args:
        log: file for what it prints; written anew.
        settings: arguments of :class:`sglang_prefix.bench.serving.client.Client`.
    """

    def __init__(self, log: Path, settings: dict[str, Any]) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                _COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,
            )
        # A read cannot be given up; a thread does it, and ends with the process.
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._send(settings)
        self._ready = False

    def order(
        self, order: str, /, *, limit_s: float, watch: Callable[[], None], **arguments: Any
    ) -> Any:
        """Give an order and wait for what it returns.

        Args:
            order: a method of :class:`sglang_prefix.bench.serving.client.Client`.
            limit_s: how long it may take.
            watch: called every second meanwhile; what it raises ends the wait.
            arguments: of the method.

        Raises:
            ClientTimeoutError: it took longer; the process is of no more use.
            ClientError: it failed, or the process has ended.
        """
        if not self._ready:
            self._receive(limit_s, watch)  # what became of the settings
            self._ready = True
        self._send({"order": order, **arguments})
        return self._receive(limit_s, watch)

    def stop(self) -> None:
        """End the process, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(_POLL_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _send(self, data: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the next answer tells
            self._process.stdin.write(json.dumps(data) + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")  # the end

    def _receive(self, limit_s: float, watch: Callable[[], None]) -> Any:
        deadline = time.monotonic() + limit_s
        while True:
            left = deadline - time.monotonic()
            try:
                line = self._lines.get(timeout=max(min(_POLL_S, left), 0.0))
                break
            except queue.Empty:
                watch()
                if left <= 0:
                    raise ClientTimeoutError(f"no answer after {limit_s:g} s") from None
        if not line:
            status = self._process.wait()
            raise ClientError(f"the client ended with status {status}; its log: {self._log}")
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(f"{answer['error']}; the client's log: {self._log}")
        return answer["result"]
