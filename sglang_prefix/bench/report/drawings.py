"""The plots of each kind of result file, drawn by the modules that the bench commands use."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from functools import partial
from typing import Any

from sglang_prefix.bench.report.figures import embedded
from sglang_prefix.bench.report.model import Figure
from sglang_prefix.bench.report.sources import Source

__all__ = ["MODULES", "draw", "has_matplotlib"]

# By kind: a module, and its mapping from names to functions from a parsed file to a matplotlib
# figure. The first line of a function's docstring says what its plot shows. Imported when they are
# needed: they may need matplotlib to be imported.
MODULES = {
    "bench-kernel": ("sglang_prefix.bench.plots", "FIGURES"),
    "bench-serving": ("sglang_prefix.bench.serving.plots", "PLOTS"),
}


def has_matplotlib() -> bool:
    """Whether plots can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(source: Source, key: str) -> list[Figure]:
    """All plots of a file; none of a kind that has no plots, or of a file without cells.

    Args:
        source: the file.
        key: letters and digits, unique in the page.
    """
    if source.kind not in MODULES or not source.data["cells"]:
        return []
    module, mapping = MODULES[source.kind]
    plots = getattr(importlib.import_module(module), mapping)
    data = _literal(source.data)
    return [
        embedded(partial(plot, data), _caption(plot), f"{key}p{number}")
        for number, plot in enumerate(plots.values(), 1)
    ]


def _literal(value: Any) -> Any:
    """The same with dollar signs escaped: between two of them matplotlib sees mathematics."""
    if isinstance(value, str):
        return value.replace("$", r"\$")
    if isinstance(value, dict):
        return {_literal(key): _literal(item) for key, item in value.items()}
    return [_literal(item) for item in value] if isinstance(value, list) else value


def _caption(plot: object) -> str:
    return (inspect.getdoc(plot) or "").partition("\n")[0].rstrip(".")
