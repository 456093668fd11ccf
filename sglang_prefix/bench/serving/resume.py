"""What `bench serving --resume` takes up: a result file and its tokens, checked.

Of a cell only its runs are taken; what they come to is concluded again. So this describes all that
is believed of the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.serving.cells import new_cell, sum_up
from sglang_prefix.bench.serving.workloads import Workload

__all__ = ["take_up"]

# Numbers of one file must come from one machine, and one state of the software.
_SAME = ("device", "cpu", "gpu", "threads", "versions", "commit")
_KEPT = ("created", "command", "environment", "dtype", "stock", "prefix", "wall_s")

Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Side = Literal["stock", "prefix"]


class _Quantiles(TypedDict):
    median: Number
    p99: Number


class _Steps(TypedDict):
    packed: Count
    stock: Count
    fallback: Count


class _Counters(TypedDict):
    steps: _Steps
    kv_tokens_read: Count
    kv_tokens_logical: Count
    reasons: dict[str, Count]


class _Run(TypedDict):
    ttft_ms: _Quantiles | None
    tpot_ms: _Quantiles | None
    itl_ms: _Quantiles | None
    output_tokens_per_s: Positive
    requests_per_s: Positive
    duration_s: Positive
    counters: _Counters | None
    load_per_cpu: NotRequired[Number]


class _Raw(TypedDict):
    runs: Annotated[list[_Run], Field(min_length=1)]


class _Measured(TypedDict):
    raw: _Raw
    flags: NotRequired[list[str] | None]


class _Cell(TypedDict):
    name: str
    requests: Count
    sides: dict[Side, _Measured]


class _Server(TypedDict):
    server_args: list[str]
    model: NotRequired[str | None]
    dtype: NotRequired[str | None]
    max_total_num_tokens: NotRequired[Count | None]


class _Environment(TypedDict):
    device: str
    cpu: str
    gpu: str | None
    threads: int
    versions: dict[str, str | None]
    commit: str | None


class _Result(TypedDict):
    created: str
    command: list[str]
    environment: _Environment
    dtype: str | None
    stock: _Server
    prefix: _Server
    wall_s: NotRequired[Number]
    settings: dict[str, Any]
    cells: list[_Cell]


class _Said(TypedDict):
    fingerprint: str
    tokens: list[list[int]]
    texts: list[list[str]]


_RESULT = TypeAdapter(_Result)
_EVIDENCE = TypeAdapter(dict[str, dict[Side, _Said]])


def take_up(
    result: Path,
    evidence: Path,
    new: Mapping[str, Any],
    workloads: Sequence[Workload],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result of an interrupted run, to go on with, and its evidence.

    Args:
        result: its result file.
        evidence: the file of its tokens.
        new: the result of a new run with the options of now.
        workloads: of now.

    Raises:
        ValueError: a file cannot be read or does not hold what it should, or the run had other
            settings or another machine or software; one line that names the file.
    """
    data = read_result(result, new["kind"])
    _check(result, _RESULT, data)
    for name, now in new["settings"].items():
        # Through JSON, as the file has been.
        if json.loads(json.dumps(now)) != data["settings"].get(name):
            raise ValueError(f"--resume: {result} was made with another {name}")
    for name in _SAME:
        was, now = data["environment"][name], new["environment"][name]
        if was != now:
            raise ValueError(f"--resume: {result}: its {name} is {was!r}, here it is {now!r}")
    said = _read_evidence(evidence)
    found = {cell["name"]: cell for cell in data["cells"]}
    names = [workload.name for workload in workloads]
    if len(found) != len(data["cells"]) or list(found) != names:
        raise ValueError(f"--resume: {result}: its cells are not {', '.join(names)}")
    _check_evidence(evidence, found, said)
    kept = {name: data[name] for name in _KEPT if name in data}
    return {**new, **kept, "cells": [_cell(w, found[w.name]) for w in workloads]}, said


def _cell(workload: Workload, found: Mapping[str, Any]) -> dict[str, Any]:
    sides = {
        side: sum_up(one["raw"]["runs"]) | {"flags": one.get("flags")}
        for side, one in found["sides"].items()
    }
    return new_cell(workload) | {"requests": found["requests"], "sides": sides}


def _read_evidence(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--resume: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--resume: {path} is not JSON: {error}") from None
    _check(path, _EVIDENCE, found)
    return dict(found)


def _check_evidence(path: Path, cells: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    for name, cell in cells.items():
        for side, one in cell["sides"].items():
            found = said.get(name, {}).get(side, {"texts": [], "tokens": []})
            answers = {len(found["tokens"]), *map(len, found["texts"])}
            if len(found["texts"]) < len(one["raw"]["runs"]) or len(answers) > 1:
                raise ValueError(f"--resume: {path} lacks what {side} said in {name}")


def _check(path: Path, adapter: TypeAdapter[Any], data: Any) -> None:
    try:
        adapter.validate_python(data, strict=True)
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_context=False)
        where = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
        )
        more = f" (and {len(others)} more)" if others else ""
        raise ValueError(
            f"--resume: {path} is not whole: {where.lstrip('.') or 'it'}: {first['msg']}{more}"
        ) from None
