"""Pictures of result files: functions from a parsed file to a matplotlib figure.

Needs matplotlib (the extra ``bench``), which is imported when the first picture is drawn. Figures
are made without pyplot, so nothing global changes.
"""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_prefix.bench.comparison import fastest, of_kind, our_provider, over, provider_of
from sglang_prefix.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PLOTS", "has_matplotlib", "save_plots", "svg_text"]

Data = Mapping[str, Any]

# Colours of Okabe and Ito, told apart with any colour vision.
_OURS, _LOSING, _STOCK = "#0072b2", "#d55e00", "#888888"
_PARTS = {"plan": "#e69f00", "copy": "#cc79a7", "forward": "#0072b2", "merge": "#009e73"}
_MARKS = {"pat": "o", "node": "s", "chunk": "^", "query": "x"}
_SIDES = {"stock": _STOCK, "prefix": _OURS}
_PANELS = {
    "ttft_ms": "time to first token, ms (less is better)",
    "tpot_ms": "time per output token, ms (less is better)",
    "itl_ms": "time between tokens, ms (less is better)",
    "output_tokens_per_s": "output tokens per second (more is better)",
    "kv_read_ratio": "KV tokens read / KV tokens, in packed steps",
    "packed_share": "share of decode steps that were packed",
}
_ROW, _FRAME = 0.30, 1.9  # inches
_BAR = 0.62
_STYLE: Any = {
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    # Outlines: a page from disk brings no fonts, and another's would not fit the boxes.
    "svg.fonttype": "path",
    # Names may have dollar signs, which do not enclose mathematics.
    "text.parse_math": False,
}


