"""The two servers of `bench serving`: started here one at a time, or found running."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

import psutil  # type: ignore[import-untyped]
import requests
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from sglang_prefix.api_key import ApiKey, ask, ask_json, why_failed
from sglang_prefix.bench.child import cause_in, kill_session, spawn
from sglang_prefix.bench.engine import counters, free_port, is_free
from sglang_prefix.bench.results import ResultError, check_type
from sglang_prefix.files import read_tail

__all__ = [
    "Count",
    "KindReport",
    "Name",
    "Report",
    "RunningServer",
    "ServerError",
    "cpu_environment",
    "describe",
    "launch",
    "read_counters",
    "wait_until_ready",
]

_SERVE = (sys.executable, "-m", "sglang_prefix.cli.main", "exec", "--", "sglang", "serve")
_CALL_S = 60
_END_S = 60.0
_POLL_S = 0.3
_HOST = "127.0.0.1"


Count = Annotated[int, Field(ge=0, lt=1 << 62)]
_Counts = Annotated[dict[str, Count], Field(max_length=1000)]
Name = Annotated[str, Field(max_length=4096)]


class KindReport(TypedDict):
    """What one model runner counted of a kind of pass, and of which a run takes the difference."""

    packed_steps: NotRequired[Count]
    stock_steps: NotRequired[Count]
    fallback_steps: NotRequired[Count]
    kv_tokens_read: NotRequired[Count]
    kv_tokens_logical: NotRequired[Count]
    stock_reasons: NotRequired[_Counts]
    fallback_reasons: NotRequired[_Counts]


class Report(KindReport):
    """Counters of one model runner: those of decode steps, and of other kinds by their names."""

    verify: NotRequired[KindReport]
    extend: NotRequired[KindReport]


class _State(TypedDict):
    sglang_prefix: NotRequired[list[Report]]


class _ServerInfo(TypedDict):
    """What is read of ``/server_info``; all else is left out."""

    internal_states: Annotated[list[_State], Field(max_length=1 << 16)]
    version: NotRequired[Name | None]
    load_format: NotRequired[Name | None]
    dtype: NotRequired[Name | None]
    attention_backend: NotRequired[Name | None]
    decode_attention_backend: NotRequired[Name | None]
    max_total_num_tokens: NotRequired[Count | None]


class _ModelInfo(TypedDict):
    model_path: NotRequired[Name | None]


class ServerError(RuntimeError):
    """A server that cannot be used, or its client, in one line."""


@dataclass(slots=True)
class RunningServer:
    """A server that answers.

    Attributes:
        side: "stock" or "prefix".
        url: without a slash at the end.
        log: its log, if it was started here.
        process: leader of its process group, if it was started here.
        key: with which it is asked.
    """

    side: str
    url: str
    log: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    key: ApiKey = field(default_factory=ApiKey)

    def stop(self) -> None:
        """End a server that was started here, with all its processes; another is left alone.

        Waits for all of them, not for the leader alone: until the last has ended it may hold the
        memory, of a GPU too, and the port of the server that is started next.

        Raises:
            ServerError: a process does not end.
        """
        if self.process is None:
            return
        kill_session(self.process)
        deadline = time.monotonic() + _END_S
        while left := _running_in_group(self.process.pid):
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the {self.side} server was killed but does not end: after {_END_S:g} s "
                    f"these processes of it are left: {', '.join(map(str, left))}"
                )
            time.sleep(_POLL_S)

    def raise_if_ended(self) -> None:
        """Raise ServerError if a server that was started here has ended; asks it nothing."""
        if self.process is not None and self.process.poll() is not None:
            text = read_tail(self.log) if self.log else ""
            raise ServerError(
                f"the {self.side} server ended with status {self.process.returncode}: "
                f"{cause_in(text)}; its log: {self.log}"
            )

    def get_server_info(self) -> dict[str, Any]:
        """Of what ``sglang.Engine.get_server_info`` says, the part that is read here.

        Raises:
            ServerError: it does not answer, or with something else.
        """
        return self.get("server_info", _ServerInfo)

    def get_model_info(self) -> dict[str, Any]:
        """As :meth:`get_server_info`."""
        return self.get("model_info", _ModelInfo)

    def get(self, page: str, kind: Any, timeout_s: float = _CALL_S) -> dict[str, Any]:
        """Of a page, the part that a type of pydantic's names; raises as the others do."""
        url = f"{self.url}/{page}"
        try:
            data = ask_json(url, self.key, timeout_s=timeout_s)
            found: dict[str, Any] = check_type(url, data, TypeAdapter(kind), "is not SGLang's")
        except requests.RequestException as error:
            why = why_failed(error, url, self.key)
            raise ServerError(f"{url} does not answer: {why}") from None
        except ResultError as error:
            raise ServerError(str(error)) from None
        return found


