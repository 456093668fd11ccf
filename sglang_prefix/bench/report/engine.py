"""Section of a `bench-engine` file: engines of SGLang, ours and stock, on the same loads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sglang_prefix.bench.report.section import Section, Verdict, make_section
from sglang_prefix.bench.tables import Cell, Column, Table, gain, number_text, tabulate, words

__all__ = ["engine_section"]

Data = Mapping[str, Any]

_OURS = "prefix"


def engine_section(data: Data) -> Section:
    """What the file says."""
    loads = _loads(data)
    turns = [case | {"over": 1 / case["ratio"]} for case in data["cases"] if "ratio" in case]
    stock = {name for load in loads if not load["why_not"] for name in load["backends"]}
    stock |= {case["stock"] for case in turns if "stock" in case}
    verdict = Verdict(
        "the prefix backend",
        "the fastest stock backend in TPOT",
        {case["name"]: case["over"] or case["why_not"] for case in [*loads, *turns]},
        stock=sorted(stock - {_OURS}),
    )
    return make_section(
        "Engines with all requests at once",
        data,
        [*_load_tables(loads), *_other_tables(data)],
        verdicts=[verdict],
        absent="Absent backends",
    )


def _loads(data: Data) -> list[Data]:
    """Measured decoding by load, whose backends may lie in several cases.

    Returns:
        "name", "backends" by name, "prefix" (ours), "why_not" (None if ours can be compared) and
        "over", the time of the fastest stock backend over ours.
    """
    loads: dict[str, dict[str, Any]] = {}
    for case in data["cases"]:
        if case.get("measured"):
            name = case.get("load", {}).get("name", case["name"])
            loads.setdefault(name, {}).update(case["measured"])
    return [_compared(*load) for load in loads.items()]


def _compared(name: str, backends: dict[str, Any]) -> Data:
    ours = backends.get(_OURS, {})
    stock = [found["tpot_us"] for backend, found in backends.items() if backend != _OURS]
    why_not = None
    if not ours or not stock:
        why_not = f"{'no stock backend' if ours else 'ours'} was measured"
    elif not ours.get("packed"):
        reasons = (ours.get("not_packed_because") or {}).items()
        why_not = f"ours did not pack ({', '.join(f'{why}: {count}' for why, count in reasons)})"
    over = None if why_not else min(stock) / ours["tpot_us"]
    return {"name": name, "backends": backends, _OURS: ours, "why_not": why_not, "over": over}


def _load_tables(loads: list[Data]) -> list[Table]:
    def time(load: Data, backend: str) -> float | None:
        found: float | None = load["backends"].get(backend, {}).get("tpot_us")
        return found

    stock = sorted({name for load in loads for name in load["backends"]} - {_OURS})
    packed = "share of decode steps that read shared prefixes once"
    columns = [
        Column("load", "name"),
        Column("over stock", lambda load: gain(load["over"]), "time of the fastest over ours"),
        *(Column(f"{name} us", partial(time, backend=name)) for name in stock),
        Column("prefix us", "prefix.tpot_us", "time per output token, full batch"),
        Column("median step us", "prefix.median_step_us", "of ours"),
        Column("packed", "prefix.packed_share", packed),
        Column("KV read", "prefix.counters.kv_read_ratio", "KV tokens read over all"),
        Column("host us", "prefix.host_us_per_step", "per step, for plans"),
    ]
    return [tabulate("Decoding at full batch", columns, loads)] if loads else []


def _other_tables(data: Data) -> list[Table]:
    """Cases that are not one load on one engine: engines in turn, log probabilities, churn."""

    def status(case: Data) -> Cell:
        found = str(case.get("status", "done"))
        return words(found, is_loss=found == "failed")

    columns = [
        Column("case", "name"),
        Column("status", status),
        Column("what was found", _found),
        Column("over stock", lambda case: gain(1 / case["ratio"] if "ratio" in case else None)),
    ]
    cases = [case for case in data["cases"] if _found(case)]
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
    return number_text(value) if isinstance(value, int | float) else str(value)
