"""The tables of ``docs/reproduction.md`` from a result file of ``sglang-prefix bench kernel``.

``python -m benchmarks.reproduction FILE`` prints them; a test compares them with the document.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.workloads.registry import load_registry

__all__ = ["chunk_table", "pat_table"]

_OURS, _QUERY = "torch/pat", "torch/query"
_COLUMNS = (
    "requests",
    "KV tokens",
    "ideal",
    "stock ms",
    "`query` ms",
    "ours ms",
    "over stock",
    "over `query`",
    "KV read",
    "H200",
)


def pat_table(data: dict[str, Any], heads: str) -> str:
    """PAT's 20 trees with one head configuration, as Markdown."""
    specs = [b for name in ("trees", "unrelated") for b in load_registry(name).batches]
    rows = ((f"{s.group}/{s.name}/{heads}", f"{s.name[:2]} | {s.tree}") for s in specs)
    return _table(data, ("#", "tree"), rows)


def chunk_table(data: dict[str, Any]) -> str:
    """ChunkAttention's grid, as Markdown."""
    specs = load_registry("chunk").batches
    rows = ((f"{s.group}/{s.name}/{s.heads[0]}", s.name) for s in specs)
    return _table(data, ("requests x shared + own tokens",), rows)


def _table(data: dict[str, Any], first: tuple[str, ...], rows: Iterator[tuple[str, str]]) -> str:
    cells = {cell["name"]: cell for cell in data["cells"]}
    lines = [f"| {' | '.join((*first, *_COLUMNS))} |"]
    lines.append("|" + " --- |" * len(first) + " ---: |" * len(_COLUMNS))
    for name, label in rows:
        values = _values(cells[name]) if name in cells else ["not run"] + [""] * 8
        lines.append(f"| {label} | {' | '.join([*values, 'not measured'])} |")
    return "\n".join(lines)


def _values(cell: dict[str, Any]) -> list[str]:
    tokens, contenders = cell["tokens"], cell["contenders"]
    ours, query = contenders[_OURS], contenders[_QUERY]
    over_stock = ours["speedup"]
    return [
        str(cell["batch"]),
        f"{tokens['logical']:,}",
        f"{tokens['logical'] / tokens['ideal']:.2f}x",
        f"{contenders[cell['best_stock']]['ms']:.0f}",
        f"{query['ms']:.0f}",
        f"{ours['ms']:.0f}",
        f"{over_stock:.2f}x" + " (slower)" * (over_stock < 1),
        f"{query['ms'] / ours['ms']:.2f}x" + " (slower)" * (query["ms"] < ours["ms"]),
        f"{1 / ours['kv_read_ratio']:.2f}x less",
    ]


def main() -> None:
    """Print both tables."""
    data = read_result(sys.argv[1], "bench-kernel")
    print(pat_table(data, "32:8"))
    print()
    print(chunk_table(data))


if __name__ == "__main__":
    main()
