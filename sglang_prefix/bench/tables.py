"""Tables of results, and how they are printed: on a terminal, as Markdown, in a page.

A table is made from items, mostly the cases of a result file, and from columns that know how to
find and to format their value in an item. What a reader must not miss is decided here once: a gain
below 1 marks its row as lost, and what has no number says why.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from math import exp, log, log2
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

__all__ = [
    "NONE",
    "Cell",
    "Column",
    "Row",
    "Table",
    "as_is",
    "by_reason",
    "gain",
    "geomean",
    "number",
    "print_tables",
    "ratio_text",
    "share",
    "tabulate",
    "text",
    "to_html",
    "to_markdown",
    "to_rich",
]

Tone = Literal["", "losing", "gaining", "absent", "quiet"]

_UNMEASURED = "-"
_MOST_NAMED = 4
# Nearer to 1 than this, two decimals would not tell which side won.
_NEAR_ONE = 0.05
# Ratios from 1/16 to 16 keep within their bar.
_BAR_DOUBLINGS = 4
# A page lets cells that are longer than this break.
_LONG = 40
# On a terminal texts are folded at this width, and tables in a file may be this wide.
_TEXT_WIDTH, _FILE_WIDTH = 36, 160


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what is shown.
        sort: what a column is sorted by; None: nothing was measured here.
        tone: how it looks.
        gain: how many times ours is faster, drawn as a bar to either side of 1; None: no bar.
        span: columns that it fills.
        mark: what follows the text where colours may not be seen.
    """

    text: str
    sort: float | str | None = None
    tone: Tone = ""
    gain: float | None = None
    span: int = 1
    mark: str = ""

    @property
    def marked(self) -> str:
        """The text with its mark."""
        return f"{self.text} {self.mark}".rstrip()


NONE = Cell(_UNMEASURED, tone="quiet")


def text(value: object) -> Cell:
    """Words, or a dash for None."""
    return NONE if value is None or value == "" else Cell(str(value), str(value))


def number(value: float | None, digits: int = 3) -> Cell:
    """A number with so many significant digits; an integer with all of its own."""
    if value is None:
        return NONE
    return Cell(f"{value:,}" if isinstance(value, int) else _significant(value, digits), value)


def share(value: float | None) -> Cell:
    """A share of one."""
    return NONE if value is None else Cell(f"{value:.3f}", value)


def gain(value: float | None, *, counts: bool = True, bar: bool = True) -> Cell:
    """How many times ours is faster; a loss looks like one.

    Args:
        value: None where there is nothing to compare with.
        counts: whether this is a measurement of ours; if not it has no tone.
        bar: whether it is drawn as well.
    """
    if value is None:
        return NONE
    if not counts:
        return Cell(ratio_text(value), value)
    tone: Tone = "losing" if value < 1 else "gaining" if value > 1 else ""
    mark = "slower" if value < 1 else ""
    return Cell(ratio_text(value), value, tone, value if bar else None, mark=mark)


