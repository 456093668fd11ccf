"""The workloads of `bench serving`: read from a data file, checked before anything runs.

A trace in Mooncake's format has no text: every block id gets one fixed block of random tokens, so
that requests which begin with the same ids begin with the same tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from sglang_prefix.bench.results import check_type
from sglang_prefix.bench.workloads.traces import BLOCK_TOKENS, TraceRequest
from sglang_prefix.files import read_json

__all__ = [
    "REGISTRY",
    "Forks",
    "Questions",
    "Rollouts",
    "Trace",
    "Workload",
    "load_workloads",
    "scale_trace",
]

REGISTRY = Path(__file__).with_suffix(".json")

# Of each number; then of all tokens, and all answers, of a workload: requests are made in memory.
_Count = Annotated[int, Field(gt=0, le=1 << 20)]
_MAX_TOKENS, _MAX_ANSWERS = 1 << 26, 1 << 16
_closed = with_config({"extra": "forbid"})


@_closed
class Trace(TypedDict):
    """A trace replay.

    Attributes:
        requests: the first so many of the trace.
        block_tokens: tokens of one of its blocks of 512; all lengths shrink in proportion.
        max_prompt_tokens, max_output_tokens: longer ones are cut.
        speed: how many times faster than recorded requests arrive.
        max_concurrency: requests in flight at most; later ones wait.
    """

    requests: _Count
    block_tokens: Annotated[int, Field(gt=0, le=BLOCK_TOKENS)]
    max_prompt_tokens: _Count
    max_output_tokens: _Count
    speed: Annotated[float, Field(ge=1e-3, le=1e6)]
    max_concurrency: _Count


@_closed
class Rollouts(TypedDict):
    """``samples`` answers to each of ``prompts`` random prompts; lengths in tokens."""

    prompts: _Count
    samples: _Count
    prompt_tokens: _Count
    output_tokens: _Count


@_closed
class Questions(TypedDict):
    """``questions`` of random tokens about each of ``documents``, which are cached before.

    Lengths in tokens.
    """

    documents: _Count
    questions: _Count
    document_tokens: _Count
    question_tokens: _Count
    output_tokens: _Count


@_closed
class Forks(TypedDict):
    """A tree of text: ``documents``, ``sections`` of each, ``questions`` to each section.

    Lengths in tokens; of text at least so many, since it ends with a sentence.
    """

    documents: _Count
    sections: _Count
    questions: _Count
    document_tokens: _Count
    section_tokens: _Count
    output_tokens: _Count


# SGLang's tool reads its flags itself. A number may not hide in a text, which could be any.
_Flag = (
    bool
    | Annotated[int, Field(ge=0, le=1 << 20)]
    | Annotated[float, Field(ge=0, le=1e6)]
    | Annotated[str, Field(max_length=4096, pattern="^[A-Za-z_/]")]
)
_FlagName = Annotated[str, Field(pattern="^[a-z][a-z0-9-]{0,63}$")]

_PARAMETERS: dict[str, Any] = {
    "bench_serving": dict[_FlagName, _Flag],
    "trace": Trace,
    "rollouts": Rollouts,
    "questions": Questions,
    "forks": Forks,
}


class _Entry(TypedDict):
    """A workload in both sizes."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    group: Literal["shared-prefix", "random", "trace", "rollouts", "questions", "forks"]
    driver: Literal["bench_serving", "trace", "rollouts", "questions", "forks"]
    about: str
    full: dict[str, Any]
    quick: dict[str, Any]


