"""``docs/reproduction.md`` says what its result file says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sglang_prefix.bench.comparison import over, over_unshared
from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.workloads.registry import load_registry

ROOT = Path(__file__).parents[1]
OURS, QUERY, PEER = "native/pat", "native/query", "vllm-cpu"
COLUMNS = (
    *("requests", "KV tokens", "ideal", "vLLM ms", "`query` ms", "ours ms"),
    *("over vLLM", "over `query`", "KV read", "H200"),
)


def test_the_tables_are_those_of_the_file() -> None:
    text = (ROOT / "docs" / "reproduction.md").read_text()
    (name,) = set(re.findall(r"docs/results/cpu/[\w-]+-seeds\.json", text))
    data = read_result(ROOT / name, "bench-kernel")
    trees = [c for file in ("trees", "unrelated") for c in load_registry(file)]
    first = [case for case in trees if str(case.heads) == "32:8"]
    rows = ((case.name, f"{case.batch_name[:2]} | {case.notation}") for case in first)
    assert table(data, ("#", "tree"), rows) in text
    rows = ((case.name, case.batch_name) for case in load_registry("chunk"))
    assert table(data, ("requests x shared + own tokens",), rows) in text
    assert f"commit {data['environment']['commit']}," in text
    assert data["environment"]["cpu"] in text


def table(data: dict[str, Any], first: tuple[str, ...], rows: Iterable[tuple[str, str]]) -> str:
    """The Markdown; cases without a number are in it."""
    cases = {case["name"]: case for case in data["cases"]}
    lines = [f"| {' | '.join((*first, *COLUMNS))} |"]
    lines.append("|" + " --- |" * len(first) + " ---: |" * len(COLUMNS))
    for name, label in rows:
        values = cells(cases[name]) if name in cases else ["not run"] + [""] * 8
        lines.append(f"| {label} | {' | '.join([*values, 'not measured'])} |")
    return "\n".join(lines)


def cells(case: dict[str, Any]) -> list[str]:
    tokens, providers = case["tokens"], case["providers"]
    times = (providers.get(name, {}).get("ms") for name in (PEER, QUERY, OURS))
    gains = (over(case, OURS, PEER), over_unshared(case, OURS))
    return [
        str(case["batch"]),
        f"{tokens['logical']:,}",
        f"{tokens['logical'] / tokens['ideal']:.2f}x",
        *("no room" if ms is None else f"{ms:.1f}" for ms in times),
        *("" if gain is None else f"{gain:.2f}x" + " (slower)" * (gain < 1) for gain in gains),
        f"{1 / providers[OURS]['kv_read_ratio']:.2f}x less",
    ]
