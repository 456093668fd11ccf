"""`sglang-prefix doctor`: can the backend be used on this host, and if not, why not.

Run as a module, this prints as one JSON object what is found in the environment that SGLang would
get. A process of its own, because loading SGLang and its plugins cannot be undone, and because its
environment must be set before.
"""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distributions, entry_points, version
from typing import Any

import typer

from sglang_prefix.cli.options import JsonOption
from sglang_prefix.cli.output import console, say, write_json
from sglang_prefix.config import BACKEND_NAME
from sglang_prefix.sglang_environment import SglKernel, find_sgl_kernel, sglang_environment

__all__ = ["METADATA_CHECKS", "SGLANG_CHECKS", "CheckError", "check_kernel", "doctor"]

# Importing SGLang takes 5 to 40 s; beyond this something hangs.
_TIMEOUT_S = 300
_EXEC = "sglang-prefix exec -- …"
_PACKAGES = ("sglang-prefix", "sglang", "torch", "triton", "transformers", "sglang-kernel")
_PLUGIN_GROUP = "sglang.srt.plugins"
_REINSTALL = "install sglang-prefix again into this environment"


class CheckError(Exception):
    """A check found something wrong: what, and what to do about it."""


def doctor(json_file: JsonOption = None) -> None:
    """Say whether SGLang can use the backend here. Ends with 0 if so, else with 1."""
    kernel = find_sgl_kernel()
    report = _examine(kernel)
    kind = report["device"]["kind"]
    checks = [_result("sgl_kernel", lambda: check_kernel(kernel, kind)), *report["checks"]]
    failed = [
        ": ".join(filter(None, [check["name"], check["detail"], check["advice"]]))
        for check in checks
        if not check["ok"]
    ]
    needs_exec = kernel.kind != "real"
    usable = f"on the CPU, in processes started with `{_EXEC}`" if needs_exec else ""
    result = {
        "usable": not failed,
        "reason": "; ".join(failed) or usable or "everything it needs is in place",
        "needs_exec": needs_exec,
        "sgl_kernel": kernel.kind,
        **report,
        "checks": checks,
    }
    _print_report(result, json_file)
    write_json(result, json_file)
    raise typer.Exit(0 if result["usable"] else 1)


def _examine(kernel: SglKernel) -> dict[str, Any]:
    """Run the checks in the environment that `exec` would provide."""
    command = [sys.executable, "-P", "-m", __name__]
    options: Any = {"capture_output": True, "text": True, "errors": "replace"}
    environment = sglang_environment(kernel)
    try:
        probe = subprocess.run(command, env=environment, timeout=_TIMEOUT_S, **options)
    except subprocess.TimeoutExpired:
        detail = f"no answer within {_TIMEOUT_S} s"
    else:
        if probe.returncode == 0:
            report: dict[str, Any] = json.loads(probe.stdout)
            if not all(check["ok"] for check in report["checks"]):
                # SGLang only logs why it skipped a plugin.
                typer.echo(probe.stderr.rstrip(), err=True)
            return report
        last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        detail = f"status {probe.returncode}: {last}"
    advice = "try `python -c 'import sglang'` for the cause"
    check = {"name": "SGLang process", "ok": False, "detail": detail, "advice": advice}
    return {"versions": {}, "device": {"kind": "unknown", "name": ""}, "checks": [check]}


