"""What Nsight Compute (`ncu`) counts of the kernels of one layer.

As a program: ``python -m sglang_prefix.bench.gpu.counters FILE [--dry]``.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sglang_prefix.bench.child import cause_in
from sglang_prefix.files import read_text, write_file

__all__ = ["count", "parse"]

_SECTIONS = ("SpeedOfLight", "SchedulerStats", "WarpStateStats")
_MORE_SECTIONS = ("ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis")
# Launches of both modes: every counter takes some replays of each.
_LAUNCHES = 8
# Of the hundreds of counters in these sections: time, memory, issue, tensor pipes, stalls.
_KEPT = re.compile(
    r"gpu__time_duration\.sum|dram__bytes_read\.sum|dram_throughput\.avg\.pct|"
    r"issue_active\.avg|inst_issued\.avg\.pct|pipe_tensor.*active\.avg\.pct"
)
_STALL, _MOST_STALLS = re.compile(r"issue_stalled.*\.ratio"), 3


def count(file: Path, *, dry: bool) -> dict[str, float | str]:
    """Run a layer under ncu; counters by launch, kernel and name.

    Where ncu is not installed, "ncu" says so. The clocks are left as they are.

    Args:
        file: where the layer may write what it finds.
        dry: a tiny layer.

    Raises:
        RuntimeError: ncu failed; its own last words.
    """
    toolkit = "/usr/local/cuda/bin/ncu"
    ncu = shutil.which("ncu") or (toolkit if Path(toolkit).exists() else None)
    if ncu is None:
        return {"ncu": "not installed"}
    log = file.with_suffix(".csv")
    sections = [word for name in (*_SECTIONS, *_MORE_SECTIONS) for word in ("--section", name)]
    options = ["--csv", "--page", "raw", "--clock-control", "none", "--log-file", str(log)]
    which = ["--kernel-name", "regex:pack_forward|merge", "--launch-count", str(_LAUNCHES)]
    program = [sys.executable, "-m", "sglang_prefix.bench.gpu.layer", str(file)]
    command = [ncu, *options, *sections, *which, *program, *(["--dry"] if dry else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = read_text(log) if log.exists() else ""
    found = parse(text)
    if done.returncode or not found:
        raise RuntimeError(f"ncu: {cause_in(text or done.stdout + done.stderr)}")
    return dict(found)


def parse(text: str) -> dict[str, float]:
    """Counters in the CSV of ncu's raw page, whose second row has the units.

    Of the reasons for which warps wait, the most frequent of each launch.
    """
    rows = csv.DictReader(line for line in text.splitlines() if line.startswith('"'))
    found: dict[str, float] = {}
    for row in rows:
        launch = f"{row.get('ID') or ''} {row.get('Kernel Name') or ''}"
        plain = {name: (value or "").replace(",", "") for name, value in row.items() if name}
        numbers = {n: float(v) for n, v in plain.items() if re.fullmatch(r"-?\d+(\.\d+)?", v)}
        stalls = sorted(filter(_STALL.search, numbers), key=numbers.__getitem__, reverse=True)
        kept = [*filter(_KEPT.search, numbers), *stalls[:_MOST_STALLS]]
        found |= {f"{launch} {name}": numbers[name] for name in kept}
    return found


def main() -> None:
    """Write the counters to the file that is named."""
    file = Path(sys.argv[1])
    write_file(file, json.dumps(count(file, dry="--dry" in sys.argv)))


if __name__ == "__main__":
    main()
