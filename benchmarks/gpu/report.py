"""A run of cells within a time budget: what is written after each, and how it is taken up again."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

__all__ = ["NOT_RUN", "CellRun", "arguments", "device_of", "print_table"]

RESULTS = Path(__file__).parents[1] / "results"
DRY_RESULTS = Path(__file__).parents[2] / "build"
NOT_RUN = "not run"
_SCHEMA = 1
_PACKAGES = ("numpy", "sglang", "sglang-kernel", "sgl-kernel", "flashinfer-python")
_CLOCKS = (
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "power.draw,power.limit,temperature.gpu,ecc.mode.current"
)


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all entry points have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--budget-s", type=float, default=540, help="stop before this many seconds")
    parser.add_argument("--resume", type=Path, help="result file to complete")
    parser.add_argument("--only", default="", help="regular expression that a cell's name contains")
    parser.add_argument("--out", type=Path, help="result file instead of the dated one")
    parser.add_argument("--seed", type=int, help="of all inputs; default: a fresh one")
    parser.add_argument("--list", action="store_true", help="print the cells in order, run none")
    parser.add_argument(
        "--dry", action="store_true", help="tiny shapes in Triton's interpreter: proves no speed"
    )
    return parser


def device_of(options: argparse.Namespace) -> torch.device:
    """The GPU, or the CPU for a dry run.

    Raises:
        SystemExit: there is no GPU, or a dry run without the interpreter.
    """
    if options.dry:
        if not triton.knobs.runtime.interpret:
            raise SystemExit("--dry needs Triton's interpreter: set TRITON_INTERPRET=1")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here; legal without one: --dry")
    return torch.device("cuda", torch.cuda.current_device())


class CellRun:
    """Results of cells, kept in one JSON file.

    Args:
        kind: "gpu-bench", "gpu-check", "gpu-serve" or "gpu-tune".
        names: all cells in order, whether or not this call runs them.
        options: parsed arguments.
        device: where they run.

    Raises:
        SystemExit: the file to resume is of another kind, commit, device or set of cells.
    """

    def __init__(
        self, kind: str, names: Sequence[str], options: argparse.Namespace, device: torch.device
    ) -> None:
        self._began = time.perf_counter()
        self._options = options
        self._only = re.compile(options.only)
        date = datetime.date.today().isoformat()
        self.report: dict[str, Any] = {
            "schema": _SCHEMA,
            "kind": kind,
            "dry": options.dry,
            "date": date,
            "commit": _commit(),
            "seed": _seed(options.seed),
            "device": _device_name(device),
            "order": list(names),
            "runs": [],
            "cells": {name: {"status": NOT_RUN} for name in names},
        }
        if options.resume:
            self._take_up(options.resume)
        folder = DRY_RESULTS if options.dry else RESULTS / self.report["device"]
        prefix = "" if kind == "gpu-bench" else kind.removeprefix("gpu-") + "-"
        dry = "dry-" if options.dry else ""
        dated = folder / f"{dry}{prefix}{date}-{self.report['commit']}.json"
        self.path: Path = options.out or options.resume or dated
        self.report["runs"].append({"environment": _environment(device), "cells": []})
        print(f"{kind} on {self.report['device']}, seed {self.seed}{', dry' * options.dry}")

    @property
    def seed(self) -> int:
        """Seed of all inputs."""
        return int(self.report["seed"])

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """Results by name."""
        cells: dict[str, dict[str, Any]] = self.report["cells"]
        return cells

    def this_run(self) -> dict[str, Any]:
        """What belongs to this call alone."""
        run: dict[str, Any] = self.report["runs"][-1]
        return run

    def run(
        self,
        cells: Mapping[str, Callable[[], dict[str, Any]]],
        after_each: Callable[[], None] = lambda: None,
        least: Mapping[str, float] | None = None,
        expected: Callable[[str], float] | None = None,
    ) -> None:
        """Run what has not been run, in order, until the next cell might not fit the budget.

        The budget counts from the making of this object.

        Args:
            cells: by name, what returns a cell's result with its "status".
            after_each: called before the file is written.
            least: seconds that a cell may need, where the ones before do not tell.
            expected: seconds that a cell will need, where the ones before say nothing about it; a
                cell that does not fit then leaves its place to the ones after it.
        """
        recent: list[float] = []
        for name, measure in cells.items():
            if self.cells[name]["status"] != NOT_RUN or not self._only.search(name):
                continue
            started = time.perf_counter()
            needs = max([*recent[-3:], (least or {}).get(name, 0.0)])
            if expected is not None:
                needs = expected(name)
            if started - self._began + needs >= self._options.budget_s:
                if expected is not None:
                    continue
                break
            lost = False
            try:
                result = measure()
            except Exception as error:  # the cells after this one are still worth their time
                result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:2000]}
                lost = _is_lost()
            recent.append(time.perf_counter() - started)
            self.cells[name] = {**result, "seconds": recent[-1], "run": len(self.report["runs"])}
            self.this_run()["cells"].append(name)
            print(f"  {result['status']:8} {recent[-1]:6.1f} s  {name}", flush=True)
            if "reason" in result:
                print(f"           {result['reason']}", flush=True)
            after_each()
            self.write()
            if lost:
                print("  the device is lost: nothing more can run in this process")
                break
        self.this_run()["seconds"] = time.perf_counter() - self._began
        self.this_run()["clocks_after"] = _clocks()
        after_each()
        self.write()

    def finish(self) -> int:
        """Say what is left and where the file is; the exit status, 1 for a failure."""
        status = {name: cell["status"] for name, cell in self.cells.items()}
        left = [name for name, state in status.items() if state == NOT_RUN]
        failed = [name for name, state in status.items() if state == "failed"]
        print(f"{len(status) - len(left)} of {len(status)} cells run")
        if left:
            print("not run: " + ", ".join(left))
        if failed:
            print("FAILED: " + ", ".join(failed))
        print(f"written to {self.path}")
        return int(bool(failed))

    def write(self) -> None:
        """Write the file, all of it or nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.report, indent=1, allow_nan=False, default=str) + "\n")
        new.replace(self.path)

    def _take_up(self, path: Path) -> None:
        old = json.loads(path.read_text())
        for name in ("schema", "kind", "dry", "commit", "device", "order"):
            if old[name] != self.report[name]:
                raise SystemExit(
                    f"{path} cannot be resumed: its {name} is {old[name]!r}, here it is "
                    f"{self.report[name]!r}"
                )
        self.report = old


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Plain text: the host may have nothing to draw tables with."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        print("  ".join(cells).rstrip())


def _environment(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "machine": platform.machine(),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "num_sms": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "compute_capability": list(torch.cuda.get_device_capability(device)),
        }
    return found | {"clocks_before": _clocks()}


def _is_lost() -> bool:
    """Whether the GPU no longer answers, as after a kernel that left its memory."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _clocks() -> dict[str, str] | None:
    """What nvidia-smi says, read only; None where it is not."""
    command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(_CLOCKS.split(","), map(str.strip, run.stdout.split(",")), strict=False))


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def _seed(given: int | None) -> int:
    return int.from_bytes(os.urandom(4)) >> 1 if given is None else given


def _commit() -> str:
    def git(*command: str) -> str:
        try:
            run = subprocess.run(["git", *command], capture_output=True, text=True, check=True)
        except (OSError, subprocess.SubprocessError):
            return ""
        return run.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    dirty = git("status", "--porcelain", "-uno")
    return commit + ("-dirty" if dirty else "")
