"""The demo, as a user runs it: real engines, a control, and the JSON that others read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KEYS = {
    "device",
    "backend",
    "num_requests",
    "tokens_equal_stock",
    "kv_read_ratio",
    "num_packs",
    "packed_steps",
    "fallback_steps",
    "decode_speedup",
}


@pytest.mark.engine
def test_the_demo_compares_and_tells(tmp_path: Path) -> None:
    target = tmp_path / "demo.json"
    command = [sys.executable, "-m", "sglang_prefix.cli.main", "demo", "--rounds", "1"]
    run = subprocess.run(
        [*command, "--json", str(target)], capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(target.read_text())
    assert report.keys() >= KEYS
    assert report["tokens_equal_stock"] is True
    assert report["num_requests"] >= 16
    assert min(report["prompt_tokens"]) > 1500
    assert report["packed_steps"] > 30
    assert report["fallback_steps"] == 0
    assert report["num_packs"] > report["num_requests"]
    assert report["kv_read_ratio"] < 0.25
    assert report["control_num_requests_changed"] >= report["num_requests"] / 2
    assert report["decode_speedup"] > 0
    assert "tokens equal to stock" in run.stdout
