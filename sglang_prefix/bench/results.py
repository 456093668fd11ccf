"""Result files of the bench commands: one JSON file per run, and what it was measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "SCHEMA", "environment", "read_result", "write_result", "write_whole"]

SCHEMA = 1
KINDS = ("bench-kernel", "bench-serving")
_PACKAGES = ("sglang", "torch", "triton", "sglang-prefix")
_ROOT = Path(__file__).parents[2]


def write_result(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write a result file whole or not at all: to a file beside it, which then takes its place.

    Args:
        path: where; its folder is made if it is not there.
        data: with "schema", "kind" and "cells", as :func:`read_result` asks for.

    Raises:
        OSError: the folder or the file cannot be written.
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    target = Path(path)
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, text)


def write_whole(target: Path, text: str) -> None:
    """Write a text file whole or not at all: to a file beside it, which then takes its place.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def read_result(path: str | os.PathLike[str], kind: str | None = None) -> dict[str, Any]:
    """Read a result file.

    Args:
        path: the file.
        kind: the kind that it must have; None for any of :data:`KINDS`.

    Raises:
        ValueError: it cannot be read or is not a result file; one line with its name and why.
    """
    legal = KINDS if kind is None else (kind,)
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a result file: it is not text") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path} is not a result file: {error.msg} at {where}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a result file: it holds no JSON object")
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema is {data.get('schema')!r}; legal: {SCHEMA}")
    if data.get("kind") not in legal:
        names = ", ".join(map(repr, legal))
        raise ValueError(f"{path}: kind is {data.get('kind')!r}; legal: {names}")
    cells = data.get("cells")
    if not isinstance(cells, list) or not all(isinstance(c, dict) and "name" in c for c in cells):
        raise ValueError(f'{path}: "cells" is not a list of objects with a "name"')
    return data


def environment() -> dict[str, Any]:
    """What numbers of this process are measured on and with; imports torch.

    Returns:
        "device" ("cuda" or "cpu"), "cpu" and "gpu" names, "threads" of torch, "python",
        "versions" of packages (None for one that is not installed) and the "commit" of a checkout
        (None for an installed wheel).
    """
    import torch

    has_gpu = torch.cuda.is_available()
    return {
        "device": "cuda" if has_gpu else "cpu",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    # In site-packages a repository above would be someone else's.
    if not (_ROOT / ".git").exists():
        return None

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(
                ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    commit = git("rev-parse", "--short", "HEAD")
    return commit and commit + ("-dirty" if git("status", "--porcelain", "-uno") else "")
