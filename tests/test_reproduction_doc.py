"""``docs/reproduction.md`` says what its result file says."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.reproduction import chunk_table, pat_table
from sglang_prefix.bench.results import read_result

ROOT = Path(__file__).parents[1]


def test_the_tables_are_those_of_the_file() -> None:
    text = (ROOT / "docs" / "reproduction.md").read_text()
    (name,) = set(re.findall(r"docs/results/cpu/[\w-]+-kernel\.json", text))
    data = read_result(ROOT / name, "bench-kernel")
    assert pat_table(data, "32:8") in text
    assert chunk_table(data) in text
    assert f"commit {data['environment']['commit']}," in text
    assert data["environment"]["cpu"] in text
