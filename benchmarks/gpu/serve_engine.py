"""Engines of `serve`: started when they are needed, kept while they are, asked with a deadline."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.serve_cells import OURS, PAIR, SYNC
from benchmarks.gpu.serve_model import ROOT, ModelShape

__all__ = [
    "DRY_STOCK",
    "SYNC_FILE",
    "CallIsOverError",
    "EngineProcess",
    "Engines",
    "engine_arguments",
]

HOOKS = Path(__file__).parent / "serve_hooks"
# On the CPU.
DRY_STOCK = "torch_native"
# Where the hook tells of what it guarded.
SYNC_FILE = "SGLANG_PREFIX_SERVE_SYNC_FILE"
# Two engines of 14.5 GB of weights and 27 GiB of KV each.
_PAIR_TOKENS = 220_000
_DRY_TOKENS = 4096
_MAX_BATCH = 64
_MEMORY_WAITS = 60
_MEMORY_SLACK = 64 << 20


class CallIsOverError(Exception):
    """This call cannot do it, for want of time mostly; what was asked is still to be done."""


class EngineProcess:
    """One engine behind a connection.

    Args:
        job: see `serve_worker.Worker`.
        environment: of the engine's processes.
        log: file for what they print.
    """

    def __init__(self, job: dict[str, Any], environment: dict[str, str], log: Path) -> None:
        self._log = log
        ours, theirs = multiprocessing.Pipe()
        self._connection = ours
        command = [sys.executable, *_isolation(), "-m", "benchmarks.gpu.serve_worker"]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), json.dumps(job)],
                stdin=subprocess.PIPE,  # it kills itself when this closes, however we end
                stdout=file,
                stderr=file,
                env=environment,
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        self.description: dict[str, Any] = {}

    def wait_until_ready(self, deadline: float) -> None:
        """Wait for the engine to start; see `ask` for what it raises."""
        self.description = self._receive("start", deadline)

    def ask(self, name: str, deadline: float, **arguments: Any) -> Any:
        """The answer to a command.

        Args:
            name: method of `serve_worker.Worker`.
            deadline: of `time.monotonic`.
            arguments: of the method.

        Raises:
            CallIsOverError: no answer until the deadline.
            RuntimeError: the engine failed; the message ends with its log.
        """
        with contextlib.suppress(OSError):  # of a process that has ended; it is told of below
            self._connection.send((name, arguments))
        return self._receive(name, deadline)

    def stop(self) -> None:
        """Kill all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _receive(self, what: str, deadline: float) -> Any:
        try:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                raise CallIsOverError(f"no answer to {what!r} in the time of this call")
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            answer = {"error": "its process ended"}
        if "error" in answer:
            tail = self._log.read_text(errors="replace")[-1500:]
            raise RuntimeError(f"{what}: {answer['error'][-400:]}; its log ends:\n{tail}")
        return answer["result"]


