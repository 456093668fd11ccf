"""What one result file says, before any HTML: a section of verdicts and tables."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sglang_prefix.bench.tables import (
    Cell,
    Column,
    Table,
    as_is,
    by_reason,
    geomean,
    number,
    print_tables,
    tabulate,
    text,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Section",
    "Verdict",
    "environment_rows",
    "left_cases",
    "left_table",
    "print_section",
    "target_tables",
    "warnings",
]

Data = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Ours against one baseline, over all cases that have both.

    Attributes:
        ours: what of ours, the same in all cases.
        baseline: the name of the other side, as in "faster than ...".
        gains: by case, how many times ours is faster; below 1 it is slower.
        not_compared: cases that say nothing about it, and why.
        better, worse: what more and less than 1 are called.
        stock: names of the stock kernels that ours was compared with, if the file has them.
    """

    ours: str
    baseline: str
    gains: Mapping[str, float]
    not_compared: Mapping[str, str] = field(default_factory=dict)
    better: str = "faster than"
    worse: str = "slower"
    stock: Sequence[str] = ()

    @classmethod
    def over(
        cls,
        ours: str,
        baseline: str,
        cases: Iterable[Data],
        gain: Callable[[Data], float | None],
        why_not: Callable[[Data], str],
        left: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Verdict:
        """From cases: the gain of each, or why it has none.

        Args:
            ours, baseline, more: attributes.
            cases: with a "name".
            gain: None where there is no comparison.
            why_not: the reason for it.
            left: cases without any measurement, and why.
        """
        found = {case["name"]: (gain(case), case) for case in cases}
        gains = {name: value for name, (value, _) in found.items() if value is not None}
        missing = {name: why_not(case) for name, (_, case) in found.items() if name not in gains}
        return cls(ours, baseline, gains, missing | dict(left or {}), **more)

    @property
    def won(self) -> list[str]:
        """Cases in which ours is faster."""
        return [name for name, gain in self.gains.items() if gain > 1]

    @property
    def lost(self) -> dict[str, float]:
        """Cases in which ours is slower, worst first."""
        slower = {name: gain for name, gain in self.gains.items() if gain < 1}
        return dict(sorted(slower.items(), key=lambda item: item[1]))

    @property
    def mean(self) -> float | None:
        """Geometric mean of the gains."""
        return geomean(self.gains.values())

    @property
    def missing(self) -> list[str]:
        """Why cases were not compared."""
        return by_reason(self.not_compared)


@dataclass(frozen=True, slots=True)
class Section:
    """What one result file says.

    Attributes:
        title: in words.
        environment: what it was measured on and with, by name.
        warnings: what a reader must know before the numbers.
        verdicts: the first is the one that the page's summary counts.
        tables: in order.
    """

    title: str
    environment: Mapping[str, str]
    warnings: Sequence[str] = ()
    verdicts: Sequence[Verdict] = ()
    tables: Sequence[Table] = ()


def print_section(section: Section, console: Console | None = None) -> None:
    """Print the tables that a terminal has room for, and what they do not show."""
    print_tables(section.tables, console)
    for warning in section.warnings:
        if console is None:
            print(warning)
        else:
            console.print(warning, soft_wrap=True, highlight=False, markup=False)


def environment_rows(data: Data, **more: Any) -> dict[str, str]:
    """What a file was measured on and with, in the order of a reader's questions.

    Args:
        data: of the file.
        more: what its kind has to tell beside that.
    """
    found = data["environment"]
    cpu, threads = found.get("cpu"), found.get("threads")
    versions = found.get("versions", {}).items()
    rows = {
        "device": found["device"],
        "GPU": found.get("gpu"),
        "driver": (found.get("clocks") or {}).get("driver_version"),
        "CPU": f"{cpu}, threads: {threads}" if cpu and threads else cpu,
        "versions": ", ".join(f"{n} {version or 'not installed'}" for n, version in versions),
        "Python": found.get("python"),
        "commit": found.get("commit"),
        "measured": _moment(data["created"]),
        "seed": data["seed"],
        **more,
        "command": shlex.join(data["command"]),
    }
    return {name: str(value) for name, value in rows.items() if value not in (None, "")}


def _moment(time: str) -> str:
    """An ISO time for readers, to the minute; anything else as it is."""
    try:
        found = datetime.fromisoformat(time)
    except ValueError:
        return time
    return f"{found:%Y-%m-%d %H:%M %Z}".strip() if "T" in time else time


def warnings(data: Data, absent: str = "Absent baselines") -> list[str]:
    """What stands above the numbers: what they mean, what is not here, failed or was not run.

    Args:
        data: of the file.
        absent: what that is which can be absent.
    """
    said = [data["note"]] if data.get("note") else []
    if data["dry"]:
        said.append("Dry run on tiny shapes: the times mean nothing.")
    if data["options"].get("quick"):
        said.append("Quick run: few workloads and few repetitions.")
    if data["absent"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in data["absent"].items())
        said.append(f"{absent}: {reasons}.")
    for what in ("not run", "failed"):
        if left := by_reason(data[what.replace(" ", "_")]):
            said.append(f"{what.capitalize()}: {', '.join(left)}.")
    for what in ("failed", "absent"):
        cases: dict[str, list[str]] = {}
        for case in data["cases"]:
            for name, reason in case.get(what, {}).items():
                cases.setdefault(f"{name} {what}: {reason}", []).append(case["name"])
        said += [f"{', '.join(_some(names))}: {reason}." for reason, names in cases.items()]
    return said


def _some(names: Sequence[str], most: int = 4) -> list[str]:
    return [*names[:most], *([f"{len(names) - most} more"] if names[most:] else [])]


def left_cases(data: Data) -> dict[str, str]:
    """Cases that have no numbers, and why."""
    not_run = {name: f"not run: {reason}" for name, reason in data["not_run"].items()}
    failed = {name: f"failed: {reason}" for name, reason in data["failed"].items()}
    measured = {case["name"] for case in data["cases"]}
    return {n: reason for n, reason in (not_run | failed).items() if n not in measured}


def left_table(data: Data) -> list[Table]:
    """Cases without numbers: a missing row would look like a run that never meant to have it."""
    columns = [
        Column("case", text, lambda item: item[0]),
        Column("why there is no number", as_is, lambda item: _reason(item[1])),
    ]
    left = left_cases(data)
    return [tabulate("Not run or failed", columns, left.items())] if left else []


def _reason(reason: str) -> Cell:
    return Cell(reason, reason, "losing" if reason.startswith("failed") else "absent")


def target_tables(data: Data) -> list[Table]:
    """What the project has promised, and whether this file holds it."""

    def status(item: tuple[str, Data]) -> Cell:
        found = item[1]["status"]
        return Cell(found, found, "losing" if found == "missed" and not data["dry"] else "")

    columns = [
        Column("target", text, lambda item: item[0]),
        Column("status", as_is, status),
        Column("value", number, lambda item: item[1]["value"]),
        Column("what it asks for", text, lambda item: item[1]["meaning"]),
        Column("cases that miss it", text, lambda item: _missed(item[1].get("missed"))),
    ]
    targets = data.get("targets", {})
    return [tabulate("Targets", columns, targets.items())] if targets else []


def _missed(cases: Mapping[str, float] | None) -> str:
    return ", ".join(f"{name} ({number(value).text})" for name, value in (cases or {}).items())