def _print_report(result: dict[str, Any], json_file: str | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="sglang-prefix doctor", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for name, number in result["versions"].items():
        table.add_row(name, "", number or "not installed")
    table.add_row("device", "", " ".join(filter(None, result["device"].values())))
    table.add_section()
    for check in result["checks"]:
        mark = "[green]ok[/green]" if check["ok"] else "[red]no[/red]"
        finding = ". ".join(filter(None, [check["detail"], check["advice"]]))
        table.add_row(check["name"], mark, escape(finding))
    out = console(json_file)
    out.print(table)
    say(out, f"usable: {'yes, ' if result['usable'] else 'no, because '}{result['reason']}")


def _result(name: str, check: Callable[[], str]) -> dict[str, Any]:
    """What a check found: `advice` says what to do about it and is empty when all is well."""
    try:
        return {"name": name, "ok": True, "detail": check(), "advice": ""}
    except CheckError as fault:
        detail, advice = fault.args
    except Exception as error:  # anything that SGLang raises is the finding
        detail, advice = f"{type(error).__name__}: {error}", _REINSTALL
    return {"name": name, "ok": False, "detail": detail, "advice": advice}


def check_kernel(kernel: SglKernel, device_kind: str) -> str:
    """Which `sgl_kernel` SGLang gets.

    Raises:
        CheckError: it is one without kernels, on a GPU.
    """
    if kernel.kind == "real":
        return "the real one loads"
    if kernel.kind == "stand-in":
        return "our stand-in for the CPU is on the path"
    problem = "not installed"
    if kernel.kind == "broken":
        problem = f"the installed one does not load ({kernel.detail})"
    if device_kind == "cuda":
        # The stand-in would hide the GPU from a user who surely wants it.
        raise CheckError(problem, "install the sglang-kernel that fits SGLang")
    return f"{problem}; `{_EXEC}` puts our CPU stand-in in its place"


# What follows runs in the process of its own.


def _torch() -> str:
    places = {
        (found.version, str(found.locate_file("")))
        for found in distributions()
        if (found.metadata["Name"] or "").lower() == "torch"
    }
    listing = ", ".join(f"{number} in {folder}" for number, folder in sorted(places))
    if len(places) != 1:
        raise CheckError(
            f"{len(places)} installations: {listing}" if places else "not installed",
            "use a fresh environment in which only SGLang decides about torch",
        )
    return listing


def _sglang_version() -> str:
    from prefix_patches.versions import SUPPORTED_SGLANG, check_sglang_version

    try:
        return f"{check_sglang_version()} is in {SUPPORTED_SGLANG}"
    except RuntimeError as error:
        raise CheckError(str(error), f"install sglang{SUPPORTED_SGLANG}") from None


def _entry_point() -> str:
    from sglang_prefix.plugin import register

    expected = f"{register.__module__}:{register.__name__}"
    values = [entry.value for entry in entry_points(group=_PLUGIN_GROUP, name=BACKEND_NAME)]
    if expected not in values:
        found = f"found {', '.join(values)}" if values else "not found"
        raise CheckError(f"{expected} {found}", _REINSTALL)
    return f"{BACKEND_NAME} = {expected}"


def _sglang_import() -> str:
    import sglang
    import sglang.srt.server_args

    return str(sglang.__file__)


def _registration() -> str:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    from sglang_prefix.plugin import create_prefix_backend

    load_plugins()
    needed = {
        "the choice of the name": BACKEND_NAME in ATTENTION_BACKEND_CHOICES,
        "our factory": ATTENTION_BACKENDS.get(BACKEND_NAME) is create_prefix_backend,
    }
    missing = [what for what, is_there in needed.items() if not is_there]
    if missing:
        raise CheckError(
            f"SGLang loaded its plugins, but {' and '.join(missing)} is missing",
            "see the log above; SGLANG_PLUGINS, where set, must list prefix, and "
            "SGLANG_PLATFORM must not exclude sglang-prefix",
        )
    return f"--attention-backend {BACKEND_NAME} has a factory"


def _patched_symbols() -> str:
    from prefix_patches.install import missing_attributes, missing_symbols

    missing = [*missing_symbols(), *missing_attributes()]
    if missing:
        raise CheckError(
            f"this SGLang lacks {', '.join(missing)}",
            "install another SGLang release of the supported range, or a newer sglang-prefix",
        )
    return "all present"


def _backend() -> str:
    from sglang_prefix.backend import backend
    from sglang_prefix.config import PrefixConfig

    try:
        return f"{backend.__name__} imports, {PrefixConfig.from_env()}"
    except ValueError as error:
        raise CheckError(str(error), "correct the environment variable") from None


def _executor() -> str:
    """What `auto` takes here. Where it is not the fastest, the server works all the same."""
    import torch

    from prefix_kernels.executor import choose_executor, why_torch
    from prefix_kernels.native_library import describe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = (device, torch.bfloat16, torch.bfloat16)
    name = choose_executor("auto", *tensors)
    about = describe() if name == "native" else why_torch(*tensors)
    return ", ".join(filter(None, [name, about]))


METADATA_CHECKS = {
    "torch": _torch,
    "SGLang version": _sglang_version,
    "plugin entry point": _entry_point,
}
# Each of these needs the one before: the first failure explains the rest.
SGLANG_CHECKS = {
    "SGLang import": _sglang_import,
    "registration": _registration,
    "patched symbols": _patched_symbols,
    "backend": _backend,
    "executor": _executor,
}


def _run_checks() -> list[dict[str, Any]]:
    found = [_result(name, check) for name, check in METADATA_CHECKS.items()]
    for name, check in SGLANG_CHECKS.items():
        found.append(_result(name, check))
        if not found[-1]["ok"]:
            break
    return found


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _device() -> dict[str, str]:
    try:
        import torch
    except ImportError as error:
        return {"kind": "unknown", "name": f"torch does not import: {error}"}
    if torch.cuda.is_available():
        return {"kind": "cuda", "name": torch.cuda.get_device_name()}
    return {"kind": "cpu", "name": platform.processor() or platform.machine()}


if __name__ == "__main__":
    # SGLang and what it imports may print; standard output belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        _report = {"versions": _versions(), "device": _device(), "checks": _run_checks()}
    print(json.dumps(_report))
