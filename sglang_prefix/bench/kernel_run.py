"""A run of `bench kernel`: cells one after another, the result file whole after each."""

from __future__ import annotations

import datetime
import gc
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from pydantic import TypeAdapter

from sglang_prefix.bench.cells import KernelCell, KernelOptions, kernel_cells
from sglang_prefix.bench.contenders import find_stock
from sglang_prefix.bench.measure import is_out_of_memory, measure_cell, our_makers, peak_gflop_s
from sglang_prefix.bench.report.schema import KernelRunResult
from sglang_prefix.bench.report.sources import check_result, check_type
from sglang_prefix.bench.results import SCHEMA, environment, read_result, write_result

__all__ = ["FILE_NAME", "KIND", "KernelRun"]

KIND = "bench-kernel"
FILE_NAME = "kernel.json"
_SECONDS_PER_CELL = {True: 3.0, False: 8.0}  # by --quick
# Numbers of one file must come from one machine, and one state of the software.
_SAME = ("device", "cpu", "gpu", "threads", "versions", "commit")

Tell = Callable[[str], None]


class KernelRun:
    """Measures cells and keeps the result file.

    Args:
        folder: where ``kernel.json`` is written.
        options: which cells, and how.
        command: arguments of the command, for the file.
        resume: take up the run whose file is in the folder; its options stand, ``options`` is
            not looked at.

    Raises:
        ValueError: an option is not legal, or the file cannot be taken up; one line.
        OSError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, options: KernelOptions, command: Sequence[str], *, resume: bool = False
    ) -> None:
        self._began = time.monotonic()
        self.path = folder / FILE_NAME
        data = _taken_up(self.path) if resume else None
        self.options = KernelOptions.from_json(data["options"]) if data else options
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        self._environment = environment()
        self.device = torch.device(self._environment["device"])
        if data:
            _check_same(self.path, data["environment"], self._environment)
        self.cells = kernel_cells(self.options)
        _check_writable(folder)
        self.data: dict[str, Any] = data or {
            "schema": SCHEMA,
            "kind": KIND,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": list(command),
            "quick": options.quick,
            "seed": options.seed,
            "options": options.as_json(),
            "environment": self._environment,
            "absent": {},
            "not_run": [],
            "why_not_run": {},
            "wall_s": 0.0,
            "cells": [],
        }
        self._wall_s_before = self.data.get("wall_s", 0.0)
        self._ours = our_makers(self.options.policies, self.device)
        self._makers = dict(self._ours)
        self.ours = next(iter(self._ours))

    def prepare(self) -> None:
        """Look for stock kernels, which imports SGLang, and measure what arithmetic can do."""
        stock, absent = find_stock(self.device)
        self._makers = {**stock, **self._ours}
        self.data["absent"] = absent
        dtype = getattr(torch, self.options.dtype)
        self.data["peak_gflop_s"] = peak_gflop_s(self.device, dtype)

    def run(self, budget_s: float, begin: Callable[[KernelCell], None], tell: Tell) -> None:
        """Measure the cells that the file lacks while the budget lasts; writes after each.

        Small batches come first, so that a budget leaves out the largest. A cell is not begun
        either if it will take longer than what is left, going by the time of the one before. One
        that runs out of memory is not run; the others go on.

        Args:
            budget_s: seconds.
            begin: is called with every cell before it is measured or passed over.
            tell: is told what happens within a cell.
        """
        ended = time.monotonic() + budget_s
        order = {cell.name: place for place, cell in enumerate(self.cells)}
        done = {cell["name"] for cell in self.data["cells"]}
        reasons = {name: "interrupted" for name in order if name not in done}
        # Before the first cell: what was in the folder is not to be taken up as this run.
        self._write(reasons)
        pace = 0.0  # seconds per element of KV, of the cell before
        try:
            for cell in sorted(self.cells, key=lambda cell: (cell.rank, cell.logical_elements)):
                begin(cell)
                if cell.name in done:
                    continue
                why_not, began = self._why_not(cell), time.monotonic()
                if why_not is None and ended - began <= pace * cell.logical_elements:
                    why_not = f"not enough was left of the budget of {budget_s:g} s"
                if why_not is None:
                    why_not = self._measure(cell, tell)
                if why_not is None:
                    self.data["cells"].sort(key=lambda cell: order[cell["name"]])
                    pace = (time.monotonic() - began) / cell.logical_elements
                    del reasons[cell.name]
                else:
                    reasons[cell.name] = why_not
                self._write(reasons)
        except KeyboardInterrupt:
            self._write(reasons)  # for the time that the cell had taken
            raise

    def problems(self) -> list[str]:
        """One line for each of our contenders that failed or was wrong."""
        return [
            f"{cell['name']}: {name}: {reason}"
            for cell in self.data["cells"]
            for name, reason in cell["failed"].items()
            if name in self._ours
        ]

    def _write(self, reasons: dict[str, str]) -> None:
        wall_s = self._wall_s_before + time.monotonic() - self._began
        self.data |= {"not_run": list(reasons), "why_not_run": reasons, "wall_s": wall_s}
        write_result(self.path, self.data)

    def _measure(self, cell: KernelCell, tell: Tell) -> str | None:
        """Measure a cell into the data; why not, if memory does not suffice."""
        gc.collect()  # the cell before may have held most of the memory
        try:
            measured = measure_cell(
                cell,
                self._makers,
                self.device,
                dtype=getattr(torch, self.options.dtype),
                seed=self.options.seed,
                rounds=self.options.rounds,
                seconds=_SECONDS_PER_CELL[self.options.quick],
                tell=tell,
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return f"out of memory: {type(error).__name__}: {error}".partition("\n")[0][:300]
        self.data["cells"].append(measured)
        return None

    def _why_not(self, cell: KernelCell) -> str | None:
        """Why a cell is not run at all."""
        tokens = int(cell.make_tree().length.sum())
        if tokens > self.options.max_tokens:
            return f"{tokens} KV tokens, over --max-tokens {self.options.max_tokens}"
        itemsize = getattr(torch, self.options.dtype).itemsize
        needed = tokens * cell.heads.kv * (cell.heads.dim + cell.heads.v_dim) * itemsize
        free = _free_bytes(self.device)
        if needed > free // 2:
            return f"{needed >> 20} MiB of KV, over half of the {free >> 20} MiB that are free"
        return None


def _taken_up(path: Path) -> dict[str, Any]:
    """The result file of a run to go on with."""
    data = read_result(path, KIND)
    check_result(path, data)
    check_type(path, data, TypeAdapter(KernelRunResult), "cannot be resumed")
    return data


def _check_same(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    for name in _SAME:
        if there.get(name) != here[name]:
            raise ValueError(
                f"{path} cannot be resumed: its {name} is {there.get(name)!r}, here it is "
                f"{here[name]!r}"
            )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _check_writable(folder: Path) -> None:
    """Find out before the first cell, not after it."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{FILE_NAME}.{os.getpid()}"
    try:
        probe.touch()
    finally:
        probe.unlink(missing_ok=True)
