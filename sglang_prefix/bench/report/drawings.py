"""The plots of each kind of result file, drawn by the modules that the bench commands use."""

from __future__ import annotations

import importlib.util

from sglang_prefix.bench.report.model import Figure
from sglang_prefix.bench.report.sources import Source

__all__ = ["draw", "has_matplotlib"]


def has_matplotlib() -> bool:
    """Whether plots can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(source: Source, key: str) -> list[Figure]:
    """All plots of a file.

    Args:
        source: the file; kinds without plots have none.
        key: letters and digits, unique in the page.
    """
    return []
