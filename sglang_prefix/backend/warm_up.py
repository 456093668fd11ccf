"""Compiling every kernel that may be launched, before the server says that it is ready."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from prefix_kernels.tile_config import ROW_CLASSES
from sglang_prefix.backend.decode_planner import DecodePlanner
from sglang_prefix.backend.layers import ServedLayers
from sglang_prefix.runner import PlanRunner

__all__ = ["warm_up"]

# Runs one layer: its runner, q, the layer.
RunLayer = Callable[[PlanRunner, torch.Tensor, Any], torch.Tensor]


@torch.no_grad()
def warm_up(
    batches: DecodePlanner, served: ServedLayers, run: RunLayer, q_dtype: torch.dtype
) -> float:
    """Run every layer once for each set of launches, on the slot that belongs to no request.

    Launches are fixed but for the class of the widest tile, which follows from the number of rows.

    Returns:
        Seconds that it took, compilation included.
    """
    began = time.perf_counter()
    for num_requests in _batch_sizes(served):
        batch = _blank_batch(num_requests, served.device)
        batches.prepare_private(batch)
        for shape in served.shapes:
            shape.runner.append_in_graph(batch.seq_lens, batch.out_cache_loc)
        for layer, runner in served.runner_of.items():
            heads = (num_requests, layer.tp_q_head_num, layer.qk_head_dim)
            run(runner, torch.zeros(heads, dtype=q_dtype, device=served.device), layer)
    if served.device.type == "cuda":
        torch.cuda.synchronize(served.device)
    batches.forget()
    return time.perf_counter() - began


def _batch_sizes(served: ServedLayers) -> list[int]:
    """The smallest batch for each class of the widest tile, for each group size."""
    sizes = set()
    for shape in served.shapes:
        group = shape.planner.costs.shape.group_size
        smallest = {1, *(rows // group + 1 for rows in ROW_CLASSES)}
        most = shape.workspace.capacity.batch_rows if shape.workspace else 1
        sizes |= {min(size, most) for size in smallest}
    return sorted(sizes)


def _blank_batch(num_requests: int, device: torch.device) -> Any:
    """Requests of one token, all in the row of SGLang's padding."""
    ones = torch.ones(num_requests, dtype=torch.int64)
    zeros = torch.zeros(num_requests, dtype=torch.int64, device=device)
    return SimpleNamespace(
        batch_size=num_requests,
        req_pool_indices=zeros,
        seq_lens=ones.to(device),
        seq_lens_cpu=ones,
        out_cache_loc=zeros,
    )