class _File(TypedDict):
    workloads: Annotated[list[_Entry], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Workload:
    """One workload at one size; ``parameters`` are what its driver takes."""

    name: str
    group: str
    driver: str
    parameters: Mapping[str, Any]


def load_workloads(
    path: Path = REGISTRY,
    *,
    quick: bool,
    names: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> list[Workload]:
    """Read workloads.

    Args:
        path: a file like `workloads.json` here.
        quick: the small size.
        names: which; all if empty.
        overrides: parameters of trace replays to replace.

    Raises:
        ValueError: the file cannot be read, holds no such workloads, or a name is not in it.
    """
    try:
        data = read_json(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    check_type(path, data, TypeAdapter(_File), "is not a file of workloads")
    found = []
    for entry in data["workloads"]:
        name, driver = entry["name"], entry["driver"]
        parameters = entry["quick" if quick else "full"]
        if driver == "trace":
            parameters = parameters | (overrides or {})
        check_type(path, parameters, TypeAdapter(_PARAMETERS[driver]), f"workload {name}")
        _check_size(f"{path} workload {name}", driver, parameters)
        found.append(Workload(name, entry["group"], driver, parameters))
    known = [workload.name for workload in found]
    if len(set(known)) < len(known):
        raise ValueError(f"{path}: two workloads of one name")
    for name in names:
        if name not in known:
            raise ValueError(f"--workload is {name}; legal: {', '.join(known)}")
    return [workload for workload in found if not names or workload.name in names]


def _check_size(where: str, driver: str, parameters: Mapping[str, Any]) -> None:
    """Raise ValueError if the requests are too many to be made; so may products of numbers be."""

    def product(*names: str) -> int:
        return prod(int(parameters.get(name, 0)) for name in names)

    tree = ("documents", "sections", "questions")
    groups = ("gsp-num-groups", "gsp-prompts-per-group")
    answers = {
        "trace": product("requests"),
        "rollouts": product("prompts", "samples"),
        "questions": product("documents", "questions"),
        "forks": product(*tree),
        "bench_serving": product("num-prompts") + product(*groups),
    }[driver]
    tokens = {
        "trace": product("requests", "max_prompt_tokens"),
        "rollouts": product("prompts", "prompt_tokens"),
        "questions": product("documents", "questions", "question_tokens")
        + product("documents", "questions", "document_tokens"),
        "forks": product("documents", "document_tokens") + product(*tree[:2], "section_tokens"),
        "bench_serving": product("num-prompts", "random-input-len")
        + product("gsp-num-groups", "gsp-system-prompt-len")
        + product(*groups, "gsp-question-len"),
    }[driver]
    for what, number, most in (("answers", answers, _MAX_ANSWERS), ("tokens", tokens, _MAX_TOKENS)):
        if number > most:
            raise ValueError(f"{where}: {number:,} {what} in all; legal: up to {most:,}")


def scale_trace(
    trace: Sequence[TraceRequest], token_ids: Sequence[int], shape: Trace, seed: int
) -> list[tuple[list[int], int, float]]:
    """Turn a trace into requests with token ids: prompt, tokens to generate, when to send it in ms.

    Args:
        trace: requests from `workloads.traces.read_trace`.
        token_ids: ids to draw from.
        shape: of the replay. Longer prompts lose their end, so that what they share stays shared.
        seed: of the blocks; an id's block depends on nothing but the id and this.
    """
    block_tokens, ids = shape["block_tokens"], np.asarray(token_ids)

    @functools.cache
    def block(hash_id: int) -> list[int]:
        drawn = np.random.default_rng([seed, hash_id]).integers(len(ids), size=block_tokens)
        tokens: list[int] = ids[drawn].tolist()
        return tokens

    def scaled(tokens: int) -> int:
        return max(1, round(tokens * block_tokens / BLOCK_TOKENS))

    rows: list[tuple[list[int], int, float]] = []
    for request in trace:
        length = min(scaled(request.input_length), shape["max_prompt_tokens"])
        ids_used = request.hash_ids[: -(-length // block_tokens)]
        prompt = [token for hash_id in ids_used for token in block(hash_id)]
        output = min(scaled(request.output_length), shape["max_output_tokens"])
        # Two tokens at least: the first comes from prefill and says nothing about decode.
        rows.append((prompt[:length], max(output, 2), request.timestamp))
    return rows
