"""`make compat VERSION=…`: one line for a version that is missing or out of range."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEGAL = "legal: a release >=0.5.17,<0.6"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("0.5.17", ""),
        ("0.5.18.post1", ""),
        ("0.5.23", ""),
        ("0.5.30", ""),
        ("", "VERSION is missing"),
        ("0.5.16", "VERSION=0.5.16 is out of range"),
        ("0.6.0", "VERSION=0.6.0 is out of range"),
        ("0.6", "VERSION=0.6 is out of range"),
        ("main", "VERSION=main is not a release"),
        ("==0.5.17", "VERSION===0.5.17 is not a release"),
    ],
)
def test_the_version_is_a_release_of_the_range(version: str, problem: str) -> None:
    found = subprocess.run(
        ["make", "-s", "compat-version", f"VERSION={version}", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        # `make test` hands its own flags down.
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
    )
    lines = [line for line in found.stderr.splitlines() if not line.startswith("make: ")]
    assert (found.returncode != 0, len(lines), found.stdout) == (bool(problem), bool(problem), "")
    assert "".join(lines).startswith(f"make compat: {problem}; {LEGAL}" if problem else "")


def test_requirements_are_those_of_sglang_and_ours() -> None:
    command: list[str | Path] = [sys.executable, ROOT / ".ci" / "compat.py", "requirements"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    names = {line.partition(" ")[0] for line in printed}
    assert {"hypothesis", "typer", "transformers"} <= {n.partition("==")[0] for n in names}
    assert "cuda-tile" in printed or not any(name.startswith("cuda-tile") for name in names)
    assert not any(line.startswith("sglang>") for line in printed)
