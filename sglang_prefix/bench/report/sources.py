"""Result files of a report: which there are, and that each holds what its kind should."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from sglang_prefix.bench.report import schema
from sglang_prefix.bench.results import SCHEMA

__all__ = ["CPU", "KINDS", "ResultError", "Source", "check_result", "check_type", "find_sources"]

# The file of benchmarks/cpu.py says its kind by its keys.
CPU = "bench-cpu"
_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    "bench-kernel": TypeAdapter(schema.KernelResult),
    "bench-serving": TypeAdapter(schema.ServingResult),
    "gpu-bench": TypeAdapter(schema.GpuResult),
    "gpu-serve": TypeAdapter(schema.GpuResult),
    "gpu-tune": TypeAdapter(schema.GpuResult),
    "gpu-check": TypeAdapter(schema.GpuResult),
    CPU: TypeAdapter(schema.CpuResult),
}
# In the order in which a page shows them.
KINDS = tuple(_ADAPTERS)


class ResultError(ValueError):
    """A result file, or the lack of one, keeps the page from being made; one line that says why."""


@dataclass(frozen=True, slots=True)
class Source:
    """One result file.

    Attributes:
        name: its path below the folder that was given, or its own name.
        path: where it is.
        kind: one of :data:`KINDS`.
        data: what it holds, checked against the kind's type in `schema`.
    """

    name: str
    path: Path
    kind: str
    data: Any

    @property
    def when(self) -> str:
        """ISO time or date of the run."""
        return str(self.data.get("created") or self.data.get("date"))


def find_sources(places: Sequence[str | os.PathLike[str]]) -> tuple[list[Source], list[str]]:
    """Read result files, and those anywhere below folders.

    A file below a folder that does not claim to be a result, such as a model's configuration, is
    left out; one that cannot be read may be half a result, and is not.

    Returns:
        The files, newest first within each kind, and the names of those that were left out.

    Raises:
        ResultError: there is none, or one cannot be read or does not hold what its kind should; one
            line that names it.
    """
    files: dict[Path, tuple[str, bool]] = {}
    for place in map(Path, places):
        for path, name, is_named in _files_at(place):
            known = files.get(path.resolve(), (name, False))
            files[path.resolve()] = (known[0], is_named or known[1])
    found, left_out = [], []
    for path, (name, is_named) in files.items():
        data = _parse(path)
        if is_named or _claims(data):
            found.append(Source(name, path, check_result(path, data), data))
        else:
            left_out.append(name)
    if not found:
        others = f"; these are none: {', '.join(left_out)}" if left_out else ""
        where = ", ".join(map(str, places))
        raise ResultError(f"{where}: no result file (*.json) in this folder{others}")
    found.sort(key=lambda source: (source.when, source.name), reverse=True)
    return sorted(found, key=lambda source: KINDS.index(source.kind)), left_out


def _files_at(place: Path) -> list[tuple[Path, str, bool]]:
    """Path, name, and whether the user named this very file."""
    if place.is_dir():
        below = sorted(path for path in place.rglob("*.json") if path.is_file())
        return [(path, path.relative_to(place).as_posix(), False) for path in below]
    if not place.exists():
        raise ResultError(f"{place}: no such file or folder")
    return [(place, place.name, True)]


def _claims(data: Any) -> bool:
    return isinstance(data, dict) and ("kind" in data or "attention" in data)


def check_result(path: Path, data: Any) -> str:
    """Check that a parsed file is a whole result file; return its kind.

    Raises:
        ResultError: it is not; one line that names the file and the first thing that is wrong.
    """
    if not isinstance(data, dict):
        raise ResultError(f"{path} is not a result file: it holds no JSON object")
    kind = data.get("kind", CPU if "attention" in data else None)
    if not isinstance(kind, str) or kind not in _ADAPTERS:
        legal = ", ".join(KINDS[:-1])
        raise ResultError(f"{path} is not a result file: its kind is {kind!r}; legal: {legal}")
    if kind != CPU and data.get("schema") != SCHEMA:
        raise ResultError(f"{path}: schema is {data.get('schema')!r}; legal: {SCHEMA}")
    check_type(path, data, _ADAPTERS[kind], f"is not a whole {kind} file")
    cells = data["cells"] if kind.startswith("bench-") and kind != CPU else []
    if twice := _named_twice(cells):
        raise ResultError(f"{path} is not a whole {kind} file: two cells are named {twice!r}")
    return kind


def check_type(path: Path, data: Any, adapter: TypeAdapter[Any], complaint: str) -> None:
    """Check a parsed file against a type.

    Raises:
        ResultError: it is not of it; one line: the file, the complaint, the first thing wrong.
    """
    try:
        adapter.validate_python(data, strict=True)
    except ValidationError as error:
        raise ResultError(f"{path} {complaint}: {_first(error)}") from None


def _parse(path: Path) -> Any:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise ResultError(f"{path} is not a result file: it is empty")
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ResultError(f"{path} is not JSON: {error}") from None


def _named_twice(cells: Sequence[Any]) -> str | None:
    names = [cell["name"] for cell in cells]
    return next((name for name in names if names.count(name) > 1), None)


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, and how many more there are."""
    first, *others = error.errors(include_url=False, include_context=False, include_input=False)
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    return f"{where.lstrip('.')}: {first['msg']}{more}"
