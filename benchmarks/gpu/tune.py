"""Measure the tiles: ``make gpu-tune``, or ``python -m benchmarks.gpu.tune``.

Times the forward kernel with every candidate tile on one pack shape per row class, after checking
each. Cells run until the time budget is used up, the file is written after each, and ``--resume
FILE`` completes it. ``--write-table FILE`` then takes what was faster into ``tuned_tiles.json``.
Needs torch, triton and numpy.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.inputs import MismatchError
from benchmarks.gpu.report import CellRun, arguments, device_of, print_table
from benchmarks.gpu.timing import Meter, meter_for
from benchmarks.gpu.tune_cells import TuneCell, TuneWork, cells, dry_cells
from prefix_kernels.tiles import ARCHS, TABLE, TileConfig, load_tuned_tiles
from prefix_kernels.triton_executor import why_not_triton

__all__ = ["write_table"]

ROOT = Path(__file__).parents[2]
_SECONDS_PER_CELL = 3.0
_ROUNDS = 100
# A choice must be worth its line: the medians of two runs differ by about as much.
_LEAST_GAIN = 1.02
# Compiling some 30 tiles takes longer than all else.
_FIRST_CELL_SECONDS = 150


def main() -> int:
    """Measure cells and print the table, or turn a result file into the entry of its device."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--write-table", type=Path, metavar="FILE", help="result file to take into --table"
    )
    parser.add_argument("--table", type=Path, default=TABLE, help="default: what is installed")
    options = parser.parse_args()
    if options.write_table:
        print(write_table(options.write_table, options.table))
        return 0
    chosen = dry_cells() if options.dry else cells()
    if options.list:
        print("\n".join(cell.name for cell in chosen))
        return 0
    device = device_of(options)
    run = CellRun("gpu-tune", [cell.name for cell in chosen], options, device)
    run.report |= _device_facts(device)
    meter = meter_for(device)
    run.this_run()["limits"] = meter.limits()

    def measure(cell: TuneCell) -> Callable[[], dict[str, Any]]:
        return lambda: _measure(cell, device, meter, run.seed)

    least = {} if options.dry else {chosen[0].name: _FIRST_CELL_SECONDS}
    run.run({cell.name: measure(cell) for cell in chosen}, least=least)
    _print_cells(run)
    return run.finish()


def write_table(result_file: Path, table: Path) -> str:
    """Make a result file the entry of its device: of each cell the fastest tile, if it is not the
    formula's or within 2% of it.

    Returns:
        What was written and what to do next, for a reader.

    Raises:
        SystemExit: the file is no result of gpu-tune, a dry run's, for which ``table`` must be
            another file, outside the repository, or of an architecture that cannot be audited.
    """
    report = json.loads(result_file.read_text())
    if report.get("kind") != "gpu-tune":
        raise SystemExit(f"{result_file} is of kind {report.get('kind')!r}; legal: 'gpu-tune'")
    if report["dry"] and table.resolve() == TABLE:
        raise SystemExit(f"{result_file} is a dry run's: name another --table than {TABLE}")
    path = result_file.resolve()
    if not report["dry"] and not path.is_relative_to(ROOT):
        raise SystemExit(f"{result_file} must stand in the repository, under {ROOT}")
    name, arch = report["device_name"], report["arch"]
    if arch not in ARCHS:
        raise SystemExit(f"{name} is {arch}, which has no audit; legal: {', '.join(ARCHS)}")
    content = json.loads(table.read_text()) if table.exists() else {}
    tiles = [tile for cell in report["cells"].values() if (tile := _faster_tile(cell))]
    content[name] = {
        "arch": arch,
        "result_file": str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path),
        "tiles": tiles,
    }
    new = table.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    load_tuned_tiles(new)
    new.replace(table)
    return (
        f"{table}: {len(tiles)} tiles for {name}. Next: sglang-prefix kernels --arch {arch}, which "
        "says whether all variants with them are free of spills; then commit both files"
    )


