"""What one result file says, before any HTML: a section of verdicts and tables."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sglang_prefix.bench.tables import (
    Cell,
    Column,
    Table,
    by_reason,
    geomean,
    number_text,
    tabulate,
    to_rich,
    words,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Section", "Verdict", "make_section", "print_section"]

Data = Mapping[str, Any]

# Without a terminal, as in a file, tables may be this wide.
_FILE_WIDTH = 160


@dataclass(frozen=True, slots=True)
class Verdict:
    """Ours against one baseline, over all cases.

    Attributes:
        ours: what of ours, the same in all cases.
        baseline: the name of the other side, as in "faster than ...".
        found: by case, how many times ours is faster, below 1 it is slower; or why there is no
            comparison.
        better, worse: what more and less than 1 are called.
        stock: names of the stock kernels that ours was compared with, if the file has them.
    """

    ours: str
    baseline: str
    found: Mapping[str, float | str]
    better: str = "faster than"
    worse: str = "slower"
    stock: Sequence[str] = ()

    @property
    def gains(self) -> dict[str, float]:
        """Cases that were compared."""
        return {name: gain for name, gain in self.found.items() if not isinstance(gain, str)}

    @property
    def not_compared(self) -> dict[str, str]:
        """Cases that say nothing about it, and why."""
        return {name: reason for name, reason in self.found.items() if isinstance(reason, str)}

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
    warnings: Sequence[str]
    verdicts: Sequence[Verdict]
    tables: Sequence[Table]


def make_section(
    title: str,
    data: Data,
    tables: Sequence[Table],
    *,
    verdicts: Sequence[Verdict] = (),
    environment: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    absent: str = "Absent baselines",
) -> Section:
    """A section with what files of all kinds have: environment, warnings, targets, what is left.

    Args:
        title, tables: of the section; in a dry run nothing is a gain or a loss.
        verdicts: on the cases that were measured; of the first, the section says why there is no
            comparison where there is none.
        data: of the file.
        environment, warnings: what its kind has beside those of all.
        absent: what that is which can be absent.
    """
    left = _left_cases(data)
    refused = {
        name: f"not a comparison: {why}"
        for verdict in verdicts[:1]
        for name, why in verdict.not_compared.items()
        if name not in data["not_run"] and name not in data["absent"]
    }
    said = [*_warnings(data, absent), *(f"{name} is {why}." for name, why in refused.items())]
    reasons = {name: f"absent: {reason}" for name, reason in data["absent"].items()}
    shown = [*_targets(data), *tables, *_left_out(reasons | left | refused)]
    return Section(
        title,
        _environment(data, environment or {}),
        [*said, *warnings],
        [] if data["dry"] else [replace(v, found={**v.found, **left}) for v in verdicts],
        [_toneless(table) for table in shown] if data["dry"] else shown,
    )


def print_section(section: Section, console: Console | None = None) -> None:
    """Print the tables that are no detail, and the warnings."""
    from rich.console import Console

    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    for table in section.tables:
        if not table.is_detail:
            console.print(to_rich(table))
    for warning in section.warnings:
        console.print(warning, soft_wrap=True, highlight=False, markup=False)


def _left_cases(data: Data) -> dict[str, str]:
    """Cases that have no numbers, and why."""
    not_run = {name: f"not run: {reason}" for name, reason in data["not_run"].items()}
    failed = {name: f"failed: {reason}" for name, reason in data["failed"].items()}
    measured = {case["name"] for case in data["cases"]}
    return {n: reason for n, reason in (not_run | failed).items() if n not in measured}


def _environment(data: Data, more: Mapping[str, Any]) -> dict[str, str]:
    """What a file was measured on and with, in the order of a reader's questions."""
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
        "measured": data["created"].replace("T", " ")[:16],
        "seed": data["seed"],
        **more,
        "command": shlex.join(data["command"]),
    }
    return {name: str(value) for name, value in rows.items() if value not in (None, "")}


def _warnings(data: Data, absent: str) -> list[str]:
    """What stands above the numbers: what they mean, what is not here, failed or was not run."""
    said = [data["note"]] if data.get("note") else []
    if data["dry"]:
        said.append("Dry run on tiny shapes: the times mean nothing.")
    if data["options"].get("quick"):
        said.append("Quick run: few workloads and few repetitions.")
    if data["absent"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in data["absent"].items())
        said.append(f"{absent}: {reasons}.")
    for what, title in (("not_run", "Not run"), ("failed", "Failed")):
        if data[what]:
            said.append(f"{title}: {', '.join(by_reason(data[what]))}.")
    for what in ("failed", "absent"):
        cases: dict[str, dict[str, str]] = {}
        for case in data["cases"]:
            for name, reason in case.get(what, {}).items():
                cases.setdefault(name, {})[case["name"]] = reason
        said += [f"{name} {what}: {', '.join(by_reason(found))}." for name, found in cases.items()]
    return said


def _left_out(reasons: Mapping[str, str]) -> list[Table]:
    """What has no numbers: a missing row would look like a run that never meant to have it."""

    def why(name: str) -> Cell:
        return words(reasons[name], is_loss=reasons[name].startswith("failed"))

    columns = [Column("case", str), Column("why it has no number", why)]
    table = tabulate("Not measured or not compared", columns, reasons, is_detail=True)
    return [table] if reasons else []


def _targets(data: Data) -> list[Table]:
    """What the project has promised, and whether this file holds it."""

    def missed(target: Data) -> str:
        cases = target.get("missed") or {}
        return ", ".join(f"{name} ({number_text(value)})" for name, value in cases.items())

    columns = [
        Column("target", "name"),
        Column("status", lambda t: words(t["status"], is_loss=t["status"] == "missed")),
        Column("value", "value"),
        Column("what it asks for", "meaning"),
        Column("cases that miss it", missed),
    ]
    targets = [{"name": name, **target} for name, target in data.get("targets", {}).items()]
    return [tabulate("Targets", columns, targets)] if targets else []


def _toneless(table: Table) -> Table:
    rows = [[replace(cell, tone="", bar=None) for cell in row] for row in table.rows]
    return replace(table, rows=rows)
