"""Engines of `bench serving --engine`: started when they are needed, kept while they are."""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_prefix.bench.child import ChildError
from sglang_prefix.bench.engine import ROOT, EngineProcess, engine_environment
from sglang_prefix.bench.run import NotRunError
from sglang_prefix.bench.serving.loads import DRY_STOCK, OURS, PAIR, SYNC, Load, prompts
from sglang_prefix.bench.serving.sync_guard import SYNC_FILE
from sglang_prefix.tiny_model import TinyModelConfig

__all__ = ["LLAMA_8B", "TINY", "Engines", "engine_arguments", "write_plugin"]

# Llama-3.1-8B but for its 128,256 tokens and 131,072 positions: those of random weights would cost
# disk and time on both sides of a comparison alike.
LLAMA_8B = TinyModelConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    vocab_size=32000,
    context_length=65536,
    dtype="bfloat16",
    scales_with_inputs=True,
)
TINY = TinyModelConfig(scales_with_inputs=True)

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
        folder: for logs and the plugin, see `write_plugin`.
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

    _group: str = ""
    _starts: int = 0
    _free_bytes: int = 0
    _broken: dict[str, str] = field(default_factory=dict)
    _alive: dict[str, EngineProcess] = field(default_factory=dict)

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
            NotRunError: the group failed to start before in this run.
            TimeoutError: there was no time for it.
            ChildError: an engine failed.
        """
        if group in self._broken:
            raise NotRunError(f"engines {group} did not start before: {self._broken[group]}")
        if group != self._group:
            self.stop()
        self._group = group
        if not self._alive and not self.dry:
            self._wait_for_memory()
        try:
            for name in backends:
                if name not in self._alive:
                    self._alive[name] = self._start(name)
            for name in backends:
                self._alive[name].wait_until_ready(self.deadline)
        except ChildError as error:
            self._broken[group] = error.summary
            raise
        return {name: self._alive[name].description for name in backends}

    def call(self, backend: str, function: str, load: Load, **more: Any) -> Any:
        """Have an engine run a function of `engine_calls` on a load.

        Raises:
            TimeoutError: there was no time for it.
            ChildError: it failed.
        """
        return self._alive[backend].ask(
            f"{_CALLS}:{function}",
            self.deadline,
            prompts=prompts(load, self.vocab_size, self.seed),
            tokens=load.output_tokens,
            **more,
        )

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

    def _start(self, backend: str) -> EngineProcess:
        self._starts += 1
        settings = {"HF_HUB_OFFLINE": "1"}
        hooks = []
        if backend == OURS:
            settings["SGLANG_PREFIX_STOCK_BACKEND"] = self.stock
            if self._group == SYNC or self.dry:
                hooks = [_GUARD]
                settings[SYNC_FILE] = str(self.sync_file)
        if self.dry:
            settings["OMP_NUM_THREADS"] = "1"
        return EngineProcess(
            engine_arguments(self.model, backend, self._group, dry=self.dry),
            environment=engine_environment(
                settings, hooks=hooks, paths=[self.folder / "plugin"], base=os.environ
            ),
            log=self.folder / f"{self._starts}-{self._group}-{backend}.log",
        )


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


def write_plugin(folder: Path) -> Path | None:
    """Make our source tree a distribution to `importlib.metadata`, which SGLang asks for plugins.

    Args:
        folder: to be put on ``PYTHONPATH`` before any place where the package is installed.

    Returns:
        The ``.dist-info`` folder in it, with the name, version and entry points of pyproject.toml.
        None in an installed wheel, which is a distribution already.
    """
    if not (ROOT / "pyproject.toml").is_file():
        return None
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return info
