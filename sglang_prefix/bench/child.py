"""A child process that makes one object, then calls functions with it when asked.

It leads a session of its own, which ends whole: with the object's owner, by `ChildProcess.stop`, or
with the process that started it, even if that one was killed.

As a program, ``python -m sglang_prefix.bench.child run COMMAND...`` runs a command that ends
likewise.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

from sglang_prefix.files import read_tail

__all__ = ["ChildError", "ChildProcess", "cause_in", "kill_session", "spawn"]

_POLL_S = 1.0
_LOG_TAIL = 4000
_LONGEST_CAUSE = 300
_CAUSE = re.compile(
    r"^(?:\S+ )?(?:[\w.]*(?:Error|Exception)\b|.*\berror:).*|.*out of memory.*", re.I
)


class ChildError(RuntimeError):
    """A child failed; the message ends with the end of its log.

    Attributes:
        summary: what failed and why, in one line.
    """

    def __init__(self, summary: str, log: str) -> None:
        super().__init__(f"{summary}; its log ends:\n{log}")
        self.summary = summary


class ChildProcess:
    """A child process. It begins to start at once; `ask` waits until it has.

    Args:
        make: "package.module:function"; called in the child, it returns the object, and what to
            say of it.
        arguments: of that function, pickled as all that follows is.
        name: for messages.
        environment: of the child; None for this process's.
        log: file for what it prints; written anew.

    Attributes:
        description: once it has started, what is said of the object.
    """

    def __init__(
        self,
        make: str,
        arguments: Mapping[str, Any],
        *,
        name: str,
        environment: Mapping[str, str] | None,
        log: Path,
    ) -> None:
        self.description: dict[str, Any] = {}
        self._is_ready = False
        self._name, self._log = name, log
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            number = theirs.fileno()
            self._process = spawn([str(number)], environment, log, pass_fds=[number])
        self._send(make, arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def wait_until_ready(self, deadline: float | None = None) -> None:
        """Wait until the object is made; see `ask` for what it raises."""
        if not self._is_ready:
            self.description = self._receive("start", deadline)
            self._is_ready = True

    def ask(
        self,
        function: str,
        /,
        deadline: float | None = None,
        watch: Callable[[], None] | None = None,
        **arguments: Any,
    ) -> Any:
        """Call a function in the child and return its result.

        Args:
            function: "package.module:function", called with the object and the arguments. If it
                raises, the child ends.
            deadline: of ``time.monotonic``; None to wait for as long as it takes.
            watch: is called every second meanwhile; what it raises ends the wait.
            arguments: of the function.

        Raises:
            TimeoutError: no answer until the deadline; the child is of no more use.
            ChildError: the function raised, or the child ended.
        """
        self.wait_until_ready(deadline)
        self._send(function, arguments)
        return self._receive(function.rpartition(":")[2], deadline, watch)

    def stop(self) -> None:
        """Kill the child and all processes below it."""
        kill_session(self._process)
        self._connection.close()

    def _send(self, function: str, arguments: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the process has ended; receiving will tell
            self._connection.send((function, arguments))

    def _receive(
        self, what: str, deadline: float | None, watch: Callable[[], None] | None = None
    ) -> Any:
        end = float("inf") if deadline is None else deadline
        try:
            while not self._connection.poll(max(0.0, min(_POLL_S, end - time.monotonic()))):
                if watch is not None:
                    watch()
                if time.monotonic() >= end:
                    raise TimeoutError(f"the {self._name} did not answer {what!r} in time")
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.wait()
            answer = {"error": None}
        if "result" in answer:
            return answer["result"]
        tail = read_tail(self._log, _LOG_TAIL)
        cause = answer["error"] or f"its process ended: {cause_in(tail)}"
        raise ChildError(f"{self._name} ended at {what!r}: {cause}", tail)


def spawn(
    arguments: Sequence[str],
    environment: Mapping[str, str] | None,
    log: Path,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start this module as a program, in a session of its own that ends with this process.

    Args:
        arguments: of the program.
        environment: of the process; None for this one's.
        log: file for what it prints; written anew.
        pass_fds: file descriptors that it inherits.
    """
    # Python's -S goes on to the child: then PYTHONPATH is all there is.
    isolation = ["-S"] if sys.flags.no_site else []
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *isolation, "-m", __name__, *arguments],
            stdin=subprocess.PIPE,  # the child kills itself when this closes
            stdout=output,
            stderr=output,
            env=environment,
            pass_fds=pass_fds,
            start_new_session=True,
        )


def kill_session(process: subprocess.Popen[Any]) -> None:
    """Kill a process that was started with ``start_new_session``, and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def cause_in(log: str) -> str:
    """The line of a log that a user can act on: the last that names an error, or the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    causes = [line for line in lines if _CAUSE.match(line)]
    found = [*lines[-1:], *causes[-1:]][-1:] or ["no output"]
    return found[0][:_LONGEST_CAUSE]


# What follows runs in the child.


def main() -> None:
    """Run a command, or call functions until the connection of the given descriptor closes."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    what, *command = sys.argv[1:]
    if what == "run":
        status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
        # As shells do for a killed one. `sys.exit` would wait for the thread that reads.
        os._exit(status if status >= 0 else 128 - status)
    connection = Connection(int(what))
    try:
        make, arguments = connection.recv()
        made, answer = _find(make)(**arguments)
        while True:
            connection.send({"result": answer})
            function, arguments = connection.recv()
            answer = _find(function)(made, **arguments)
    except EOFError:
        return
    except BaseException as error:
        traceback.print_exc()
        said = " ".join("".join(traceback.format_exception_only(error)).split())
        connection.send({"error": said[:_LONGEST_CAUSE]})
    finally:
        os.killpg(0, signal.SIGKILL)


def _find(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    found: Callable[..., Any] = attrgetter(name)(importlib.import_module(module))
    return found


def _die_with_parent() -> None:
    """Kill this process group when the other end of standard input closes."""
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
