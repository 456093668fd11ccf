"""One small run of every kernel, to be run under compute-sanitizer; no output is compared."""

from __future__ import annotations

import torch

from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.variants import ALL_WAYS
from sglang_prefix.bench.packed_attention import PackedAttention
from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import TreeBatch, random_tree
from sglang_prefix.packing import DeviceProfile

__all__ = ["run_all"]

_EAGER = DeviceProfile("eager", 128, 0.4, 100, 64, 32)


def run_all(device: torch.device) -> None:
    """Plan, load, grow and run in every way, with launches fitted and fixed."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    heads = Heads(8, 2, 64, 64) if device.type == "cuda" else Heads(2, 1, 16, 16)
    requests, tokens = (20, 200) if device.type == "cuda" else (3, 8)
    tree = random_tree(0, num_requests=requests, max_tokens=tokens)
    for mode, merge in ALL_WAYS:
        for fixed in (False, True):
            batch = TreeBatch.lay_out(tree, growth=1)
            inputs = Inputs.build(batch, heads, device, 0, dtype=dtype)
            attention = PackedAttention(
                heads.shape(dtype, dtype),
                device,
                policy="node",
                mode=mode,
                merge=merge,
                profile=_EAGER,
            )
            plan = attention.plan(batch.forest())
            if fixed:
                attention.fix_capacity([plan], inputs.table, inputs.rows, rows=requests)
            attention.load(plan, inputs.table, inputs.rows)
            inputs.grow(0)
            attention.executor.append(inputs.seq_lens, inputs.newest_slots())
            outputs = inputs.outputs()
            inputs.run(attention, outputs)
            if not outputs.out.isfinite().all():
                raise RuntimeError(f"{mode}, {merge}: an output is not finite")


if __name__ == "__main__":
    run_all(torch.device("cuda"))
