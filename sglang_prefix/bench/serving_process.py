"""The other end of ``serving_client``: starts that process and gives it orders."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["ClientError", "ClientProcess"]


class ClientError(RuntimeError):
    """An order that the client could not carry out, in one line."""


class ClientProcess:
    """SGLang's load generator, and what goes with it, in a process of its own.

    Args:
        log: file for what it prints; written anew.
        settings: arguments of :class:`sglang_prefix.bench.serving_client.Client`.
    """

    def __init__(self, log: Path, settings: dict[str, Any]) -> None:
        self._log = log
        exec_command = [sys.executable, "-m", "sglang_prefix.cli.main", "exec", "--"]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*exec_command, sys.executable, "-m", "sglang_prefix.bench.serving_client"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,
            )
        self._send(settings)
        self._ready = False

    def order(self, order: str, /, **arguments: Any) -> Any:
        """Give an order and wait for what it returns.

        Raises:
            ClientError: it failed, or the process has ended.
        """
        if not self._ready:
            self._receive()  # what became of the settings
            self._ready = True
        self._send({"order": order, **arguments})
        return self._receive()

    def stop(self) -> None:
        """End the process, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _send(self, data: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the next answer tells
            self._process.stdin.write(json.dumps(data) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise ClientError(f"the client ended with status {status}; its log: {self._log}")
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(f"{answer['error']}; the client's log: {self._log}")
        return answer["result"]
