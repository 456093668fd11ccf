"""Section of a `bench-serving` file: a prefix server against a stock server on the same load."""

from __future__ import annotations

import shlex
from typing import Any

from sglang_prefix.bench.report.cells import (
    NONE,
    across,
    gain,
    name,
    number,
    ratio_text,
    share,
    text,
)
from sglang_prefix.bench.report.frame import bench_facts, bench_warnings
from sglang_prefix.bench.report.model import (
    Cell,
    Column,
    Figure,
    Row,
    Section,
    Table,
    Verdict,
    folded,
)
from sglang_prefix.bench.report.schema import ServingCell, ServingResult, ServingSide
from sglang_prefix.bench.report.sources import Source

__all__ = ["serving_section"]

_OURS, _STOCK = "prefix", "stock"
# By ratio: what it is a ratio of, its unit, and whether less of it is better.
_METRICS = {
    "tpot": ("TPOT", "time per output token after the first, median", True),
    "ttft": ("TTFT", "time to first token, median", True),
    "itl": ("ITL", "time between tokens, median", True),
    "throughput": ("throughput", "output tokens per second", False),
}


def serving_section(source: Source, figures: list[Figure]) -> Section:
    """What the file says, with the figures drawn from it."""
    data: ServingResult = source.data
    facts = bench_facts(data)
    for fact, place, key in (("servers", "method", "servers"), ("runs", "settings", "repeats")):
        found: Any = data.get(place)
        if found and key in found:
            facts[fact] = str(found[key])
    for side in (_STOCK, _OURS):
        server: Any = data.get(side) or {}
        if server.get("server_args"):
            facts[f"{side} server"] = shlex.join(server["server_args"])
    return Section(
        kind=source.kind,
        title="Serving",
        source=source.name,
        facts=facts,
        warnings=[*bench_warnings(data), *_not_comparisons(data)],
        verdicts=[_verdict(data, metric) for metric in _METRICS],
        tables=[folded(_ratio_table(data)), folded(_value_table(data["cells"]))],
        figures=figures,
    )


def _gain(cell: ServingCell, metric: str) -> float | None:
    """How many times ours is better; None where there is no comparison."""
    ratio: Any = cell["ratios"].get(metric)
    if ratio is None or not cell["is_comparison"]:
        return None
    return 1 / ratio if _METRICS[metric][2] else float(ratio)


def _verdict(data: ServingResult, metric: str) -> Verdict:
    title, _, _ = _METRICS[metric]
    cells = data["cells"]
    gains = {cell["name"]: _gain(cell, metric) for cell in cells}
    return Verdict(
        "the prefix server",
        f"the stock server in {title}",
        {cell: value for cell, value in gains.items() if value is not None},
        {c["name"]: _why_not(c) for c in cells if gains[c["name"]] is None} | _left(data),
        better="better than",
        worse="worse",
        stock=_stock_backend(data),
    )


def _stock_backend(data: ServingResult) -> list[str]:
    """The attention backend that the stock server was told to use; else it chose one itself."""
    arguments = (data.get("stock") or {}).get("server_args", [])
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, _, value = argument.partition("=")
        if option == "--attention-backend" and (value or following):
            return [value or following]
    return []


def _left(data: ServingResult) -> dict[str, str]:
    """Workloads of which nothing was measured, and why."""
    begun = {cell["name"] for cell in data["cells"]}
    absent = {n: f"not run: {reason}" for n, reason in data.get("absent", {}).items()}
    left = dict.fromkeys(data.get("not_run", []), "not run") | absent
    return {n: reason for n, reason in left.items() if n not in begun}


def _why_not(cell: ServingCell) -> str:
    if not cell["is_comparison"]:
        return cell.get("why_not") or "no reason given"
    return "no such time was measured"


def _not_comparisons(data: ServingResult) -> list[str]:
    left = data.get("not_run", [])
    return [
        f"{cell['name']} is not a comparison: {_why_not(cell)}."
        for cell in data["cells"]
        if not cell["is_comparison"] and cell["name"] not in left
    ]


