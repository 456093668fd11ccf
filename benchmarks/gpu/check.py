"""GPU checks: ``make gpu-check``, or ``python -m benchmarks.gpu.check``.

Every variant of the kernels against the float64 oracle, on inputs from a fresh seed; graphs
captured and replayed under other plans; compute-sanitizer on small shapes where it is installed.
Exits 1 if anything is wrong, naming the cell. Needs torch, triton and numpy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import sanitize
from benchmarks.gpu.check_graph import check_replays
from benchmarks.gpu.inputs import Inputs, MismatchError
from benchmarks.gpu.report import CellRun, arguments, device_of
from benchmarks.gpu.variants import ALL_WAYS, Variant, variants
from sglang_prefix.bench.packed_attention import PackedAttention
from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import TreeBatch

_TOOLS = ("memcheck", "racecheck")
_SANITIZER_SECONDS = 150
_RESERVED_TAIL_SLOTS = 16
_HEADLINE = 6  # variants before the graph checks


def main() -> int:
    """Run cells, write the file; 1 if one failed."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--control", action="store_true", help="lose a work item of every plan: all must fail"
    )
    options = parser.parse_args()
    dry, control = options.dry, options.control
    seeds: list[int] = []
    device = torch.device("cpu") if options.list else device_of(options)
    cells: dict[str, Callable[[], dict[str, Any]]] = {}

    def seed() -> int:
        return seeds[0]

    for variant in variants(dry=dry):
        cells[variant.name] = lambda v=variant: _check(v, device, seed(), dry, control)  # type: ignore[misc]
    graphs: dict[str, Callable[[], dict[str, Any]]] = {
        f"graph/{mode}/{merge}": lambda way=(mode, merge): {  # type: ignore[misc]
            "status": "passed",
            **check_replays(way, device, seed(), dry=dry, control=control),
        }
        for mode, merge in ALL_WAYS
    }
    tools: dict[str, Callable[[], dict[str, Any]]] = {
        f"sanitizer/{tool}": lambda t=tool: _sanitized(t, device, control)  # type: ignore[misc]
        for tool in _TOOLS
    }
    named = list(cells.items())
    ordered = dict([*named[:_HEADLINE], *graphs.items(), *named[_HEADLINE:], *tools.items()])
    if options.list:
        print("\n".join(ordered))
        return 0
    run = CellRun("gpu-check", list(ordered), options, device)
    run.report["control"] = control
    seeds.append(run.seed)
    run.run(ordered, least=dict.fromkeys(tools, 0 if dry else _SANITIZER_SECONDS))
    return run.finish()


def _check(
    variant: Variant, device: torch.device, seed: int, dry: bool, control: bool
) -> dict[str, Any]:
    """Run a variant in all its ways, launches fitted to the plan and fixed as for a graph."""
    errors: dict[str, float] = {}
    inputs = None
    for policy, (mode, merge), fixed in _runs(variant, dry):
        name = f"{policy}/{mode}/{merge}" + ("/fixed" if fixed else "")
        if inputs is None or variant.steps:
            inputs = _inputs(variant, device, seed, dry)
        attention = PackedAttention(
            inputs.heads.shape(inputs.q.dtype, inputs.k_cache.dtype),
            device,
            policy=policy,
            mode=mode,
            merge=merge,
            profile=variant.profile,
            reserved_tail_slots=_RESERVED_TAIL_SLOTS,
        )
        try:
            errors[name] = _check_way(variant, inputs, attention, fixed, dry, control)
        except MismatchError as error:
            reason = f"{name}: {error}"
            return {"status": "failed", "reason": reason, "errors": errors}
    assert inputs is not None
    return {
        "status": "passed",
        "errors": errors,
        "dtypes": [str(tensor.dtype) for tensor in (inputs.q, inputs.k_cache)],
        "q": list(inputs.q.shape),
        "k_cache": list(inputs.k_cache.shape),
        "longest": int(inputs.seq_lens.max()),
    }


