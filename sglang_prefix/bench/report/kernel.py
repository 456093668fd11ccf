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
# No clock stands between the two in a step.
_FORWARD = "of ours, ms: on the CPU the layers less merge, - where noise leaves nothing of it"
_MERGE = (
    "of ours, ms: on the CPU timed alone after the step, on random partials of the plan's shape"
)
_OVER_STOCK = "time of the fastest stock backend over that of ours, plans of both included"


def kernel_section(data: Data) -> Section:
    """What the file says."""
    ours, peers = our_provider(data), _names_of(data, "peer")
    cases = [case for case in data["cases"] if not of_kind(case, "chain")]
    return Section(
        title="Attention kernels",
        environment=environment_rows(data),
        warnings=warnings(data),
        verdicts=[] if data["dry"] else _verdicts(data, cases, ours, peers),
        tables=[
            *target_tables(data),
            _step_table(data, cases, ours, peers),
            _provider_table(data, cases),
            _time_table(data, cases),
            _every_table(data, cases),
            *_chain_tables(data),
        ],
    )


def _names_of(data: Data, kind: str) -> list[str]:
    return sorted({name for case in data["cases"] for name in of_kind(case, kind)})


def _verdicts(
    data: Data, cases: Sequence[Data], ours: str | None, peers: Sequence[str]
) -> list[Verdict]:
    left, said = left_cases(data), ours or "ours"
    stock = sorted({fastest(c, "stock") or "" for c in cases if over(c, ours, "stock")})
    backends = f" ({', '.join(stock)})" if stock else ""

    def against(kind: str, baseline: str, time: str, **more: Any) -> Verdict:
        gain_of = partial(over, ours=ours, kind=kind, time=time)
        why_not = partial(_why_not, ours=said, kind=kind)
        return Verdict.over(said, baseline, cases, gain_of, why_not, left, **more)

    unshared = [case for case in cases if over_unshared(case, ours) is not None]
    shares_nothing = "policy query, which shares nothing, on the same executor"
    gain_of = partial(over_unshared, ours=ours)
    return [
        against("stock", f"the fastest stock backend{backends}", "ms", stock=stock),
        *(against(peer, f"{peer}, kernels alone", "kernel_us") for peer in peers),
        *([Verdict.over(said, shares_nothing, unshared, gain_of, str)] if unshared else []),
    ]


def _why_not(case: Data, ours: str, kind: str) -> str:
    if ours in case["providers"]:
        return f"no {kind} baseline" if kind in _KINDS else f"{kind} was not measured"
    return f"ours failed: {case['failed'][ours]}" if ours in case["failed"] else "no ours"


def _step_table(data: Data, cases: Sequence[Data], ours: str | None, peers: Sequence[str]) -> Table:
    def mine(key: str) -> Any:
        return lambda case: provider_of(case, ours).get(key)

    def our_time(case: Data) -> Cell:
        failed = ours in case["failed"]
        return Cell("failed", tone="losing") if failed else number(mine("ms")(case))

    shown = partial(gain, counts=not data["dry"])
    columns = [
        Column("case", text, lambda c: c["name"]),
        Column("speed-up", shown, lambda c: over(c, ours, "stock"), _OVER_STOCK),
        Column(
            *("over query", shown, lambda c: over_unshared(c, ours)),
            *("time of our executor without sharing over that of ours", True),
        ),
        *(Column(f"over {p}", shown, partial(over, ours=ours, kind=p, time="kernel_us"),
                 "kernels alone") for p in peers),
        Column("batch", number, lambda c: c["batch"], folds=True),
        Column("tokens", number, lambda c: c["tokens"]["logical"], "KV tokens of all requests"),
        Column("stock ms", number, lambda c: provider_of(c, fastest(c, "stock")).get("ms")),
        Column("ours ms", as_is, our_time, "median of plan, copy and run of one decode step"),
        Column("read", share, mine("kv_read_ratio"), "share of the KV tokens that ours reads"),
        Column("ideal", share, _ideal, "share of them if every shared token is read once"),
        *(Column(part, number, mine(f"{part}_ms"), "of ours, ms") for part in ("plan", "copy")),
        Column("append", number, mine("append_ms"), "of ours, ms, where the plan is kept", True),
        Column("forward", number, mine("forward_ms"), _FORWARD),
        Column("merge", number, mine("merge_ms"), _MERGE),
        Column("fastest stock", text, lambda c: fastest(c, "stock"), folds=True),
        Column(
            *("kernels", shown, lambda c: over(c, ours, "stock", "kernel_us")),
            "speed-up over the fastest stock backend without plans, copies and appends",
        ),
        Column("floor us", number, lambda c: c["floor"]["us"], _FLOOR),
        Column("over floor", number, mine("over_floor"), "kernel time of ours over the floor"),
        Column("GB/s", number, lambda c: _read_rate(c, ours),
               "KV bytes that ours reads over its whole step"),
        Column("of bandwidth", share, lambda c: _bandwidth_share(c, ours),
               "share of the bandwidth of a streaming read in the same run"),
        *_case_columns(),
        *_promise(cases, ours),
    ]  # fmt: skip
    title = f"{ours} against the fastest stock backend" if ours else "Cases"
    return tabulate(title, columns, cases, left=left_cases(data))