def _ratio_table(data: ServingResult) -> Table:
    columns = [
        Column("workload", is_text=True),
        Column("group", is_text=True, folds=True),
        Column("requests", folds=True),
        Column("answers equal", "requests whose tokens are all those of the stock server"),
        Column("tokens equal", "share of the tokens before the first that differs"),
        Column("compared", "tokens", folds=True),
        Column("packed", "share of decode steps that read shared prefixes once"),
        Column("KV read", "KV tokens that those steps read, over KV tokens of all requests"),
        *(
            Column(
                f"{title} gain", f"{meaning}: " + ("stock / prefix" if less else "prefix / stock")
            )
            for title, meaning, less in _METRICS.values()
        ),
    ]
    rows = [row for cell in data["cells"] for row in _ratio_rows(cell, len(columns))]
    rows += [across([name(n)], reason, len(columns)) for n, reason in _left(data).items()]
    note = "A gain below 1 is a loss."
    return Table("Prefix server against stock server", columns, rows, [note])


def _ratio_rows(cell: ServingCell, num_columns: int) -> list[Row]:
    gains = [_gain(cell, metric) for metric in _METRICS]
    loses = any(value is not None and value < 1 for value in gains)
    ours: Any = cell["sides"].get(_OURS, {})
    equal, requests = cell.get("requests_equal"), cell["requests"]
    same, compared = cell.get("tokens_equal"), cell.get("tokens_compared")
    facts = [
        name(cell["name"], loses=loses),
        text(cell.get("group")),
        number(requests),
        NONE if equal is None else Cell(f"{equal} of {requests}", equal, _unequal(cell)),
        share(same / compared if same is not None and compared else None),
        number(compared),
        share(ours.get("packed_share")),
        share(ours.get("kv_read_ratio")),
    ]
    if not cell["is_comparison"]:
        said = f"not a comparison: {_why_not(cell)}{_unpacked(cell)}"
        return [across(facts, said, num_columns)]
    return [Row([*facts, *map(gain, gains)], "losing" if loses else "")]


def _unequal(cell: ServingCell) -> Any:
    """Answers may differ where rounding does; where they forbid a comparison it is a loss."""
    differs = cell.get("requests_equal") != cell["requests"]
    return "losing" if differs and not cell["is_comparison"] else ""


def _unpacked(cell: ServingCell) -> str:
    """What was measured where our backend did not pack: the price of having it."""
    found: Any = cell.get("unpacked_ratios") or {}
    said = [f"{m} {ratio_text(found[m])}" for m in _METRICS if found.get(m) is not None]
    return f"; prefix / stock all the same: {', '.join(said)}" if said else ""


def _value_table(cells: list[ServingCell]) -> Table:
    columns = [
        Column("workload", is_text=True),
        Column("server", is_text=True),
        *(
            Column(f"{title} {column}", hint)
            for title, hint in (
                ("TTFT", "time to first token, ms"),
                ("TPOT", "time per output token after the first, ms"),
                ("ITL", "time between tokens, ms"),
            )
            for column, hint in (("median", hint), ("p99", ""))
        ),
        Column("tokens/s", "output tokens"),
        Column("requests/s"),
        Column("seconds"),
        Column("steps", "decode steps packed / left to stock by the gate / fallen back"),
        Column("reasons", "of steps that were not packed", is_text=True),
    ]
    rows = [
        _value_row(cell["name"], side, cell["sides"][side])
        for cell in cells
        for side in sorted(cell["sides"], reverse=True)
    ]
    return Table("Measured values", columns, rows)


def _value_row(cell: str, side: str, found: ServingSide) -> Row:
    spreads: list[Any] = [found["ttft_ms"], found["tpot_ms"], found["itl_ms"]]
    steps = found.get("steps")
    counted = NONE
    if steps:
        shown = f"{steps['packed']} / {steps['stock']} / {steps['fallback']}"
        counted = Cell(shown, steps["packed"])
    reasons = "; ".join(f"{why}: {count}" for why, count in (found.get("reasons") or {}).items())
    return Row(
        [
            name(cell),
            text(side),
            *(number((s or {}).get(column)) for s in spreads for column in ("median", "p99")),
            number(found["output_tokens_per_s"]),
            number(found.get("requests_per_s")),
            number(found.get("duration_s")),
            counted,
            text(reasons),
        ]
    )
