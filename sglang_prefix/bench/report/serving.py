"""Section of a `bench-serving` file: a prefix server against a stock server on the same load."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from sglang_prefix.bench.report.section import Section, Verdict, make_section
from sglang_prefix.bench.tables import NONE, Cell, Column, Table, gain, ratio_text, tabulate, words

__all__ = ["serving_section"]

Data = Mapping[str, Any]

_SIDES = ("stock", "prefix")
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
    return make_section(
        "Serving",
        data,
        [_ratio_table(data["cases"]), _value_table(data["cases"])],
        verdicts=[_verdict(data, metric) for metric in _METRICS],
        environment={
            "model": data.get("model"),
            "model dtype": data.get("dtype"),
            "servers": data.get("method", {}).get("servers"),
            "runs": data["options"].get("repeats"),
            **{f"{side} server": _command(data, side) for side in _SIDES},
        },
        warnings=_busy(data["cases"]),
        absent="Workloads not run",
    )


def _command(data: Data, side: str) -> str:
    """Variables and arguments that a server was started with; of one that ran, nothing is known."""
    server = data.get(side) or {}
    variables = [f"{name}={value}" for name, value in server.get("variables", {}).items()]
    return shlex.join(variables + server.get("server_args", []))


def _gain(case: Data, metric: str) -> float | None:
    """How many times ours is better; None where there is no comparison."""
    ratio: float | None = case["ratios"].get(metric)
    if ratio is None or not case["is_comparison"]:
        return None
    return 1 / ratio if _METRICS[metric][2] else ratio


def _verdict(data: Data, metric: str) -> Verdict:
    absent = {name: f"not run: {reason}" for name, reason in data["absent"].items()}
    found = {case["name"]: _gain(case, metric) or _why_not(case) for case in data["cases"]}
    return Verdict(
        "the prefix server",
        f"the stock server in {_METRICS[metric][0]}",
        found | absent,
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


def _why_not(case: Data) -> str:
    """Why a case is no comparison; if stock served its steps, the price of having our backend."""
    if case["is_comparison"]:
        return "no such time was measured"
    reason = case.get("why_not") or "no reason given"
    found = case.get("unpacked_ratios") or {}
    said = [f"{m} {ratio_text(found[m])}" for m in _METRICS if found.get(m) is not None]
    costs = "; stock served those steps, so this is what the backend costs, prefix / stock: "
    return f"{reason}{costs}{', '.join(said)}" if said else reason


def _busy(cases: list[Data]) -> list[str]:
    """Whether other programs ran meanwhile, which may have slowed one side more than the other."""
    sides = [side for case in cases for side in case["sides"].values()]
    runs = [run for side in sides for run in side.get("raw", {}).get("runs", [])]
    load = max((run.get("load_per_cpu", 0.0) for run in runs), default=0.0)
    if load <= _BUSY:
        return []
    return [
        f"Up to {load:.1f} processes per CPU wanted to run meanwhile: other programs may have "
        "slowed one side more than the other."
    ]


def _ratio_table(cases: list[Data]) -> Table:
    def gain_of(metric: str) -> Column:
        title, meaning, is_time = _METRICS[metric]
        hint = f"{meaning}: {'stock / prefix' if is_time else 'prefix / stock'}"
        return Column(f"{title} gain", lambda case: gain(_gain(case, metric)), hint)

    equal = "requests whose tokens are all those of the stock server"
    read = "KV tokens that those steps read, over KV tokens of all requests"
    columns = [
        Column("workload", "name"),
        *map(gain_of, _METRICS),
        Column("answers equal", _answers_equal, equal),
        Column("tokens equal", _tokens_equal, "share of them before the first that differs"),
        Column(
            "packed",
            "sides.prefix.packed_share",
            "share of decode steps and verify passes that read a prefix once",
        ),
        Column("KV read", "sides.prefix.kv_read_ratio", read),
        Column("group", "group", is_detail=True),
        Column("requests", "requests", is_detail=True),
        Column("compared", "tokens_compared", "tokens", is_detail=True),
    ]
    notes = ["A gain below 1 is a loss."]
    return tabulate("Prefix server against stock server", columns, cases, notes=notes)


def _answers_equal(case: Data) -> Cell:
    """Answers may differ where rounding does; where they forbid a comparison it is a loss."""
    equal, requests = case.get("requests_equal"), case["requests"]
    if equal is None:
        return NONE
    forbids = equal != requests and not case["is_comparison"]
    return words(f"{equal} of {requests}", is_loss=forbids)


def _tokens_equal(case: Data) -> float | None:
    equal, compared = case.get("tokens_equal"), case.get("tokens_compared")
    return equal / compared if equal is not None and compared else None


def _value_table(cases: list[Data]) -> Table:
    def reasons(item: Data) -> str:
        return "; ".join(f"{why}: {count}" for why, count in (item.get("reasons") or {}).items())

    columns = [Column("workload", "workload"), Column("server", "server")]
    for metric in ("ttft", "tpot", "itl"):
        title, meaning, _ = _METRICS[metric]
        columns += [
            Column(f"{title} median", f"{metric}_ms.median", f"{meaning}, ms"),
            Column(f"{title} p99", f"{metric}_ms.p99", is_detail=True),
        ]
    columns += [
        Column("tokens/s", "output_tokens_per_s", "output tokens"),
        Column("requests/s", "requests_per_s", is_detail=True),
        Column("seconds", "duration_s", is_detail=True),
        Column("packed", "steps.packed", "decode steps"),
        Column("stock", "steps.stock", "decode steps left to stock"),
        Column("fallback", "steps.fallback", "decode steps fallen back", is_detail=True),
        Column("extends packed", "extends.packed", "prefills behind cached prefixes"),
        Column("extends stock", "extends.stock", is_detail=True),
        Column("reasons", reasons, "of steps that were not packed", is_detail=True),
    ]
    items = [
        {"workload": case["name"], "server": side, **case["sides"][side]}
        for case in cases
        for side in _SIDES
        if side in case["sides"]
    ]
    return tabulate("Measured values", columns, items)
