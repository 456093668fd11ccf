"""Result files of a report: which there are, and that each holds what its kind should."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_prefix.bench.results import KINDS, ResultError, read_result
from sglang_prefix.files import read_json

__all__ = ["Source", "find_sources"]


@dataclass(frozen=True, slots=True)
class Source:
    """One result file.

    Attributes:
        name: its path below the folder that was given, or its own name.
        path: where it is.
        data: what it holds, checked against the type of its kind.
    """

    name: str
    path: Path
    data: dict[str, Any]


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
    files: dict[Path, tuple[Path, str]] = {}  # once each, under the name that was given
    for place in map(Path, places):
        for path, name in _files_at(place):
            files.setdefault(path.resolve(), (path, name))
    named = {Path(place).resolve() for place in places}
    found, left_out = [], []
    for path, (given, name) in files.items():
        if path in named or _may_be_result(given):
            found.append(Source(name, path, read_result(given)))
        else:
            left_out.append(name)
    if not found:
        others = f"; these are none: {', '.join(left_out)}" if left_out else ""
        where = ", ".join(map(str, places))
        raise ResultError(f"{where}: no result file (*.json) in this folder{others}")
    found.sort(key=lambda source: (source.data["created"], source.name), reverse=True)
    return sorted(found, key=lambda source: KINDS.index(source.data["kind"])), left_out


def _files_at(place: Path) -> list[tuple[Path, str]]:
    if place.is_dir():
        below = sorted(path for path in place.rglob("*.json") if path.is_file())
        return [(path, path.relative_to(place).as_posix()) for path in below]
    if not place.exists():
        raise ResultError(f"{place}: no such file or folder")
    return [(place, place.name)]


def _may_be_result(path: Path) -> bool:
    try:
        data = read_json(path)
    except (OSError, ValueError):
        return True
    # "kernels" is what `sglang-prefix kernels --json` writes.
    return isinstance(data, dict) and "kind" in data and data["kind"] != "kernels"
