"""The workloads of `bench serving`: read from a data file, checked before anything runs.

A trace in Mooncake's format has no text: every block id gets one fixed block of random tokens, so
that requests which begin with the same ids begin with the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from sglang_prefix.bench.workloads.traces import BLOCK_TOKENS, TraceRequest

__all__ = [
    "DRIVERS",
    "GROUPS",
    "REGISTRY",
    "Forks",
    "Rollouts",
    "Trace",
    "TraceRow",
    "Workload",
    "load_workloads",
    "scale_trace",
]

REGISTRY = Path(__file__).with_suffix(".json")
GROUPS = ("shared-prefix", "random", "trace", "rollouts", "forks")
_BENCH_SERVING = "bench_serving"


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace replay.

    Attributes:
        requests: the first so many of the trace.
        block_tokens: tokens of one of its blocks of 512; all lengths shrink in proportion.
        max_prompt_tokens, max_output_tokens: longer ones are cut.
        speed: how many times faster than recorded requests arrive.
        max_concurrency: requests in flight at most; later ones wait.
    """

    requests: int
    block_tokens: int
    max_prompt_tokens: int
    max_output_tokens: int
    speed: float
    max_concurrency: int


@dataclass(frozen=True, slots=True)
class Rollouts:
    """``samples`` answers to each of ``prompts`` random prompts; lengths in tokens."""

    prompts: int
    samples: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Forks:
    """A tree of text: ``documents``, ``sections`` of each, ``questions`` to each section.

    Lengths in tokens; of text at least so many, since it ends with a sentence.
    """

    documents: int
    sections: int
    questions: int
    document_tokens: int
    section_tokens: int
    output_tokens: int


# What the parameters of a driver are; flags of SGLang's tool are read by that tool.
DRIVERS: dict[str, type[Trace | Rollouts | Forks] | None] = {
    _BENCH_SERVING: None,
    "trace": Trace,
    "rollouts": Rollouts,
    "forks": Forks,
}


@dataclass(frozen=True, slots=True)
class Workload:
    """One workload at one size.

    Attributes:
        name: unique.
        group: one of ``GROUPS``.
        driver: one of ``DRIVERS``.
        about: a few words.
        parameters: what the driver takes.
    """

    name: str
    group: str
    driver: str
    about: str
    parameters: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def load_workloads(
    path: Path = REGISTRY,
    *,
    quick: bool,
    names: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Workload]:
    """Read workloads.

    Args:
        path: a file like `workloads.json` here.
        quick: the small size.
        names: which; all if empty.
        overrides: by driver, parameters to replace.

    Raises:
        ValueError: the file cannot be read, holds no such workloads, or a name is not in it.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["workloads"]
        found = [
            _workload(entry, "quick" if quick else "full", overrides or {}) for entry in entries
        ]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error.msg} at line {error.lineno}") from None
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a file of workloads: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    known = [workload.name for workload in found]
    if not known or len(set(known)) < len(known):
        raise ValueError(f"{path}: no workloads, or two of one name")
    for name in names:
        if name not in known:
            raise ValueError(f"--workload is {name}; legal: {', '.join(known)}")
    return [workload for workload in found if not names or workload.name in names]


def _workload(
    entry: Mapping[str, Any], size: str, overrides: Mapping[str, Mapping[str, Any]]
) -> Workload:
    name, driver, group = entry["name"], entry["driver"], entry["group"]
    if driver not in DRIVERS:
        raise ValueError(f"workload {name}: driver is {driver!r}; legal: {', '.join(DRIVERS)}")
    if group not in GROUPS:
        raise ValueError(f"workload {name}: group is {group!r}; legal: {', '.join(GROUPS)}")
    parameters = {**entry[size], **overrides.get(driver, {})}
    shape = DRIVERS[driver]
    if shape is not None:
        _check(name, parameters, shape)
    return Workload(name, group, driver, entry["about"], parameters)


def _check(name: str, parameters: Mapping[str, Any], shape: type[Trace | Rollouts | Forks]) -> None:
    wanted = {field.name: field.type for field in fields(shape)}
    if parameters.keys() != wanted.keys():
        raise ValueError(f"workload {name}: its parameters must be {', '.join(wanted)}")
    for key, value in parameters.items():
        whole = wanted[key] == "int"
        number = type(value) is int or (not whole and isinstance(value, float))
        if not number or not 0 < value < float("inf"):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"workload {name}: {key} is {value!r}; legal: {kind} above 0")
    if shape is Trace and parameters["block_tokens"] > BLOCK_TOKENS:
        tokens = parameters["block_tokens"]
        raise ValueError(f"workload {name}: block_tokens is {tokens}; legal: 1 to {BLOCK_TOKENS}")


@dataclass(slots=True)
class TraceRow:
    """A request to send: token ids, tokens to generate, and when to send it in ms."""

    prompt: list[int]
    output_len: int
    timestamp: float


def scale_trace(
    trace: Sequence[TraceRequest],
    token_ids: Sequence[int],
    *,
    block_tokens: int,
    max_prompt_tokens: int,
    max_output_tokens: int,
    seed: int,
) -> list[TraceRow]:
    """Turn a trace into requests with token ids.

    Args:
        trace: requests from `workloads.traces.read_trace`.
        token_ids: ids to draw from.
        block_tokens: tokens of a block, 1 to 512; all lengths shrink in proportion.
        max_prompt_tokens, max_output_tokens: longer prompts lose their end, so that what they share
            stays shared; longer answers end sooner.
        seed: of the blocks; an id's block depends on nothing but the id and this.
    """
    ids = np.asarray(token_ids)
    blocks: dict[int, list[int]] = {}

    def block(hash_id: int) -> list[int]:
        if hash_id not in blocks:
            drawn = np.random.default_rng([seed, hash_id]).integers(len(ids), size=block_tokens)
            blocks[hash_id] = ids[drawn].tolist()
        return blocks[hash_id]

    rows = []
    for request in trace:
        length = min(_scaled(request.input_length, block_tokens), max_prompt_tokens)
        prompt: list[int] = []
        for hash_id in request.hash_ids:
            if len(prompt) >= length:
                break
            prompt += block(hash_id)
        output = min(_scaled(request.output_length, block_tokens), max_output_tokens)
        # Two tokens at least: the first comes from prefill and says nothing about decode.
        rows.append(TraceRow(prompt[:length], max(output, 2), request.timestamp))
    return rows


def _scaled(tokens: int, block_tokens: int) -> int:
    return max(1, round(tokens * block_tokens / BLOCK_TOKENS))
