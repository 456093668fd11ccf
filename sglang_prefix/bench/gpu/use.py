"""What a run of `bench gpu` changes: tiles, what the gate knows of the device, two pages."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefix_kernels.tiles import TABLE
from sglang_prefix.bench.comparison import fastest, our_provider, over, provider_of
from sglang_prefix.bench.gpu.run import GpuRun
from sglang_prefix.bench.results import read_result, write_checked
from sglang_prefix.bench.tables import number_text, ratio_text
from sglang_prefix.bench.tune import write_table
from sglang_prefix.files import read_json, read_text, write_file
from sglang_prefix.gate import LIMITS_FILE, load_limits

__all__ = ["PAGES", "ROOT", "measured_block", "use_results"]

Data = Mapping[str, Any]

ROOT = Path(__file__).parents[3]
# Pages with a block between these marks, and which groups of cases it has; None for all.
PAGES: dict[str, tuple[str, ...] | None] = {
    "docs/performance.md": None,
    "docs/reproduction.md": ("trees", "unrelated", "chunk"),
}
_BEGIN, _END = "<!-- written by `bench gpu --use`: begin -->\n", "<!-- end -->"
_COLUMNS = ("batch", "heads", "limit us", "stock", "stock us", "peer", "peer us", "ours", "ours us")
_RATIOS = ("over stock", "over peer", "of read bandwidth")


def use_results(folder: Path, root: Path = ROOT) -> list[str]:
    """Take the results of a run into a checkout, which its author then commits.

    Args:
        folder: of the run.
        root: of the checkout.

    Returns:
        What was written, for a reader.

    Raises:
        ValueError: the folder holds no whole run; nothing was measured in it, and ``root`` is this
            checkout; its kernels were wrong; or a file of the checkout cannot take its part.
        OSError: a file cannot be written.
    """
    run = read_result(folder / GpuRun.file_name, GpuRun.kind)
    if run["dry"] and root.resolve() == ROOT:
        raise ValueError(f"{folder} is a dry run's: name another --into than {ROOT}")
    status = {case["name"]: case["status"] for case in run["cases"]}
    if status.get("correct") != "done":
        raise ValueError(f"{folder}: the step 'correct' is not done, so nothing is proven")
    kernel = {s: _read(folder / s / "kernel.json") for s in ("limits", "peers")}
    gpu = run["environment"].get("gpu") or "no GPU"
    pages = {}
    place = root / "docs" / "results" / re.sub(r"\W+", "-", gpu.lower())
    stem = f"{run['created'][:10]}-{run['environment'].get('commit') or 'unknown'}"
    for name, groups in PAGES.items():
        if kernel["peers"] is not None:
            source = (place / f"{stem}-peers-kernel.json").relative_to(root)
            text = measured_block(kernel["peers"], str(source), groups)
            pages[root / name] = _replaced(root / name, text)
    # Nothing is written before this line.
    place.mkdir(parents=True, exist_ok=True)
    said, copies = [], {}
    # Facts of steps are in gpu.json as well.
    files = [file for pattern in ("*.json", "*/*.json") for file in sorted(folder.glob(pattern))]
    for file in (file for file in files if file.stem != "facts"):
        parts = file.relative_to(folder).with_suffix("").parts
        copies[parts] = shutil.copyfile(file, place / f"{stem}-{'-'.join(parts)}.json")
    said.append(f"{place}: {len(copies)} files")
    if ("tiles", "tune") in copies:
        said.append(write_table(copies["tiles", "tune"], root / TABLE.relative_to(ROOT)))
    if kernel["limits"] is not None:
        target = root / LIMITS_FILE.relative_to(ROOT)
        _write_limits(gpu, kernel["limits"], copies["limits", "kernel"].relative_to(root), target)
        said.append(f"{target}: limits of {gpu}")
    for page, text in pages.items():
        write_file(page, text)
        said.append(f"{page}: its block")
    return said


def _read(file: Path) -> dict[str, Any] | None:
    """A result; None if the step left none."""
    return read_result(file, "bench-kernel") if file.exists() else None


def _write_limits(gpu: str, data: Data, source: Path, table: Path) -> None:
    """Set a device's entry in the table that the gate reads."""
    found = data["limits"]
    content = read_json(table) if table.exists() else {}
    content[gpu] = {
        "read_bytes_per_s": found["read_bytes_per_s"],
        "flop_per_s": found["flop_per_s_bfloat16" if not data["dry"] else "flop_per_s"],
        "launch_us": found["empty_launch_us"],
        "result_file": str(source),
    }
    write_checked(table, json.dumps(content, indent=1) + "\n", load_limits)


def _replaced(page: Path, block: str) -> str:
    """The page with another block."""
    before, begin, rest = read_text(page).partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise ValueError(f"{page} has no block for results; legal: {_BEGIN.strip()} and {_END}")
    return f"{before}{begin}{block}{end}{after}"


def measured_block(data: Data, source: str, groups: tuple[str, ...] | None) -> str:
    """Markdown of a result of `bench kernel`: where it comes from, and a row per case.

    Args:
        data: the result.
        source: its file, from the root of the checkout.
        groups: of the cases that are shown; None for all.
    """
    here, ours = data["environment"], our_provider(data)
    versions = [f"{name} {found}" for name, found in here["versions"].items() if found]
    clocks = here.get("clocks") or {}
    facts = [str(here.get("gpu")), f"driver {clocks.get('driver_version', 'unknown')}", *versions]
    limits = data.get("limits") or {}
    reads, launch = limits.get("read_bytes_per_s", 0) / 1e12, limits.get("empty_launch_us", 0)
    lines = [
        f"[`{source}`](../{source}): {', '.join(facts)}, commit {here.get('commit')}.",
        f"Reads reach {reads:.2f} TB/s, an empty launch takes {number_text(launch)} us. Times are "
        "of a layer; `over stock` is",
        "of whole steps, plans and copies included. A ratio below 1 is a loss.",
        "",
        f"| {' | '.join((*_COLUMNS, *_RATIOS))} |",
        f"|{' --- |' * (len(_COLUMNS) + len(_RATIOS))}",
    ]
    cases = [case for case in data["cases"] if groups is None or case["group"] in groups]
    lines += [f"| {' | '.join(_row(case, ours))} |" for case in cases]
    return "\n".join(lines) + "\n"


def _row(case: Data, ours: str | None) -> list[str]:
    mine, heads = provider_of(case, ours), case["heads"]
    cells = [case.get("tree") or case["name"], f"{heads['qo']}:{heads['kv']}:{heads['dim']}"]
    floor = (case.get("floor") or {}).get("us")
    cells.append(number_text(floor) if floor else "")
    for name in (fastest(case, "stock", "kernel_us"), fastest(case, "peer", "kernel_us"), ours):
        us = provider_of(case, name).get("kernel_us")
        cells += [str(name), number_text(us)] if us else ["not measured", ""]
    for ratio in (over(case, ours, "stock"), over(case, ours, "peer", "kernel_us")):
        cells.append(ratio_text(ratio) if ratio else "")
    rate, us = case.get("bandwidth_gb_s"), mine.get("kernel_us")
    cells.append(f"{mine['bytes_read'] / us / 1e3 / rate:.0%}" if us and rate else "")
    return cells
