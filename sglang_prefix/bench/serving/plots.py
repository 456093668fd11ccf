"""Plots of a `bench-serving` result: functions from parsed JSON to matplotlib figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PLOTS", "plot_reads", "plot_times"]

# Grey and blue of Okabe and Ito's palette, which stay apart for most colour-blind readers.
_COLOURS = {"stock": "#9a9a9a", "prefix": "#0072b2"}
_WIDTH = 0.38
_TIMES = (("ttft_ms", "time to first token, ms"), ("tpot_ms", "time per output token, ms"),
          ("itl_ms", "time between tokens, ms"))  # fmt: skip


def plot_times(data: Mapping[str, Any]) -> Figure:
    """TTFT, TPOT, ITL (bars: median; lines: to the 99th percentile), output tokens per second.

    Workloads that are no comparison are drawn pale and marked with a star.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    cells = _cells(data)
    for (field, title), axis in zip(_TIMES, axes, strict=False):
        _bars(axis, cells, partial(_quantiles, field))
        axis.set_title(f"{title} (less is better)", fontsize=10)
    _bars(axes[-1], cells, lambda side: (side["output_tokens_per_s"], None))
    axes[-1].set_title("output tokens per second (more is better)", fontsize=10)
    figure.suptitle(_title(data))
    handles = [Patch(color=colour, label=side) for side, colour in _COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def plot_reads(data: Mapping[str, Any]) -> Figure:
    """KV tokens read over KV tokens of all requests, and the share of decode steps packed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    cells = _cells(data)
    for axis, field, title in (
        (left, "kv_read_ratio", "KV tokens read / KV tokens, packed steps (stock: 1)"),
        (right, "packed_share", "decode steps that were packed"),
    ):
        values = [(cell["sides"].get("prefix") or {}).get(field) for cell in cells]
        axis.bar(range(len(cells)), [v or 0 for v in values], 0.6, color=_COLOURS["prefix"])
        for x, value in enumerate(values):
            text = "none" if value is None else f"{value:.2f}"
            axis.annotate(text, (x, value or 0), ha="center", va="bottom", fontsize=8)
        axis.set_ylim(0, 1.15)
        axis.axhline(1, color=_COLOURS["stock"], linewidth=1)
        axis.set_title(title, fontsize=10)
        _name(axis, cells)
    figure.suptitle(_title(data))
    return figure


# File name of each plot, without its ending.
PLOTS: Mapping[str, Callable[[Mapping[str, Any]], Figure]] = {
    "serving_times": plot_times,
    "serving_reads": plot_reads,
}


def _title(data: Mapping[str, Any]) -> str:
    environment = data["environment"]
    device = environment["gpu"] or environment["device"]
    return f"{str(data['model']).rstrip('/').rsplit('/', 1)[-1]}, {data['dtype']}, {device}"


def _cells(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cell for cell in data["cells"] if cell["sides"]]


def _quantiles(field: str, side: Mapping[str, Any]) -> tuple[float | None, float | None]:
    found = side[field] or {"median": None, "p99": None}
    return found["median"], found["p99"]


def _bars(
    axis: Axes,
    cells: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], tuple[float | None, float | None]],
) -> None:
    """Two bars per cell: a value, and a line from it to another where that is not None."""
    for number, side in enumerate(_COLOURS):
        for x, cell in enumerate(cells):
            if side not in cell["sides"]:
                continue
            height, top = value(cell["sides"][side])
            if height is None:
                continue
            error = None if top is None else ([0.0], [max(0.0, top - height)])
            axis.bar(
                x + (number - 0.5) * _WIDTH,
                height,
                _WIDTH,
                color=_COLOURS[side],
                alpha=1.0 if cell["is_comparison"] else 0.35,
                yerr=error,
                error_kw={"linewidth": 0.8},
            )
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", linewidth=0.3)
    _name(axis, cells)


def _name(axis: Axes, cells: Sequence[Mapping[str, Any]]) -> None:
    names = [cell["name"] + ("" if cell["is_comparison"] else " *") for cell in cells]
    axis.set_xticks(range(len(cells)), names, fontsize=8)
    if any(name.endswith("*") for name in names):
        axis.set_xlabel("* no comparison", fontsize=8)
    for edge in ("top", "right"):
        axis.spines[edge].set_visible(False)