def _runs(variant: Variant, dry: bool) -> list[tuple[str, tuple[str, str], bool]]:
    """Policy, way, and whether launches are fixed, of all runs on a variant's inputs.

    Every launch shape is compiled, in seconds each: all of them only where that is the question.
    """
    if variant.ways == ALL_WAYS:
        every = list(product(variant.policies, variant.ways, (False, True)))
        return every[::5] if dry else every
    return [
        (policy, way, index == 0)
        for policy in variant.policies
        for index, way in enumerate(variant.ways)
    ]


def _check_way(
    variant: Variant,
    inputs: Inputs,
    attention: PackedAttention,
    fixed: bool,
    dry: bool,
    control: bool,
) -> float:
    plan = attention.plan(inputs.batch.forest())
    if fixed:
        rows = len(inputs.q)
        attention.fix_capacity([plan], inputs.table, inputs.rows, rows=rows)
    attention.breaks = control
    attention.load(plan, inputs.table, inputs.rows, num_rows=len(inputs.q))
    outputs = inputs.outputs()
    worst = 0.0
    for step in range(variant.steps + 1):
        if step:
            inputs.grow(step - 1, _first_slot(variant, dry))
            attention.executor.append(inputs.seq_lens, inputs.newest_slots())
        outputs.poison()
        attention.poison_partials()
        inputs.run(attention, outputs)
        worst = max(worst, inputs.compare(outputs))
    before = outputs.clone()
    for number in range(variant.repeats):
        outputs.poison()
        inputs.run(attention, outputs)
        if not before.same_bits(outputs):
            raise MismatchError(f"run {number} differs from the first in some bit")
    return worst


def _first_slot(variant: Variant, dry: bool) -> int:
    return min(variant.first_slot, 1000) if dry else variant.first_slot


def _inputs(variant: Variant, device: torch.device, seed: int, dry: bool) -> Inputs:
    """Fresh inputs; few heads in a dry run, and no bfloat16, whose products are wrong there."""
    kv, dtype = variant.kv, variant.dtype
    if dry:
        kv = 2 if any(isinstance(value, list) for value in variant.options.values()) else 1
        dtype = torch.float16 if dtype == torch.bfloat16 else dtype
    tree = variant.make_tree(seed, variant.requests, variant.tokens, variant.page_size)
    batch = TreeBatch.lay_out(tree, page_size=variant.page_size, growth=variant.steps, seed=seed)
    options = {
        name: torch.tensor(value, device=device) if isinstance(value, list) else value
        for name, value in variant.options.items()
    }
    return Inputs.build(
        batch,
        Heads(kv * variant.group, kv, variant.dim, variant.v_dim),
        device,
        seed,
        dtype=dtype,
        kv_dtype=variant.kv_dtype,
        options=options,
        num_rows=batch.batch_size + variant.padding,
        first_slot=_first_slot(variant, dry),
    )


def _sanitized(tool: str, device: torch.device, control: bool) -> dict[str, Any]:
    """Run `sanitize.py` under a tool of compute-sanitizer; as it is where there is no GPU."""
    if control:
        return {"status": "n/a", "reason": "compares nothing, so a control cannot reach it"}
    if device.type != "cuda":
        if tool == _TOOLS[0]:
            sanitize.run_all(device)
        return {"status": "n/a", "reason": "no GPU: compute-sanitizer has nothing to watch"}
    binary = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(binary).exists():
        return {"status": "n/a", "reason": "compute-sanitizer is not installed"}
    command = [binary, "--tool", tool, "--error-exitcode", "9", sys.executable]
    # Without its cache every tensor is an allocation of its own, with bounds that are watched.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, "-m", sanitize.__name__],
            capture_output=True,
            text=True,
            env=environment,
            timeout=_SANITIZER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": "n/a", "reason": f"not done after {_SANITIZER_SECONDS} s"}
    tail = (done.stdout + done.stderr)[-2000:]
    if "not supported" in tail:
        return {"status": "n/a", "reason": tail}
    status = "failed" if done.returncode else "passed"
    reason = {"reason": tail} if done.returncode else {}
    return {"status": status, **reason, "tail": tail, "under": tool}


if __name__ == "__main__":
    raise SystemExit(main())