def as_is(cell: Cell) -> Cell:
    """The format of a column whose values are cells."""
    return cell


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        title: the heading.
        format: makes the cell from the value: :func:`text`, :func:`number`, ...
        get: finds the value in an item; a text is its key, with dots for keys below keys.
        hint: what the numbers mean, with their unit, for the line below the table.
        folds: goes into the line below the table if all rows have the same.
    """

    title: str
    format: Callable[[Any], Cell]
    get: Callable[[Any], Any] | str
    hint: str = ""
    folds: bool = False

    @property
    def is_text(self) -> bool:
        """Whether it is left-aligned."""
        return self.format is text

    @property
    def is_gain(self) -> bool:
        """Whether it compares ours with something."""
        return getattr(self.format, "func", self.format) is gain

    def show(self, item: Any) -> Cell:
        """The cell of an item."""
        if not isinstance(self.get, str):
            return self.format(self.get(item))
        for key in self.get.split("."):
            item = (item or {}).get(key)
        return self.format(item)


@dataclass(frozen=True, slots=True)
class Row:
    """A row; a losing one is marked as such in its first cell."""

    cells: Sequence[Cell]
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table, with notes below it.

    Attributes:
        title: above it.
        columns: the most important ones first: a narrow terminal leaves the last ones out.
        rows: each fills all columns.
        notes: below it.
        is_detail: a page has room for it, a terminal does not.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    is_detail: bool = False

    @property
    def hints(self) -> dict[str, str]:
        """What the headings mean."""
        return {column.title: column.hint for column in self.columns if column.hint}


def tabulate(
    title: str,
    columns: Sequence[Column],
    items: Iterable[Any],
    *,
    message: Callable[[Any], str | None] = lambda item: None,
    left: Mapping[str, str] | None = None,
    marks_rows: bool = True,
    notes: Sequence[str] = (),
    is_detail: bool = False,
) -> Table:
    """A table with a row per item.

    Args:
        title: above it.
        columns: the first one names the row.
        items: whatever the columns look into.
        message: what stands in place of an item's gains, and of all columns after them; None for
            the gains.
        left: rows that have a name and a message only.
        marks_rows: whether a row with a losing cell is a losing row.
        notes: below the table.
        is_detail: a terminal leaves it out.
    """
    rows = [_row(columns, item, message(item), marks_rows) for item in items]
    rows += [_across([text(name)], said, len(columns)) for name, said in (left or {}).items()]
    return Table(title, columns, rows, notes, is_detail)


def _row(columns: Sequence[Column], item: Any, message: str | None, marks: bool) -> Row:
    if message is not None:
        first_gain = [column.is_gain for column in columns].index(True)
        cells = [column.show(item) for column in columns[:first_gain]]
        return _across(cells, message, len(columns))
    cells = [column.show(item) for column in columns]
    if marks and any(cell.tone == "losing" for cell in cells):
        return Row([replace(cells[0], tone="losing"), *cells[1:]], "losing")
    return Row(cells)


def _across(cells: Sequence[Cell], message: str, num_columns: int) -> Row:
    rest = Cell(message, tone="absent", span=num_columns - len(cells))
    return Row([*cells, rest], "absent")


def by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Cases with the reason that they have in common, counted where they are many."""
    cases: dict[str, list[str]] = {}
    for case, reason in reasons.items():
        cases.setdefault(reason, []).append(case)
    return [
        f"{', '.join(some) if len(some) <= _MOST_NAMED else f'{len(some)} cases'} ({reason})"
        for reason, some in cases.items()
    ]


def geomean(values: Iterable[float]) -> float | None:
    """Geometric mean; None of nothing."""
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs)) if logs else None


def ratio_text(value: float) -> str:
    """A ratio with as many decimals as it takes to see on which side of 1 it is."""
    decimals = 3 if abs(value - 1) < _NEAR_ONE or value < 0.1 else 2
    return f"{value:.{decimals}f}x"


def _significant(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    size = abs(value)
    if size < 0.001 or size >= 1e9:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - int(f"{size:e}".partition("e")[2]))
    return f"{value:,.{decimals}f}"


def _folded(table: Table) -> Table:
    """The table without foldable columns that say the same in every row, which a note says."""
    whole = [row for row in table.rows if len(row.cells) == len(table.columns)]
    if len(whole) < 2:
        return table
    same = {
        index: whole[0].cells[index].text
        for index, column in enumerate(table.columns)
        if column.folds and len({row.cells[index].text for row in whole}) == 1
    }
    said = ", ".join(
        f"{table.columns[index].title} {shown}"
        for index, shown in same.items()
        if shown != _UNMEASURED
    )
    notes = [f"In every row: {said}."] if said else []
    return replace(_without(table, same), notes=[*notes, *table.notes])


def _without(table: Table, dropped: Collection[int]) -> Table:
    rows = []
    for row in table.rows:
        kept, column = [], 0
        for cell in row.cells:
            span = sum(index not in dropped for index in range(column, column + cell.span))
            column += cell.span
            if span:
                kept.append(replace(cell, span=span))
        rows.append(replace(row, cells=kept))
    columns = [column for index, column in enumerate(table.columns) if index not in dropped]
    return replace(table, columns=columns, rows=rows)


def _plain(table: Table, width: int | None) -> Table:
    """The table for a fixed font: no spans, hints as notes, and only what there is room for.

    Args:
        table: what to show.
        width: of the screen, on which the last columns may have no room. Rows that have nothing but
            a message are left out then: the warnings of a section say the same, shorter. None for
            a file, which has room for everything.
    """
    table, rows, messages = _folded(table), [], []
    for row in table.rows:
        cells = list(row.cells)
        if row.tone == "absent":
            messages.append(f"{cells[0].text}: {cells.pop().text}.")
        if len(cells) > 1 or row.tone != "absent" or width is None:
            rows.append(Row([*cells, *[NONE] * (len(table.columns) - len(cells))], row.tone))
        else:
            messages.pop()
    used, dropped = 1, []
    for index, column in enumerate(table.columns):
        wanted = max(len(column.title), 0, *(len(row.cells[index].marked) for row in rows))
        used += 3 + (min(wanted, _TEXT_WIDTH) if column.is_text else wanted)
        if width is not None and used > width:
            dropped.append(index)
    shown = _without(replace(table, rows=rows), dropped)
    notes = [*table.notes, *messages, *(f"{title}: {hint}." for title, hint in shown.hints.items())]
    if dropped:
        titles = ", ".join(table.columns[index].title for index in dropped)
        notes.append(f"No room here for: {titles}.")
    return replace(shown, notes=notes)


