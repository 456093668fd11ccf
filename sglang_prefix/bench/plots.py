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

from sglang_prefix.bench.comparison import fastest, of_kind, our_provider, over, provider_of
from sglang_prefix.bench.results import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = [
    "PLOTS",
    "byte_ratio_figure",
    "has_matplotlib",
    "roofline_figure",
    "save_plots",
    "serving_reads_figure",
    "serving_times_figure",
    "speedup_figure",
    "svg_text",
    "time_split_figure",
]

Data = Mapping[str, Any]

# Colours of Okabe and Ito, told apart with any colour vision.
_OURS, _LOSING, _STOCK, _PALE = "#0072b2", "#d55e00", "#666666", "#dddddd"
_PARTS = {"plan": "#e69f00", "copy": "#cc79a7", "forward": "#0072b2", "merge": "#009e73"}
_MARKS = {"pat": "o", "node": "s", "chunk": "^", "query": "x"}
_SIDES = {"stock": "#9a9a9a", "prefix": _OURS}
_TIMES = {
    "ttft_ms": "time to first token, ms",
    "tpot_ms": "time per output token, ms",
    "itl_ms": "time between tokens, ms",
}
_WIDTH, _ROW, _FRAME = 9.5, 0.30, 1.9  # inches
_BAR = 0.62


def has_matplotlib() -> bool:
    """Whether plots can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def speedup_figure(data: Data) -> Figure:
    """Speed-up of ours over the fastest stock kernel, per case; other policies as marks."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ours = our_provider(data)
    cases = [case for case in data["cases"] if over(case, ours, "stock")]
    figure, axes = _rows(data, "Speed-up over stock", cases)
    values = [over(case, ours, "stock") or 1.0 for case in cases]
    colours = [_LOSING if value < 1 else _OURS for value in values]
    axes.barh(range(len(cases)), [v - 1 for v in values], left=1, color=colours, height=_BAR)
    drawn, policies = {*values, 0.8, 1.25}, set()
    for row, (case, value) in enumerate(zip(cases, values, strict=True)):
        _beside(axes, row, f"{value:.2f}x", colours[row] if value < 1 else "black")
        for name in of_kind(case, "ours").keys() - {ours}:
            policy, speedup = case["providers"][name]["policy"], over(case, name, "stock") or 1.0
            policies.add(policy)
            drawn.add(speedup)
            mark = _MARKS.get(policy, "d")
            axes.plot(speedup, row, mark, color="black", ms=4, mfc="none")
    axes.axvline(1, color=_STOCK, lw=1.2)
    axes.set_xscale("log")
    axes.set_xlim(min(drawn) / 1.2, max(drawn) * 1.2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"time of the fastest stock kernel ({_stock_names(cases)}) / time of ours")
    keys = [_key(str(ours), _OURS), _key("slower", _LOSING)]
    marks = {policy: mark for policy, mark in _MARKS.items() if policy in policies}
    keys += [_key(f"policy {p}", "black", mark, hollow=True) for p, mark in marks.items()]
    return _with_legend(figure, keys, 5)


