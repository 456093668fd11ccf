"""Cells of tables from numbers: how many digits, and when a number is a loss."""

from __future__ import annotations

from collections.abc import Iterable
from math import exp, log
from typing import Any

from sglang_prefix.bench.report.model import UNMEASURED, Cell, Row

__all__ = ["NONE", "across", "gain", "geomean", "name", "number", "ratio_text", "share", "text"]

NONE = Cell(UNMEASURED, tone="quiet")
# Nearer to 1 than this, two decimals would not tell which side won.
_NEAR_ONE = 0.05


def text(value: object) -> Cell:
    """Words, or a dash for None."""
    return NONE if value is None or value == "" else Cell(str(value), str(value))


def name(value: str, *, loses: bool = False) -> Cell:
    """What a row is called."""
    return Cell(value, value, "losing" if loses else "")


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
    drawn = value if bar and counts else None
    return Cell(ratio_text(value), value, _tone(value) if counts else "", drawn)


def across(cells: Iterable[Cell], message: str, num_columns: int) -> Row:
    """A row that has a name and, in place of numbers, one message."""
    first = list(cells)
    return Row([*first, Cell(message, tone="absent", span=num_columns - len(first))], "absent")


def ratio_text(value: float) -> str:
    """A ratio with as many decimals as it takes to see on which side of 1 it is."""
    decimals = 3 if abs(value - 1) < _NEAR_ONE or value < 0.1 else 2
    return f"{value:.{decimals}f}x"


def geomean(values: Iterable[float]) -> float | None:
    """Geometric mean; None of nothing."""
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs)) if logs else None


def _tone(value: float) -> Any:
    return "losing" if value < 1 else "gaining" if value > 1 else ""


def _significant(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    size = abs(value)
    if size < 0.001 or size >= 1e9:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - int(f"{size:e}".partition("e")[2]))
    return f"{value:,.{decimals}f}"
