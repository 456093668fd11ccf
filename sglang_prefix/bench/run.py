"""The one loop of all bench commands: named cases within a budget, the file whole after each."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_prefix.bench.results import write_result

__all__ = ["Case", "NotRunError", "is_out_of_memory", "run_cases"]

# Of errors that torch and its libraries raise as a plain RuntimeError.
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc")
_LONGEST_REASON = 500


class NotRunError(Exception):
    """A case cannot be run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement of a run.

    Attributes:
        name: unique in a run.
        group: cases that answer one question.
        measure: returns what the file holds of it, beside name and group. It may raise
            :class:`NotRunError`; any other error makes it a failed case.
        expected_s: seconds that it will need, asked just before it begins; None if they are not
            known: then it needs as long as the slowest of the last three.
    """

    name: str
    group: str
    measure: Callable[[], Mapping[str, Any]]
    expected_s: Callable[[], float] | None = None


def run_cases(
    path: Path,
    data: dict[str, Any],
    cases: Sequence[Case],
    budget_s: float,
    *,
    order: Sequence[str] | None = None,
    began: float | None = None,
    begin: Callable[[Case], None] = lambda case: None,
    finish: Callable[[Case, str | None], None] = lambda case, problem: None,
    conclude: Callable[[], None] = lambda: None,
) -> None:
    """Measure the cases that a result lacks, in order, and write its file after each.

    A case that does not fit into what is left of the budget is not run and leaves its place to
    the ones after it; one that runs out of memory is not run. One that fails is noted with the
    reason and, unlike those, not tried again by a resumed run. Where the GPU is lost, the rest is
    not run.

    Args:
        path: the file.
        data: the result, new or resumed; gets "cases", "not_run", "failed" and "wall_s".
        cases: in the order in which they are run.
        budget_s: seconds from ``began`` on, by time.monotonic(); None for now.
        order: names in the order of the file; None for that of ``cases``.
        begin: is called with every case before it is measured or passed over.
        finish: is called with every case and why it was not run or failed; None if it was measured.
        conclude: is called before the file is written, to derive what depends on all cases.

    Raises:
        KeyboardInterrupt: the user stopped it; the file is written.
        OSError: the file cannot be written.
    """
    began = time.monotonic() if began is None else began
    places = {n: i for i, n in enumerate(order if order is not None else [c.name for c in cases])}
    done = {case["name"] for case in data["cases"]} | set(data["failed"])
    data["not_run"] = {name: "interrupted" for name in places if name not in done}
    wall_s = data["wall_s"] or 0.0
    recent, lost = [0.0], False

    def write() -> None:
        data["wall_s"] = wall_s + time.monotonic() - began
        conclude()
        write_result(path, data)

    # Before the first case: what was in the folder is not to be resumed as this run.
    write()
    try:
        for case in cases:
            begin(case)
            if case.name in done:
                continue
            now = time.monotonic()
            needs = case.expected_s() if case.expected_s else max(recent[-3:])
            if lost:
                problem: str | None = "the GPU is lost: nothing more can run in this process"
                data["not_run"][case.name] = problem
            elif now - began + needs >= budget_s:
                problem = f"not enough was left of the budget of {budget_s:g} s"
                data["not_run"][case.name] = problem
            else:
                problem = _measure(case, data)
                recent.append(time.monotonic() - now)
                data["cases"].sort(key=lambda found: places.get(found["name"], len(places)))
                lost = problem is not None and _is_lost()
            finish(case, problem)
            write()
    except KeyboardInterrupt:
        write()  # for the time that the case had taken
        raise


def _measure(case: Case, data: dict[str, Any]) -> str | None:
    """Measure a case into the data; why it was not run or failed."""
    _free_memory()
    began = time.monotonic()
    try:
        measured = case.measure()
    except NotRunError as error:
        problem = data["not_run"][case.name] = str(error)
        return problem
    except Exception as error:  # the cases after this one are still worth their time
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:_LONGEST_REASON]
        if is_out_of_memory(error):
            problem = data["not_run"][case.name] = f"out of memory: {reason}"
            return problem
        problem = data["failed"][case.name] = reason
    else:
        problem = None
        times = {"wall_s": time.monotonic() - began}
        data["cases"].append({"name": case.name, "group": case.group, **measured, **times})
    del data["not_run"][case.name]
    return problem


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that the host or the device has no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _NO_MEMORY)


def _free_memory() -> None:
    """The case before may have held most of it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _is_lost() -> bool:
    """Whether the GPU no longer answers, as after a kernel that left its memory."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
