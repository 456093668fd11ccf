"""One layer in every launch and merge mode: which kernels the cache had, and what ncu watches.

As a program: ``python -m sglang_prefix.bench.gpu.layer FILE [--dry]``.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from prefix_kernels.kernel_cache import counted
from prefix_kernels.launches import LAUNCH_MODES, MERGE_MODES
from sglang_prefix.bench.packed_attention import PackedAttention
from sglang_prefix.bench.workloads.inputs import AttentionInputs
from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import shared_then_private
from sglang_prefix.files import write_file

__all__ = ["run_layer"]


def run_layer(*, dry: bool) -> dict[str, Any]:
    """Run it once in each mode; kernels found and compiled, and seconds of the first runs.

    Args:
        dry: tiny, in Triton's interpreter.

    Raises:
        RuntimeError: an output has a value that is not finite.
    """
    device = torch.device("cpu" if dry else "cuda")
    tree = shared_then_private(*((3, 16, 4) if dry else (64, 8192, 256)))
    heads, dtype = (Heads(4, 1, 16, 16), torch.float16) if dry else (Heads(32, 8), torch.bfloat16)
    inputs = AttentionInputs.lay_out(tree, heads, device, seed=0, dtype=dtype)
    seconds = 0.0
    with counted() as counts:
        for mode, merge in product(LAUNCH_MODES, MERGE_MODES):
            attention = PackedAttention(heads.shape(dtype, dtype), device, mode=mode, merge=merge)
            plan = attention.plan(inputs.batch.forest())
            attention.load(plan, inputs.req_to_token, inputs.req_pool_indices)
            inputs.out.fill_(torch.nan)
            began = time.perf_counter()
            attention.executor.run(
                inputs.q, inputs.k[0], inputs.v[0], inputs.out, None, inputs.params
            )
            if not inputs.out.isfinite().all():
                raise RuntimeError(f"{mode}/{merge} left values that are not finite")
            seconds += time.perf_counter() - began
    return {"found": counts.found, "compiled": counts.compiled, "seconds": round(seconds, 2)}


def main() -> None:
    """Write what was found to the file that is named."""
    facts = run_layer(dry="--dry" in sys.argv)
    write_file(Path(sys.argv[1]), json.dumps(facts))


if __name__ == "__main__":
    main()
