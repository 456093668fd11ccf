"""Section of a `bench-engine` file: engines of SGLang, ours and stock, on the same loads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sglang_prefix.bench.report.section import (
    Section,
    Verdict,
    environment_rows,
    left_cases,
    left_table,
    target_tables,
    warnings,
)
from sglang_prefix.bench.tables import Column, Table, gain, number, share, tabulate, text

__all__ = ["engine_section"]

Data = Mapping[str, Any]

_OURS = "prefix"


def engine_section(data: Data) -> Section:
    """What the file says; a dry run's numbers are shown, and counted nowhere."""
    loads = _loads(data)
    tables = [_load_table(data, loads)] if loads else []
    return Section(
        "Engines with all requests at once",
        environment_rows(data),
        warnings(data, "Absent backends"),
        [] if data["dry"] else [_verdict(data, loads)],
        [*target_tables(data), *tables, *_turn_tables(data), *left_table(data)],
    )


def _loads(data: Data) -> list[Data]:
    """Measured decoding by load: its backends may lie in several cases."""
    loads: dict[str, dict[str, Any]] = {}
    for case in data["cases"]:
        if case.get("measured"):
            name = case.get("load", {}).get("name", case["name"])
            backends = loads.setdefault(name, {"name": name, "backends": {}})["backends"]
            backends |= case["measured"]
    return list(loads.values())


def _verdict(data: Data, loads: list[Data]) -> Verdict:
    """Time per output token against the fastest stock backend, where ours packed."""
    turns = [case for case in data["cases"] if "ratio" in case]

    def gain_of(case: Data) -> float | None:
        return 1 / case["ratio"] if "ratio" in case else _over(case)

    compared = [load for load in loads if _over(load) is not None]
    stock = {backend for load in compared for backend in load["backends"]}
    stock |= {case["stock"] for case in turns if "stock" in case}
    return Verdict.over(
        *("the prefix backend", "the fastest stock backend in TPOT"),
        *([*loads, *turns], gain_of, lambda load: _why_not(load) or "", left_cases(data)),
        stock=sorted(stock - {_OURS}),
    )


def _stock_us(load: Data) -> list[float]:
    return [found["tpot_us"] for name, found in load["backends"].items() if name != _OURS]


def _why_not(load: Data) -> str | None:
    """Why a load says nothing about ours and stock; None if it does."""
    ours = load["backends"].get(_OURS)
    if ours is None or not _stock_us(load):
        return f"{'ours' if ours is None else 'no stock backend'} was measured"
    return None if ours.get("packed") else f"ours did not pack: {ours.get('not_packed_because')}"


def _over(load: Data) -> float | None:
    """Time of the fastest stock backend over ours."""
    if _why_not(load):
        return None
    return float(min(_stock_us(load)) / load["backends"][_OURS]["tpot_us"])


def _load_table(data: Data, loads: list[Data]) -> Table:
    stock = sorted({name for load in loads for name in load["backends"]} - {_OURS})

    def of(backend: str, key: str) -> Any:
        return lambda load: load["backends"].get(backend, {}).get(key)

    def read(load: Data) -> float | None:
        ratio: float | None = (of(_OURS, "counters")(load) or {}).get("kv_read_ratio")
        return ratio

    def message(load: Data) -> str | None:
        why_not = _why_not(load)
        return why_not and f"not a comparison: {why_not}"

    columns = [
        Column("load", text, lambda load: load["name"]),
        *(Column(f"{name} us", number, of(name, "tpot_us")) for name in stock),
        Column(f"{_OURS} us", number, of(_OURS, "tpot_us"), "time per output token, full batch"),
        Column("median step us", number, of(_OURS, "median_step_us"), "of ours"),
        Column("packed", share, of(_OURS, "packed_share"),
               "share of decode steps that read shared prefixes once"),
        Column("KV read", share, read, "KV tokens read over KV tokens of all requests"),
        Column("host us", number, of(_OURS, "host_us_per_step"),
               "per step, spent on plans and on keeping them"),
        Column("over stock", partial(gain, counts=not data["dry"]), _over,
               "time of the fastest stock backend over ours"),
    ]  # fmt: skip
    return tabulate("Decoding at full batch", columns, loads, message=message)


def _turn_tables(data: Data) -> list[Table]:
    """Cases that are not one load on one engine: engines in turn, log probabilities, churn."""
    cases = [case for case in data["cases"] if _found(case)]
    columns = [
        Column("case", text, lambda case: case["name"]),
        Column("what was found", text, _found),
        Column(
            *("over stock", partial(gain, counts=not data["dry"])),
            lambda case: 1 / case["ratio"] if "ratio" in case else None,
        ),
    ]
    return [tabulate("Comparisons in turn, and checks", columns, cases)] if cases else []


def _found(case: Data) -> str:
    if "ratio_interval" in case:
        low, high = (case["ratio_interval"][end] for end in ("low", "high"))
        return (
            f"TPOT of ours over that of {case.get('stock')}, in turn: {case['ratio']:.3f}, "
            f"interval {low:.3f} to {high:.3f}"
        )
    if "difference" in case:
        said = ", ".join(f"{key} {_short(value)}" for key, value in case["difference"].items())
        return f"log probabilities against stock: {said}"
    if "guarded_steps" in case:
        return f"{case['guarded_steps']} decode steps, guarded against waits for the device"
    return ""


def _short(value: object) -> str:
    return number(value, 2).text if isinstance(value, int | float) else str(value)
