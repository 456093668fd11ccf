"""Section of a file of ``make bench-cpu``: attention, planning and host time on a CPU."""

from __future__ import annotations

from sglang_prefix.bench.report.cells import gain, name, number, text
from sglang_prefix.bench.report.frame import versions
from sglang_prefix.bench.report.model import (
    Cell,
    Column,
    Row,
    Section,
    Table,
    Verdict,
    folded,
)
from sglang_prefix.bench.report.schema import CpuAttention, CpuResult
from sglang_prefix.bench.report.sources import Source

__all__ = ["cpu_section"]

_OURS, _STOCK, _UNSHARED = "pat", "stock", "query"
_BASELINES = {
    _STOCK: "stock torch_native",
    _UNSHARED: "policy query, which shares nothing",
}


def cpu_section(source: Source) -> Section:
    """What the file says."""
    data: CpuResult = source.data
    threads = data.get("threads")
    facts = {
        "device": "cpu",
        "CPU": data["cpu"] + (f", threads: {threads}" if threads else ""),
        "versions": versions(data.get("versions", {})),
        "Python": data.get("python"),
        "commit": data["commit"],
        "measured": data["date"],
        "seed": data.get("seed"),
    }
    return Section(
        kind=source.kind,
        title="Attention and planning on the CPU",
        source=source.name,
        facts={fact: str(value) for fact, value in facts.items() if value is not None},
        verdicts=[_verdict(data["attention"], baseline) for baseline in _BASELINES],
        tables=[
            folded(_attention_table(data["attention"])),
            *_stage_tables("Host time of planning, us, median", data.get("planning"), "median_us"),
            *_stage_tables("Host time in the real engine, us", data.get("engine"), "us"),
            *_stage_tables(
                "Host time with the device elsewhere, all our code in a decode step, us",
                data.get("host"),
                "us",
            ),
        ],
    )


def _case(case: CpuAttention) -> str:
    slots = "scattered" if case.get("scattered") else "consecutive"
    shape = f"{case['batch']} x ({case['shared']} + {case['private']})"
    return f"{shape} {case['dtype']} {slots}"


def _over(case: CpuAttention, baseline: str) -> float | None:
    times = case["median_ms"]
    if _OURS not in times or baseline not in times:
        return None
    return times[baseline] / times[_OURS]


def _verdict(cases: list[CpuAttention], baseline: str) -> Verdict:
    gains = {_case(case): _over(case, baseline) for case in cases}
    return Verdict(
        f"policy {_OURS}",
        _BASELINES[baseline],
        {case: value for case, value in gains.items() if value is not None},
        {case: "not measured" for case, value in gains.items() if value is None},
        stock=["torch_native"] if baseline == _STOCK else [],
    )


def _attention_table(cases: list[CpuAttention]) -> Table:
    ways = list(dict.fromkeys(way for case in cases for way in case["median_ms"]))
    columns = [
        Column("batch x (shared + private)", "requests and their KV tokens", is_text=True),
        Column("dtype", is_text=True, folds=True),
        Column("slots", is_text=True, folds=True),
        Column("heads", "query heads / KV heads / head dim", is_text=True, folds=True),
        Column("over stock", "time of stock over that of pat"),
        Column("over query", "time of query over that of pat"),
        *(Column(f"{way} ms") for way in ways),
        Column("target", "speed-up over stock that the project set itself", folds=True),
    ]
    return Table("Decode attention of one layer", columns, [_attention_row(c, ways) for c in cases])


def _attention_row(case: CpuAttention, ways: list[str]) -> Row:
    gains = [_over(case, baseline) for baseline in (_STOCK, _UNSHARED)]
    loses = any(value is not None and value < 1 for value in gains)
    target = case.get("target")
    return Row(
        [
            name(f"{case['batch']} x ({case['shared']} + {case['private']})", loses=loses),
            text(case["dtype"]),
            text("scattered" if case.get("scattered") else "consecutive"),
            text(f"{case['num_qo_heads']}/{case['num_kv_heads']}/{case['head_dim']}"),
            *map(gain, gains),
            *(number(case["median_ms"].get(way)) for way in ways),
            _target(target, gains[0]),
        ],
        "losing" if loses else "",
    )


def _target(target: float | None, reached: float | None) -> Cell:
    if target is None:
        return text(None)
    missed = reached is not None and reached < target
    shown = f"{target:g}x" + (" missed" if missed else "")
    return Cell(shown, target, "losing" if missed else "")


def _stage_tables(title: str, results: object, key: str) -> list[Table]:
    """A row per stage, a column per number of requests; nothing if nothing was measured."""
    if not isinstance(results, list) or not results:
        return []
    stages = dict.fromkeys(stage for result in results for stage in result[key])
    columns = [
        Column("stage", is_text=True),
        *(Column(f"{result['num_requests']} requests") for result in results),
    ]
    rows = [Row([name(s), *(number(r[key].get(s)) for r in results)]) for s in stages]
    return [Table(title, columns, rows)]
