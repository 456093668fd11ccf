"""A decode step of a real model on the CPU: what it takes, and attention's part of it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from sglang_prefix.bench.engine import EngineProcess, engine_environment
from sglang_prefix.bench.hooks import decode_watch
from sglang_prefix.bench.run import NotRunError
from sglang_prefix.files import write_file
from sglang_prefix.smollm2 import build_smollm2

__all__ = ["NUM_REQUESTS", "measure_model"]

# The demo's batch in float32.
_QUESTIONS, _SAMPLES, _DOCUMENT_TOKENS, _ANSWER_TOKENS = 16, 4, 1900, 16
NUM_REQUESTS = _QUESTIONS + _SAMPLES
_LOAD = "sglang_prefix.bench.serving.questions"
# What serves the decode steps: the executor of the engine, and who decodes in it.
_SIDES = {
    "stock": ("native", "stock"),
    "torch": ("torch", "prefix"),
    "native": ("native", "prefix"),
}


def measure_model(num_requests: int) -> dict[str, Any]:
    """Answer questions about a document, with stock decode and with each of our CPU executors.

    Returns:
        What `schema.HostCase` has of a case, without its name and group.

    Raises:
        NotRunError: the model is not here and cannot be fetched.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        root = Path(name)
        try:
            build_smollm2(root / "model")
        except (RuntimeError, OSError) as error:
            raise NotRunError(str(error)) from None
        engines = {
            executor: stack.enter_context(_start(root, executor))
            for executor in ("native", "torch")
        }
        for engine in engines.values():  # the start of one would slow the other
            engine.wait_until_ready()
        prompts = _prompts(root / "model", num_requests)
        for engine in engines.values():
            engine.ask(f"{_LOAD}:read_document", prompt=prompts[0])
        found = {
            side: _measure(root / executor, engines[executor], mode, prompts)
            for side, (executor, mode) in _SIDES.items()
        }
    times = {}
    for side, one in found.items():
        times[f"{side}: decode step"] = median(one["step_us"])
        times[f"{side}: attention in it"] = 1e3 * one.pop("attention_ms")
    return {"num_requests": num_requests, "us": times, "sides": found}


def _start(root: Path, executor: str) -> EngineProcess:
    folder = root / executor
    folder.mkdir()
    arguments = {
        "model_path": str(root / "model"),
        "device": "cpu",
        "dtype": "float32",
        "decode_attention_backend": "prefix",
        "max_total_tokens": 16_000,
        "mem_fraction_static": 0.7,
        "sleep_on_idle": True,  # while the other engine is measured
        "log_level": "error",
    }
    settings = {"SGLANG_PREFIX_EXECUTOR": executor, decode_watch.FOLDER_VARIABLE: str(folder)}
    environment = engine_environment(settings, hooks=[decode_watch.__name__])
    return EngineProcess(arguments, environment=environment, log=folder / "log")


def _prompts(model: Path, num_requests: int) -> list[list[int]]:
    from sglang_prefix.bench.serving.questions import SAMPLED, document_prompts, questions
    from sglang_prefix.explain.sources import load_tokenizer

    asked = questions(_QUESTIONS) + [SAMPLED] * (num_requests - _QUESTIONS)
    return document_prompts(load_tokenizer(str(model)), asked, _DOCUMENT_TOKENS)


def _measure(
    folder: Path, engine: EngineProcess, mode: str, prompts: list[list[int]]
) -> dict[str, Any]:
    """Steps of one mode."""
    write_file(decode_watch.mode_file(folder), mode)
    answered: Mapping[str, Any] = engine.ask(
        f"{_LOAD}:ask", prompts=prompts, num_greedy=_QUESTIONS, tokens=_ANSWER_TOKENS
    )
    counters = {
        name: answered["counters"][name]
        for name in ("executor", "kv_read_ratio", "packed_steps", "stock_steps")
    }
    attention_ms = decode_watch.step_times(folder, mode)["attention_ms"]
    return {"attention_ms": attention_ms, "step_us": answered["step_us"], "counters": counters}
