"""What a run of `bench serving` does, from what the user chose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sglang_prefix.bench.serving.compare import SIDES
from sglang_prefix.bench.serving.servers import RunningServer, describe
from sglang_prefix.bench.serving.workloads import REGISTRY, Workload, load_workloads
from sglang_prefix.bench.workloads.traces import read_trace
from sglang_prefix.tiny_model import TinyModelConfig, build_once

__all__ = ["Plan", "choose_model"]

# Of a server argument, the option of ours that takes its place.
_OURS = {
    "--model-path": "--model-path before --",
    "--model": "--model-path before --",
    "--tokenizer-path": "--tokenizer before --",
    "--host": "nothing: servers listen on 127.0.0.1",
    "--port": "--port before --",
}
# A backend in these, one that packs would be on both sides.
_BACKENDS = ("--attention-backend", "--decode-attention-backend", "--prefill-attention-backend")


@dataclass(slots=True)
class Plan:
    """The options of the command, by its names for them, and what follows from them.

    Raises:
        ValueError: an option is not legal, or a file is not what it should be.
        ServerError: a server that runs cannot be used.
        OSError: ``out`` cannot be written.

    Attributes:
        command: what the user typed.
        urls: by side, a server that runs; None to start one.
        workloads: at least one.
        absent: workloads that cannot be run, and why.
        arguments: by side, those of a server that is started; the user's last, so that they count.
    """

    out: Path
    command: Sequence[str] = ()
    server_args: Sequence[str] | None = None
    model_path: str | None = None
    tokenizer: str | None = None
    stock_url: str | None = None
    prefix_url: str | None = None
    quick: bool = False
    workload: Sequence[str] | None = None
    workload_file: Path | None = None
    trace: Path | None = None
    trace_requests: int | None = None
    trace_block_tokens: int | None = None
    trace_speed: float | None = None
    repeats: int = 1
    seed: int | None = 0
    min_equal: float | None = None
    port: int | None = None
    start_timeout: float = 900
    workload_timeout: float = 1800

    urls: dict[str, str | None] = field(init=False)
    workloads: list[Workload] = field(init=False)
    absent: dict[str, str] = field(init=False)
    arguments: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.seed = self.seed or 0
        given = zip(SIDES, (self.stock_url, self.prefix_url), strict=True)
        self.urls = {side: url.rstrip("/") if url else None for side, url in given}
        self._check_server_args()
        self._choose_workloads()
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out is {self.out}, which is a file; legal: a folder of results")
        self.out.mkdir(parents=True, exist_ok=True)
        self.model_path = self.model_path or choose_model(self.out, self.urls)
        both = self._common_arguments()
        sides = {"stock": both, "prefix": [*both, "--decode-attention-backend", "prefix"]}
        self.arguments = {side: [] if self.urls[side] else found for side, found in sides.items()}

    @property
    def options(self) -> dict[str, Any]:
        """What a resumed run must have in common with its beginning."""
        return {
            "model": self.model_path,
            "tokenizer": self.tokenizer,
            "urls": self.urls,
            "workloads": [[w.name, w.driver, dict(w.parameters)] for w in self.workloads],
            "trace": str(self.trace) if self.trace else None,
            "repeats": self.repeats,
            "seed": self.seed,
            "quick": self.quick,
            "server_args": self.arguments,
        }

    def steps(self) -> Iterator[tuple[str, Workload, int]]:
        """Side, workload and number of every timed run, in order.

        A server that is started here serves all its runs before the next one starts. Two that run
        already take turns, and take turns at being first.
        """
        rounds = range(self.repeats)
        if not all(self.urls.values()):
            yield from ((side, w, n) for side in SIDES for w in self.workloads for n in rounds)
            return
        for workload in self.workloads:
            for number in rounds:
                order = SIDES if number % 2 == 0 else SIDES[::-1]
                yield from ((side, workload, number) for side in order)

    def _check_server_args(self) -> None:
        words = [word for argument in self.server_args or () for word in argument.split("=", 1)]
        for name, ours in _OURS.items():
            if name in words:
                raise ValueError(f"server argument {name} is set by this command; use {ours}")
        for name, value in pairwise(words):
            if name in _BACKENDS and value == "prefix":
                raise ValueError(f"server argument {name} prefix would be on both sides")
            if (name, value) == ("--load-format", "dummy"):
                raise ValueError(f"server argument {name} dummy: equal tokens would prove nothing")
        if words and all(self.urls.values()):
            raise ValueError("server arguments are for servers started here; both run already")

    def _choose_workloads(self) -> None:
        changes = {
            "requests": self.trace_requests,
            "block_tokens": self.trace_block_tokens,
            "speed": self.trace_speed,
        }
        found = load_workloads(
            self.workload_file or REGISTRY,
            quick=self.quick,
            names=self.workload or (),
            overrides={name: value for name, value in changes.items() if value is not None},
        )
        if self.trace is not None:
            read_trace(self.trace)  # for its errors, before anything is started
        self.workloads = [one for one in found if one.driver != "trace" or self.trace is not None]
        left = [one.name for one in found if one not in self.workloads]
        self.absent = dict.fromkeys(left, "no --trace FILE was given")
        if not self.workloads:
            raise ValueError(f"--workload {', '.join(left)} needs --trace FILE")

    def _common_arguments(self) -> list[str]:
        import torch

        found = ["--model-path", str(self.model_path), "--random-seed", str(self.seed)]
        if self.tokenizer:
            found += ["--tokenizer-path", self.tokenizer]
        if not torch.cuda.is_available():
            # Tokens can only be required to be equal where rounding hardly matters; the pool is
            # bounded by tokens, the fraction only has to be enough.
            found += ["--device", "cpu", "--dtype", "float32"]
            found += ["--mem-fraction-static", "0.7", "--max-total-tokens", "65536"]
        return [*found, *(self.server_args or ())]


def choose_model(out: Path, urls: Mapping[str, str | None]) -> str:
    """The model of a server that runs, or a tiny one with real random weights.

    Raises:
        ServerError: see `servers.describe`; ValueError: the folder has a model that is not whole.
    """
    for side, url in urls.items():
        if url is not None:
            return str(describe(RunningServer(side, url))["model"])
    folder = out / "tiny-model"
    # As the demo's. Of more tokens, few are halves of characters: SGLang's tool takes the first
    # text for the first token.
    config = TinyModelConfig(
        num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64, vocab_size=4096
    )
    build_once(folder, config)
    return str(folder)