def _faster_tile(cell: dict[str, Any]) -> dict[str, int] | None:
    done = {n: c for n, c in cell.get("candidates", {}).items() if c["status"] == "done"}
    formula = done.get(cell.get("formula"))
    if formula is None:
        return None
    best = min(done.values(), key=lambda candidate: float(candidate["kernel_us"]))
    if formula["kernel_us"] <= _LEAST_GAIN * best["kernel_us"]:
        return None
    return {**cell["shape"], **best["tile"]}


def _device_facts(device: torch.device) -> dict[str, str]:
    """Name and architecture; a dry run stands for a device with wgmma."""
    if device.type != "cuda":
        return {"device_name": "cpu", "arch": "sm_90"}
    major, minor = torch.cuda.get_device_capability(device)
    return {"device_name": torch.cuda.get_device_name(device), "arch": f"sm_{major}{minor}"}


def _measure(cell: TuneCell, device: torch.device, meter: Meter, seed: int) -> dict[str, Any]:
    """Compile, check and time the tiles of a cell."""
    if cell.kv_dtype != "bf16" and device.type == "cuda":
        reason = why_not_triton(device, torch.bfloat16, torch.float8_e4m3fn)
        if reason:
            return {"status": "n/a", "reason": reason}
    if device.type == "cuda":  # the cell before may have held most of the memory
        gc.collect()
        torch.cuda.empty_cache()
    work = TuneWork(cell, device, seed, dry=meter.dry)
    results: dict[str, dict[str, Any]] = {}
    replays: dict[str, Callable[[], object]] = {}
    failed: list[str] = []
    for tile in (work.formula, *work.candidates):
        result: dict[str, Any] = {"tile": asdict(tile)}
        name = _name(tile)
        results[name] = result
        try:
            result["registers"], spills = work.compile(tile)
            if spills:
                result |= {"status": "n/a", "reason": f"spills, {spills} by the driver's count"}
                continue
            result["error"] = work.check(tile)
            replays[name] = meter.replayable(work.forward(tile))
        except MismatchError as mismatch:
            result |= {"status": "failed", "reason": str(mismatch)}
            failed.append(f"{name}: {mismatch}")
        except Exception as error:  # one tile too large for this device: the others are not
            meter.synchronize()  # raises again where the device itself is lost
            result |= {"status": "n/a", "reason": f"{type(error).__name__}: {error}"[:500]}
    rounds = meter.rounds_for(replays, _SECONDS_PER_CELL, _ROUNDS)
    for name, seconds in meter.interleaved(replays, rounds).items():
        results[name] |= {
            "status": "done",
            "kernel_us": median(seconds) * 1e6,
            "bytes_per_s": work.kv_bytes / median(seconds),
            "kernel_seconds": seconds,
        }
    shape = {
        key: getattr(work.shape, key)
        for key in ("head_dim", "v_head_dim", "q_itemsize", "kv_itemsize")
    }
    return {
        "status": "failed" if failed else "done",
        **({"reason": failed[0]} if failed else {}),
        "shape": shape,
        **work.facts,
        "formula": _name(work.formula),
        "candidates": results,
    }


def _name(tile: TileConfig) -> str:
    size = f"{tile.block_m}x{tile.block_n}"
    return f"{size}/{tile.num_warps} warps/{tile.num_stages} stages/{tile.max_registers} registers"


def _print_cells(run: CellRun) -> None:
    title = "DRY RUN, no measurement: " if run.report["dry"] else ""
    print(f"\n{title}forward kernel alone, TB/s of KV; the formula's tile and the fastest")
    rows = []
    for name, cell in run.cells.items():
        done = {n: c for n, c in cell.get("candidates", {}).items() if c["status"] == "done"}
        if cell.get("formula") not in done:
            continue
        formula = done[cell["formula"]]
        best = min(done, key=lambda n: float(done[n]["kernel_us"]))
        speeds = [f"{c['bytes_per_s'] / 1e12:.2f}" for c in (formula, done[best])]
        gain = f"{formula['kernel_us'] / done[best]['kernel_us']:.2f}x"
        rows.append([name, *speeds, gain, f"{len(done)}/{len(cell['candidates'])}", best])
    print_table(("cell", "formula", "best", "gain", "timed", "best tile"), rows)


if __name__ == "__main__":
    raise SystemExit(main())
