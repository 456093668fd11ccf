"""The layers that the backend takes off the stock backend, and what runs them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention

from prefix_patches.kv_write import applies_kv_scales
from sglang_prefix.backend.decode_planner import LayerGroup
from sglang_prefix.backend.fallback import layer_reason
from sglang_prefix.backend.workspace import Workspace, size_workspace
from sglang_prefix.config import PrefixConfig
from sglang_prefix.packing import AttentionShape
from sglang_prefix.packing.planner import RESERVED_TAIL_SLOTS, PackPlanner, profile_for
from sglang_prefix.runner import PlanRunner, choose_executor

__all__ = ["ServedLayers", "attention_layers", "find_delegated", "serve_layers"]

# Twice the largest batch that SGLang captures by default (512). Larger ones go to stock.
_MAX_ROWS = 1024


@dataclass(frozen=True, slots=True)
class ServedLayers:
    """What runs the layers that are not delegated.

    Attributes:
        runner_of: the runner of each layer.
        shapes: planner and runner of each attention shape.
        device: where they run.
        workspace: of the shape that holds the fewest requests for sure; None where nothing is
            preallocated.
    """

    runner_of: dict[RadixAttention, PlanRunner]
    shapes: list[LayerGroup]
    device: torch.device
    workspace: Workspace | None

    @property
    def executor_names(self) -> list[str]:
        """Executors in use."""
        return sorted({shape.runner.executor_name for shape in self.shapes})


def find_delegated(model_runner: Any, stock_names: set[str]) -> dict[int, str]:
    """Layers that are always the stock backend's: a reason by layer id."""
    pool = model_runner.token_to_kv_pool
    reasons = {
        layer.layer_id: layer_reason(
            layer,
            stock_names,
            kv_is_8_bit=applies_kv_scales(pool),
            same_dtype=pool.dtype == model_runner.dtype,
        )
        for layer in attention_layers(model_runner)
    }
    return {layer_id: reason for layer_id, reason in reasons.items() if reason}


def attention_layers(model_runner: Any) -> list[RadixAttention]:
    """All attention layers of the model."""
    return [m for m in model_runner.model.modules() if isinstance(m, RadixAttention)]


def serve_layers(
    model_runner: Any, delegated: dict[int, str], config: PrefixConfig
) -> ServedLayers:
    """Build planner and runner for each attention shape among the layers that we take.

    Raises:
        ValueError: the executor cannot take the model's tensors, or the workspace is too small.
    """
    device = model_runner.req_to_token_pool.req_to_token.device
    kv_dtype = model_runner.token_to_kv_pool.dtype
    layers = [m for m in attention_layers(model_runner) if m.layer_id not in delegated]
    shape_of = {layer: _shape_of(layer, model_runner.dtype, kv_dtype) for layer in layers}
    executor = choose_executor(config.executor, device, model_runner.dtype, kv_dtype)
    num_layers = Counter(shape_of.values())
    shapes: dict[AttentionShape, LayerGroup] = {}
    workspaces: list[Workspace] = []
    for shape, count in num_layers.items():
        options: dict[str, Any] = {}
        workspace = None
        if executor == "triton":
            workspace = _workspace_of(model_runner, shape, config, len(num_layers))
            workspaces.append(workspace)
            options = {
                "capacity": workspace.capacity,
                "mode": config.launch_mode,
                "merge": config.merge_mode,
            }
        runner = PlanRunner(shape, device, executor, check_slots=config.verify, options=options)
        planner = PackPlanner(
            shape,
            profile_for(executor, runner.max_block_rows),
            policy=config.policy,
            max_partials=workspace.max_partials if workspace else None,
        )
        shapes[shape] = LayerGroup(planner, runner, count, workspace)
    return ServedLayers(
        {layer: shapes[shape].runner for layer, shape in shape_of.items()},
        list(shapes.values()),
        device,
        min(workspaces, key=lambda workspace: workspace.sure_rows, default=None),
    )


def _workspace_of(
    model_runner: Any, shape: AttentionShape, config: PrefixConfig, num_shapes: int
) -> Workspace:
    from prefix_kernels.tiles import TileShape, widest_block

    return size_workspace(
        shape,
        # Batches are padded to multiples of what parallelism asks for.
        max_rows=min(-(-int(model_runner.req_to_token_pool.size) // 64) * 64, _MAX_ROWS),
        context_len=int(model_runner.model_config.context_len),
        reserved_tail_slots=RESERVED_TAIL_SLOTS,
        max_block_rows=widest_block(config.launch_mode, TileShape.of(shape)),
        budget=config.workspace_mib * 2**20 // num_shapes,
    )


def _shape_of(layer: RadixAttention, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> AttentionShape:
    return AttentionShape(
        layer.tp_q_head_num,
        layer.tp_k_head_num,
        layer.qk_head_dim,
        layer.v_head_dim,
        q_dtype.itemsize,
        kv_dtype.itemsize,
    )
