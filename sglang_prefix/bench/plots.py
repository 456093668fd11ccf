"""Pictures of a `bench kernel` result: functions from the parsed file to a matplotlib figure.

Needs matplotlib (the extra ``bench``). Figures are made without pyplot, so nothing global changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

__all__ = [
    "FIGURES",
    "byte_ratio_figure",
    "our_contender",
    "roofline_figure",
    "save_plots",
    "speedup_figure",
    "time_split_figure",
]

Data = Mapping[str, Any]

# Colours of Okabe and Ito, told apart with any colour vision.
_OURS, _LOSING, _STOCK = "#0072b2", "#d55e00", "#666666"
_PARTS = {"plan": "#e69f00", "copy": "#cc79a7", "forward": "#0072b2", "merge": "#009e73"}
_MARKS = {"pat": "o", "node": "s", "chunk": "^", "query": "x"}
_WIDTH, _ROW, _FRAME = 9.5, 0.30, 1.9  # inches


def our_contender(data: Data) -> str:
    """The contender that figures call ours: the run's first policy on its executor."""
    policy = data["options"]["policies"][0]
    found = (
        name
        for cell in data["cells"]
        for name, contender in cell["contenders"].items()
        if contender["kind"] == "ours" and contender["policy"] == policy
    )
    return next(found, f"ours/{policy}")


def speedup_figure(data: Data) -> Figure:
    """Speed-up of ours over the fastest stock kernel, per cell; other policies as marks."""
    ours = our_contender(data)
    cells = [c for c in data["cells"] if c["best_stock"] and ours in c["contenders"]]
    figure, axes = _rows(data, "Speed-up over stock", cells)
    values = [cell["contenders"][ours]["speedup"] for cell in cells]
    colours = [_LOSING if value < 1 else _OURS for value in values]
    axes.barh(range(len(cells)), [v - 1 for v in values], left=1, color=colours, height=0.62)
    drawn = {*values, 0.8, 1.25}
    policies = set()
    for row, (cell, value) in enumerate(zip(cells, values, strict=True)):
        _beside(axes, row, f"{value:.2f}x", colours[row] if value < 1 else "black")
        for name, contender in cell["contenders"].items():
            if contender["kind"] != "ours" or name == ours:
                continue
            policies.add(contender["policy"])
            drawn.add(contender["speedup"])
            mark = _MARKS.get(contender["policy"], "d")
            axes.plot(contender["speedup"], row, mark, color="black", ms=4, mfc="none")
    axes.axvline(1, color=_STOCK, lw=1.2)
    axes.set_xscale("log")
    axes.set_xlim(min(drawn) / 1.2, max(drawn) * 1.2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"time of the fastest stock kernel ({_stock_names(cells)}) / time of ours")
    handles: list[Any] = [Patch(color=_OURS, label=ours), Patch(color=_LOSING, label="slower")]
    for policy, mark in _MARKS.items():
        if policy in policies:
            label = f"policy {policy}"
            handles.append(
                Line2D([], [], marker=mark, color="black", mfc="none", ls="", ms=4, label=label)
            )
    return _with_legend(figure, handles, 5)


