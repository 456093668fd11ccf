"""What a run of `bench gpu` changes: tiles, what the gate knows of the device, two pages."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefix_kernels.tiles import TABLE, load_tuned_tiles
from sglang_prefix.bench.comparison import fastest, our_provider, over, provider_of
from sglang_prefix.bench.gpu.run import GpuRun, wrong_results
from sglang_prefix.bench.results import read_result, write_checked
from sglang_prefix.bench.tables import number_text, ratio_text
from sglang_prefix.bench.tune import new_table
from sglang_prefix.files import read_json, read_text, write_file
from sglang_prefix.gate import LIMITS_FILE, load_limits

__all__ = ["PAGES", "ROOT", "measured_block", "use_results"]

Data = Mapping[str, Any]

ROOT = Path(__file__).parents[3]
# Beside "correct", which must be done and whole.
_CHECKS = ("correct-more", "sanitizers")
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
        What was written, and which checks are not whole, for a reader.

    Raises:
        ValueError: the folder holds no whole run; nothing was measured in it, and ``root`` is this
            checkout; its kernels were wrong, or not all of "correct" was run; or a file of the
            checkout cannot take its part. Nothing is written then.
        OSError: a file cannot be written.
    """
    run = read_result(folder / GpuRun.file_name, GpuRun.kind)
    if run["dry"] and root.resolve() == ROOT:
        raise ValueError(f"{folder} is a dry run's: name another --into than {ROOT}")
    cases = {case["name"]: case for case in run["cases"]}
    said = _check_proven(folder, cases)
    files = _result_files(folder, cases)
    results = {parts: read_result(file) for parts, file in files.items()}
    limits, peers, tune = (
        results.get(parts)
        for parts in (("limits", "kernel"), ("peers", "kernel"), ("tiles", "tune"))
    )
    gpu = run["environment"].get("gpu") or "no GPU"
    texts: dict[Path, tuple[str, str]] = {}
    place = root / "docs" / "results" / re.sub(r"\W+", "-", gpu.lower())
    stem = f"{run['created'][:10]}-{run['environment'].get('commit') or 'unknown'}"
    copies = {parts: place / f"{stem}-{'-'.join(parts)}.json" for parts in files}
    sources = {parts: str(copy.relative_to(root)) for parts, copy in copies.items()}
    if tune and tune["cases"]:
        table, file = root / TABLE.relative_to(ROOT), files["tiles", "tune"]
        texts[table] = new_table(file, tune, sources["tiles", "tune"], table)
        _check_table(table, texts[table][0], load_tuned_tiles)
    if limits:
        table = root / LIMITS_FILE.relative_to(ROOT)
        text = _new_limits(gpu, limits, sources["limits", "kernel"], table)
        texts[table] = text, f"{table}: limits of {gpu}"
        _check_table(table, text, load_limits)
    for name, groups in PAGES.items():
        if peers:
            page = root / name
            text = _replaced(page, measured_block(peers, sources["peers", "kernel"], groups))
            texts[page] = text, f"{page}: its block"
    # Nothing is written before this line.
    place.mkdir(parents=True, exist_ok=True)
    for parts, file in files.items():
        shutil.copyfile(file, copies[parts])
    for target, (text, _) in texts.items():
        write_file(target, text)
    return [*said, f"{place}: {len(copies)} files", *(line for _, line in texts.values())]


def _check_proven(folder: Path, cases: Mapping[str, Data]) -> list[str]:
    """Refuse a run whose kernels are wrong; a line for each further check that is not whole."""
    correct = cases.get("correct")
    if correct is None or correct["status"] != "done":
        raise ValueError(f"{folder}: the step 'correct' is not done, so nothing is proven")
    if left := correct["says"].get("not run"):
        raise ValueError(f"{folder}: the step 'correct' left out {left} checks; legal: none")
    lines = []
    for name in _CHECKS:
        if name not in cases:
            lines.append(f"not proven: {name} was not run")
            continue
        case = cases[name]
        for what, why in wrong_results(case).items():
            raise ValueError(f"{folder}: the step {name!r} found what is wrong: {what}: {why}")
        says = case["says"]
        if case["status"] != "done" or any(says[key] for key in says if key.endswith("not run")):
            facts = ", ".join(f"{key} {value}" for key, value in says.items())
            lines.append(f"not proven: {name} {case['status']}: {facts or 'no results'}")
    return lines


def _result_files(folder: Path, steps: Mapping[str, Data]) -> dict[tuple[str, ...], Path]:
    """The run's own, and those of its steps; an older run may have left others."""
    files = [folder / GpuRun.file_name]
    files += [file for step in steps for file in sorted(folder.glob(f"{step}/*.json"))]
    # Facts of steps are in gpu.json as well.
    found = (file for file in files if file.stem != "facts")
    return {file.relative_to(folder).with_suffix("").parts: file for file in found}


def _check_table(table: Path, text: str, load: Callable[[Path], object]) -> None:
    """Check what a table is to become, elsewhere."""
    with tempfile.TemporaryDirectory() as scratch:
        write_checked(Path(scratch, table.name), text, load)


def _new_limits(gpu: str, data: Data, source: str, table: Path) -> str:
    """The table that the gate reads, with another entry for a device."""
    if table.exists():
        load_limits(table)
    content = read_json(table) if table.exists() else {}
    rate = "flop_per_s" if data["dry"] else "flop_per_s_bfloat16"
    columns = {"read_bytes_per_s": "read_bytes_per_s", "flop_per_s": rate}
    columns["launch_us"] = "empty_launch_us"
    found = data.get("limits") or {}
    row = {name: found.get(measured) for name, measured in columns.items()}
    content[gpu] = {**row, "result_file": source}
    return json.dumps(content, indent=1) + "\n"


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
