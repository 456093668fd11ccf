"""Section of a `bench-kernel` file: one step of attention, ours against all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang_prefix.bench.comparison import (
    fastest,
    of_kind,
    our_provider,
    over,
    over_unshared,
    provider_of,
)
from sglang_prefix.bench.report.section import Section, Verdict, make_section
from sglang_prefix.bench.tables import (
    Cell,
    Column,
    Table,
    gain,
    geomean,
    ratio_text,
    tabulate,
    words,
)

__all__ = ["kernel_section"]

Data = Mapping[str, Any]

_KINDS = ("ours", "stock", "peer")
_FAILED = words("failed", is_loss=True)
# No clock stands between forward and merge in a step.
_PARTS = {
    "plan": "",
    "copy": "",
    "append": "of a step that keeps the plan",
    "forward": "of the torch executor the layers less merge, - where noise leaves nothing of it",
    "merge": "of the torch executor timed alone after the step, on random partials",
}


def kernel_section(data: Data) -> Section:
    """What the file says."""
    ours = our_provider(data)
    peers = sorted({name for case in data["cases"] for name in of_kind(case, "peer")})
    cases = [_compared(case, ours, peers) for case in data["cases"] if not of_kind(case, "chain")]
    # In an environment without SGLang, peers are what there is to compare with.
    has_stock = any(of_kind(case, "stock") for case in cases) or not peers
    baseline = "stock" if has_stock else peers[0]
    tables = [
        _step_table(cases, ours, peers, baseline),
        _provider_table(cases, baseline),
        _every_table(data["cases"], baseline),
    ]
    verdicts = _verdicts(cases, ours or "ours", peers, has_stock=has_stock)
    return make_section("Attention kernels", data, tables, verdicts=verdicts)


def _compared(case: Data, ours: str | None, peers: Sequence[str]) -> dict[str, Any]:
    """The case with what it says of ours: "ours", "stock", and "over" each baseline."""
    stock, mine = fastest(case, "stock"), provider_of(case, ours)
    # Bytes are those of one layer, times those of all.
    rate = mine["bytes_read"] * case["layers"] / mine["ms"] / 1e6 if mine else None
    tokens, heads, limit = case["tokens"], case["heads"], case["bandwidth_gb_s"]
    return {
        **case,
        "ours": mine,
        "peers": {peer: provider_of(case, peer) for peer in peers},
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


def _verdicts(
    cases: Sequence[Data], ours: str, peers: Sequence[str], *, has_stock: bool
) -> list[Verdict]:
    stock = sorted({case["stock"]["name"] for case in cases if case["over"]["stock"]})
    backends = f" ({', '.join(stock)})" if stock else ""

    def against(kind: str, baseline: str) -> Verdict:
        found = {c["name"]: c["over"][kind] or _why_not(c, ours, kind) for c in cases}
        names = stock if kind == "stock" else ()
        return Verdict(ours, baseline, found, stock=names)

    verdicts = [against("stock", f"the fastest stock backend{backends}")] if has_stock else []
    verdicts += [against(peer, f"{peer}, kernels alone") for peer in peers]
    if any(case["over"]["query"] for case in cases):
        shared_by_none = "policy query, which shares nothing, on the same executor"
        verdicts.append(against("query", shared_by_none))
    return verdicts


def _why_not(case: Data, ours: str, kind: str) -> str:
    if ours in case["providers"]:
        return f"no {kind} baseline" if kind in _KINDS else f"{kind} was not measured"
    return f"ours failed: {case['failed'][ours]}" if ours in case["failed"] else "no ours"


def _step_table(
    cases: Sequence[Data], ours: str | None, peers: Sequence[str], baseline: str
) -> Table:
    def over_baseline(title: str, key: str, hint: str, *, is_detail: bool = False) -> Column:
        return Column(title, lambda case: gain(case["over"][key]), hint, is_detail)

    def our_time(case: Data) -> Any:
        return _FAILED if ours in case["failed"] else case["ours"].get("ms")

    columns = [
        Column("case", "name"),
        over_baseline("speed-up", "stock", "time of the fastest stock backend over that of ours"),
        over_baseline("over query", "query", "the same executor without sharing"),
        *(over_baseline(f"over {peer}", peer, "kernels alone") for peer in peers),
        Column("stock ms", "stock.ms"),
        Column("ours ms", our_time, "median of plan, copy and run of one step"),
        Column("read", "ours.kv_read_ratio", "share of the KV tokens that ours reads"),
        Column("ideal", "ideal", "share of them if every shared token is read once"),
        Column(
            "over floor",
            "ours.over_floor",
            "kernel time of ours over the time that the operations or the bytes of a layer take at "
            "least, at the most that this machine was measured to reach",
        ),
        *_part_columns("ours."),
        Column("batch", "batch", is_detail=True),
        Column("tokens", "tokens.logical", "KV tokens of all requests", is_detail=True),
        Column("fastest stock", "stock.name", is_detail=True),
        over_baseline("kernels", "stock's kernels", "without plans and copies", is_detail=True),
        Column("floor us", "floor.us", "of a layer: bytes, operations, one launch", is_detail=True),
        Column("ours us", "ours.kernel_us", "kernel time of a layer", is_detail=True),
        *(
            Column(f"{peer} us", f"peers.{peer}.kernel_us", "likewise", is_detail=True)
            for peer in peers
        ),
        Column("GB/s", "gb_s", "KV bytes that ours reads over its whole step", is_detail=True),
        Column("of bandwidth", "bandwidth_share", "of a streaming read", is_detail=True),
        Column("heads", "shape", "query heads / KV heads / head dim", is_detail=True),
        Column("layers", "layers", "of one step", is_detail=True),
        Column("page", "page_size", is_detail=True),
        *(Column(key, key, is_detail=True) for key in ("group", "dtype", "slots", "note")),
    ]
    title = f"{ours} against {_words_of(baseline)}" if ours else "Cases"
    return tabulate(title, columns, cases)


def _words_of(baseline: str) -> str:
    return "the fastest stock backend" if baseline == "stock" else baseline


def _part_columns(prefix: str) -> list[Column]:
    return [
        Column(f"{part} ms", f"{prefix}{part}_ms", hint, is_detail=True)
        for part, hint in _PARTS.items()
    ]


def _kinds(cases: Sequence[Data]) -> dict[str, str]:
    """Providers that were measured or failed somewhere, ours first, with their kinds."""
    kinds = {name: "failed" for case in cases for name in case["failed"]}
    kinds |= {name: found["kind"] for case in cases for name, found in case["providers"].items()}
    order = (*_KINDS, "failed")
    return dict(sorted(kinds.items(), key=lambda item: (order.index(item[1]), item[0])))


def _ratio(value: float | None, kind: str) -> Cell:
    """How many times a provider is faster than stock: a gain or a loss only of ours."""
    if value is None or kind == "ours":
        return gain(value)
    return Cell(ratio_text(value), value)


def _provider_table(cases: Sequence[Data], baseline: str) -> Table:
    """Each provider over all cases."""

    def over_all(name: str, kind: str) -> dict[str, Any]:
        found = {case["name"]: over(case, name, baseline) for case in cases}
        gains = {case: value for case, value in found.items() if value is not None}
        worst = min(gains, key=gains.__getitem__, default="")
        return {
            "name": name,
            "kind": kind,
            "mean": _ratio(geomean(gains.values()), kind),
            "worst": _ratio(gains.get(worst), kind),
            "worst_case": worst,
            "won": sum(value > 1 for value in gains.values()),
            "lost": sum(value < 1 for value in gains.values()),
            "missing": sum(name not in case["providers"] for case in cases),
        }

    against = _words_of(baseline)
    columns = [
        Column("provider", "name"),
        Column("kind", "kind"),
        Column("speed-up", "mean", f"time of {against} over this one, geometric mean"),
        Column("worst", "worst", "speed-up in the worst case"),
        Column("worst case", "worst_case"),
        Column("faster in", "won", f"cases in which it is faster than {against}"),
        Column("slower in", "lost"),
        Column("not measured", "missing", "cases in which it failed or does not apply"),
    ]
    items = [over_all(*item) for item in _kinds(cases).items()]
    return tabulate("Providers", columns, items, is_detail=True)


def _every_table(cases: Sequence[Data], baseline: str) -> Table:
    def measurement(case: Data, name: str, found: Data) -> dict[str, Any]:
        speedup = _ratio(over(case, name, baseline), found["kind"])
        return {**found, "case": case["name"], "provider": name, "over": speedup}

    columns = [
        *(Column(key, key) for key in ("case", "provider", "kind", "executor", "policy", "mode")),
        Column("merged", "merge"),
        Column("ms", "ms"),
        Column("speed-up", "over", f"time of {_words_of(baseline)} over this one"),
        Column("fastest", lambda found: min(found["raw_ms"], default=None), "timed step, ms"),
        Column("slowest", lambda found: max(found["raw_ms"], default=None), "timed step, ms"),
        Column("disturbed", "disturbed", "steps left out, as others had a core meanwhile"),
        Column("kernel us", "kernel_us", "of one layer"),
        *_part_columns(""),
        Column("packs", "packs"),
        Column("KV read", "kv_read_ratio"),
        Column("largest error", "max_abs_error"),
    ]
    items = [measurement(case, *found) for case in cases for found in case["providers"].items()]
    notes = [
        "The error is the largest absolute one against the float64 oracle, on the timed inputs.",
        "Of kind chain: what launches cost, by launch mode / merge / tile classes in use.",
    ]
    return tabulate("Every measurement", columns, items, notes=notes, is_detail=True)
