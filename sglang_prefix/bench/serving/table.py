"""The table of a `bench-serving` result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sglang_prefix.bench.serving.compare import METRICS, SIDES

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["comparison_table", "notes"]

_NONE = "-"
# A server and its client want to run all the time, and threads of theirs beside them.
_BUSY = 2.0


def comparison_table(data: Mapping[str, Any]) -> Table:
    """Both sides of every workload, "median / 99th percentile", and prefix over stock.

    Where a cell is no comparison there are no ratios, and :func:`notes` says why.
    """
    from rich.table import Table

    environment = data["environment"]
    device = environment["gpu"] or environment["cpu"]
    model = str(data["model"]).rstrip("/").rsplit("/", 1)[-1]
    table = Table(title=f"{model}, {data['dtype']}, {device}", title_justify="left")
    for name in ("workload", "side"):
        table.add_column(name, no_wrap=True)
    for name in ("TTFT ms", "TPOT ms", "ITL ms", "tokens/s", "packed", "KV read", "equal"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in data["cells"]:
        for side in SIDES:
            if side in cell["sides"]:
                name = cell["name"] if side == SIDES[0] else f"  {cell['requests']} requests"
                table.add_row(*_side_row(cell, side, name))
        table.add_row(*_ratio_row(cell))
        table.add_section()
    return table


def _side_row(cell: Mapping[str, Any], side: str, name: str) -> list[RenderableType]:
    found = cell["sides"][side]
    times = [_quantiles(found[f"{metric}_ms"]) for metric in METRICS]
    row: list[RenderableType] = [name, side, *times, f"{found['output_tokens_per_s']:.1f}"]
    if side == "prefix":
        row += [_number(found["packed_share"], ".0%"), _number(found["kv_read_ratio"], ".3f")]
        equal = cell["requests_equal"]
        row.append(_NONE if equal is None else f"{equal} of {cell['requests']}")
    return row


def _ratio_row(cell: Mapping[str, Any]) -> list[RenderableType]:
    if not cell["is_comparison"]:
        name = cell["name"] if not cell["sides"] else ""
        return [name, "[bold]no comparison[/]"]
    ratios = cell["ratios"]
    values = [_number(ratios[name], ".2f", "x") for name in (*METRICS, "throughput")]
    return ["", "[bold]prefix / stock[/]", *(f"[bold]{value}[/]" for value in values)]


def _quantiles(found: Mapping[str, float] | None) -> str:
    return _NONE if found is None else f"{_short(found['median'])} / {_short(found['p99'])}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _number(value: float | None, spec: str, unit: str = "") -> str:
    return _NONE if value is None else format(value, spec) + unit


def notes(data: Mapping[str, Any]) -> list[str]:
    """What the table cannot say: workloads that are no comparison or absent, and a busy host."""
    found = []
    for cell in data["cells"]:
        if cell["is_comparison"]:
            continue
        text = f"{cell['name']} is no comparison: {cell['why_not']}"
        if cell["unpacked_ratios"]:
            tpot, rate = (cell["unpacked_ratios"][name] for name in ("tpot", "throughput"))
            text += (
                "; stock served those steps, so this is what the backend costs when it does not "
                f"pack: TPOT {_number(tpot, '.2f', 'x')}, tokens/s {_number(rate, '.2f', 'x')}"
            )
        found.append(text)
    runs = [
        run
        for cell in data["cells"]
        for side in cell["sides"].values()
        for run in side["raw"]["runs"]
    ]
    load = max((run.get("load_per_cpu", 0.0) for run in runs), default=0.0)
    if load > _BUSY:
        found.append(
            f"up to {load:.1f} processes per CPU wanted to run meanwhile: other programs may have "
            "slowed one side more than the other"
        )
    found += [f"{name} is absent: {why}" for name, why in data["absent"].items()]
    return found
