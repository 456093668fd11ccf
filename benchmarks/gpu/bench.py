"""GPU benchmarks: ``make gpu-bench``, or ``python -m benchmarks.gpu.bench``.

Needs torch, triton and numpy; other projects' kernels are measured beside ours where they can be
imported. Cells run in a fixed order until the time budget is used up; the file is written after
each, and ``--resume FILE`` completes it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.chain import measure_chain
from benchmarks.gpu.fasttree import FastTree
from benchmarks.gpu.measure import measure_cell
from benchmarks.gpu.report import NOT_RUN, CellRun, arguments, device_of, print_table
from benchmarks.gpu.targets import evaluate
from benchmarks.gpu.timing import meter_for
from benchmarks.gpu.workloads import Cell, cells, dry_cells
from sglang_prefix.bench.baselines import (
    Baseline,
    FlashAttention3,
    FlashInferCascade,
    FlashInferDecode,
    SglangTriton,
)

BASELINES: tuple[type[Baseline], ...] = (
    SglangTriton,
    FlashInferDecode,
    FlashInferCascade,
    FlashAttention3,
    FastTree,
)


def main() -> int:
    """Measure cells, print the table and the targets, write the file."""
    options = arguments(__doc__.splitlines()[0]).parse_args()
    chosen = dry_cells() if options.dry else cells()
    if options.list:
        print("\n".join(cell.name for cell in chosen))
        return 0
    device = device_of(options)
    run = CellRun("gpu-bench", [cell.name for cell in chosen], options, device)
    missing = {baseline: baseline.unavailable(device) for baseline in BASELINES}
    run.this_run()["baselines"] = {b.name: reason or "available" for b, reason in missing.items()}
    for name, reason in run.this_run()["baselines"].items():
        print(f"  {name}: {reason}")
    meter = meter_for(device)
    limits = meter.limits()
    run.this_run()["limits"] = limits
    print(
        f"  reads {limits['read_bytes_per_s'] / 1e12:.2f} TB/s, bf16 "
        f"{limits['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s, empty launch "
        f"{limits['empty_launch_us']:.2f} us"
    )

    def measure(cell: Cell) -> Callable[[], dict[str, Any]]:
        def one() -> dict[str, Any]:
            if device.type == "cuda":  # the cell before may have held most of the memory
                gc.collect()
                torch.cuda.empty_cache()
            if cell.is_chain:
                return measure_chain(cell, device, meter, run.seed)
            return measure_cell(cell, device, meter, limits, run.seed, missing)

        return one

    def judge() -> None:
        run.report["targets"] = evaluate(run.cells)

    run.run({cell.name: measure(cell) for cell in chosen}, judge)
    _print_cells(run)
    _print_chain(run)
    _print_targets(run)
    return run.finish()


def _print_cells(run: CellRun) -> None:
    way = run.report["targets"]["ours"]
    title = "DRY RUN, no measurement: " if run.report["dry"] else ""
    print(f"\n{title}us per layer; ours is {way}; best of ours, of stock; ratios are theirs / ours")
    rows = []
    for name, cell in run.cells.items():
        if "candidates" not in cell:
            continue
        done = {n: c for n, c in cell["candidates"].items() if c["status"] == "done"}
        kinds = {
            kind: {n: c for n, c in done.items() if c["kind"] == kind} for kind in ("ours", "stock")
        }
        best = min(kinds["ours"], key=lambda n: kinds["ours"][n]["kernel_us"], default="")
        stock = min(kinds["stock"], key=lambda n: kinds["stock"][n]["kernel_us"], default="")
        row = [
            name,
            f"{cell['shape']['kv_bytes_unique'] / 2**20:.0f}",
            f"{cell['floor']['us']:.1f}",
        ]
        if way in done:
            ours = done[way]
            row += [f"{ours[key]:.1f}" for key in ("kernel_us", "total_us")]
            row += [f"{ours['over_floor']:.2f}", best]
        else:
            row += ["-", "-", "-", best]
        row += [f"{done[stock]['kernel_us']:.1f} {stock}" if stock else "-"]
        for other, key in (
            (stock, "kernel_us"),
            ("flashinfer-cascade", "kernel_us"),
            ("fasttree", "kernel_us"),
            (stock, "total_us"),
        ):
            both = way in done and other in done
            row.append(f"{done[other][key] / done[way][key]:.2f}x" if both else "-")
        rows.append(row)
    columns = ("cell", "MiB", "floor", "ours", "+plan", "/floor", "best of ours", "stock")
    print_table((*columns, "stock/", "cascade/", "fasttree/", "stock/ +plan"), rows)


def _print_chain(run: CellRun) -> None:
    for name, cell in run.cells.items():
        if "chains" not in cell:
            continue
        print(f"\n{name}: us per layer, by tile classes in use")
        ways: dict[str, dict[str, str]] = {}
        for chain, result in cell["chains"].items():
            way, used = chain.rsplit("/", 1)
            ways.setdefault(way, {})[used] = f"{result['us_per_layer']:.2f}"
        used = list(next(iter(ways.values())))
        print_table(
            ("way", *used), [[way, *(times[u] for u in used)] for way, times in ways.items()]
        )


def _print_targets(run: CellRun) -> None:
    print()
    for name, target in run.report["targets"].items():
        if isinstance(target, dict):
            value = "" if target["value"] is None else f"{target['value']:.2f}; "
            dry = " (dry run: means nothing)" if run.report["dry"] else ""
            print(f"target {name}: {target['status']}{dry}; {value}{target['meaning']}")
    if any(cell["status"] == NOT_RUN for cell in run.cells.values()):
        print("some cells were not run: --resume completes the file")


if __name__ == "__main__":
    raise SystemExit(main())
