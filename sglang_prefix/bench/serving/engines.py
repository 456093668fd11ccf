"""Engines of `bench serving --engine`: started when they are needed, kept while they are."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_prefix.bench.child import cause_in
from sglang_prefix.bench.engine import EngineProcess, engine_environment
from sglang_prefix.bench.run import NotRunError
from sglang_prefix.bench.serving.loads import DRY_STOCK, OURS, PAIR, SYNC
from sglang_prefix.bench.serving.sync_guard import SYNC_FILE

__all__ = ["Engines", "engine_arguments"]

_CALLS = "sglang_prefix.bench.serving.engine_calls"
_GUARD = "sglang_prefix.bench.serving.sync_guard"
# Two engines of 14.5 GB of weights and 27 GiB of KV each.
_PAIR_TOKENS = 220_000
_DRY_TOKENS = 4096
_MAX_BATCH = 64
_MEMORY_WAITS = 60
_MEMORY_SLACK = 64 << 20


@dataclass
class Engines:
    """The engines that are alive: those of one group.

    Args:
        model: folder of the model.
        vocab_size: of the model.
        stock: backend that ours delegates to.
        folder: for logs and the plugin, see `model.write_plugin`.
        seed: of prompts.
        dry: on the CPU.
        deadline: of `time.monotonic`, after which nothing is waited for; none at first.
    """

    model: Path
    vocab_size: int
    stock: str
    folder: Path
    seed: int
    dry: bool
    deadline: float | None = None

    def __post_init__(self) -> None:
        self._group = ""
        self._broken: dict[str, str] = {}
        self._alive: dict[str, EngineProcess] = {}
        self._starts = 0
        self._free_bytes = 0

    @property
    def sync_file(self) -> Path:
        """What the guard has written."""
        return self.folder / "sync.json"

    def running(self, group: str) -> bool:
        """Whether the engines of a group are alive."""
        return bool(self._alive) and group == self._group

    def start(self, group: str, backends: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Have the engines of a group running, started side by side; those of another end.

        Returns:
            The description of each.

        Raises:
            NotRunError: there was no time, or the group failed to start before in this run.
            RuntimeError: an engine failed, in one line.
        """
        if group in self._broken:
            raise NotRunError(f"engines {group} did not start before: {self._broken[group]}")
        if group != self._group:
            self.stop()
        self._group = group
        new = [name for name in backends if name not in self._alive]
        if not self._alive and not self.dry:
            self._wait_for_memory()
        try:
            for name in new:
                self._alive[name] = self._start(name, group)
            for name in new:
                self._alive[name].wait_until_ready(self.deadline)
        except TimeoutError as error:
            raise NotRunError(str(error)) from None
        except RuntimeError as error:
            self._broken[group] = _in_one_line(error)
            raise RuntimeError(self._broken[group]) from error
        return {name: self._alive[name].description for name in backends}

    def call(self, backend: str, function: str, load: dict[str, Any], **more: Any) -> Any:
        """Have an engine run a function of `engine_calls` on a load.

        Raises:
            NotRunError: there was no time for it.
            RuntimeError: it failed; one line.
        """
        given = {"load": load, "seed": self.seed, "vocab_size": self.vocab_size, **more}
        try:
            return self._alive[backend].ask(f"{_CALLS}:{function}", self.deadline, **given)
        except TimeoutError as error:
            raise NotRunError(str(error)) from None
        except RuntimeError as error:
            raise RuntimeError(_in_one_line(error)) from error

    def stop(self) -> None:
        """End all engines."""
        for engine in self._alive.values():
            engine.stop()
        self._alive = {}

    def _wait_for_memory(self) -> None:
        """The driver frees what a killed process had a while later; pools are sized by it."""
        import torch

        for _ in range(_MEMORY_WAITS):
            free, _total = torch.cuda.mem_get_info()
            if free >= self._free_bytes - _MEMORY_SLACK:
                break
            time.sleep(0.5)
        self._free_bytes = max(self._free_bytes, free)

    def _start(self, backend: str, group: str) -> EngineProcess:
        self._starts += 1
        settings = {"HF_HUB_OFFLINE": "1"}
        hooks = []
        if backend == OURS:
            settings["SGLANG_PREFIX_STOCK_BACKEND"] = self.stock
            if group == SYNC or self.dry:
                hooks = [_GUARD]
                settings[SYNC_FILE] = str(self.sync_file)
        if self.dry:
            settings["OMP_NUM_THREADS"] = "1"
        return EngineProcess(
            engine_arguments(self.model, backend, group, dry=self.dry),
            environment=engine_environment(
                settings, hooks=hooks, paths=[self.folder / "plugin"], base=os.environ
            ),
            log=self.folder / f"{self._starts}-{group}-{backend}.log",
        )


def _in_one_line(error: RuntimeError) -> str:
    """What an engine failed at, and of its log, which follows in the message, the cause."""
    first, _, log = str(error).partition("\n")
    return f"{first.removesuffix('; its log ends:')}: {cause_in(log)}"


def engine_arguments(model: Path, backend: str, group: str, *, dry: bool) -> dict[str, Any]:
    """Keyword arguments of ``sglang.Engine``, the same for all backends of a group."""
    arguments: dict[str, Any] = {
        "model_path": str(model),
        "skip_tokenizer_init": True,
        "random_seed": 0,
        "log_level": "info",
        "page_size": 1,
        "schedule_policy": "fcfs",
        "max_running_requests": _MAX_BATCH,
    }
    if dry:
        # SGLang 0.5.17 cannot have all of it on the CPU.
        return arguments | {
            "prefill_attention_backend": DRY_STOCK,
            "decode_attention_backend": backend,
            "device": "cpu",
            "dtype": "float32",
            "mem_fraction_static": 0.7,
            "max_total_tokens": _DRY_TOKENS,
        }
    arguments |= {
        "attention_backend": backend,
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