_FLOOR = "of a layer, what no kernel can beat: bytes, operations, one launch"


def _case_columns() -> list[Column]:
    """What a case is, mostly the same in all of a file."""

    def heads(case: Data) -> str:
        found = case["heads"]
        return f"{found['qo']}/{found['kv']}/{found['dim']}"

    return [
        Column("group", text, lambda c: c["group"], folds=True),
        Column("heads", text, heads, "query heads / KV heads / head dim", folds=True),
        Column("dtype", text, lambda c: c["dtype"], folds=True),
        Column("page", number, lambda c: c["page_size"], folds=True),
        Column("slots", text, lambda c: c["slots"], folds=True),
        Column("layers", number, lambda c: c["layers"], "of one step", folds=True),
        Column("note", text, lambda c: c["note"], folds=True),
    ]


def _promise(cases: Sequence[Data], ours: str | None) -> list[Column]:
    """The speed-up that the project set itself, where it did."""

    def target(case: Data) -> Cell:
        wanted, reached = case["target"], over(case, ours, "stock")
        if wanted is None:
            return NONE
        missed = reached is not None and reached < wanted
        return Cell(f"{wanted:g}x{' missed' * missed}", wanted, "losing" if missed else "")

    hint = "speed-up that the project set itself"
    has_any = any(case["target"] is not None for case in cases)
    return [Column("target", as_is, target, hint, folds=True)] if has_any else []


def _ideal(case: Data) -> float | None:
    tokens = case["tokens"]
    return tokens["ideal"] / tokens["logical"] if tokens["logical"] else None


def _read_rate(case: Data, ours: str | None) -> float | None:
    found = provider_of(case, ours)
    # Bytes are those of one layer, times those of all.
    return found["bytes_read"] * case["layers"] / found["ms"] / 1e6 if found else None


def _bandwidth_share(case: Data, ours: str | None) -> float | None:
    rate = _read_rate(case, ours)
    return rate / case["bandwidth_gb_s"] if rate else None


def _kinds(cases: Sequence[Data]) -> dict[str, str]:
    """Providers that were measured or failed somewhere, ours first, with their kinds."""
    kinds = {name: "failed" for case in cases for name in case["failed"]}
    kinds |= {name: found["kind"] for case in cases for name, found in case["providers"].items()}
    order = {kind: place for place, kind in enumerate(_KINDS)}
    return dict(sorted(kinds.items(), key=lambda item: (order.get(item[1], len(order)), item[0])))