def _running_in_group(group: int) -> list[int]:
    """Processes of a group that have not ended; a zombie has when its last thread has."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == group and (
                process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
            ):
                found.append(process.pid)
    return found


def cpu_environment() -> dict[str, str]:
    """Variables for a server that computes on the CPU: ``OMP_NUM_THREADS``, unless it is set.

    Its other processes and the load generator need a core, too: threads that wait for one spin.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) - 1))}


def launch(
    side: str,
    arguments: Sequence[str],
    port: int | None,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> RunningServer:
    """Start ``sglang serve`` under ``sglang-prefix exec``; it does not answer yet.

    Args:
        side: "stock" or "prefix".
        arguments: of ``sglang serve``, without host and port.
        port: where it listens; None to choose a free one.
        log: file for what it prints; written anew.
        environment: variables beside this process's own.

    Raises:
        ServerError: the port is in use.
    """
    if port is not None and not is_free(port):
        raise ServerError(f"port {port} is in use; --port takes another, or none to choose one")
    port = free_port() if port is None else port
    command = ["run", *_SERVE, *arguments, "--host", _HOST, "--port", str(port)]
    process = spawn(command, os.environ | (environment or {}), log)
    return RunningServer(side, f"http://{_HOST}:{port}", log, process)


def wait_until_ready(server: RunningServer, timeout_s: float) -> None:
    """Wait until a launched server answers.

    Raises:
        ServerError: it ended, or does not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(requests.RequestException):
            ask(f"{server.url}/health", server.key, timeout_s=_CALL_S)
            return
        server.raise_if_ended()
        if time.monotonic() > deadline:
            raise ServerError(
                f"the {server.side} server does not answer after {timeout_s:.0f} s; its log: "
                f"{server.log}"
            )
        time.sleep(_POLL_S)


def describe(server: RunningServer) -> dict[str, Any]:
    """What a server is, from its own pages, checked to be of its side.

    Returns:
        "model", "sglang", "dtype", "attention_backend", "decode_attention_backend" and
        "max_total_num_tokens" (of its KV pool), None for what the pages lack.

    Raises:
        ServerError: it does not answer, has dummy weights, or is of the other side.
    """
    info = server.get_server_info()
    is_prefix = bool(counters(server))
    if is_prefix != (server.side == "prefix"):
        what = "names the prefix backend" if is_prefix else "names no prefix backend"
        raise ServerError(f"{server.url} is no {server.side} server: its /server_info {what}")
    if info.get("load_format") == "dummy":
        raise ServerError(
            f"{server.url} has dummy weights, under which attention hardly matters: equal tokens "
            "would prove nothing; use real ones"
        )
    names = ("dtype", "attention_backend", "decode_attention_backend", "max_total_num_tokens")
    return {
        "model": server.get_model_info().get("model_path"),
        "sglang": info.get("version"),
        **{name: info.get(name) for name in names},
    }


def read_counters(server: RunningServer) -> dict[str, Any] | None:
    """The backend's counters, of data-parallel replicas the sum; None for stock.

    Raises:
        ServerError: the server does not answer.
    """
    return counters(server) or None
