"""Numbers as people read them. Imports nothing of ours."""

from __future__ import annotations

__all__ = ["plural", "size"]


def plural(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(num_bytes: float) -> str:
    """Bytes in thousands or millions, with three digits where that many are needed."""
    value, unit = (num_bytes / 1e3, "kB") if num_bytes < 999_500 else (num_bytes / 1e6, "MB")
    return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.3g} {unit}"
