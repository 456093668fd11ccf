"""One layer in every launch and merge mode: which kernels the cache had, and what ncu watches.

As a program: ``python -m sglang_prefix.bench.gpu.layer FILE [--dry]``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
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

__all__ = ["launch_layer", "run_layer"]


def run_layer(*, dry: bool) -> dict[str, Any]:
    """Run it once in each mode; kernels found and compiled, and seconds of the first runs.

    Args:
        dry: tiny, in Triton's interpreter.

    Raises:
        RuntimeError: an output has a value that is not finite.
    """
    if dry:
        inputs = _lay_out((3, 16, 4), Heads(4, 1, 16, 16), torch.float16, torch.device("cpu"))
    else:
        inputs = _lay_out((64, 8192, 256), Heads(32, 8), torch.bfloat16, torch.device("cuda"))
    seconds = 0.0
    with counted() as counts:
        for name, attention in _loaded(inputs):
            inputs.out.fill_(torch.nan)
            began = time.perf_counter()
            _run(attention, inputs)
            if not inputs.out.isfinite().all():
                raise RuntimeError(f"{name} left values that are not finite")
            seconds += time.perf_counter() - began
    return {"found": counts.found, "compiled": counts.compiled, "seconds": round(seconds, 2)}


def launch_layer() -> None:
    """Launch the same on tensors of the CPU, to be recorded; a shorter prefix changes nothing."""
    inputs = _lay_out((64, 2048, 16), Heads(32, 8), torch.bfloat16, torch.device("cpu"))
    for _, attention in _loaded(inputs):
        _run(attention, inputs)


def _lay_out(
    tree: tuple[int, int, int], heads: Heads, dtype: torch.dtype, device: torch.device
) -> AttentionInputs:
    """Inputs of requests with a shared prefix and private tails: how many, and tokens of each."""
    return AttentionInputs.lay_out(shared_then_private(*tree), heads, device, seed=0, dtype=dtype)


def _loaded(inputs: AttentionInputs) -> Iterator[tuple[str, PackedAttention]]:
    """Attention in each mode, its plan in use."""
    shape = inputs.heads.shape(inputs.q.dtype, inputs.k.dtype)
    for mode, merge in product(LAUNCH_MODES, MERGE_MODES):
        attention = PackedAttention(shape, inputs.q.device, mode=mode, merge=merge)
        plan = attention.plan(inputs.batch.forest())
        attention.load(plan, inputs.req_to_token, inputs.req_pool_indices)
        yield f"{mode}/{merge}", attention


def _run(attention: PackedAttention, inputs: AttentionInputs) -> None:
    attention.executor.run(inputs.q, inputs.k[0], inputs.v[0], inputs.out, None, inputs.params)


def main() -> None:
    """Write what was found to the file that is named."""
    facts = run_layer(dry="--dry" in sys.argv)
    write_file(Path(sys.argv[1]), json.dumps(facts))


if __name__ == "__main__":
    main()
