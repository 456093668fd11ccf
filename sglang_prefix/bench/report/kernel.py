"""Section of a `bench-kernel` file: one decode step of attention, ours against all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sglang_prefix.bench.comparison import (
    fastest,
    of_kind,
    our_provider,
    over,
    over_unshared,
    provider_of,
)
from sglang_prefix.bench.report.section import (
    Section,
    Verdict,
    environment_rows,
    left_cases,
    target_tables,
    warnings,
)
from sglang_prefix.bench.tables import (
    NONE,
    Cell,
    Column,
    Table,
    as_is,
    gain,
    geomean,
    number,
    share,
    tabulate,
    text,
)

__all__ = ["kernel_section"]

Data = Mapping[str, Any]

_KINDS = ("ours", "stock", "peer")
# No clock stands between forward and merge in a step.
_PARTS = {
    "plan": "",
    "copy": "",
    "append": "of a step that keeps the plan",
    "forward": "on the CPU the layers less merge, - where noise leaves nothing of it",
    "merge": "on the CPU timed alone after the step, on random partials of the plan's shape",
}


def kernel_section(data: Data) -> Section:
    """What the file says."""
    ours = our_provider(data)
    peers = sorted({name for case in data["cases"] for name in of_kind(case, "peer")})
    cases = [_compared(case, ours, peers) for case in data["cases"] if not of_kind(case, "chain")]
    return Section(
        title="Attention kernels",
        environment=environment_rows(data),
        warnings=warnings(data),
        verdicts=[] if data["dry"] else _verdicts(data, cases, ours or "ours", peers),
        tables=[
            *target_tables(data),
            _step_table(data, cases, ours, peers),
            _provider_table(data, cases),
            _time_table(data, cases),
            _every_table(data, cases),
            *_chain_tables(data),
        ],
    )


def _compared(case: Data, ours: str | None, peers: Sequence[str]) -> dict[str, Any]:
    """The case with what it says of ours: "ours", "stock", and "over" each baseline."""
    stock, mine = fastest(case, "stock"), provider_of(case, ours)
    # Bytes are those of one layer, times those of all.
    rate = mine["bytes_read"] * case["layers"] / mine["ms"] / 1e6 if mine else None
    tokens, heads, limit = case["tokens"], case["heads"], case["bandwidth_gb_s"]
    return {
        **case,
        "ours": mine,
        "stock": {"name": stock, **provider_of(case, stock)},
        "over": {
            "stock": over(case, ours, "stock"),
            "stock's kernels": over(case, ours, "stock", "kernel_us"),
            "query": over_unshared(case, ours),
            **{peer: over(case, ours, peer, "kernel_us") for peer in peers},
        },
        "gb_s": rate,
        "bandwidth_share": rate / limit if rate and limit else None,
        "ideal": tokens["ideal"] / tokens["logical"] if tokens["logical"] else None,
        "shape": f"{heads['qo']}/{heads['kv']}/{heads['dim']}",
    }


def _verdicts(data: Data, cases: Sequence[Data], ours: str, peers: Sequence[str]) -> list[Verdict]:
    left = left_cases(data)
    stock = sorted({case["stock"]["name"] for case in cases if case["over"]["stock"]})
    backends = f" ({', '.join(stock)})" if stock else ""

    def against(kind: str, baseline: str, among: Sequence[Data], **more: Any) -> Verdict:
        why_not = partial(_why_not, ours=ours, kind=kind)
        return Verdict.over(ours, baseline, among, lambda c: c["over"][kind], why_not, **more)

    baseline = f"the fastest stock backend{backends}"
    verdicts = [against("stock", baseline, cases, left=left, stock=stock)]
    verdicts += [against(peer, f"{peer}, kernels alone", cases, left=left) for peer in peers]
    if unshared := [case for case in cases if case["over"]["query"]]:
        baseline = "policy query, which shares nothing, on the same executor"
        verdicts.append(against("query", baseline, unshared))
    return verdicts


def _why_not(case: Data, ours: str, kind: str) -> str:
    if ours in case["providers"]:
        return f"no {kind} baseline" if kind in _KINDS else f"{kind} was not measured"
    return f"ours failed: {case['failed'][ours]}" if ours in case["failed"] else "no ours"


def _step_table(data: Data, cases: Sequence[Data], ours: str | None, peers: Sequence[str]) -> Table:
    def our_time(case: Data) -> Cell:
        failed = ours in case["failed"]
        return Cell("failed", tone="losing") if failed else number(case["ours"].get("ms"))

    def over_baseline(title: str, key: str, hint: str, *, folds: bool = False) -> Column:
        shown = partial(gain, counts=not data["dry"])
        return Column(title, shown, lambda case: case["over"][key], hint, folds)

    columns = [
        Column("case", text, "name"),
        over_baseline("speed-up", "stock", "time of the fastest stock backend over that of ours"),
        over_baseline("over query", "query", "the same executor without sharing", folds=True),
        *(over_baseline(f"over {peer}", peer, "kernels alone") for peer in peers),
        Column("stock ms", number, "stock.ms"),
        Column("ours ms", as_is, our_time, "median of plan, copy and run of one decode step"),
        Column("read", share, "ours.kv_read_ratio", "share of the KV tokens that ours reads"),
        Column("ideal", share, "ideal", "share of them if every shared token is read once"),
        *(Column(f"{part} ms", number, f"ours.{part}_ms", h, True) for part, h in _PARTS.items()),
        Column("target", as_is, _promise, "speed-up that the project set itself", folds=True),
        Column("batch", number, "batch", folds=True),
        Column("tokens", number, "tokens.logical", "KV tokens of all requests"),
        Column("fastest stock", text, "stock.name", folds=True),
        over_baseline("kernels", "stock's kernels", "speed-up without plans and copies"),
        Column("floor us", number, "floor.us", "of a layer: bytes, operations, one launch", True),
        Column("over floor", number, "ours.over_floor", "kernel time of ours over it", True),
        Column("GB/s", number, "gb_s", "KV bytes that ours reads over its whole step"),
        Column(
            "of bandwidth", share, "bandwidth_share", "of a streaming read in the same run", True
        ),
        Column("group", text, "group", folds=True),
        Column("heads", text, "shape", "query heads / KV heads / head dim", folds=True),
        Column("dtype", text, "dtype", folds=True),
        Column("page", number, "page_size", folds=True),
        Column("slots", text, "slots", folds=True),
        Column("layers", number, "layers", "of one step", folds=True),
        Column("note", text, "note", folds=True),
    ]
    title = f"{ours} against the fastest stock backend" if ours else "Cases"
    return tabulate(title, columns, cases, left=left_cases(data))


def _promise(case: Data) -> Cell:
    wanted, reached = case["target"], case["over"]["stock"]
    if wanted is None:
        return NONE
    missed = reached is not None and reached < wanted
    return Cell(f"{wanted:g}x{' missed' * missed}", wanted, "losing" if missed else "")


def _kinds(cases: Sequence[Data]) -> dict[str, str]:
    """Providers that were measured or failed somewhere, ours first, with their kinds."""
    kinds = {name: "failed" for case in cases for name in case["failed"]}
    kinds |= {name: found["kind"] for case in cases for name, found in case["providers"].items()}
    order = {kind: place for place, kind in enumerate(_KINDS)}
    return dict(sorted(kinds.items(), key=lambda item: (order.get(item[1], len(order)), item[0])))


def _provider_table(data: Data, cases: Sequence[Data]) -> Table:
    """Each provider over all cases; a baseline that is not here has a row that says why."""

    def over_all(name: str, kind: str) -> dict[str, Any]:
        found = {case["name"]: over(case, name, "stock") for case in cases}
        gains = {case: value for case, value in found.items() if value is not None}
        worst = min(gains, key=gains.__getitem__, default=None)
        lost = sum(value < 1 for value in gains.values())
        is_ours = kind == "ours" and not data["dry"]
        return {
            "name": name,
            "kind": kind,
            "mean": gain(geomean(gains.values()), counts=is_ours),
            "worst": gain(gains[worst] if worst else None, counts=is_ours, bar=False),
            "worst_case": worst,
            "won": sum(value > 1 for value in gains.values()),
            "lost": Cell(str(lost), lost, "losing" if lost and is_ours else ""),
            "missing": sum(name not in case["providers"] for case in cases),
        }

    items = [over_all(*item) for item in _kinds(cases).items()]
    hint = "time of the fastest stock backend over this one, geometric mean"
    columns = [
        Column("provider", text, "name"),
        Column("kind", text, "kind"),
        Column("speed-up", as_is, "mean", hint),
        Column("worst", as_is, "worst", "speed-up in the worst case"),
        Column("worst case", text, "worst_case"),
        Column("faster in", number, "won", "cases in which it is faster than every stock backend"),
        Column("slower in", as_is, "lost"),
        Column("not measured", number, "missing", "cases in which it failed or does not apply"),
    ]
    absent = {name: f"absent: {reason}" for name, reason in data["absent"].items()}
    return tabulate("Providers", columns, items, left=absent, marks_rows=False, is_detail=True)


def _time_table(data: Data, cases: Sequence[Data]) -> Table:
    """All providers side by side."""

    def time(case: Data, name: str) -> Cell:
        found = provider_of(case, name)
        if name in case["failed"]:
            return Cell("failed", tone="losing")
        if not found:
            return Cell("absent", tone="absent") if name in case["absent"] else NONE
        speedup = over(case, name, "stock")
        counts = found["kind"] == "ours" and speedup is not None and not data["dry"]
        return Cell(number(found["ms"]).text, found["ms"], gain(speedup).tone if counts else "")

    columns = [Column("case", text, "name")]
    columns += [
        Column(f"{name} ({kind})", as_is, partial(time, name=name))
        for name, kind in _kinds(cases).items()
    ]
    note = "A time of ours that is longer than that of the fastest stock backend is a loss."
    title = "Time of one decode step, all providers, ms"
    return tabulate(title, columns, cases, marks_rows=False, notes=[note], is_detail=True)


def _every_table(data: Data, cases: Sequence[Data]) -> Table:
    def measurement(case: Data, name: str, found: Data) -> dict[str, Any]:
        raw = found["raw_ms"] or [found["ms"]]
        counts = found["kind"] == "ours" and not data["dry"]
        return {
            **found,
            "case": case["name"],
            "provider": name,
            "over": gain(over(case, name, "stock"), counts=counts, bar=False),
            "spread": Cell(f"{number(min(raw)).text} to {number(max(raw)).text}", min(raw)),
        }

    items = [measurement(case, *found) for case in cases for found in case["providers"].items()]
    hint = "time of the fastest stock backend over this one"
    columns = [
        Column("case", text, "case"),
        Column("provider", text, "provider"),
        Column("kind", text, "kind"),
        *(Column(key, text, key, folds=True) for key in ("executor", "policy", "mode")),
        Column("merged", text, "merge", folds=True),
        Column("ms", number, "ms"),
        Column("speed-up", as_is, "over", hint),
        Column("fastest to slowest", as_is, "spread", "of all timed steps, ms"),
        Column("kernel us", number, "kernel_us", "of one layer"),
        *(Column(f"{part} ms", number, f"{part}_ms", h, True) for part, h in _PARTS.items()),
        Column("packs", number, "packs"),
        Column("KV read", share, "kv_read_ratio"),
        Column("largest error", partial(number, digits=2), "max_abs_error"),
    ]
    note = "The error is the largest absolute one against the float64 oracle, on the timed inputs."
    return tabulate("Every measurement", columns, items, notes=[note], is_detail=True)


def _chain_tables(data: Data) -> list[Table]:
    items = [
        {"case": case["name"], "chain": name, **found}
        for case in data["cases"]
        for name, found in of_kind(case, "chain").items()
    ]
    columns = [
        Column("case", text, "case"),
        Column("launch mode / merge / tile classes in use", text, "chain"),
        Column("us per layer", number, "kernel_us"),
    ]
    return [tabulate("Price of launches", columns, items)] if items else []
