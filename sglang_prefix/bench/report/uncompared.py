"""Sections of files that compare ours with no stock backend: tiles, host time, checks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sglang_prefix.bench.report.section import (
    Section,
    environment_rows,
    left_table,
    target_tables,
    warnings,
)
from sglang_prefix.bench.tables import Column, Table, gain, number, tabulate, text

__all__ = ["check_section", "host_section", "tune_section"]

Data = Mapping[str, Any]

_HOST_TITLES = {
    "planning": "Host time of planning, us, median",
    "engine": "Host time in the real engine, us",
    "host": "Host time with the device elsewhere, all our code in a decode step, us",
}


def check_section(data: Data) -> Section:
    """What the kernels' outputs were checked on, and how far from the oracle they were."""
    columns = [
        Column("case", text, lambda case: case["name"]),
        Column("group", text, lambda case: case["group"], folds=True),
        Column(
            *("variants", number, lambda case: len(case.get("errors", {})) or None),
            "policies and launch and merge modes on these inputs",
        ),
        Column(
            *("largest error", partial(number, digits=2)),
            lambda case: max(case.get("errors", {}).values(), default=None),
            "relative, against the float64 oracle",
        ),
    ]
    table = tabulate("Checks that passed", columns, data["cases"])
    return _section("Checks of the kernels against the oracle", data, [table])


def tune_section(data: Data) -> Section:
    """The fastest tile of each pack shape beside the one that the formula chooses."""

    def fastest(case: Data) -> str:
        times = {tile: found["kernel_us"] for tile, found in case["tiles"].items()}
        return min(times, key=times.__getitem__)

    def time(case: Data, tile: str) -> float | None:
        found = case["tiles"].get(tile)
        return found["kernel_us"] if found else None

    def over_formula(case: Data) -> float | None:
        before = time(case, case["formula"])
        return before / case["tiles"][fastest(case)]["kernel_us"] if before else None

    columns = [
        Column("shape", text, lambda case: case["name"]),
        Column("tile of the formula", text, lambda case: case["formula"]),
        Column("us", number, lambda case: time(case, case["formula"])),
        Column("fastest tile", text, fastest),
        Column("fastest us", number, lambda case: time(case, fastest(case))),
        Column(
            *("gain", partial(gain, counts=not data["dry"]), over_formula),
            "time of the formula's tile over that of the fastest",
        ),
    ]
    cases = [case for case in data["cases"] if case["tiles"]]
    tables = [tabulate("Tiles", columns, cases)] if cases else []
    return _section("Tiles of the forward kernel", data, tables)


def host_section(data: Data) -> Section:
    """Host time by stage: a table per group of cases, a column per number of requests."""
    groups: dict[str, list[Data]] = {}
    for case in data["cases"]:
        groups.setdefault(case["group"], []).append(case)
    tables = []
    for group, cases in groups.items():
        stages = dict.fromkeys(stage for case in cases for stage in case["us"])
        columns = [Column("stage", text, str)]
        columns += [
            Column(f"{case['num_requests']} requests", number, case["us"].get) for case in cases
        ]
        tables.append(tabulate(_HOST_TITLES.get(group, group), columns, stages))
    return _section("Host time of planning and of decode steps", data, tables)


def _section(title: str, data: Data, tables: list[Table]) -> Section:
    return Section(
        title,
        environment_rows(data),
        warnings(data),
        tables=[*target_tables(data), *tables, *left_table(data)],
    )