def roofline_figure(data: Data) -> Figure:
    """Achieved arithmetic against intensity, at the bytes read and at the ideal bytes."""
    ours = our_contender(data)
    figure = Figure(figsize=(_WIDTH, 5.6), layout="constrained")
    axes = figure.subplots()
    points: list[tuple[float, float]] = []
    for cell in data["cells"]:
        work = cell["flop"] / 1e9
        best = cell["best_stock"]
        for name, colour in ((best, _STOCK), (ours, _OURS)):
            contender = cell["contenders"].get(name)
            if contender is None:
                continue
            rate = work * cell["layers"] / contender["ms"] * 1e3
            read = work * 1e9 / contender["bytes_read"]
            losing = name == ours and contender["speedup"] is not None and contender["speedup"] < 1
            axes.plot(read, rate, "o", color=_LOSING if losing else colour, ms=5)
            points.append((read, rate))
            if name == ours:
                ideal = work * 1e9 / cell["bytes"]["ideal"]
                axes.plot([read, ideal], [rate, rate], "-", color=_OURS, lw=0.6)
                axes.plot(ideal, rate, "o", color=_OURS, ms=6, mfc="none")
                points.append((ideal, rate))
    bandwidths = sorted(cell["bandwidth_gb_s"] for cell in data["cells"])
    peak = data.get("peak_gflop_s")
    if points:
        _roof(axes, [x for x, _ in points], bandwidths[len(bandwidths) // 2], peak)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity, FLOP per byte of KV")
    axes.set_ylabel("achieved, GFLOP/s")
    axes.set_title(_title(data, "Roofline"), loc="left", size=10)
    axes.grid(alpha=0.25, which="both", lw=0.5)
    handles: list[Any] = [
        _dot(_OURS, f"{ours}, at the bytes it reads"),
        _dot(_OURS, "the same, at the ideal bytes (each shared token once)", hollow=True),
        _dot(_LOSING, f"{ours}, slower than stock"),
        _dot(_STOCK, f"fastest stock ({_stock_names(data['cells'])}), at the bytes it reads"),
        Line2D([], [], color="black", lw=1, label="bandwidth and arithmetic, measured in this run"),
    ]
    return _with_legend(figure, handles, 2)


def time_split_figure(data: Data) -> Figure:
    """Where a step of ours spends its time; on the CPU the merge is timed alone, after the step."""
    ours = our_contender(data)
    cells = [c for c in data["cells"] if ours in c["contenders"]]
    figure, axes = _rows(data, "Time of a decode step", cells)
    left = [0.0] * len(cells)
    shown = []
    for part, colour in _PARTS.items():
        parts = [cell["contenders"][ours][f"{part}_ms"] for cell in cells]
        if all(value is None for value in parts):
            continue
        shown.append(Patch(color=colour, label=_part_label(part, cells, ours)))
        wholes = [cell["contenders"][ours]["ms"] for cell in cells]
        shares = [100 * (v or 0.0) / w for v, w in zip(parts, wholes, strict=True)]
        axes.barh(range(len(cells)), shares, left=left, color=colour, height=0.62)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    for row, cell in enumerate(cells):
        mine = cell["contenders"][ours]
        losing = mine["speedup"] is not None and mine["speedup"] < 1
        text = f"{mine['ms']:.2f} ms" + (", slower than stock" if losing else "")
        _beside(axes, row, text, _LOSING if losing else "black")
    axes.set_xlim(0, max([100, *left]))
    layers = max((cell["layers"] for cell in cells), default=1)
    axes.set_xlabel(f"median of each part / median of the step of {ours}, %; layers: {layers}")
    return _with_legend(figure, shown, 4)


def _part_label(part: str, cells: list[Any], ours: str) -> str:
    """A part of the step, and how it was found where no clock stood around it."""
    if all(cell["contenders"][ours]["merge_ms"] is None for cell in cells):
        return "forward with merge" if part == "forward" else part
    how = {"forward": " (run less merge)", "merge": " (timed alone after the step)"}
    return part + how.get(part, "")


def byte_ratio_figure(data: Data) -> Figure:
    """KV bytes that are stored (ideal) and that ours reads, over those that stock reads."""
    ours = our_contender(data)
    cells = [c for c in data["cells"] if ours in c["contenders"]]
    figure, axes = _rows(data, "KV bytes read", cells)
    read = [100 * cell["contenders"][ours]["kv_read_ratio"] for cell in cells]
    ideal = [100 * cell["bytes"]["ideal"] / cell["bytes"]["logical"] for cell in cells]
    axes.barh(range(len(cells)), [100] * len(cells), color="#dddddd", height=0.62)
    axes.barh(range(len(cells)), read, color=_OURS, height=0.62)
    axes.plot(ideal, range(len(cells)), "|", color="black", ms=13, mew=2)
    for row, (mine, best) in enumerate(zip(read, ideal, strict=True)):
        _beside(axes, row, f"{mine:.1f}%, ideal {best:.1f}%")
    axes.set_xlim(0, max([100, *read]))
    axes.set_xlabel("KV bytes, % of what every request reading its own takes")
    handles: list[Any] = [
        Patch(color=_OURS, label=f"read by {ours}"),
        Line2D([], [], marker="|", color="black", ls="", ms=11, mew=2, label="ideal: each once"),
        Patch(color="#dddddd", label="logical: each request its own, as stock reads"),
    ]
    return _with_legend(figure, handles, 3)


FIGURES: dict[str, Callable[[Data], Figure]] = {
    "kernel-speedup": speedup_figure,
    "kernel-roofline": roofline_figure,
    "kernel-time-split": time_split_figure,
    "kernel-bytes": byte_ratio_figure,
}


def save_plots(data: Data, folder: str | os.PathLike[str]) -> list[Path]:
    """Write every figure as SVG; each file whole or not at all.

    Args:
        data: a parsed result file.
        folder: where; must be there.

    Returns:
        The files.
    """
    paths = []
    for name, draw in FIGURES.items():
        path = Path(folder) / f"{name}.svg"
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            draw(data).savefig(beside, format="svg", facecolor="white")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        paths.append(path)
    return paths


def _rows(data: Data, what: str, cells: list[Any]) -> tuple[Figure, Axes]:
    """A figure with one row per cell, the first on top."""
    height = _FRAME + _ROW * max(len(cells), 3)
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes: Axes = figure.subplots()
    axes.set_title(_title(data, what), loc="left", size=10)
    axes.set_yticks(range(len(cells)), [cell["name"] for cell in cells], size=8)
    axes.set_ylim(max(len(cells), 1) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.25, lw=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not cells:
        axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center")
    return figure, axes


def _title(data: Data, what: str) -> str:
    where = data["environment"]["gpu"] or data["environment"]["cpu"]
    threads = "" if data["environment"]["gpu"] else f", threads: {data['environment']['threads']}"
    return f"{what}: decode attention, {data['options']['dtype']}, {where}{threads}"


def _stock_names(cells: list[Any]) -> str:
    return ", ".join(dict.fromkeys(c["best_stock"] for c in cells if c["best_stock"])) or "absent"


def _roof(axes: Axes, intensities: list[float], bandwidth: float, peak: float | None) -> None:
    """What the memory delivers at each intensity, up to what arithmetic delivers."""
    low, high = min(intensities) / 2, max(intensities) * 2
    corner = peak / bandwidth if peak else high
    xs = sorted({low, high, *([corner] if low < corner < high else [])})
    axes.plot(xs, [min(bandwidth * x, peak or bandwidth * x) for x in xs], color="black", lw=1)
    axes.annotate(
        f"{bandwidth:.1f} GB/s",
        (low, bandwidth * low),
        (8, -4),
        textcoords="offset points",
        size=8,
    )
    if peak and corner < high:
        text = f"{peak:.0f} GFLOP/s"
        axes.annotate(text, (high, peak), (-4, 4), textcoords="offset points", ha="right", size=8)


def _dot(colour: str, label: str, *, hollow: bool = False) -> Line2D:
    face = "none" if hollow else colour
    return Line2D([], [], marker="o", ls="", color=colour, mfc=face, ms=5, label=label)


def _beside(axes: Axes, row: int, text: str, colour: str = "black") -> None:
    """A text right of the axes, in line with a row."""
    where = axes.get_yaxis_transform()
    axes.text(1.01, row, text, transform=where, va="center", size=8, color=colour)


def _with_legend(figure: Figure, handles: list[Any], columns: int) -> Figure:
    figure.legend(
        handles=handles, loc="outside lower left", ncols=columns, fontsize=8, frameon=False
    )
    return figure
