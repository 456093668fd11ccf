"""CPU benchmarks: ``make bench-cpu``, or ``sglang-prefix exec -- python -m benchmarks.cpu``.

Writes every raw time to ``docs/results/cpu/<date>-<commit>.json`` and prints the medians.
Stock ``torch_native`` decode is a loop over requests, so the fair baseline stands beside it:
policy ``query``, which shares nothing, on our own executor.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cpu_attention import CASES, measure_attention
from benchmarks.cpu_planning import measure_planning
from benchmarks.timing import environment
from sglang_prefix.bench.host import measure_engine, measure_host

RESULTS = Path(__file__).parent / "results" / "cpu"


def main() -> None:
    """Run all cases, print the tables, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per attention case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="result file instead of the dated one")
    arguments = parser.parse_args()
    console = Console(width=max(Console().width, 130))  # the table is wide, also in a file
    commit = _git("rev-parse", "--short", "HEAD")
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit + ("-dirty" if _git("status", "--porcelain", "-uno") else ""),
        "seed": arguments.seed,
        **environment(),
    }
    report["attention"] = [
        measure_attention(case, arguments.rounds, arguments.seed) for case in CASES
    ]
    console.print(_attention_table(report["attention"]))
    report["planning"] = [measure_planning(n, 50, arguments.seed) for n in (256, 1024)]
    title = "host planning, three-level forest, us (median)"
    console.print(_planning_table(report["planning"], "median_us", title))
    report["engine"] = [measure_engine(256)]
    console.print(_planning_table(report["engine"], "us", "host time in the real engine, us"))
    report["host"] = [measure_host(256)]
    title = "host time in the real engine, device elsewhere, us"
    console.print(_planning_table(report["host"], "us", title))
    target = arguments.out or RESULTS / f"{report['date']}-{commit}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written to {target}")


def _attention_table(results: list[dict[str, Any]]) -> Table:
    title = "decode attention, Hq 32, Hkv 8, head dim 128, ms (median)"
    columns = ("batch", "shared + private", "dtype", "slots", "stock", "query", "chunk", "node")
    table = Table(*columns, "pat", "over stock", "target", "over query", title=title)
    for r in results:
        ms = r["median_ms"]
        table.add_row(
            str(r["batch"]),
            f"{r['shared']} + {r['private']}",
            r["dtype"],
            "scattered" if r["scattered"] else "consecutive",
            *(f"{ms[name]:.1f}" for name in ("stock", "query", "chunk", "node", "pat")),
            f"{r['speedup_over_stock']:.2f}x",
            f"{r['target']}x" if r["target"] else "",
            f"{r['speedup_over_query']:.2f}x",
        )
    return table


def _planning_table(results: list[dict[str, Any]], key: str, title: str) -> Table:
    table = Table("stage", title=title)
    for r in results:
        table.add_column(f"{r['num_requests']} requests", justify="right")
    for name in results[0][key]:
        table.add_row(name, *(f"{r[key][name]:.1f}" for r in results))
    return table


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else "unknown"


if __name__ == "__main__":
    main()