def _provider_table(data: Data, cases: Sequence[Data]) -> Table:
    """Each provider over all cases; a baseline that is not here has a row that says why."""
    kinds = _kinds(cases)
    gains = {
        name: {c["name"]: value for c in cases if (value := over(c, name, "stock")) is not None}
        for name in kinds
    }

    def toned(name: str, value: float | None, *, bar: bool = False) -> Cell:
        return gain(value, counts=kinds[name] == "ours" and not data["dry"], bar=bar)

    def worst(name: str) -> str | None:
        return min(gains[name], key=gains[name].__getitem__, default=None)

    def lost(name: str) -> Cell:
        count = sum(value < 1 for value in gains[name].values())
        return Cell(str(count), count, "losing" if count and kinds[name] == "ours" else "")

    columns = [
        Column("provider", text, str),
        Column("kind", text, lambda n: kinds[n]),
        Column("speed-up", as_is, lambda n: toned(n, geomean(gains[n].values()), bar=True),
               "time of the fastest stock backend over this one, geometric mean"),
        Column("worst", as_is, lambda n: toned(n, gains[n].get(worst(n) or "")),
               "speed-up in the worst case"),
        Column("worst case", text, worst),
        Column("faster in", number, lambda n: sum(value > 1 for value in gains[n].values()),
               "cases in which it is faster than every stock backend"),
        Column("slower in", as_is, lost),
        Column("not measured", number, lambda n: sum(n not in c["providers"] for c in cases),
               "cases in which it failed or does not apply"),
    ]  # fmt: skip
    absent = {name: f"absent: {reason}" for name, reason in data["absent"].items()}
    return tabulate("Providers", columns, kinds, left=absent, marks_rows=False, is_detail=True)


def _time_table(data: Data, cases: Sequence[Data]) -> Table:
    """All providers side by side."""

    def time(case: Data, name: str) -> Cell:
        found = provider_of(case, name)
        if name in case["failed"]:
            return Cell("failed", tone="losing")
        if not found:
            return Cell("absent", tone="absent") if name in case["absent"] else NONE
        counts = found["kind"] == "ours" and not data["dry"]
        tone = gain(over(case, name, "stock"), counts=counts).tone
        return Cell(number(found["ms"]).text, found["ms"], "" if tone == "quiet" else tone)

    columns = [Column("case", text, lambda c: c["name"])]
    columns += [
        Column(f"{name} ({kind})", as_is, partial(time, name=name))
        for name, kind in _kinds(cases).items()
    ]
    note = "A time of ours that is longer than that of the fastest stock backend is a loss."
    title = "Time of one decode step, all providers, ms"
    return tabulate(title, columns, cases, marks_rows=False, notes=[note], is_detail=True)


def _every_table(data: Data, cases: Sequence[Data]) -> Table:
    items = [(case, name, found) for case in cases for name, found in case["providers"].items()]

    def of(key: str) -> Any:
        return lambda item: item[2].get(key)

    def over_stock(item: tuple[Data, str, Data]) -> Cell:
        counts = item[2]["kind"] == "ours" and not data["dry"]
        return gain(over(item[0], item[1], "stock"), counts=counts, bar=False)

    def spread(item: tuple[Data, str, Data]) -> Cell:
        raw = item[2]["raw_ms"] or [item[2]["ms"]]
        return Cell(f"{number(min(raw)).text} to {number(max(raw)).text}", min(raw))

    parts = {part: "of the step, ms" for part in ("plan", "copy", "append")}
    parts |= {"forward": _FORWARD, "merge": _MERGE}
    names = ("executor", "policy", "mode", "merge")
    columns = [
        Column("case", text, lambda item: item[0]["name"]),
        Column("provider", text, lambda item: item[1]),
        Column("kind", text, of("kind")),
        *(Column(name if name != "merge" else "merged", text, of(name), folds=True)
          for name in names),
        Column("ms", number, of("ms")),
        Column("speed-up", as_is, over_stock, "time of the fastest stock backend over this one"),
        Column("fastest to slowest", as_is, spread, "of all timed steps, ms"),
        Column("kernel us", number, of("kernel_us"), "of one layer"),
        *(Column(f"{part} ms", number, of(f"{part}_ms"), hint) for part, hint in parts.items()),
        Column("packs", number, of("packs")),
        Column("KV read", share, of("kv_read_ratio")),
        Column("largest error", partial(number, digits=2), of("max_abs_error")),
    ]  # fmt: skip
    note = "The error is the largest absolute one against the float64 oracle, on the timed inputs."
    return tabulate("Every measurement", columns, items, notes=[note], is_detail=True)


def _chain_tables(data: Data) -> list[Table]:
    items = [
        (case["name"], name, found["kernel_us"])
        for case in data["cases"]
        for name, found in of_kind(case, "chain").items()
    ]
    columns = [
        Column("case", text, lambda item: item[0]),
        Column("launch mode / merge / tile classes in use", text, lambda item: item[1]),
        Column("us per layer", number, lambda item: item[2]),
    ]
    return [tabulate("Price of launches", columns, items)] if items else []
