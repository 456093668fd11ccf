"""The one loop of all bench commands: named cases within a budget, the file whole after each."""

from __future__ import annotations

import gc
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sglang_prefix.bench.results import (
    check_same,
    environment,
    new_result,
    read_result,
    same_environment,
    write_result,
)
from sglang_prefix.files import check_writable

__all__ = ["BenchRun", "Case", "NotRunError", "is_out_of_memory", "run_cases"]

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
            :class:`NotRunError` or TimeoutError; any other error makes it a failed case.
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
                data["not_run"][case.name] = "the GPU is lost: nothing more can run in this process"
            elif now - began + needs >= budget_s:
                left = f"not enough was left of the budget of {budget_s:g} s"
                data["not_run"][case.name] = left
            else:
                lost = not _measure(case, data) and _is_lost()
                recent.append(time.monotonic() - now)
                data["cases"].sort(key=lambda found: places.get(found["name"], len(places)))
            write()
    except KeyboardInterrupt:
        write()  # for the time that the case had taken
        raise


def _measure(case: Case, data: dict[str, Any]) -> bool:
    """Measure a case into the data, or note there why not; whether it was measured."""
    _free_memory()
    began = time.monotonic()
    try:
        measured = case.measure()
    except (NotRunError, TimeoutError) as error:
        data["not_run"][case.name] = str(error)
        return False
    except Exception as error:  # the cases after this one are still worth their time
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:_LONGEST_REASON]
        if is_out_of_memory(error):
            data["not_run"][case.name] = f"out of memory: {reason}"
        else:
            del data["not_run"][case.name]
            data["failed"][case.name] = reason
        return False
    del data["not_run"][case.name]
    times = {"wall_s": time.monotonic() - began}
    data["cases"].append({"name": case.name, "group": case.group, **measured, **times})
    return True


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


class BenchRun(ABC):
    """The run of a bench command, new or resumed, and its result file.

    Args:
        folder: where the file is written.
        command: arguments of the command, for the file.
        options: for the file; those of a resumed run stand instead.
        seed: of all inputs; likewise.
        device: "cpu" for a run that leaves a GPU alone; None for the GPU if there is one.
        dry: whether nothing is measured.
        resume: go on with the run whose file is in the folder.

    Raises:
        ValueError: an option is not legal, or the file cannot be resumed; one line.
        OSError: the folder cannot be written.

    Attributes:
        path, data: of the result.
        progress: is told what happens within a case.
    """

    kind: ClassVar[str]
    file_name: ClassVar[str]

    def __init__(
        self,
        folder: Path,
        *,
        command: Sequence[str],
        options: Mapping[str, Any],
        seed: int,
        device: str | None = None,
        dry: bool = False,
        resume: bool = False,
    ) -> None:
        self._began = time.monotonic()
        self.path = folder / self.file_name
        data = read_result(self.path, self.kind) if resume else None
        self.use(data["options"] if data else options)
        here = environment("cpu" if dry else device)
        if data:
            check_same(self.path, data, {**same_environment(here), "dry": dry})
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(self.path)
        self.data: dict[str, Any] = data or new_result(
            self.kind, command=command, options=options, seed=seed, environment=here, dry=dry
        )
        self.progress: Callable[[str], None] = lambda what: None

    @abstractmethod
    def use(self, options: Mapping[str, Any]) -> None:
        """Take the options of the run into use, before its environment is looked at.

        Raises:
            ValueError: they are not legal.
        """

    def prepare(self) -> None:  # noqa: B027
        """What takes seconds, and comes before the first case."""

    @abstractmethod
    def cases(self) -> list[Case]:
        """In the order in which they are run."""

    @property
    def order(self) -> list[str]:
        """Names of the cases in the order of the file."""
        return [case.name for case in self.cases()]

    def conclude(self) -> None:  # noqa: B027
        """Derive what depends on all cases, before the file is written."""

    def run(
        self, budget_s: float, begin: Callable[[str], None], progress: Callable[[str], None]
    ) -> None:
        """Measure the cases that the file lacks: :func:`run_cases`.

        Args:
            budget_s: seconds since this object was made.
            begin: is told every case before it is measured or passed over.
            progress: is told what happens within a case.
        """
        self.progress = progress
        run_cases(
            self.path,
            self.data,
            self.cases(),
            budget_s,
            order=self.order,
            began=self._began,
            begin=lambda case: begin(case.name),
            conclude=self.conclude,
        )

    def problems(self) -> list[str]:
        """One line for each case that failed, and for each of our own results that was wrong."""
        failed = dict(self.data["failed"])
        for case in self.data["cases"]:
            failed |= {f"{case['name']}: {n}": why for n, why in self.own_failures(case).items()}
        return [f"{what}: {why}" for what, why in failed.items()]

    def own_failures(self, case: Mapping[str, Any]) -> Mapping[str, str]:
        """Of what is ours in a case, what failed, and why."""
        found: Mapping[str, str] = case.get("failed", {})
        return found
