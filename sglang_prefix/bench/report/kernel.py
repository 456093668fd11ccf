"""Section of a `bench-kernel` file: one decode step of attention, ours against all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sglang_prefix.bench.report.cells import NONE, across, gain, geomean, name, number, share, text
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
from sglang_prefix.bench.report.schema import KernelCell, KernelContender, KernelResult
from sglang_prefix.bench.report.sources import Source

__all__ = ["kernel_section"]

_PAT, _UNSHARED = "pat", "query"
_KINDS = ("ours", "stock", "peer")
# No clock stands between the two in a step.
_FORWARD = "of ours, ms: on the CPU the layers less merge, - where noise leaves nothing of it"
_MERGE = (
    "of ours, ms: on the CPU timed alone after the step, on random partials of the plan's shape"
)
_HINTS = {"forward ms": _FORWARD, "merge ms": _MERGE}


def kernel_section(source: Source, figures: list[Figure]) -> Section:
    """What the file says, with the figures drawn from it."""
    data: KernelResult = source.data
    cells = data["cells"]
    way = _our_way(data)
    return Section(
        kind=source.kind,
        title="Attention kernels",
        source=source.name,
        facts=bench_facts(data),
        warnings=[*bench_warnings(data), *_failures(cells)],
        verdicts=_verdicts(data, way),
        tables=[
            _contender_table(data),
            folded(_step_table(data, way)),
            folded(_time_table(data)),
            folded(_every_table(cells)),
        ],
        figures=figures,
    )


def _our_way(data: KernelResult) -> str | None:
    """The one of ours with the run's first policy; if it has several, the fastest over most cells.

    One for all cells: the best of ours in each cell would be chosen with its result in hand.
    """
    policy = next(iter(data.get("options", {}).get("policies", [])), _PAT)
    times: dict[str, list[float]] = {}
    ours = [pair for cell in data["cells"] for pair in _of(cell, "ours").items()]
    default = [(n, c) for n, c in ours if c.get("policy") == policy]
    for contender, result in default or ours:
        times.setdefault(contender, []).append(result["ms"])
    most = max(map(len, times.values()), default=0)
    means = {n: geomean(ms) or 0.0 for n, ms in times.items() if len(ms) == most}
    return min(means, key=means.__getitem__) if means else None


def _of(cell: KernelCell, kind: str) -> dict[str, KernelContender]:
    return {n: c for n, c in cell["contenders"].items() if c["kind"] == kind}


def _fastest(cell: KernelCell, kind: str) -> str | None:
    found = _of(cell, kind)
    return min(found, key=lambda n: found[n]["ms"]) if found else None


def _over(cell: KernelCell, ours: str | None, kind: str) -> float | None:
    """Time of the fastest of a kind over ours."""
    theirs = _fastest(cell, kind)
    if theirs is None or ours is None or ours not in cell["contenders"]:
        return None
    return cell["contenders"][theirs]["ms"] / cell["contenders"][ours]["ms"]


def _over_unshared(cell: KernelCell, way: str | None) -> float | None:
    """Time of our own executor without sharing over ours; None where ours is just that."""
    ours = cell["contenders"].get(way or "")
    if ours is None or ours.get("policy") == _UNSHARED:
        return None
    for found in _of(cell, "ours").values():
        if found.get("policy") == _UNSHARED and found.get("executor") == ours.get("executor"):
            return found["ms"] / ours["ms"]
    return None


def _verdicts(data: KernelResult, way: str | None) -> list[Verdict]:
    cells, ours = data["cells"], way or "ours"
    reasons = data.get("why_not_run", {})
    left = {n: f"not run: {reasons[n]}" if n in reasons else "not run" for n in _left(data)}
    verdicts = []
    for kind, baseline in (("stock", "the fastest stock backend"), ("peer", "the fastest peer")):
        overs = {cell["name"]: _over(cell, way, kind) for cell in cells}
        found = {cell: value for cell, value in overs.items() if value is not None}
        missing = {c["name"]: _why_not(c, ours, kind) for c in cells if c["name"] not in found}
        names = sorted({_fastest(c, kind) or "" for c in cells if c["name"] in found})
        said = f"{baseline} ({', '.join(names)})" if names else baseline
        stock = names if kind == "stock" else []
        if found or kind == "stock":
            verdicts.append(Verdict(ours, said, found, missing | left, stock=stock))
    unshared = {cell["name"]: _over_unshared(cell, way) for cell in cells}
    if gains := {n: value for n, value in unshared.items() if value is not None}:
        baseline = f"policy {_UNSHARED}, which shares nothing, on the same executor"
        verdicts.append(Verdict(ours, baseline, gains))
    return verdicts


def _left(data: KernelResult) -> list[str]:
    """Cells of which nothing was measured."""
    begun = {cell["name"] for cell in data["cells"]}
    return [name for name in data.get("not_run", []) if name not in begun]


def _why_not(cell: KernelCell, way: str, kind: str) -> str:
    if way in cell["contenders"]:
        return f"no {kind} baseline"
    return f"ours failed: {cell['failed'][way]}" if way in cell.get("failed", {}) else "no ours"


def _failures(cells: list[KernelCell]) -> list[str]:
    """Contenders that could not be timed, since what they computed was wrong or nothing."""
    return [
        f"{cell['name']}: {contender} failed: {reason}."
        for cell in cells
        for contender, reason in cell.get("failed", {}).items()
    ]


def _step_table(data: KernelResult, way: str | None) -> Table:
    cells = data["cells"]
    has_peers = any(_of(cell, "peer") for cell in cells)
    columns = [
        Column("cell", is_text=True),
        Column("speed-up", "time of the fastest stock backend over ours"),
        *([Column("over peer", "time of the fastest peer over ours")] if has_peers else []),
        Column(f"over {_UNSHARED}", "time of our executor without sharing over ours", folds=True),
        Column("stock ms"),
        Column("ours ms", "median of plan, copy and run of one decode step"),
        Column("fastest stock", is_text=True, folds=True),
        Column("group", is_text=True, folds=True),
        Column("batch", folds=True),
        Column("heads", "query heads / KV heads / head dim", is_text=True, folds=True),
        Column("dtype", is_text=True, folds=True),
        Column("page", folds=True),
        Column("layers", "of one step", folds=True),
        Column("tokens", "KV tokens of all requests"),
        Column("ideal", "share of them if every shared token is read once"),
        Column("read", "share of them that ours reads"),
        Column("plan", "of ours, ms"),
        Column("copy", "of ours, ms"),
        Column("forward", _FORWARD),
        Column("merge", _MERGE),
        Column("GB/s", "KV bytes that ours reads over its whole step"),
        Column("of bandwidth", "share of the bandwidth of a streaming read in the same run"),
    ]
    rows = [_step_row(cell, way, has_peers) for cell in cells]
    reasons = data.get("why_not_run", {})
    for left in _left(data):
        said = f"not run: {reasons[left]}" if left in reasons else "not run"
        rows.append(across([name(left)], said, len(columns)))
    title = f"{way} against the fastest stock backend" if way else "Cells"
    return Table(title, columns, rows)


def _step_row(cell: KernelCell, way: str | None, has_peers: bool) -> Row:
    ours: Any = cell["contenders"].get(way or "", {})
    stock = _fastest(cell, "stock")
    speedup, over_peer = _over(cell, way, "stock"), _over(cell, way, "peer")
    over_unshared = _over_unshared(cell, way)
    gains = (speedup, over_peer, over_unshared)
    loses = any(value is not None and value < 1 for value in gains)
    loses = loses or (way or "") in cell.get("failed", {})
    heads, tokens = cell["heads"], cell["tokens"]
    # Bytes are those of one layer, times those of all.
    read = ours.get("bytes_read", 0) * cell.get("layers", 1)
    gb_s = read / ours["ms"] / 1e6 if read else None
    limit = cell.get("bandwidth_gb_s")
    return Row(
        [
            name(cell["name"], loses=loses),
            gain(speedup),
            *([gain(over_peer)] if has_peers else []),
            gain(over_unshared),
            number(cell["contenders"][stock]["ms"] if stock else None),
            number(ours.get("ms")),
            text(stock),
            text(cell.get("group")),
            number(cell["batch"]),
            text(f"{heads['qo']}/{heads['kv']}/{heads['dim']}"),
            text(cell["dtype"]),
            number(cell["page_size"]),
            number(cell.get("layers")),
            number(tokens["logical"]),
            share(tokens["ideal"] / tokens["logical"] if tokens["logical"] else None),
            share(ours.get("kv_read_ratio")),
            *(number(ours.get(f"{part}_ms")) for part in ("plan", "copy", "forward", "merge")),
            number(gb_s),
            share(gb_s / limit if gb_s and limit else None),
        ],
        "losing" if loses else "",
    )


def _kinds(data: KernelResult) -> dict[str, str]:
    """Contenders that were measured or failed somewhere, ours first, with their kinds."""
    cells = data["cells"]
    failed = {n: "failed" for cell in cells for n in cell.get("failed", {})}
    kinds = failed | {n: c["kind"] for cell in cells for n, c in cell["contenders"].items()}
    order = {kind: place for place, kind in enumerate(_KINDS)}
    return dict(sorted(kinds.items(), key=lambda item: (order.get(item[1], len(order)), item[0])))


def _contender_table(data: KernelResult) -> Table:
    """Each contender over all cells; a baseline that is not here has a row that says why."""
    columns = [
        Column("contender", is_text=True),
        Column("kind", is_text=True),
        Column("speed-up", "time of the fastest stock backend over this one, geometric mean"),
        Column("worst", "speed-up in the worst cell"),
        Column("worst cell", is_text=True),
        Column("faster in", "cells in which it is faster than every stock backend"),
        Column("slower in"),
        Column("not measured", "cells in which it failed or does not apply"),
    ]
    rows = [_contender_row(data["cells"], n, kind) for n, kind in _kinds(data).items()]
    for n, reason in data.get("absent", {}).items():
        rows.append(across([name(n)], f"absent: {reason}", len(columns)))
    return Table("Contenders", columns, rows)


def _contender_row(cells: list[KernelCell], contender: str, kind: str) -> Row:
    found = {cell["name"]: _over(cell, contender, "stock") for cell in cells}
    gains = {n: value for n, value in found.items() if value is not None}
    worst = min(gains, key=gains.__getitem__, default=None)
    is_ours = kind == "ours"
    lost = sum(value < 1 for value in gains.values())
    return Row(
        [
            name(contender),
            text(kind),
            gain(geomean(gains.values()), counts=is_ours),
            gain(gains[worst] if worst else None, counts=is_ours, bar=False),
            text(worst),
            number(sum(value > 1 for value in gains.values())),
            Cell(str(lost), lost, "losing" if lost and is_ours else ""),
            number(sum(contender not in cell["contenders"] for cell in cells)),
        ]
    )


def _time_table(data: KernelResult) -> Table:
    """All contenders side by side."""
    cells, kinds = data["cells"], _kinds(data)
    columns = [Column("cell", is_text=True), *(Column(f"{n} ({k})") for n, k in kinds.items())]
    rows = []
    for cell in cells:
        fastest = {kind: _fastest(cell, kind) for kind in _KINDS}
        rows.append(Row([name(cell["name"]), *(_time_cell(cell, n, fastest) for n in kinds)]))
    reasons = {
        f"{contender} absent where: {reason}."
        for cell in cells
        for contender, reason in cell.get("absent", {}).items()
    }
    note = "A time of ours that is longer than that of the fastest stock backend is a loss."
    return Table(
        "Time of one decode step, all contenders, ms", columns, rows, [note, *sorted(reasons)]
    )


def _time_cell(cell: KernelCell, contender: str, fastest: Mapping[str, str | None]) -> Cell:
    found = cell["contenders"].get(contender)
    if contender in cell.get("failed", {}):
        return Cell("failed", tone="losing")
    if found is None:
        return Cell("absent", tone="absent") if contender in cell.get("absent", {}) else NONE
    shown = number(found["ms"])
    if found["kind"] != "ours" or fastest["stock"] is None:
        return shown
    over = _over(cell, contender, "stock")
    return Cell(shown.text, shown.sort, gain(over).tone)


def _every_table(cells: list[KernelCell]) -> Table:
    parts: dict[str, Callable[[Any], Cell]] = {
        "plan ms": lambda c: number(c.get("plan_ms")),
        "copy ms": lambda c: number(c.get("copy_ms")),
        "forward ms": lambda c: number(c.get("forward_ms")),
        "merge ms": lambda c: number(c.get("merge_ms")),
        "packs": lambda c: number(c.get("packs")),
        "KV read": lambda c: share(c.get("kv_read_ratio")),
        "largest error": lambda c: number(c.get("max_abs_error"), 2),
    }
    columns = [
        Column("cell", is_text=True),
        Column("contender", is_text=True),
        Column("kind", is_text=True),
        Column("executor", is_text=True, folds=True),
        Column("ms"),
        Column("speed-up", "time of the fastest stock backend over this one"),
        Column("fastest to slowest", "of all timed steps, ms", is_text=True),
        *(Column(part, _HINTS.get(part, "")) for part in parts),
    ]
    rows = []
    for cell in cells:
        for contender, found in cell["contenders"].items():
            raw = found.get("raw_ms") or [found["ms"]]
            over = _over(cell, contender, "stock")
            is_ours = found["kind"] == "ours"
            loses = is_ours and over is not None and over < 1
            rows.append(
                Row(
                    [
                        name(cell["name"], loses=loses),
                        text(contender),
                        text(found["kind"]),
                        text(found.get("executor")),
                        number(found["ms"]),
                        gain(over, counts=is_ours, bar=False),
                        Cell(f"{number(min(raw)).text} to {number(max(raw)).text}", min(raw)),
                        *(show(found) for show in parts.values()),
                    ],
                    "losing" if loses else "",
                )
            )
    note = "The error is the largest absolute one against the float64 oracle, on the timed inputs."
    return Table("Every measurement", columns, rows, [note])
