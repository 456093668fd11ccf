"""What launches cost: 32 layers in one graph with 0, 1 and all tile classes in use, per mode."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from benchmarks.gpu.timing import Meter
from benchmarks.gpu.workloads import Cell, Workload
from prefix_kernels import plan_buffers
from prefix_kernels.triton_executor import LAUNCH_MODES, MERGE_MODES
from sglang_prefix.bench.graphs import launches_of
from sglang_prefix.bench.packed_attention import PackedAttention

__all__ = ["measure_chain"]

_LAYERS = 32
_ROUNDS = 30
# Classes in use, and the policy that leads to it on requests that share a short prefix: packs of
# all of them beside their tails, or their tails alone.
_POLICIES = {"none": "query", "one": "query", "all": "node"}


def measure_chain(cell: Cell, device: torch.device, meter: Meter, seed: int) -> dict[str, Any]:
    """Time per layer of chains that differ in what their launches find to do.

    "none" minus nothing is the price of empty launches and of the fork and join; the modes differ
    in how many they make. "fitted" launches what one class needs and nothing else.
    """
    workload = Workload.build(cell, device, seed, dry=meter.dry)
    layers = 1 if meter.dry else _LAYERS
    chains, facts = {}, {}
    for mode in LAUNCH_MODES:
        for merge in MERGE_MODES:
            for used in ("none", "one", "all", "fitted"):
                attention = _attention(workload, mode, merge, used)
                name = f"{mode}/{merge}/{used}"
                chains[name] = _chain(attention, workload, layers)
                launches = launches_of(_chain(attention, workload, 1))
                facts[name] = [
                    " ".join(
                        (
                            kernel.__name__,
                            "x".join(map(str, grid)),
                            f"rows {arguments['BLOCK_M']}" if "BLOCK_M" in arguments else "",
                        )
                    ).strip()
                    for kernel, grid, arguments in launches
                ]
    replays = {name: meter.replayable(chain) for name, chain in chains.items()}
    seconds = meter.interleaved(replays, _ROUNDS)
    return {
        "status": "done",
        "layers": layers,
        "batch": workload.batch.batch_size,
        "chains": {
            name: {
                "us_per_layer": median(times) / layers * 1e6,
                "launches_per_layer": facts[name],
                "seconds": times,
            }
            for name, times in seconds.items()
        },
    }


def _attention(w: Workload, mode: str, merge: str, used: str) -> PackedAttention:
    shape = w.cell.heads.shape(w.q.dtype, w.k.dtype)
    policy = _POLICIES.get(used, "query")
    attention = PackedAttention(shape, w.q.device, policy=policy, mode=mode, merge=merge)
    plan = attention.plan(w.batch.forest())
    if used != "fitted":
        attention.fix_capacity([plan], w.req_to_token, w.rows, rows=w.batch.batch_size)
    attention.load(plan, w.req_to_token, w.rows)
    if used == "none":
        first = plan_buffers.HEADER_NUM_ITEMS
        attention.executor.buffers.plan[first : first + plan_buffers.MAX_LISTS] = 0
    return attention


def _chain(attention: PackedAttention, w: Workload, layers: int) -> Any:
    """``layers`` layers on the same caches, which are small and stay in the L2."""

    def run() -> None:
        for _ in range(layers):
            attention.run(w.q, w.k[0], w.v[0], w.out, sm_scale=w.sm_scale)

    return run
