"""Tables of results: made once from result files, printed on a terminal and drawn in a page.

A table has a row per item, mostly a case of a result file, and columns that find their value in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = [
    "NONE",
    "Cell",
    "Column",
    "Table",
    "by_reason",
    "gain",
    "geomean",
    "is_losing",
    "number_text",
    "ratio_text",
    "tabulate",
    "to_cell",
    "to_rich",
    "words",
]

_MOST_NAMED = 4
# Nearer to 1 than this, two decimals would not tell which side won.
_NEAR_ONE = 0.05
# Ratios from 1/16 to 16 keep within their bar.
_BAR_DOUBLINGS = 4


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what is shown.
        sort: what a column is sorted by; None: nothing was measured here.
        tone: how it looks.
        bar: where a bar begins and ends in percent of the cell; None: no bar.
    """

    text: str
    sort: float | str | None = None
    tone: Literal["", "losing", "gaining"] = ""
    bar: tuple[float, float] | None = None


NONE = Cell("-")


def to_cell(value: object) -> Cell:
    """What shows a value: a number, words, or a dash for None; a cell is left as it is."""
    if isinstance(value, Cell):
        return value
    if value is None or value == "":
        return NONE
    if isinstance(value, int | float):
        return Cell(number_text(value), value)
    return Cell(str(value), str(value))


def words(said: str, *, is_loss: bool) -> Cell:
    """Words that may look like a loss."""
    return Cell(said, said, "losing" if is_loss else "")


def gain(value: float | None) -> Cell:
    """How many times ours is better, with a bar from 1 to it; a loss looks like one."""
    if value is None:
        return NONE
    # Logarithmic, 1 in the middle.
    end = 50 + 50 * max(-1.0, min(1.0, log2(value) / _BAR_DOUBLINGS))
    tone: Any = "losing" if value < 1 else "gaining" if value > 1 else ""
    return Cell(ratio_text(value), value, tone, (min(50.0, end), max(50.0, end)))


def ratio_text(value: float) -> str:
    """A ratio with as many decimals as it takes to see on which side of 1 it is."""
    decimals = 3 if abs(value - 1) < _NEAR_ONE or value < 0.1 else 2
    return f"{value:.{decimals}f}x"


def number_text(value: float) -> str:
    """A number with three significant digits, or with all digits before its point."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def geomean(values: Iterable[float]) -> float | None:
    """Geometric mean; None of nothing."""
    found = list(values)
    return geometric_mean(found) if found else None


def by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Cases with the reason that they have in common, counted where they are many."""
    cases: dict[str, list[str]] = {}
    for case, reason in reasons.items():
        cases.setdefault(reason, []).append(case)
    return [
        f"{', '.join(some) if len(some) <= _MOST_NAMED else f'{len(some)} cases'} ({reason})"
        for reason, some in cases.items()
    ]


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        title: the heading.
        get: finds the value in an item; a text is its key, with dots for keys below keys.
        hint: what the numbers mean, with their unit, for the lines below the table.
        is_detail: a page has room for it, a terminal does not.
    """

    title: str
    get: Callable[[Any], Any] | str
    hint: str = ""
    is_detail: bool = False

    def cell(self, item: Any) -> Cell:
        """The cell of an item."""
        if not isinstance(self.get, str):
            return to_cell(self.get(item))
        for key in self.get.split("."):
            item = (item or {}).get(key)
        return to_cell(item)


@dataclass(frozen=True, slots=True)
class Table:
    """A table, with notes below it.

    Attributes:
        title: above it.
        columns: the first one names the row.
        rows: a cell per column.
        notes: below it.
        is_detail: a page has room for it, a terminal does not.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    is_detail: bool = False

    def is_text(self, index: int) -> bool:
        """Whether a column has words, which are aligned to the left."""
        return any(isinstance(row[index].sort, str) for row in self.rows)


def is_losing(row: Sequence[Cell]) -> bool:
    """Whether something is lost in a row."""
    return any(cell.tone == "losing" for cell in row)


def tabulate(
    title: str,
    columns: Sequence[Column],
    items: Iterable[Any],
    *,
    notes: Sequence[str] = (),
    is_detail: bool = False,
) -> Table:
    """A table with a row per item; a column in which no item has a value is left out."""
    rows = [[column.cell(item) for column in columns] for item in items]
    used = [n for n, _ in enumerate(columns) if n == 0 or any(row[n] != NONE for row in rows)]
    shown = [[row[n] for n in used] for row in rows]
    return Table(title, [columns[n] for n in used], shown, notes, is_detail)


def to_rich(table: Table) -> RichTable:
    """The table for a terminal without its columns of detail; losing rows are red."""
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = [n for n, column in enumerate(table.columns) if not column.is_detail]
    hints = [f"{c.title}: {c.hint}." for c in table.columns if c.hint and not c.is_detail]
    found = RichTable(
        title=Text(table.title),
        title_justify="left",
        caption=Text("\n".join([*table.notes, *hints])),
        caption_justify="left",
    )
    for n in shown:
        justify: Literal["left", "right"] = "left" if table.is_text(n) else "right"
        found.add_column(Text(table.columns[n].title), justify=justify, overflow="fold")
    for row in table.rows:
        cells = (Text(_marked(row[n])) for n in shown)
        found.add_row(*cells, style="red" if is_losing(row) else None)
    return found


def _marked(cell: Cell) -> str:
    """The text, which says a loss where colours may not be seen."""
    return f"{cell.text} slower" if cell.bar and cell.tone == "losing" else cell.text
