"""Section of a `bench-serving` file: a prefix server against a stock server on the same load."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

from sglang_prefix.bench.report.section import (
    Section,
    Verdict,
    environment_rows,
    left_cases,
    warnings,
)
from sglang_prefix.bench.tables import (
    NONE,
    Cell,
    Column,
    Table,
    as_is,
    gain,
    number,
    ratio_text,
    share,
    tabulate,
    text,
)

__all__ = ["serving_section"]

Data = Mapping[str, Any]

_OURS, _STOCK = "prefix", "stock"
# By ratio: its title, what it is a ratio of, and whether less of it is better.
_METRICS = {
    "tpot": ("TPOT", "median time per output token after the first", True),
    "ttft": ("TTFT", "median time to first token", True),
    "itl": ("ITL", "median time between tokens", True),
    "throughput": ("throughput", "output tokens per second", False),
}
# A server and its client want to run all the time, and threads of theirs beside them.
_BUSY = 2.0


def serving_section(data: Data) -> Section:
    """What the file says."""
    servers = {
        f"{side} server": shlex.join((data.get(side) or {}).get("server_args", []))
        for side in (_STOCK, _OURS)
    }
    return Section(
        title="Serving",
        environment=environment_rows(
            data,
            **{"model": data.get("model"), "model dtype": data.get("dtype")},
            servers=data.get("method", {}).get("servers"),
            runs=data["options"].get("repeats"),
            **servers,
        ),
        warnings=[
            *warnings(data, "Workloads not run"),
            *(f"{c['name']} is not a comparison: {_why_not(c)}." for c in _uncompared(data)),
            *_busy(data["cases"]),
        ],
        verdicts=[] if data["dry"] else [_verdict(data, metric) for metric in _METRICS],
        tables=[_ratio_table(data), _value_table(data["cases"])],
    )


def _gain(case: Data, metric: str) -> float | None:
    """How many times ours is better; None where there is no comparison."""
    ratio: float | None = case["ratios"].get(metric)
    if ratio is None or not case["is_comparison"]:
        return None
    return 1 / ratio if _METRICS[metric][2] else ratio


def _verdict(data: Data, metric: str) -> Verdict:
    return Verdict.over(
        "the prefix server",
        f"the stock server in {_METRICS[metric][0]}",
        data["cases"],
        partial(_gain, metric=metric),
        _why_not,
        _left(data),
        better="better than",
        worse="worse",
        stock=_stock_backend(data),
    )


def _stock_backend(data: Data) -> list[str]:
    """The attention backend that the stock server was told to use; else it chose one itself."""
    arguments = (data.get("stock") or {}).get("server_args", [])
    for argument, following in pairwise([*arguments, ""]):
        option, _, value = argument.partition("=")
        if option == "--attention-backend" and (value or following):
            return [value or following]
    return []


def _left(data: Data) -> dict[str, str]:
    """Workloads of which nothing was measured, and why."""
    absent = {name: f"not run: {reason}" for name, reason in data["absent"].items()}
    return left_cases(data) | absent


def _why_not(case: Data) -> str:
    if not case["is_comparison"]:
        return case.get("why_not") or "no reason given"
    return "no such time was measured"


def _uncompared(data: Data) -> list[Data]:
    return [c for c in data["cases"] if not c["is_comparison"] and c["name"] not in data["not_run"]]


def _busy(cases: list[Data]) -> list[str]:
    """Whether other programs ran meanwhile, which may have slowed one side more than the other."""
    runs = [
        run
        for case in cases
        for side in case["sides"].values()
        for run in side.get("raw", {}).get("runs", [])
    ]
    load = max((run.get("load_per_cpu", 0.0) for run in runs), default=0.0)
    if load <= _BUSY:
        return []
    return [
        f"Up to {load:.1f} processes per CPU wanted to run meanwhile: other programs may have "
        "slowed one side more than the other."
    ]


def _ratio_table(data: Data) -> Table:
    def gain_of(metric: str) -> Column:
        title, meaning, is_time = _METRICS[metric]
        hint = f"{meaning}: {'stock / prefix' if is_time else 'prefix / stock'}"
        shown = partial(gain, counts=not data["dry"])
        return Column(f"{title} gain", shown, partial(_gain, metric=metric), hint)

    equal = "requests whose tokens are all those of the stock server"
    packed = "share of decode steps that read shared prefixes once"
    read = "KV tokens that those steps read, over KV tokens of all requests"
    columns = [
        Column("workload", text, "name"),
        Column("group", text, "group", folds=True),
        Column("requests", number, "requests", folds=True),
        Column("answers equal", as_is, _answers_equal, equal),
        Column("tokens equal", share, _tokens_equal, "share of them before the first that differs"),
        Column("compared", number, "tokens_compared", "tokens", folds=True),
        Column("packed", share, "sides.prefix.packed_share", packed),
        Column("KV read", share, "sides.prefix.kv_read_ratio", read),
        *map(gain_of, _METRICS),
    ]
    note = "A gain below 1 is a loss."
    title, left = "Prefix server against stock server", _left(data)
    message = _no_comparison
    return tabulate(title, columns, data["cases"], message=message, left=left, notes=[note])


def _answers_equal(case: Data) -> Cell:
    """Answers may differ where rounding does; where they forbid a comparison it is a loss."""
    equal, requests = case.get("requests_equal"), case["requests"]
    if equal is None:
        return NONE
    forbids = equal != requests and not case["is_comparison"]
    return Cell(f"{equal} of {requests}", equal, "losing" if forbids else "")


def _tokens_equal(case: Data) -> float | None:
    equal, compared = case.get("tokens_equal"), case.get("tokens_compared")
    return equal / compared if equal is not None and compared else None


def _no_comparison(case: Data) -> str | None:
    """Why a case is none, and what was measured all the same: the price of having our backend."""
    if case["is_comparison"]:
        return None
    found = case.get("unpacked_ratios") or {}
    said = [f"{m} {ratio_text(found[m])}" for m in _METRICS if found.get(m) is not None]
    costs = (
        "; stock served those steps, so this is what the backend costs when it does not pack, "
        f"prefix / stock: {', '.join(said)}"
    )
    return f"not a comparison: {_why_not(case)}{costs if said else ''}"


def _value_table(cases: list[Data]) -> Table:
    items = [
        {"workload": case["name"], "server": side, **case["sides"][side]}
        for case in cases
        for side in sorted(case["sides"], reverse=True)
    ]

    def steps(item: Data) -> Cell:
        found = item.get("steps")
        if not found:
            return NONE
        said = " / ".join(str(found[path]) for path in ("packed", "stock", "fallback"))
        return Cell(said, found["packed"])

    def reasons(item: Data) -> str:
        return "; ".join(f"{why}: {count}" for why, count in (item.get("reasons") or {}).items())

    columns = [Column("workload", text, "workload"), Column("server", text, "server")]
    for metric in ("ttft", "tpot", "itl"):
        title, meaning, _ = _METRICS[metric]
        columns += [
            Column(f"{title} median", number, f"{metric}_ms.median", f"{meaning}, ms"),
            Column(f"{title} p99", number, f"{metric}_ms.p99"),
        ]
    columns += [
        Column("tokens/s", number, "output_tokens_per_s", "output tokens"),
        Column("requests/s", number, "requests_per_s"),
        Column("seconds", number, "duration_s"),
        Column("steps", as_is, steps, "decode steps: packed / left to stock / fallen back"),
        Column("reasons", text, reasons, "of steps that were not packed"),
    ]
    return tabulate("Measured values", columns, items)
