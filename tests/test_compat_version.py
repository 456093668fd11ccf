"""``make compat VERSION=…``: one line for a version that is missing or out of range."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or not (ROOT / "Makefile").exists(), reason="needs make"
)


def check(version: str) -> subprocess.CompletedProcess[str]:
    # `make test` hands its own flags down.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", "-s", "compat-version", f"VERSION={version}", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("version", ["0.5.17", "0.5.18.post1", "0.5.23", "0.5.30"])
def test_a_release_of_the_range_passes(version: str) -> None:
    found = check(version)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("", "VERSION is missing"),
        ("0.5.16", "VERSION=0.5.16 is out of range"),
        ("0.6.0", "VERSION=0.6.0 is out of range"),
        ("0.6", "VERSION=0.6 is out of range"),
        ("main", "VERSION=main is not a release"),
        ("==0.5.17", "VERSION===0.5.17 is not a release"),
    ],
)
def test_anything_else_is_refused_with_the_range(version: str, problem: str) -> None:
    found = check(version)
    assert found.returncode != 0
    line, *make = found.stderr.splitlines()
    assert line.startswith(f"make compat: {problem}; legal: a release >=0.5.17,<0.6")
    assert all(text.startswith("make: ") for text in make)