def to_rich(table: Table, width: int | None = None) -> RichTable:
    """The table for a terminal; losing rows are red.

    Args:
        table: what to show.
        width: columns of the screen; None shows the whole table.
    """
    from rich.table import Table as RichTable
    from rich.text import Text

    table = _plain(table, width)
    shown = RichTable(
        title=Text(table.title),
        title_justify="left",
        caption=Text("\n".join(table.notes)),
        caption_justify="left",
    )
    for column in table.columns:
        justify: Literal["left", "right"] = "left" if column.is_text else "right"
        heading = Text(column.title)
        shown.add_column(heading, justify=justify, overflow="fold", no_wrap=not column.is_text)
    for row in table.rows:
        style = {"losing": "red", "absent": "dim"}.get(row.tone)
        shown.add_row(*(Text(cell.marked) for cell in row.cells), style=style)
    return shown


def print_tables(tables: Iterable[Table], console: Console | None = None) -> None:
    """Print tables that are no detail: on a terminal as wide as it is, as Markdown without rich."""
    shown = [table for table in tables if not table.is_detail]
    if console is None:
        try:
            from rich.console import Console
        except ImportError:
            print("\n".join(f"{table.title}\n\n{to_markdown(table)}" for table in shown))
            return
        console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    for table in shown:
        console.print(to_rich(table, console.width))


def to_markdown(table: Table) -> str:
    """The table in GitHub's Markdown, its notes below."""
    table = _plain(table, None)
    lines = [[column.title for column in table.columns]]
    lines += [["---" if column.is_text else "---:" for column in table.columns]]
    lines += [[cell.marked for cell in row.cells] for row in table.rows]
    rows = ["| " + " | ".join(_markdown(each) for each in line) + " |" for line in lines]
    return "\n".join([*rows, *(f"\n{_markdown(note)}" for note in table.notes)]) + "\n"


def _markdown(shown: str) -> str:
    return escape(shown, quote=False).replace("|", r"\|").replace("\n", " ")


def to_html(table: Table) -> str:
    """The table as a `<figure>` of the report's page; everything in it is escaped."""
    table = _folded(table)
    title = escape(table.title)
    heads = "".join(
        f'<th scope="col" class="{_side(column)}">{escape(column.title)}</th>'
        for column in table.columns
    )
    hints = "; ".join(f"<b>{escape(head)}</b>: {escape(h)}" for head, h in table.hints.items())
    notes = [*map(escape, table.notes), *([f"{hints}."] if hints else [])]
    below = "".join(f"<p>{note}</p>" for note in notes)
    body = "\n".join(_html_row(table.columns, row) for row in table.rows)
    return f"""<figure class="table">
<figcaption>{title}</figcaption>
<div class="scroll" tabindex="0" role="region" aria-label="{title}">
<table>
<thead><tr>{heads}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
{f'<div class="notes">{below}</div>' if below else ""}
</figure>
"""


def _html_row(columns: Sequence[Column], row: Row) -> str:
    cells = []
    for index, (column, cell) in enumerate(zip(columns, row.cells, strict=False)):
        tag, attributes = ("td", "") if index else ("th", ' scope="row"')
        classes = [_side(column) if cell.span == 1 else "text", cell.tone]
        classes += ["long"] * (len(cell.text) > _LONG) + ["bar"] * (cell.gain is not None)
        attributes += f' class="{" ".join(filter(None, classes))}"'
        if cell.span > 1:
            attributes += f' colspan="{cell.span}"'
        if cell.gain is not None:
            attributes += f' style="{_bar(cell.gain)}"'
        if cell.sort is not None:
            attributes += f' data-sort="{escape(str(cell.sort))}"'
        cells.append(f"<{tag}{attributes}>{escape(cell.text)}</{tag}>")
    return f'<tr class="{row.tone}">{"".join(cells)}</tr>'


def _side(column: Column) -> str:
    return "text" if column.is_text else "number"


def _bar(value: float) -> str:
    """Where a bar from 1 to this ratio begins and ends, logarithmic, 1 in the middle."""
    end = 50 + 50 * max(-1.0, min(1.0, log2(value) / _BAR_DOUBLINGS))
    low, high = sorted((50.0, end))
    return f"--from:{low:.1f}%;--to:{high:.1f}%"
