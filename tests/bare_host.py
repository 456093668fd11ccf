"""Python as on a GPU host, where nothing of ours is installed and much of the rest is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["run_bare"]

_ROOT = Path(__file__).parents[1]
_BARE = """
import sys
ABSENT = {"pydantic", "pydantic_core", "sglang", "matplotlib", "psutil", "transformers"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT | {"pytest_timeout", "xdist"}:
            raise ImportError(f"{name} is not on a GPU host")
sys.meta_path.insert(0, Absent())
"""


def run_bare(script: str, *arguments: str | Path) -> tuple[int, str]:
    """Run a script without what such a host lacks; its exit status, and what it printed."""
    path = os.pathsep.join(str(_ROOT / folder) for folder in (".", "kernels", "patches"))
    done = subprocess.run(
        [sys.executable, "-c", _BARE + script, *arguments],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr
