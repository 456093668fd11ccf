"""The layers that the backend takes off the stock backend, and what runs them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention

from prefix_kernels.executor import (
    AttentionParams,
    choose_executor,
    make_executor,
    why_not_shape,
    why_torch,
)
from prefix_kernels.plan import AttentionShape
from prefix_patches.attention_layers import attention_layers
from prefix_patches.attributes import AttentionLayer, KVPool, ModelRunner
from prefix_patches.kv_pool import applies_kv_scales, latent_dims
from prefix_patches.latent_attention import decodes
from sglang_prefix.backend.decode_planner import LayerGroup
from sglang_prefix.backend.fallback import REASONS, layer_reason
from sglang_prefix.backend.workspace import Workspace, size_workspace
from sglang_prefix.config import PrefixConfig
from sglang_prefix.gate import limits_of
from sglang_prefix.packing.planner import RESERVED_TAIL_SLOTS, planner_for

__all__ = ["ModelLayers", "find_layers", "run_layer"]

# Twice the largest batch that SGLang captures by default (512). Larger ones go to stock.
_MAX_BATCH_SIZE = 1024
# New tokens of an extend on a GPU, where those are packed; fewer if the budget holds no more.
_EXTEND_ROWS = 4096

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelLayers:
    """Attention layers of a model: those that we serve, and those that are the stock backend's.

    Attributes:
        num_layers: all of them.
        delegated: layers that are always the stock backend's: a reason by layer id.
        group_of: the group of each layer that we serve.
        groups: planner and executor of each attention shape that we serve.
        why_torch: why the torch executor serves where a faster one was asked for; None otherwise.
    """

    num_layers: int
    delegated: dict[int, str]
    group_of: dict[RadixAttention, LayerGroup]
    groups: list[LayerGroup]
    why_torch: str | None = None

    @property
    def executor_names(self) -> list[str]:
        """Executors in use."""
        return sorted({group.executor.name for group in self.groups})

    @property
    def executor_text(self) -> str:
        """Executors in use, and why not a faster one."""
        names = "/".join(self.executor_names) or "none"
        return f"{names} ({self.why_torch})" if self.why_torch else names

    @property
    def workspace(self) -> Workspace | None:
        """Of the group that holds the fewest requests for sure; None if nothing is preallocated."""
        workspaces = [group.workspace for group in self.groups if group.workspace]
        return min(workspaces, key=lambda workspace: workspace.sure_batch_size, default=None)

    def log_startup(
        self,
        config: PrefixConfig,
        stock_name: str,
        graph_labels: Sequence[str],
        inactive: str | None,
        hint: str | None = None,
    ) -> None:
        """One line that says whether anything is packed, and one per reason to delegate a layer.

        Args:
            config: settings.
            stock_name: name of the stock backend.
            graph_labels: labels that decode graphs are captured under.
            inactive: why nothing is packed, a key of :data:`REASONS`; None if something is.
            hint: what would bring verify passes of speculative decoding here; None if nothing.
        """
        workspace = self.workspace
        logger.info(
            "prefix attention: %d of %d layers, executor %s, stock backend %s, gate %s, policy %s, "
            "graph labels %s%s%s%s",
            0 if inactive else len(self.group_of),
            self.num_layers,
            self.executor_text,
            stock_name,
            config.gate,
            config.policy,
            "/".join(graph_labels) or "none",
            f", workspace {workspace.num_bytes / 2**20:.0f} MiB" if workspace else "",
            f", {hint}" if hint else "",
            f", inactive: {REASONS[inactive]}" if inactive else "",
        )
        for reason in sorted(set(self.delegated.values())):
            ids = [layer_id for layer_id, found in self.delegated.items() if found == reason]
            logger.info("prefix attention: layers %s are stock's (%s)", ids, REASONS[reason])


def find_layers(
    model_runner: ModelRunner,
    stock_names: set[str],
    config: PrefixConfig,
    *,
    serve: bool,
    drafts: int = 0,
) -> ModelLayers:
    """Find a model's attention layers, and build what runs those that are not delegated.

    Args:
        model_runner: SGLang's model runner; its pools and its model exist.
        stock_names: the backends that run prefill, and decode when we do not.
        config: settings.
        serve: whether we serve any layer; if not, nothing is built.
        drafts: query tokens of each request in verify passes; 0 where only decode is planned.

    Raises:
        ValueError: the executor cannot take the model's tensors, or the workspace is too small.
    """
    pool = model_runner.token_to_kv_pool
    latent = latent_dims(pool)
    layers = [layer for layer in attention_layers(model_runner.model) if decodes(layer, latent)]
    if not serve:
        return ModelLayers(len(layers), {}, {}, [])
    device = model_runner.req_to_token_pool.req_to_token.device
    delegated: dict[int, str] = {}
    shape_of: dict[RadixAttention, AttentionShape] = {}
    for layer in layers:
        reason = layer_reason(
            layer,
            stock_names,
            kv_is_8_bit=applies_kv_scales(pool),
            same_dtype=pool.dtype == model_runner.dtype,
            v_in_k=latent is not None,
        )
        if reason is None:
            shape = _shape_of(layer, model_runner, v_in_k=latent is not None)
            # Every executor runs every other shape.
            name = _executor_name(model_runner, config)
            if shape.v_in_k and why_not_shape(name, shape, device):
                reason = "latent-attention"
        if reason is None:
            shape_of[layer] = shape
        else:
            delegated[layer.layer_id] = reason
    num_layers = Counter(shape_of.values())
    groups = {
        shape: _build_group(model_runner, shape, config, count, len(num_layers), drafts or 1)
        for shape, count in num_layers.items()
    }
    group_of = {layer: groups[shape] for layer, shape in shape_of.items()}
    found = ModelLayers(len(layers), delegated, group_of, list(groups.values()))
    if config.executor == "auto" and found.executor_names == ["torch"]:
        return replace(found, why_torch=why_torch(device, model_runner.dtype, pool.dtype))
    return found


def run_layer(
    pool: KVPool,
    group: LayerGroup,
    q: torch.Tensor,
    layer: AttentionLayer,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one layer under the plan in use, over what the pool holds.

    Args:
        pool: SGLang's, with the KV of the queries' own tokens.
        group: of the layer.
        q: [R, Hq * D] or [R, Hq, D].
        layer: the layer.
        sinks: [Hq] on the device; None for none.

    Returns:
        [R, Hq * Dv], new.
    """
    q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
    out = q.new_empty(q.shape[0], layer.tp_q_head_num, layer.v_head_dim)
    scaled = applies_kv_scales(pool)
    group.executor.run(
        q,
        pool.get_key_buffer(layer.layer_id),
        pool.get_value_buffer(layer.layer_id),
        out,
        None,
        AttentionParams(
            layer.scaling,
            layer.logit_cap or 0.0,
            layer.k_scale if scaled and layer.k_scale is not None else 1.0,
            layer.v_scale if scaled and layer.v_scale is not None else 1.0,
            sinks,
        ),
    )
    return out.view(q.shape[0], -1)


