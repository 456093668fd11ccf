"""Compiling every kernel that may be launched, before the server says that it is ready."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from prefix_kernels import kernel_cache
from prefix_kernels.launches import warm_up_sizes
from sglang_prefix.backend.decode_batch import DecodeBatch
from sglang_prefix.backend.decode_planner import DecodePlanner, LayerGroup
from sglang_prefix.kernel_cache import settle

__all__ = ["warm_up"]

logger = logging.getLogger(__name__)

# Runs one layer: its group, q, the layer, its sinks.
RunLayer = Callable[[LayerGroup, torch.Tensor, Any, torch.Tensor | None], torch.Tensor]


@torch.no_grad()
def warm_up(
    planner: DecodePlanner,
    group_of: Mapping[Any, LayerGroup],
    sinks_of: Mapping[Any, torch.Tensor],
    run: RunLayer,
    q_dtype: torch.dtype,
    drafts: int = 0,
) -> str:
    """Run every layer once for each set of launches, on the slot that belongs to no request.

    What `sglang-prefix kernels --cache` has compiled is found in Triton's cache, even if that was
    moved since.

    Args:
        planner: the planner; without a plan afterwards.
        group_of: the group of each layer.
        sinks_of: the attention sinks of each layer that has some.
        run: runs a layer.
        q_dtype: dtype of queries.
        drafts: tokens of each request that are verified; 0 where requests decode.

    Returns:
        What it was, with the seconds that it took, compilation included.
    """
    began = time.perf_counter()
    device = planner.req_to_token.device
    _settle_cache()
    with kernel_cache.counted() as counts:
        for num_rows in _batch_sizes(planner):
            count, most = -(-num_rows // (drafts or 1)), planner.max_batch_size or num_rows
            batch = _blank_batch(max(1, min(count, most // (drafts or 1))), device, drafts)
            planner.prepare_private(batch)
            planner.append(batch)
            for layer, group in group_of.items():
                heads = (batch.num_rows, layer.tp_q_head_num, layer.qk_head_dim)
                q = torch.zeros(heads, dtype=q_dtype, device=device)
                run(group, q, layer, sinks_of.get(layer))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    return (
        f"kernels compiled and run once in {seconds:.1f} s "
        f"({counts.compiled} compiled, {counts.found} found in Triton's cache)"
    )


def _settle_cache() -> None:
    from triton import knobs

    try:
        settle(knobs.cache.dir)
    except OSError as error:
        logger.warning("prefix attention: Triton's cache was filled elsewhere: %s", error)


def _batch_sizes(planner: DecodePlanner) -> list[int]:
    """Those that between them make every launch there is, for each group size."""
    sizes = set[int]()
    for group in planner.groups:
        most = group.workspace.capacity.batch_rows if group.workspace else 1
        sizes |= warm_up_sizes(group.planner.costs.shape.group_size, most)
    return sorted(sizes)


def _blank_batch(num_requests: int, device: torch.device, drafts: int) -> DecodeBatch:
    """Requests of one token, and of drafts behind it, all in the row of SGLang's padding."""
    ones = torch.ones(num_requests, dtype=torch.int64)
    zeros = torch.zeros(num_requests * (drafts or 1), dtype=torch.int64, device=device)
    forward_batch = SimpleNamespace(
        batch_size=num_requests,
        req_pool_indices=zeros[:num_requests],
        seq_lens=ones.to(device),
        seq_lens_cpu=ones,
        out_cache_loc=zeros,
    )
    return DecodeBatch(forward_batch, None, in_graph=True, drafts=drafts)