def roofline_figure(data: Data) -> Figure:
    """Achieved arithmetic against intensity, at the bytes read and at the ideal bytes."""
    ours = our_provider(data)
    figure, axes = _figure(5.6)
    points: list[tuple[float, float]] = []

    def dot(intensity: float, rate: float, colour: str, **look: Any) -> None:
        axes.plot(intensity, rate, "o", color=colour, **look)
        points.append((intensity, rate))

    for case in data["cases"]:
        for name, colour in ((fastest(case, "stock"), _STOCK), (ours, _OURS)):
            found = provider_of(case, name)
            if not found:
                continue
            rate = case["flop"] * case["layers"] / found["ms"] / 1e6
            loses = name == ours and _loses(case, ours)
            dot(case["flop"] / found["bytes_read"], rate, _LOSING if loses else colour, ms=5)
            if name == ours:
                read, ideal = case["flop"] / found["bytes_read"], _ideal_intensity(case)
                axes.plot([read, ideal], [rate, rate], "-", color=_OURS, lw=0.6)
                dot(ideal, rate, _OURS, ms=6, mfc="none")
    bandwidths = sorted(c["bandwidth_gb_s"] for c in data["cases"] if c["bandwidth_gb_s"])
    if points and bandwidths:
        peak = data.get("limits", {}).get("flop_per_s")
        middle = bandwidths[len(bandwidths) // 2]
        _draw_roof(axes, [x for x, _ in points], middle, peak and peak / 1e9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity, FLOP per byte of KV")
    axes.set_ylabel("achieved, GFLOP/s")
    axes.set_title(_kernel_title(data, "Roofline"), loc="left", size=10)
    axes.grid(alpha=0.25, which="both", lw=0.5)
    stock = f"fastest stock ({_stock_names(data['cases'])}), at the bytes it reads"
    ideal_label = "the same, at the ideal bytes (each shared token once)"
    keys = [
        _key(f"{ours}, at the bytes it reads", _OURS, "o"),
        _key(ideal_label, _OURS, "o", hollow=True),
        _key(f"{ours}, slower than stock", _LOSING, "o"),
        _key(stock, _STOCK, "o"),
        _key("bandwidth and arithmetic, measured in this run", "black", "_"),
    ]
    return _with_legend(figure, keys, 2)


def _ideal_intensity(case: Data) -> float:
    return float(case["flop"] / case["bytes"]["ideal"])


def _draw_roof(axes: Axes, xs: Sequence[float], bandwidth: float, peak: float | None) -> None:
    """What the memory delivers at each intensity, up to what arithmetic delivers."""
    low, high = min(xs) / 2, max(xs) * 2
    corner = peak / bandwidth if peak else high
    line = sorted({low, high, *([corner] if low < corner < high else [])})
    axes.plot(line, [min(bandwidth * x, peak or bandwidth * x) for x in line], color="black", lw=1)
    where: Any = {"textcoords": "offset points", "size": 8}
    axes.annotate(f"{bandwidth:.1f} GB/s", (low, bandwidth * low), (8, -4), **where)
    if peak and corner < high:
        axes.annotate(f"{peak:.0f} GFLOP/s", (high, peak), (-4, 4), ha="right", **where)


def time_split_figure(data: Data) -> Figure:
    """Where a step of ours spends its time; on the CPU the merge is timed alone, after the step."""
    ours, cases = _cases_of_ours(data)
    figure, axes = _rows(data, "Time of a decode step", cases)
    found = [case["providers"][ours] for case in cases]
    has_merge = any(mine.get("merge_ms") is not None for mine in found)
    labels = {part: part for part in _PARTS} | {"forward": "forward with merge"}
    if has_merge:
        labels |= {"forward": "forward (run less merge)"}
        labels |= {"merge": "merge (timed alone after the step)"}
    left, keys = [0.0] * len(cases), []
    for part, colour in _PARTS.items():
        if all(mine.get(f"{part}_ms") is None for mine in found):
            continue
        keys.append(_key(labels[part], colour))
        shares = [100 * (mine.get(f"{part}_ms") or 0.0) / mine["ms"] for mine in found]
        axes.barh(range(len(cases)), shares, left=left, color=colour, height=_BAR)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    for row, (case, mine) in enumerate(zip(cases, found, strict=True)):
        loses = _loses(case, ours)
        said = f"{mine['ms']:.2f} ms" + (", slower than stock" if loses else "")
        _beside(axes, row, said, _LOSING if loses else "black")
    axes.set_xlim(0, max([100, *left]))
    layers = max((case["layers"] for case in cases), default=1)
    axes.set_xlabel(f"median of each part / median of the step of {ours}, %; layers: {layers}")
    return _with_legend(figure, keys, 4)


def byte_ratio_figure(data: Data) -> Figure:
    """KV bytes that are stored (ideal) and that ours reads, over those that stock reads."""
    ours, cases = _cases_of_ours(data)
    figure, axes = _rows(data, "KV bytes read", cases)
    rows = range(len(cases))
    read = [100 * case["providers"][ours]["kv_read_ratio"] for case in cases]
    ideal = [100 * case["bytes"]["ideal"] / case["bytes"]["logical"] for case in cases]
    axes.barh(rows, [100] * len(cases), color=_PALE, height=_BAR)
    axes.barh(rows, read, color=_OURS, height=_BAR)
    axes.plot(ideal, rows, "|", color="black", ms=13, mew=2)
    for row, (mine, best) in enumerate(zip(read, ideal, strict=True)):
        _beside(axes, row, f"{mine:.1f}%, ideal {best:.1f}%")
    axes.set_xlim(0, max([100, *read]))
    axes.set_xlabel("KV bytes, % of what every request reading its own takes")
    keys = [
        _key(f"read by {ours}", _OURS),
        _key("ideal: each once", "black", "|"),
        _key("logical: each request its own, as stock reads", _PALE),
    ]
    return _with_legend(figure, keys, 3)


def serving_times_figure(data: Data) -> Figure:
    """TTFT, TPOT, ITL (bars: median; lines: to the 99th percentile), output tokens per second.

    Workloads that are no comparison are drawn pale and marked with a star.
    """
    figure, grid = _figure(7.0, 2, 2)
    cases = [case for case in data["cases"] if case["sides"]]
    for axes, (field, title) in zip(grid.flatten(), _TIMES.items(), strict=False):
        _bars(axes, cases, lambda side, field=field: side[field])  # type: ignore[misc]
        axes.set_title(f"{title} (less is better)", fontsize=10)
    axes = grid[1][1]
    _bars(axes, cases, lambda side: {"median": side["output_tokens_per_s"], "p99": None})
    axes.set_title("output tokens per second (more is better)", fontsize=10)
    figure.suptitle(_serving_title(data))
    return _with_legend(figure, [_key(side, colour) for side, colour in _SIDES.items()], 2)


def serving_reads_figure(data: Data) -> Figure:
    """KV tokens read over KV tokens of all requests, and the share of decode steps packed."""
    figure, grid = _figure(3.8, 1, 2)
    cases = [case for case in data["cases"] if case["sides"]]
    shown = {
        "kv_read_ratio": "KV tokens read / KV tokens, packed steps (stock: 1)",
        "packed_share": "decode steps that were packed",
    }
    for axes, (field, title) in zip(grid, shown.items(), strict=True):
        values = [case["sides"].get("prefix", {}).get(field) for case in cases]
        axes.bar(range(len(cases)), [value or 0 for value in values], 0.6, color=_OURS)
        for x, value in enumerate(values):
            said = "none" if value is None else f"{value:.2f}"
            axes.annotate(said, (x, value or 0), ha="center", va="bottom", fontsize=8)
        axes.set_ylim(0, 1.15)
        axes.axhline(1, color=_SIDES["stock"], linewidth=1)
        axes.set_title(title, fontsize=10)
        _name_workloads(axes, cases)
    figure.suptitle(_serving_title(data))
    return figure


def _bars(axes: Axes, cases: Sequence[Data], spread: Callable[[Data], Data | None]) -> None:
    """Two bars per case: a median, and a line from it to the 99th percentile if there is one."""
    for number, (side, colour) in enumerate(_SIDES.items()):
        for x, case in enumerate(cases):
            found = spread(case["sides"][side]) if side in case["sides"] else None
            if found is None or found["median"] is None:
                continue
            height, top = found["median"], found["p99"]
            axes.bar(
                x + (number - 0.5) * 0.38,
                height,
                0.38,
                color=colour,
                alpha=1.0 if case["is_comparison"] else 0.35,
                yerr=None if top is None else ([0.0], [max(0.0, top - height)]),
                error_kw={"linewidth": 0.8},
            )
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", linewidth=0.3)
    _name_workloads(axes, cases)


def _name_workloads(axes: Axes, cases: Sequence[Data]) -> None:
    names = [case["name"] + ("" if case["is_comparison"] else " *") for case in cases]
    axes.set_xticks(range(len(cases)), names, fontsize=8)
    if not all(case["is_comparison"] for case in cases):
        axes.set_xlabel("* no comparison", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


# By kind of result file and name of the picture's file. The first line of a function's docstring
# says what its plot shows.
PLOTS: dict[str, dict[str, Callable[[Data], Figure]]] = {
    "bench-kernel": {
        "kernel-speedup": speedup_figure,
        "kernel-roofline": roofline_figure,
        "kernel-time-split": time_split_figure,
        "kernel-bytes": byte_ratio_figure,
    },
    "bench-serving": {
        "serving_times": serving_times_figure,
        "serving_reads": serving_reads_figure,
    },
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
        write_whole(path, svg_text(draw, data, name))
        paths.append(path)
    return paths


def svg_text(draw: Callable[[Data], Figure], data: Data, salt: str) -> str:
    """A picture as the text of an SVG file, the same for the same data and salt."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.hashsalt": salt,
        # Outlines: a page from disk brings no fonts, and another's would not fit the boxes.
        "svg.fonttype": "path",
        # Names may have dollar signs, which do not enclose mathematics.
        "text.parse_math": False,
    }
    file = io.StringIO()
    with matplotlib.rc_context(settings):
        draw(data).savefig(
            file, format="svg", metadata={"Date": None}, bbox_inches="tight", facecolor="white"
        )
    return file.getvalue()


def _figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    width = _WIDTH if rows == columns == 1 else 11
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def _rows(data: Data, what: str, cases: Sequence[Data]) -> tuple[Figure, Axes]:
    """A figure with one row per case, the first on top."""
    figure, axes = _figure(_FRAME + _ROW * max(len(cases), 3))
    axes.set_title(_kernel_title(data, what), loc="left", size=10)
    axes.set_yticks(range(len(cases)), [case["name"] for case in cases], size=8)
    axes.set_ylim(max(len(cases), 1) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.25, lw=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not cases:
        axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center")
    return figure, axes


def _cases_of_ours(data: Data) -> tuple[str | None, list[Data]]:
    ours = our_provider(data)
    return ours, [case for case in data["cases"] if ours in case["providers"]]


def _loses(case: Data, ours: str | None) -> bool:
    return (over(case, ours, "stock") or 1.0) < 1


def _kernel_title(data: Data, what: str) -> str:
    found = data["environment"]
    where = found.get("gpu") or f"{found.get('cpu')}, threads: {found.get('threads')}"
    return f"{what}: decode attention, {data['options']['dtype']}, {where}"


def _serving_title(data: Data) -> str:
    where = data["environment"].get("gpu") or data["environment"]["device"]
    model = str(data.get("model")).rstrip("/").rsplit("/", 1)[-1]
    return f"{model}, {data.get('dtype')}, {where}"


def _stock_names(cases: Sequence[Data]) -> str:
    names = [name for case in cases if (name := fastest(case, "stock"))]
    return ", ".join(dict.fromkeys(names)) or "absent"


def _key(label: str, colour: str, marker: str = "s", *, hollow: bool = False) -> Line2D:
    """An entry of a legend."""
    from matplotlib.lines import Line2D

    face = "none" if hollow else colour
    return Line2D([], [], marker=marker, ls="", color=colour, mfc=face, ms=7, label=label)


def _beside(axes: Axes, row: int, said: str, colour: str = "black") -> None:
    """A text right of the axes, in line with a row."""
    where = axes.get_yaxis_transform()
    axes.text(1.01, row, said, transform=where, va="center", size=8, color=colour)


def _with_legend(figure: Figure, keys: list[Line2D], columns: int) -> Figure:
    figure.legend(handles=keys, loc="outside lower left", ncols=columns, fontsize=8, frameon=False)
    return figure
