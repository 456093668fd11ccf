"""Sections of files that compare ours with no stock backend: tiles, costs, host time, checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_prefix.bench.report.section import Section, make_section
from sglang_prefix.bench.tables import Cell, Column, gain, number_text, tabulate, words

__all__ = ["check_section", "gpu_section", "host_section", "profile_section", "tune_section"]

Data = Mapping[str, Any]

# Of what a step says, in a cell.
_MOST_FOUND = 40
_HOST_TITLES = {
    "planning": "Host time of planning, us, median",
    "engine": "Host time in the real engine, us",
    "model": "Decode step of SmolLM2-135M-Instruct on a CPU, us, median",
    "host": "Host time with the device elsewhere, all our code in a decode step, us",
}


def check_section(data: Data) -> Section:
    """What the kernels' outputs were checked on, and how far from the oracle they were."""

    def worst(case: Data) -> float | None:
        return max(case.get("errors", {}).values(), default=None)

    variants = "policies and launch and merge modes on these inputs"
    columns = [
        Column("case", "name"),
        Column("group", "group"),
        Column("variants", lambda case: len(case.get("errors", {})) or None, variants),
        Column("largest error", worst, "relative, against the float64 oracle"),
    ]
    table = tabulate("Checks that passed", columns, data["cases"])
    return make_section("Checks of the kernels against the oracle", data, [table])


def gpu_section(data: Data) -> Section:
    """The steps of a run of `bench gpu`: how they ended, and what they found."""

    def status(case: Data) -> Cell:
        return words(case["status"], is_loss=case["status"] != "done")

    def found(case: Data) -> str:
        said = case["says"].items()
        values = [(k, number_text(v) if isinstance(v, int | float) else v) for k, v in said]
        more = [f"{len(values) - _MOST_FOUND} more"] if len(values) > _MOST_FOUND else []
        return "; ".join([*(f"{name}: {value}" for name, value in values[:_MOST_FOUND]), *more])

    columns = [
        Column("step", "name"),
        Column("ended", status),
        Column("s", "wall_s"),
        Column("limit s", "limit_s"),
        Column("compiled", "compiled", "kernels that were not in the cache"),
        Column("found", found),
        Column("for", "group", is_detail=True),
    ]
    table = tabulate("Steps", columns, data["cases"])
    return make_section("A GPU's few minutes", data, [table])


def tune_section(data: Data) -> Section:
    """The fastest tile of each pack shape beside the one that the formula chooses."""

    def row(case: Data) -> Data:
        times = {tile: found["kernel_us"] for tile, found in case["tiles"].items()}
        fastest, before = min(times, key=times.__getitem__), times.get(case["formula"])
        gained = before / times[fastest] if before else None
        return {**case, "us": before, "fastest": fastest, "best": times[fastest], "gain": gained}

    columns = [
        Column("shape", "name"),
        Column("tile of the formula", "formula"),
        Column("us", "us"),
        Column("fastest tile", "fastest"),
        Column("fastest us", "best"),
        Column("gain", lambda case: gain(case["gain"]), "time of the formula's tile over it"),
    ]
    rows = [row(case) for case in data["cases"] if case["tiles"]]
    tables = [tabulate("Tiles", columns, rows)] if rows else []
    return make_section("Tiles of the forward kernel", data, tables)


def profile_section(data: Data) -> Section:
    """The profile of each executor, and the times that it was fitted to."""
    profiles = data.get("profiles") or {}
    names = dict.fromkeys(name for found in profiles.values() for name in found)
    fitted = [Column(name, name) for name in ("executor", *names)]
    timed = [
        Column("case", "name"),
        *(Column(name, name) for name in ("requests", "tokens", "packs", "us")),
    ]
    costs = [{"executor": executor, **found} for executor, found in profiles.items()]
    rows = [{**pack, "name": case["name"]} for case in data["cases"] for pack in case["packs"]]
    tables = [
        tabulate("Profiles: costs beside reading KV, in bytes", fitted, costs),
        tabulate("Time of a layer by pack", timed, rows, is_detail=True),
    ]
    return make_section("What work costs the CPU beside reading KV", data, tables)


def host_section(data: Data) -> Section:
    """Host time by stage: a table per group of cases, a column per number of requests."""
    groups: dict[str, list[Data]] = {}
    for case in data["cases"]:
        groups.setdefault(case["group"], []).append(case)
    tables = []
    for group, cases in groups.items():
        stages = dict.fromkeys(stage for case in cases for stage in case["us"])
        columns = [Column("stage", str)]
        columns += [Column(f"{case['num_requests']} requests", case["us"].get) for case in cases]
        tables.append(tabulate(_HOST_TITLES.get(group, group), columns, stages))
    return make_section("Host time of planning and of decode steps", data, tables)
