"""`sglang-prefix doctor`: can the backend be used on this host, and if not, why not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import typer

from sglang_prefix.cli.doctor_checks import Check
from sglang_prefix.cli.exec import SglKernel, find_sgl_kernel, sglang_environment
from sglang_prefix.cli.output import JsonOption, console, write_json

__all__ = ["doctor"]

# Importing SGLang takes 5 to 40 s; beyond this something hangs.
_TIMEOUT_S = 300
_EXEC = "sglang-prefix exec -- …"


def doctor(json_file: JsonOption = None) -> None:
    """Say whether SGLang can use the backend here. Ends with 0 if so, else with 1."""
    kernel = find_sgl_kernel()
    report = _examine(kernel)
    found = [Check(**check) for check in report["checks"]]
    checks = [_kernel_check(kernel, report["device"]["kind"]), *found]
    failed = [
        ": ".join(filter(None, [check.name, check.detail, check.advice]))
        for check in checks
        if not check.ok
    ]
    usable = not failed
    needs_exec = kernel.kind != "real"
    if failed:
        reason = "; ".join(failed)
    elif needs_exec:
        reason = f"on the CPU, in processes started with `{_EXEC}`"
    else:
        reason = "everything it needs is in place"
    result = {
        "usable": usable,
        "reason": reason,
        "needs_exec": needs_exec,
        "sgl_kernel": kernel.kind,
        "device": report["device"],
        "versions": report["versions"],
        "checks": [asdict(check) for check in checks],
    }
    _print_report(result, json_file)
    write_json(result, json_file)
    raise typer.Exit(0 if usable else 1)


def _examine(kernel: SglKernel) -> dict[str, Any]:
    """Run the checks in the environment that `exec` would provide."""
    command = [sys.executable, "-P", "-m", "sglang_prefix.cli.doctor_checks"]
    try:
        probe = subprocess.run(
            command,
            env=sglang_environment(kernel),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return _no_report(f"no answer within {_TIMEOUT_S} s")
    if probe.returncode:
        lines = probe.stderr.strip().splitlines()
        return _no_report(f"status {probe.returncode}: {lines[-1] if lines else 'no message'}")
    report: dict[str, Any] = json.loads(probe.stdout)
    if not all(check["ok"] for check in report["checks"]):
        # SGLang only logs why it skipped a plugin.
        typer.echo(probe.stderr.rstrip(), err=True)
    return report


def _no_report(detail: str) -> dict[str, Any]:
    check = Check("SGLang process", False, detail, "try `python -c 'import sglang'` for the cause")
    return {"versions": {}, "device": {"kind": "unknown", "name": ""}, "checks": [asdict(check)]}


def _kernel_check(kernel: SglKernel, device_kind: str) -> Check:
    match kernel.kind:
        case "real":
            return Check("sgl_kernel", True, "the real one loads")
        case "stand-in":
            return Check("sgl_kernel", True, "our stand-in for the CPU is on the path")
        case "broken":
            problem = f"the installed one does not load ({kernel.detail})"
        case "missing":
            problem = "not installed"
    if device_kind == "cuda":
        # The stand-in would hide the GPU from a user who surely wants it.
        return Check("sgl_kernel", False, problem, "install the sglang-kernel that fits SGLang")
    return Check("sgl_kernel", True, f"{problem}; `{_EXEC}` puts our CPU stand-in in its place")


def _print_report(result: dict[str, Any], json_file: str | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="sglang-prefix doctor", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for name, number in result["versions"].items():
        table.add_row(name, "", number or "not installed")
    device = result["device"]
    table.add_row("device", "", " ".join(filter(None, [device["kind"], device["name"]])))
    table.add_section()
    for check in result["checks"]:
        mark = "[green]ok[/green]" if check["ok"] else "[red]no[/red]"
        finding = ". ".join(filter(None, [check["detail"], check["advice"]]))
        table.add_row(check["name"], mark, escape(finding))
    out = console(json_file)
    out.print(table)
    verdict = "yes, " if result["usable"] else "no, because "
    out.print(f"usable: {verdict}{result['reason']}", markup=False, highlight=False, soft_wrap=True)
