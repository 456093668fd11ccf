"""`examples/compare.sh`, run for real on one small batch, but for the servers it would start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_prefix.bench.results import read_result

ROOT = Path(__file__).parents[1]
TREE = "1,4_64,16"
CASE = f"tree/{TREE}/4:2:16"
# `bench kernel` measures one case, whose plots the report draws; tests/engine/test_bench_serving.py
# runs the servers.
STAND_IN = f"""#!/usr/bin/env bash
echo "$@" >> calls
case "$1 $2" in
    "bench serving") exit ;;
    "bench kernel") set -- "$@" --tree {TREE} --heads 4:2:16 --rounds 2 --threads 1 --no-plots ;;
esac
exec {sys.executable} -m sglang_prefix.cli.main "$@"
"""


def compare(folder: Path) -> subprocess.CompletedProcess[str]:
    command = folder / "bin" / "sglang-prefix"
    command.parent.mkdir()
    command.write_text(STAND_IN)
    command.chmod(0o755)
    return subprocess.run(
        ["bash", ROOT / "examples" / "compare.sh", "results", "--model-path", "tiny"],
        cwd=folder,
        env=os.environ | {"PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_comparison_ends_with_a_page_of_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="compare.sh draws plots: the extra `bench`")
    done = compare(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == [
        "bench kernel --out results --quick",
        "bench serving --out results --quick --model-path tiny",
        "report results --out results/report.html",
    ]
    data = read_result(tmp_path / "results" / "kernel.json", "bench-kernel")
    assert [case["name"] for case in data["cases"]] == [CASE]
    (case,) = data["cases"]
    assert {"torch/pat", "torch/query"} <= set(case["providers"])
    assert any(other["kind"] == "stock" for other in case["providers"].values())
    page = (tmp_path / "results" / "report.html").read_text()
    assert CASE in page
    assert "data:image/svg+xml" in page
    for provider in case["providers"]:
        assert provider in page
    assert done.stdout.splitlines()[-1] == "open results/report.html"
