"""What a run of `bench serving` does: its settings, in order, from what the user chose."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_prefix import tiny_model
from sglang_prefix.bench.serving.compare import SIDES
from sglang_prefix.bench.serving.servers import RunningServer, describe
from sglang_prefix.bench.serving.workloads import REGISTRY, Workload, load_workloads
from sglang_prefix.bench.workloads.traces import read_trace

__all__ = ["Plan", "choose_model", "choose_workloads", "make_folder", "server_arguments", "steps"]

# Of a model folder: without one of these it is not whole.
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run.

    Attributes:
        out: folder for everything that is written.
        model: folder or name; tokenizer: the same, None for the model's.
        workloads: at least one.
        absent: workloads that cannot be run, and why.
        trace: file of a trace.
        repeats: timed runs per workload and side.
        seed: of the requests and the servers.
        quick: whether the small sizes were taken.
        urls: by side, a server that runs; None to start one.
        server_args: by side, arguments of a server that is started.
        port: of servers that are started; None to choose.
        start_timeout_s: how long a server may take to start.
        workload_timeout_s: how long requests may take to be made, or to be answered once; beyond
            the time over which a trace sends them.
        min_equal: share of tokens that must agree; None for all in float32, a quarter otherwise.
        command: what the user typed.
    """

    out: Path
    model: str
    tokenizer: str | None
    workloads: Sequence[Workload]
    absent: dict[str, str]
    trace: str | None
    repeats: int
    seed: int
    quick: bool
    urls: dict[str, str | None]
    server_args: dict[str, list[str]]
    port: int | None
    start_timeout_s: float
    workload_timeout_s: float
    min_equal: float | None
    command: list[str]

    def options(self) -> dict[str, Any]:
        """What a resumed run must have in common with its beginning."""
        return {
            "model": self.model,
            "tokenizer": self.tokenizer,
            "urls": self.urls,
            "workloads": [workload.as_dict() for workload in self.workloads],
            "trace": self.trace,
            "repeats": self.repeats,
            "seed": self.seed,
            "quick": self.quick,
            "server_args": self.server_args,
        }


def steps(plan: Plan) -> Iterator[tuple[str, Workload, int]]:
    """Side, workload and number of every timed run, in order.

    A server that is started here serves all its runs before the next one starts. Two that run
    already take turns, and take turns at being first.
    """
    rounds = range(plan.repeats)
    if all(plan.urls.values()):
        for workload in plan.workloads:
            for number in rounds:
                order = SIDES if number % 2 == 0 else SIDES[::-1]
                yield from ((side, workload, number) for side in order)
    else:
        for side in SIDES:
            yield from ((side, w, number) for w in plan.workloads for number in rounds)


def choose_workloads(
    file: Path | None,
    quick: bool,
    names: list[str],
    trace: Path | None,
    overrides: dict[str, Any],
) -> tuple[list[Workload], dict[str, str]]:
    """The workloads that can be run, and why others cannot.

    Args:
        file: of workloads; None for ours.
        quick: the small sizes.
        names: which; all if empty.
        trace: file of a trace.
        overrides: parameters of the trace replay; None keeps one.

    Raises:
        ValueError: a file holds none, or a name is not in it.
    """
    changed = {name: value for name, value in overrides.items() if value is not None}
    found = load_workloads(file or REGISTRY, quick=quick, names=names, overrides={"trace": changed})
    if trace is not None:
        read_trace(trace)  # for its errors, before anything is started
        return found, {}
    without = [one for one in found if one.driver != "trace"]
    absent = {one.name: "no --trace FILE was given" for one in found if one not in without}
    if not without:
        raise ValueError(f"--workload {', '.join(absent)} needs --trace FILE")
    return without, absent


def make_folder(out: Path) -> None:
    """Make the folder of the results; ValueError if it is a file, OSError if it cannot be."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {out}, which is a file; legal: a folder, or a new one's name")
    out.mkdir(parents=True, exist_ok=True)


def choose_model(out: Path, urls: Mapping[str, str | None]) -> str:
    """The model of a server that runs, or a tiny one with real random weights.

    Raises:
        ServerError: see `servers.describe`; ValueError: the folder has a model that is not whole.
    """
    for side, url in urls.items():
        if url is not None:
            return str(describe(RunningServer(side, url))["model"])
    folder = out / "tiny-model"
    if folder.exists():
        if lacking := [name for name in _MODEL_FILES if not (folder / name).is_file()]:
            raise ValueError(
                f"{folder} is not a whole model, it lacks {', '.join(lacking)}: remove it"
            )
        return str(folder)
    # As the demo's. Of more tokens, few are halves of characters: SGLang's tool takes the first
    # text for the first token.
    config = tiny_model.TinyModelConfig(
        num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64, vocab_size=4096
    )
    with tempfile.TemporaryDirectory(prefix=".tiny-model-", dir=out) as beside:
        whole = Path(beside, "model")
        tiny_model.build_tiny_model(whole, config)
        whole.rename(folder)
    return str(folder)


def server_arguments(
    model: str,
    tokenizer: str | None,
    seed: int,
    given: list[str],
    urls: Mapping[str, str | None],
) -> dict[str, list[str]]:
    """Arguments of both servers, the user's last so that they count.

    Args:
        model, tokenizer: folders or names; None for the model's tokenizer.
        seed: of the servers.
        given: what the user has for both.
        urls: by side, a server that runs; it gets no arguments.
    """
    import torch

    common = ["--model-path", model, "--random-seed", str(seed)]
    if tokenizer:
        common += ["--tokenizer-path", tokenizer]
    if not torch.cuda.is_available():
        # Tokens can only be required to be equal where rounding hardly matters; the pool is bounded
        # by tokens, the fraction only has to be enough.
        common += ["--device", "cpu", "--dtype", "float32"]
        common += ["--mem-fraction-static", "0.7", "--max-total-tokens", "65536"]
    both = [*common, *given]
    found = {"stock": both, "prefix": [*both, "--decode-attention-backend", "prefix"]}
    return {side: [] if urls[side] else arguments for side, arguments in found.items()}