def _build_group(
    model_runner: ModelRunner,
    shape: AttentionShape,
    config: PrefixConfig,
    num_layers: int,
    num_groups: int,
    query_tokens: int,
) -> LayerGroup:
    device = model_runner.req_to_token_pool.req_to_token.device
    name = _executor_name(model_runner, config)
    options: dict[str, Any] = {}
    workspace = None
    budget = config.workspace_mib * 2**20 // num_groups
    # Executors of the CPU take memory when they need it; this is what they may come to need.
    max_partials = max(1, budget // shape.partial_size)
    if name == "native":
        options = {"max_parts": max_partials}
    if name == "triton":
        workspace = _workspace_of(model_runner, shape, config, budget, query_tokens)
        max_partials = workspace.max_partials
        options = {
            "capacity": workspace.capacity,
            "mode": config.launch_mode,
            "merge": config.merge_mode,
        }
        if device.type == "cuda":
            _say_whose_tiles(torch.cuda.get_device_name(device))
    executor = make_executor(name, shape, device, check_slots=config.verify, **options)
    planner = planner_for(
        executor,
        limits_of(device).read_bytes_per_s,
        policy=config.policy,
        max_partials=max_partials,
    )
    return LayerGroup(planner, executor, num_layers, workspace)


@cache
def _say_whose_tiles(gpu: str) -> None:
    """Log whose measurements choose the tiles, unless that is the GPU itself."""
    from prefix_kernels.tiles import measured_device

    measured = measured_device(gpu)
    if measured != gpu:
        source = f"those measured on {measured}" if measured else "the formula's"
        logger.info("prefix attention: no tiles were measured on %s; it gets %s", gpu, source)


def _workspace_of(
    model_runner: ModelRunner,
    shape: AttentionShape,
    config: PrefixConfig,
    budget: int,
    query_tokens: int,
) -> Workspace:
    from prefix_kernels.launches import widest_block
    from prefix_kernels.tiles import TileShape

    # Batches are padded to multiples of what parallelism asks for.
    padded = min(-(-model_runner.req_to_token_pool.size // 64) * 64, _MAX_BATCH_SIZE)
    if config.extends == "always":
        padded = max(padded, _EXTEND_ROWS)
    return size_workspace(
        shape,
        max_batch_size=padded,
        context_len=model_runner.model_config.context_len,
        reserved_tail_slots=RESERVED_TAIL_SLOTS,
        max_block_rows=widest_block(config.launch_mode, TileShape.of(shape)),
        budget=budget,
        query_tokens=query_tokens,
    )


def _executor_name(model_runner: ModelRunner, config: PrefixConfig) -> str:
    device = model_runner.req_to_token_pool.req_to_token.device
    kv_dtype = model_runner.token_to_kv_pool.dtype
    return choose_executor(config.executor, device, model_runner.dtype, kv_dtype)


def _shape_of(layer: AttentionLayer, model_runner: ModelRunner, *, v_in_k: bool) -> AttentionShape:
    return AttentionShape(
        layer.tp_q_head_num,
        layer.tp_k_head_num,
        layer.qk_head_dim,
        layer.v_head_dim,
        model_runner.dtype.itemsize,
        model_runner.token_to_kv_pool.dtype.itemsize,
        v_in_k,
    )
