"""What sections of result files of the bench commands have in common."""

from __future__ import annotations

import shlex
from datetime import datetime
from typing import Any

from sglang_prefix.bench.report.model import by_reason

__all__ = ["bench_facts", "bench_warnings", "moment", "versions"]


def bench_facts(data: Any) -> dict[str, str]:
    """Environment of a run of `sglang-prefix bench`, in the order of a reader's questions."""
    found = data["environment"]
    threads = found.get("threads")
    cpu = found.get("cpu")
    facts = {
        "device": found["device"],
        "GPU": found.get("gpu"),
        "CPU": f"{cpu}, threads: {threads}" if cpu and threads else cpu,
        "model": data.get("model"),
        "model dtype": data.get("dtype"),
        "versions": versions(found.get("versions", {})),
        "Python": found.get("python"),
        "commit": found.get("commit"),
        "measured": moment(data["created"]),
        "seed": data.get("seed"),
        "command": shlex.join(data.get("command") or []),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def bench_warnings(data: Any) -> list[str]:
    """What stands above the numbers: a shortened run, what is not here, cells left."""
    absent, left = data.get("absent", {}), data.get("not_run", [])
    warnings = []
    if data.get("quick"):
        warnings.append("Quick run: few workloads and few repetitions.")
    if absent:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        # Of a serving run these are its loads: it has one baseline, the stock server.
        what = "Workloads not run" if data["kind"] == "bench-serving" else "Absent baselines"
        warnings.append(f"{what}: {reasons}.")
    if left:
        reasons = data.get("why_not_run", {})
        said = [n for n in left if n not in reasons]
        said += by_reason({n: reasons[n] for n in left if n in reasons})
        warnings.append(f"Not run: {', '.join(said)}.")
    return warnings


def moment(time: str) -> str:
    """An ISO time for readers, to the minute; anything else as it is."""
    try:
        found = datetime.fromisoformat(time)
    except ValueError:
        return time
    return f"{found:%Y-%m-%d %H:%M %Z}".strip() if "T" in time else time


def versions(found: dict[str, str | None]) -> str:
    """Packages with their versions; one that is not installed says so."""
    return ", ".join(f"{name} {version or 'not installed'}" for name, version in found.items())