class Engines:
    """The engines that are alive: those of one group.

    Args:
        model: folder of the model.
        shape: of the model.
        stock: backend that ours delegates to.
        folder: for logs and the plugin; see `serve_model.write_plugin`.
        seed: of prompts.
        dry: on the CPU.
        deadline: of `time.monotonic`, after which nothing is waited for.
    """

    def __init__(
        self,
        model: Path,
        shape: ModelShape,
        stock: str,
        folder: Path,
        seed: int,
        *,
        dry: bool,
        deadline: float,
    ) -> None:
        self._model, self._shape, self._stock = model, shape, stock
        self._folder, self._seed, self._dry = folder, seed, dry
        self.deadline = deadline
        self._group = ""
        self._broken: dict[str, str] = {}
        self._alive: dict[str, EngineProcess] = {}
        self._starts = 0
        self._free_bytes = 0

    @property
    def sync_file(self) -> Path:
        """What the hook has written."""
        return self._folder / "sync.json"

    def running(self, group: str) -> bool:
        """Whether the engines of a group are alive."""
        return bool(self._alive) and group == self._group

    def get(self, group: str, backends: Sequence[str]) -> dict[str, EngineProcess]:
        """The engines of a group, started side by side where they are not alive; others end.

        Raises:
            CallIsOverError, RuntimeError: see `EngineProcess.ask`; none of the group lives then. A
                group that failed to start is not tried again in this call.
        """
        if group in self._broken:
            raise CallIsOverError(f"engines {group} did not start before: {self._broken[group]}")
        if group != self._group:
            self.stop()
        self._group = group
        new = [name for name in backends if name not in self._alive]
        if not self._alive and not self._dry:
            self._wait_for_memory()
        try:
            for name in new:
                self._alive[name] = self._start(name, group)
            for name in new:
                self._alive[name].wait_until_ready(self.deadline)
        except BaseException as error:
            self.stop()
            if isinstance(error, RuntimeError):
                self._broken[group] = str(error)[:200]
            raise
        return {name: self._alive[name] for name in backends}

    def stop(self) -> None:
        """End all engines."""
        for engine in self._alive.values():
            engine.stop()
        self._alive = {}

    def _wait_for_memory(self) -> None:
        """The driver frees what a killed process had a while later; pools are sized by it."""
        for _ in range(_MEMORY_WAITS):
            free, _total = torch.cuda.mem_get_info()
            if free >= self._free_bytes - _MEMORY_SLACK:
                break
            time.sleep(0.5)
        self._free_bytes = max(self._free_bytes, free)

    def _start(self, backend: str, group: str) -> EngineProcess:
        self._starts += 1
        job = {
            "engine": engine_arguments(self._model, backend, group, dry=self._dry),
            "vocab_size": self._shape.vocab_size,
            "seed": self._seed,
        }
        roots = [self._folder / "plugin", ROOT, ROOT / "kernels", ROOT / "patches"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if backend == OURS:
            environment["SGLANG_PREFIX_STOCK_BACKEND"] = self._stock
            if group == SYNC or self._dry:
                roots.insert(0, HOOKS)
                environment[SYNC_FILE] = str(self.sync_file)
        if self._dry:
            environment["OMP_NUM_THREADS"] = "1"
        paths = [*map(str, roots), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        log = self._folder / f"{self._starts}-{group}-{backend}.log"
        return EngineProcess(job, environment, log)


def engine_arguments(model: Path, backend: str, group: str, *, dry: bool) -> dict[str, Any]:
    """Keyword arguments of ``sglang.Engine``, the same for all backends of a group."""
    arguments: dict[str, Any] = {
        "model_path": str(model),
        "attention_backend": backend,
        "skip_tokenizer_init": True,
        "random_seed": 0,
        "log_level": "info",
        "page_size": 1,
        "schedule_policy": "fcfs",
        "max_running_requests": _MAX_BATCH,
        "port": free_port(),
    }
    if dry:
        # SGLang 0.5.17 cannot have all of it on the CPU.
        del arguments["attention_backend"]
        return arguments | {
            "prefill_attention_backend": DRY_STOCK,
            "decode_attention_backend": backend,
            "device": "cpu",
            "dtype": "float32",
            "mem_fraction_static": 0.7,
            "max_total_tokens": _DRY_TOKENS,
        }
    arguments |= {
        "dtype": "bfloat16",
        "mem_fraction_static": 0.85,
        "cuda_graph_max_bs_decode": _MAX_BATCH,
        # Prefill is not measured, and its graphs take long to capture.
        "disable_prefill_cuda_graph": True,
        "sampling_backend": "pytorch",
        "chunked_prefill_size": 8192,
    }
    if group in (PAIR, SYNC):
        arguments["max_total_tokens"] = _PAIR_TOKENS
    return arguments


def free_port() -> int:
    """A port that nothing listens on; an engine takes others up to 1,000 above it."""
    ports = list(range(11_000, 32_000, 1500))
    random.SystemRandom().shuffle(ports)
    for port in ports:
        with socket.socket() as probe:
            if port not in _GIVEN and probe.connect_ex(("127.0.0.1", port)) != 0:
                _GIVEN.append(port)
                del _GIVEN[:-4]
                return port
    raise RuntimeError("no free TCP port between 11000 and 32000")


_GIVEN: list[int] = []


def _isolation() -> list[str]:
    """-S if this process was started with it: then the path is all there is."""
    return ["-S"] if sys.flags.no_site else []