def has_matplotlib() -> bool:
    """Whether plots can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def steps_figure(data: Data) -> Figure:
    """A decode step of ours, per case: speed-up over stock, where its time goes, KV bytes read.

    On the CPU the merge is timed alone, after the step.
    """
    ours = our_provider(data)
    cases = [case for case in data["cases"] if ours in case["providers"]]
    figure, panels = _figure(_FRAME + _ROW * max(len(cases), 3), 1, 3, width=16, sharey=True)
    for axes, draw in zip(panels, (_draw_speedups, _draw_parts, _draw_bytes), strict=True):
        draw(axes, cases, ours)
    panels[0].set_yticks(range(len(cases)), [case["name"] for case in cases])
    panels[0].set_ylim(max(len(cases), 1) - 0.4, -0.6)
    figure.suptitle(_title(data, "Decode attention"))
    return _with_legend(figure, 6)


def _draw_speedups(axes: Axes, cases: Sequence[Data], ours: str | None) -> None:
    """Bars of ours, which begin at 1; other policies as marks."""
    for row, case in enumerate(cases):
        value = over(case, ours, "stock")
        if value is None:
            continue
        label, colour = ("slower", _LOSING) if value < 1 else (ours, _OURS)
        axes.barh(row, value - 1, left=1, color=colour, height=_BAR, label=label)
        _beside(axes, row, f"{value:.2f}x", loses=value < 1)
        for name, other in of_kind(case, "ours").items():
            if name != ours:
                mark, label = _MARKS.get(other["policy"], "d"), f"policy {other['policy']}"
                if other["executor"] != case["providers"][ours]["executor"]:
                    mark, label = "d", name
                speedup = over(case, name, "stock") or 1.0
                axes.plot(speedup, row, mark, color="black", ms=4, mfc="none", label=label)
    axes.axvline(1, color=_STOCK, lw=1.2)
    _logarithmic(axes, "x", base=2)
    axes.set_xlabel(f"time of the fastest stock kernel ({_stock_names(cases)}) / time of ours")


def _draw_parts(axes: Axes, cases: Sequence[Data], ours: str | None) -> None:
    """Shares of the parts of a step."""
    found = [case["providers"][ours] for case in cases]
    # Of a GPU there is no time of the merge, which is launched with the forward pass.
    is_split = any(mine.get("merge_ms") is not None for mine in found)
    labels = {
        "forward": "forward (run less merge)" if is_split else "forward with merge",
        "merge": "merge (timed alone after the step)",
    }
    left = np.zeros(len(cases))
    for part, colour in _PARTS.items():
        shares = [100 * (mine.get(f"{part}_ms") or 0.0) / mine["ms"] for mine in found]
        label = labels.get(part, part) if any(shares) else None
        axes.barh(range(len(cases)), shares, _BAR, left, color=colour, label=label)
        left += shares
    for row, mine in enumerate(found):
        _beside(axes, row, f"{mine['ms']:.2f} ms")
    layers = max((case["layers"] for case in cases), default=1)
    axes.set_xlabel(f"median of each part / median of the step, %; layers: {layers}")


def _draw_bytes(axes: Axes, cases: Sequence[Data], ours: str | None) -> None:
    """KV bytes that are stored (ideal) and that ours reads, over those that stock reads."""
    rows = range(len(cases))
    read = [100 * case["providers"][ours]["kv_read_ratio"] for case in cases]
    ideal = [100 * case["bytes"]["ideal"] / case["bytes"]["logical"] for case in cases]
    axes.barh(rows, read, _BAR, color=_OURS)
    axes.plot(ideal, rows, "|", color="black", ms=13, mew=2, label="ideal: each token once")
    for row, mine in enumerate(read):
        _beside(axes, row, f"{mine:.1f}%")
    axes.set_xlim(0, 105)
    axes.set_xlabel("KV bytes, % of what every request reading its own takes, as stock does")


def roofline_figure(data: Data) -> Figure:
    """Achieved arithmetic against intensity, at the bytes read and at the ideal bytes."""
    ours, cases = our_provider(data), data["cases"]
    figure, axes = _figure(5.6)
    mine, slower = f"{ours}, at the bytes it reads", f"{ours}, slower than stock"
    stock = f"fastest stock ({_stock_names(cases)}), at the bytes it reads"
    best = "the same, at the ideal bytes (each shared token once)"
    xs = []
    for case in cases:
        for name in (fastest(case, "stock"), ours):
            found = provider_of(case, name)
            if not found:
                continue
            rate = case["flop"] * case["layers"] / found["ms"] / 1e6
            read, ideal = (case["flop"] / n for n in (found["bytes_read"], case["bytes"]["ideal"]))
            xs += [read, ideal]
            look = (mine, _OURS) if name == ours else (stock, _STOCK)
            if name == ours:
                axes.plot([read, ideal], [rate, rate], color=_OURS, lw=0.6)
                axes.plot(ideal, rate, "o", color=_OURS, ms=6, mfc="none", label=best)
                look = (slower, _LOSING) if (over(case, ours, "stock") or 1.0) < 1 else look
            axes.plot(read, rate, "o", color=look[1], ms=5, label=look[0])
    bandwidths = sorted(c["bandwidth_gb_s"] for c in cases if c["bandwidth_gb_s"])
    if xs and bandwidths:
        bandwidth = bandwidths[len(bandwidths) // 2]
        peak = data.get("limits", {}).get("flop_per_s", np.inf) / 1e9
        limits = f"measured in this run: {bandwidth:.1f} GB/s, {peak:.0f} GFLOP/s"
        roof = np.geomspace(min(xs) / 2, max(xs) * 2)
        axes.plot(roof, np.minimum(bandwidth * roof, peak), color="black", lw=1, label=limits)
    _logarithmic(axes, "x")
    _logarithmic(axes, "y")
    axes.set_xlabel("arithmetic intensity, FLOP per byte of KV")
    axes.set_ylabel("achieved, GFLOP/s")
    axes.set_title(_title(data, "Roofline: decode attention"))
    return _with_legend(figure, 2)


def serving_figure(data: Data) -> Figure:
    """Servers: times (bars: median; lines: to the 99th percentile), tokens per second, reads.

    Workloads that are no comparison are drawn pale and marked with a star.
    """
    figure, grid = _figure(10.0, 3, 2)
    for axes, (field, title) in zip(grid.flatten(), _PANELS.items(), strict=True):
        _bars(axes, [case for case in data["cases"] if case["sides"]], title, field)
    figure.suptitle(_title(data, Path(str(data.get("model"))).name))
    return _with_legend(figure, 2)


def _bars(axes: Axes, cases: Sequence[Data], title: str, field: str) -> None:
    """A bar per case and side; of times a line from the median to the 99th percentile as well."""
    width = 0.38
    for left, (side, colour) in zip((-width / 2, width / 2), _SIDES.items(), strict=True):
        found = [case["sides"].get(side, {}).get(field) for case in cases]
        spreads = [each if isinstance(each, dict) else {"median": each} for each in found]
        heights = [spread["median"] or 0.0 for spread in spreads]
        tops = [spread.get("p99", spread["median"]) or 0.0 for spread in spreads]
        xs = np.arange(len(cases)) + left
        bars = axes.bar(xs, heights, width, color=colour, label=side)
        axes.vlines(xs, heights, np.maximum(heights, tops), color="black", linewidth=0.8)
        for bar, case in zip(bars, cases, strict=True):
            bar.set_alpha(1.0 if case["is_comparison"] else 0.35)
    names = [case["name"] + ("" if case["is_comparison"] else " *") for case in cases]
    axes.set_xticks(range(len(cases)), names)
    if not all(case["is_comparison"] for case in cases):
        axes.set_xlabel("* no comparison")
    axes.set_title(title)
    axes.set_ylim(bottom=0)


# By kind of result file and name of the picture's file. The first line of a function's docstring
# says what its plot shows.
PLOTS: dict[str, dict[str, Callable[[Data], Figure]]] = {
    "bench-kernel": {
        "kernel-steps": steps_figure,
        "kernel-roofline": roofline_figure,
    },
    "bench-serving": {"serving_times": serving_figure},
}


def save_plots(data: Data, folder: str | os.PathLike[str]) -> list[Path]:
    """Write every picture of a result file as SVG; each file whole or not at all.

    Args:
        data: a parsed result file.
        folder: where; must be there.

    Returns:
        The files.

    Raises:
        OSError: one cannot be written.
    """
    paths = []
    for name, draw in PLOTS.get(data["kind"], {}).items():
        path = Path(folder) / f"{name}.svg"
        write_file(path, svg_text(draw, data, name))
        paths.append(path)
    return paths


def svg_text(draw: Callable[[Data], Figure], data: Data, salt: str) -> str:
    """A picture as the text of an SVG file, the same for the same data and salt."""
    from matplotlib import style

    file = io.StringIO()
    with style.context(["seaborn-v0_8-whitegrid", _STYLE | {"svg.hashsalt": salt}]):
        draw(data).savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return file.getvalue()


def _figure(
    height: float, rows: int = 1, columns: int = 1, *, width: float = 10, sharey: bool = False
) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, sharey=sharey)


def _logarithmic(axes: Axes, which: str, base: int = 10) -> None:
    """Plain numbers at its powers: matplotlib would write them as mathematics."""
    (axes.semilogx if which == "x" else axes.semilogy)(base=base)
    (axes.xaxis if which == "x" else axes.yaxis).set_major_formatter("{x:g}")
    axes.minorticks_off()


def _title(data: Data, what: str) -> str:
    """What is shown, and what it was measured with and on."""
    found, dtype = data["environment"], data["options"].get("dtype", data.get("dtype"))
    where = found.get("gpu") or f"{found.get('cpu')}, threads: {found.get('threads')}"
    return f"{what}, {dtype}, {where}"


def _stock_names(cases: Sequence[Data]) -> str:
    names = [name for case in cases if (name := fastest(case, "stock"))]
    return ", ".join(dict.fromkeys(names)) or "absent"


def _beside(axes: Axes, row: int, said: str, *, loses: bool = False) -> None:
    """A text right of the axes, in line with a row."""
    where, colour = axes.get_yaxis_transform(), _LOSING if loses else "black"
    axes.text(1.01, row, said, transform=where, va="center", color=colour)


def _with_legend(figure: Figure, columns: int) -> Figure:
    """The figure with each label of its axes once, below them."""
    found: dict[Any, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend([*found.values()], [*found], loc="outside lower left", ncols=columns)
    return figure
