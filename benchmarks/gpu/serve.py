"""Served models on a GPU: ``make gpu-serve``, or ``python -m benchmarks.gpu.serve``.

Real SGLang engines with a model of Llama-3.1-8B's shape and random weights, ours against the stock
backends: time per output token at full batch, log probabilities, size of the KV pool, and a guard
against waiting for the device. Needs a host where SGLang can be imported; this package need not be
installed. Cells run best first until the time budget is used up; the file is written after each,
and ``--resume FILE`` completes it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.report import NOT_RUN, CellRun, arguments, print_table
from benchmarks.gpu.serve_cells import OURS, Cell, cells, dry_cells
from benchmarks.gpu.serve_engine import DRY_STOCK, Engines
from benchmarks.gpu.serve_measure import measure_cell
from benchmarks.gpu.serve_model import LLAMA_8B, TINY, write_model, write_plugin
from benchmarks.gpu.serve_targets import by_load, evaluate
from sglang_prefix.bench.baselines import FlashInferDecode, SglangTriton, import_reason

# The one that is expected to be the fastest first.
_STOCK = ("fa3", "flashinfer", "triton")
# Of one engine or of two side by side, until one has started: imports, weights, graphs.
_START_SECONDS = 100
_MODEL_SECONDS = 60
# What is running when the budget is used up may take so much longer.
_GRACE_SECONDS = 35


def main() -> int:
    """Measure cells, print tables and targets, write the file."""
    began = time.monotonic()
    # `timeout` and others send it: the engines are to end with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="folder for the model, 15 GB; default: one in the temporary one"
    )
    parser.add_argument(
        "--long-output", type=int, default=8192, help="tokens of the long rollouts; default: 8192"
    )
    options = parser.parse_args()
    if options.list:
        print("\n".join(cell.name for cell in _cells(options, list(_STOCK))))
        return 0
    device = _device(options)
    absent = {} if options.dry else {n: r for n in _STOCK if (r := _unavailable(n, device))}
    if len(absent) == len(_STOCK):
        raise SystemExit(f"no backend of SGLang can be imported here: {absent}")
    chosen = _cells(options, [name for name in _STOCK if name not in absent])
    run = CellRun("gpu-serve", [cell.name for cell in chosen], options, device)
    stock = chosen[0].backends[1]
    shape = TINY if options.dry else LLAMA_8B
    run.this_run()["absent"] = absent
    for name, reason in absent.items():
        print(f"  {name} is absent: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="sglang-prefix-serve-"))
    model = options.model or Path(tempfile.gettempdir()) / f"sglang-prefix-model-{os.getuid()}"
    model = folder / "model" if options.dry and not options.model else model
    write_plugin(folder / "plugin")
    engines = Engines(
        model,
        shape,
        stock,
        folder,
        run.seed,
        dry=options.dry,
        deadline=began + options.budget_s + _GRACE_SECONDS,
    )

    def measure(cell: Cell) -> Callable[[], dict[str, Any]]:
        def one() -> dict[str, Any]:
            written = write_model(model, shape, device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            return measure_cell(cell, engines) | {"model_written": written}

        return one

    by_name = {cell.name: cell for cell in chosen}

    def expected(name: str) -> float:
        cell = by_name[name]
        if options.dry:
            return 0
        start = 0 if engines.running(cell.group) else _start_seconds(run)
        return cell.seconds + start + (0 if model.exists() else _MODEL_SECONDS)

    def judge() -> None:
        run.report["targets"] = evaluate(run.cells)

    try:
        run.run({cell.name: measure(cell) for cell in chosen}, judge, expected=expected)
    finally:
        engines.stop()
        if all(cell["status"] in ("done", "passed", "n/a") for cell in run.cells.values()):
            shutil.rmtree(folder)  # else its logs are wanted
    _print_loads(run)
    _print_targets(run)
    return run.finish()


def _start_seconds(run: CellRun) -> float:
    """As long as the slowest start so far took."""
    found = [
        engine["started_s"]
        for cell in run.cells.values()
        for engine in cell.get("engines", {}).values()
    ]
    return max(found, default=_START_SECONDS)


def _cells(options: argparse.Namespace, stock: list[str]) -> list[Cell]:
    return dry_cells([DRY_STOCK]) if options.dry else cells(stock, options.long_output)


def _device(options: argparse.Namespace) -> torch.device:
    if options.dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here; legal without one: --dry")
    return torch.device("cuda", torch.cuda.current_device())


def _unavailable(name: str, device: torch.device) -> str | None:
    """Why a stock backend cannot be used on this host; None if it can."""
    if name == "fa3":
        if torch.cuda.get_device_capability(device)[0] not in (8, 9):
            return "needs compute capability 8.x or 9.x"
        return import_reason("sgl_kernel.flash_attn", "sgl_kernel.flash_ops")
    return {"flashinfer": FlashInferDecode, "triton": SglangTriton}[name].unavailable(device)


def _print_loads(run: CellRun) -> None:
    title = "DRY RUN, no measurement: " if run.report["dry"] else ""
    print(f"\n{title}us per output token at full batch; ratio is ours / best stock")
    rows = []
    for name, row in by_load(run.cells).items():
        stock = {n: m["tpot_us"] for n, m in row.items() if n != OURS}
        best = min(stock, key=stock.__getitem__, default="")
        ours = row.get(OURS)
        both = ours is not None and bool(stock)
        rows.append(
            [
                name,
                f"{ours['tpot_us']:.0f}" if ours else "-",
                f"{ours['median_step_us']:.0f}" if ours else "-",
                f"{stock[best]:.0f} {best}" if stock else "-",
                f"{row[best]['median_step_us']:.0f}" if stock else "-",
                f"{ours['tpot_us'] / stock[best]:.3f}x" if ours and both else "-",
                f"{ours['packed_share']:.0%}" if ours else "-",
                f"{ours['counters'].get('kv_read_ratio') or 1:.3f}" if ours else "-",
                ", ".join(f"{n} {tpot:.0f}" for n, tpot in stock.items() if n != best) or "-",
            ]
        )
    columns = ("load", "ours", "median", "best stock", "median", "ratio", "packed", "kv read")
    print_table((*columns, "other stock"), rows)
    for name, row in by_load(run.cells).items():
        if OURS in row and not row[OURS]["packed"]:
            print(f"{name} did not pack: {row[OURS]['not_packed_because']}")


def _print_targets(run: CellRun) -> None:
    print()
    dry = " (dry run: means nothing)" if run.report["dry"] else ""
    for name, target in run.report["targets"].items():
        value = "" if target["value"] is None else f"{target['value']:.3f}; "
        print(f"target {name}: {target['status']}{dry}; {value}{target['meaning']}")
    if any(cell["status"] == NOT_RUN for cell in run.cells.values()):
        print("some cells were not run: --resume completes the file")


if __name__ == "__main__":
    raise SystemExit(main())
