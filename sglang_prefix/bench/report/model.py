"""What a page is made of, before any HTML: sections of verdicts, tables and figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

__all__ = [
    "UNMEASURED",
    "Cell",
    "Column",
    "Figure",
    "Row",
    "Section",
    "Table",
    "Verdict",
    "by_reason",
    "folded",
]

# What stands where there is no value.
UNMEASURED = "-"

_MOST_NAMED = 4

Tone = Literal["", "losing", "gaining", "absent", "quiet"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what is shown.
        sort: what a column is sorted by; None: nothing was measured here.
        tone: how it looks, and what a screen reader says of it.
        gain: how many times ours is faster, drawn as a bar to either side of 1; None: no bar.
        span: columns that it fills.
    """

    text: str
    sort: float | str | None = None
    tone: Tone = ""
    gain: float | None = None
    span: int = 1


@dataclass(frozen=True, slots=True)
class Column:
    """A column's heading.

    Attributes:
        title: the heading.
        hint: what the numbers mean, with their unit, for the line below the table.
        is_text: left-aligned.
        folds: goes into the line below the table if all rows have the same.
    """

    title: str
    hint: str = ""
    is_text: bool = False
    folds: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A row; a losing one is marked as such in its first cell."""

    cells: Sequence[Cell]
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table, with notes below it."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    @property
    def hints(self) -> dict[str, str]:
        """What the headings mean."""
        return {column.title: column.hint for column in self.columns if column.hint}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Ours against one baseline, over all cells that have both.

    Attributes:
        ours: what of ours, the same in all cells.
        baseline: the name of the other side, as in "faster than ...".
        gains: by cell, how many times ours is faster; below 1 it is slower.
        not_compared: cells that say nothing about it, and why.
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

    @property
    def won(self) -> list[str]:
        """Cells in which ours is faster."""
        return [name for name, gain in self.gains.items() if gain > 1]

    @property
    def lost(self) -> dict[str, float]:
        """Cells in which ours is slower, worst first."""
        slower = {name: gain for name, gain in self.gains.items() if gain < 1}
        return dict(sorted(slower.items(), key=lambda item: item[1]))

    @property
    def missing(self) -> list[str]:
        """Why cells were not compared."""
        return by_reason(self.not_compared)


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture.

    Attributes:
        title: what it shows.
        svg: an `<svg>` element, safe to stand in a page beside others.
    """

    title: str
    svg: str


@dataclass(frozen=True, slots=True)
class Section:
    """What one result file says.

    Attributes:
        kind: of the file.
        title: in words.
        source: the file's name.
        facts: what it was measured on and with, by name.
        warnings: what a reader must know before the numbers.
        verdicts: the first is the one that the page's summary counts.
        tables, figures: in order.
    """

    kind: str
    title: str
    source: str
    facts: Mapping[str, str]
    warnings: Sequence[str] = ()
    verdicts: Sequence[Verdict] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


def by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Cells with the reason that they have in common, counted where they are many."""
    cells: dict[str, list[str]] = {}
    for cell, reason in reasons.items():
        cells.setdefault(reason, []).append(cell)
    return [
        f"{', '.join(some) if len(some) <= _MOST_NAMED else f'{len(some)} cells'} ({reason})"
        for reason, some in cells.items()
    ]


def folded(table: Table) -> Table:
    """The table without foldable columns that say the same in every row, which a note says."""
    whole = [row for row in table.rows if len(row.cells) == len(table.columns)]
    if len(whole) < 2:
        return table
    same = {
        index: whole[0].cells[index].text
        for index, column in enumerate(table.columns)
        if column.folds and len({row.cells[index].text for row in whole}) == 1
    }
    if not same:
        return table
    said = ", ".join(
        f"{table.columns[index].title} {text}" for index, text in same.items() if text != UNMEASURED
    )
    return replace(
        table,
        columns=[column for index, column in enumerate(table.columns) if index not in same],
        rows=[_without(row, same) for row in table.rows],
        notes=[*([f"In every row: {said}."] if said else []), *table.notes],
    )


def _without(row: Row, dropped: Collection[int]) -> Row:
    kept, column = [], 0
    for cell in row.cells:
        span = sum(index not in dropped for index in range(column, column + cell.span))
        column += cell.span
        if span:
            kept.append(replace(cell, span=span))
    return replace(row, cells=kept)
