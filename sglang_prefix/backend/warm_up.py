"""Compiling every kernel that may be launched, before the server says that it is ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from prefix_kernels.launches import SMALL_BATCH
from prefix_kernels.tiles import ROW_CLASSES
from sglang_prefix.backend.decode_batch import DecodeBatch
from sglang_prefix.backend.decode_planner import DecodePlanner, LayerGroup

__all__ = ["warm_up"]

# Runs one layer: its group, q, the layer.
RunLayer = Callable[[LayerGroup, torch.Tensor, Any], torch.Tensor]


@torch.no_grad()
def warm_up(
    planner: DecodePlanner,
    group_of: Mapping[Any, LayerGroup],
    run: RunLayer,
    q_dtype: torch.dtype,
) -> float:
    """Run every layer once for each set of launches, on the slot that belongs to no request.

    Launches follow from the batch size: their mode, and the class of the widest tile.

    Args:
        planner: the planner; without a plan afterwards.
        group_of: the group of each layer.
        run: runs a layer.
        q_dtype: dtype of queries.

    Returns:
        Seconds that it took, compilation included.
    """
    began = time.perf_counter()
    device = planner.req_to_token.device
    for num_requests in _batch_sizes(planner):
        batch = _blank_batch(num_requests, device)
        planner.prepare_private(batch)
        planner.append(batch)
        for layer, group in group_of.items():
            heads = (num_requests, layer.tp_q_head_num, layer.qk_head_dim)
            run(group, torch.zeros(heads, dtype=q_dtype, device=device), layer)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _batch_sizes(planner: DecodePlanner) -> list[int]:
    """The smallest batch of each mode, and for each class of the widest tile and group size."""
    sizes = set()
    for group in planner.groups:
        group_size = group.planner.costs.shape.group_size
        smallest = {1, SMALL_BATCH + 1, *(rows // group_size + 1 for rows in ROW_CLASSES)}
        most = group.workspace.capacity.batch_rows if group.workspace else 1
        sizes |= {min(size, most) for size in smallest}
    return sorted(sizes)


def _blank_batch(num_requests: int, device: torch.device) -> DecodeBatch:
    """Requests of one token, all in the row of SGLang's padding."""
    ones = torch.ones(num_requests, dtype=torch.int64)
    zeros = torch.zeros(num_requests, dtype=torch.int64, device=device)
    forward_batch = SimpleNamespace(
        batch_size=num_requests,
        req_pool_indices=zeros,
        seq_lens=ones.to(device),
        seq_lens_cpu=ones,
        out_cache_loc=zeros,
    )
    return DecodeBatch(forward_batch, None, in_graph=True)
