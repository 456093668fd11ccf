"""What the backend does not serve itself, and why: one table, and the tests that fill it in.

A batch or layer that has one of these goes to stock, is counted under its name, and is said once.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from prefix_patches.attributes import AttentionLayer, ForwardBatch, ModelRunner, ReplayView
from prefix_patches.install import lacks_attributes
from prefix_patches.kv_pool import is_block_quantized, is_slot_major
from prefix_patches.rank_agreement import why_not
from prefix_patches.stock_backend import resolved_args, runs_dp_attention
from sglang_prefix.backend.decode_batch import ScheduledRows
from sglang_prefix.checks import KV_DTYPES, Q_DTYPES

__all__ = [
    "GATE_REASONS",
    "REASONS",
    "argument_reason",
    "batch_reason",
    "captures_decode",
    "has_dp_attention",
    "has_tensor_parallelism",
    "layer_reason",
    "ranks_must_agree",
    "server_reason",
]

REASONS = {
    # The whole server: nothing is ever packed.
    "unknown-attributes": "this SGLang is newer than this package, and lacks what we read of it",
    "gate-never": "SGLANG_PREFIX_GATE=never",
    "cuda-graph": "the executor cannot run in decode graphs; --disable-cuda-graph packs",
    "kernels": "our kernels could not be compiled, or run for the first time, on this device; see "
    "the traceback in the log",
    "dp-attention": "ranks with batches of their own must agree on a graph, and this SGLang, or "
    "SGLANG_SCHEDULER_SKIP_ALL_GATHER, keeps them from it; SGLANG_PREFIX_GATE=always packs",
    "torch-compile": "--enable-torch-compile has not been tried with our kernels",
    "pd-multiplexing": "--enable-pdmux shares the GPU between prefill and decode",
    "adaptive-drafts": "--speculative-adaptive changes the number of drafts meanwhile",
    "draft-model": "this is the draft model of speculative decoding",
    "encoder-decoder": "the model is an encoder-decoder",
    "deterministic": "--enable-deterministic-inference needs results that no other request affects",
    "metadata-glue-graph": "SGLANG_ENABLE_METADATA_GLUE_GRAPH replays metadata without Python",
    "context-parallel": "decode context parallelism spreads one request's KV over ranks",
    "kv-layout": "the KV pool is not laid out as [slot, head, dim]",
    "kv-dtype": "the KV cache dtype is not one that the executors read",
    "kv-quantized": "the KV cache is quantised in blocks",
    "cpu-graph": "--enable-torch-compile captures decode on the CPU",
    "no-layer": "every attention layer of the model is stock's; delegated_layers says why",
    "no-attention": "the model has no RadixAttention layer that could be found",
    # One layer: the others are packed all the same.
    "sliding-window": "the layer attends to a window only",
    "cross-attention": "the layer attends to an encoder",
    "attention-type": "the layer is not causal decoder attention",
    "position-encoding": "the layer encodes positions inside attention",
    "logit-capping": "the layer caps logits in another way than tanh, or the backend that serves "
    "its prefill ignores the cap",
    "kv-scales": "the backend that serves the layer's prefill applies the KV scales otherwise",
    "unknown-argument": "the model passes an attention argument that the executors do not know",
    "latent-attention": "the executor has no kernel for multi-head latent attention of this shape",
    "attention-sinks": "the backend that serves the layer's prefill ignores attention sinks",
    "head-groups": "query heads do not come in whole groups per KV head",
    # One batch.
    "no-request-info": "the batch came without its requests (warm-up, or a row without a request)",
    "no-radix-paths": "this tree cannot be read on the CPU; "
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python can",
    "two-batch-overlap": "two-batch overlap splits the batch in two",
    "speculative": "the decode batch carries speculative state",
    "speculative-tree": "the drafts of a request are a tree, or not known to be a chain",
    "query-lengths": "drafts reach past the context, or there are more or fewer query tokens than "
    "the lengths of the pass say",
    # One pass that stock takes before it could come to us.
    "speculative-verify": "another backend than ours checks drafts; the line about the start says "
    "what brings them here",
    "speculative-ranks": "ranks with batches of their own agree on graphs for decode alone",
    "diffusion": "a diffusion model denoises a block of tokens per request",
    # One call.
    "late-graph": "SGLang has captured its graphs after the start, without our kernels",
    "other-batch": "the call has another number of queries than the batch that was planned",
    "error": "planning or running failed; see the traceback in the log",
    "workspace": "the plan is larger than the workspace; SGLANG_PREFIX_WORKSPACE_MIB raises it",
    # Not a fallback: the gate says so.
    "gate-nothing-shared": "no two requests of the batch share KV",
    "gate-no-gain": "packing is predicted to be no faster",
    "gate-other-ranks": "packing is predicted not to help the slowest rank of DP attention",
}
GATE_REASONS = ("gate-never", "gate-nothing-shared", "gate-no-gain", "gate-other-ranks")


def server_reason(model_runner: ModelRunner, gate: str) -> str | None:
    """Why nothing on this runner is packed, as a key of :data:`REASONS`; None to go ahead."""
    if lacks_attributes(model_runner):
        return "unknown-attributes"
    args, pool = resolved_args(model_runner), model_runner.token_to_kv_pool
    device = str(model_runner.device)
    found = {
        "gate-never": gate == "never",
        # SGLang builds a backend for each number, and graphs that know no labels.
        "adaptive-drafts": getattr(args, "speculative_adaptive", False),
        "draft-model": model_runner.is_draft_worker,
        "encoder-decoder": model_runner.model_config.is_encoder_decoder,
        "deterministic": args.enable_deterministic_inference,
        "metadata-glue-graph": _is_set("SGLANG_ENABLE_METADATA_GLUE_GRAPH"),
        "context-parallel": args.dcp_size > 1,
        "kv-quantized": is_block_quantized(pool) or args.kv_cache_dtype in _BLOCK_QUANTIZED,
        "kv-layout": not is_slot_major(pool) or _is_set("SGLANG_USE_HND_KVCACHE"),
        "kv-dtype": pool.dtype not in KV_DTYPES or model_runner.dtype not in Q_DTYPES,
        "dp-attention": ranks_must_agree(model_runner, gate)
        and (
            _is_set("SGLANG_SCHEDULER_SKIP_ALL_GATHER")
            # Ranks may come that vote, to ranks of a server of one replica, which do not.
            or args.elastic_ep_backend is not None
            or why_not() is not None
        ),
        "torch-compile": device != "cpu" and args.enable_torch_compile,
        "two-batch-overlap": args.enable_two_batch_overlap,
        "pd-multiplexing": args.enable_pdmux,
        "cpu-graph": device == "cpu" and args.enable_torch_compile,
    }
    return next((reason for reason, holds in found.items() if holds), None)


def batch_reason(
    forward_batch: ForwardBatch | ReplayView | ScheduledRows, *, verifies: bool = False
) -> str | None:
    """Why a batch is left to the stock backend unseen; None to plan it.

    Args:
        forward_batch: SGLang's.
        verifies: whether it is a verify pass, whose speculative state is looked at elsewhere.
    """
    if forward_batch.spec_info is not None and not verifies:
        return "speculative"
    # The halves come to backends of their own, with the schedule batch of the whole (to 0.5.23).
    is_half = getattr(forward_batch, "tbo_parent_token_range", None)
    if is_half or getattr(forward_batch, "tbo_children", None):
        return "two-batch-overlap"
    return None


def has_dp_attention(model_runner: ModelRunner) -> bool:
    """Whether the ranks of this server decode batches of their own."""
    return runs_dp_attention(resolved_args(model_runner))


def ranks_must_agree(model_runner: ModelRunner, gate: str) -> bool:
    """Whether ranks with batches of their own may choose between graphs, and so must agree."""
    return gate == "auto" and has_dp_attention(model_runner) and captures_decode(model_runner)


def has_tensor_parallelism(model_runner: ModelRunner) -> bool:
    """Whether several ranks compute each layer together."""
    return resolved_args(model_runner).tp_size > 1


def captures_decode(model_runner: ModelRunner) -> bool:
    """Whether SGLang captures decode steps of this runner in graphs, CUDA's or another device's.

    It asks the graph configuration and nothing else, into which ``--disable-cuda-graph`` has gone.
    """
    config = resolved_args(model_runner).cuda_graph_config
    on_device = not str(model_runner.device).startswith("cpu")
    return on_device and (config is None or config.decode.backend != "disabled")


_BLOCK_QUANTIZED = ("mxfp8", "nvfp4", "fp4_e2m1", "fp4_mx_block16")
# These compute neither prefill nor decode with a cap (0.5.17 to 0.5.23). A capped decode after an
# uncapped prefill would be neither stock's result nor the model's.
_IGNORE_LOGIT_CAP = {"torch_native", "flex_attention", "trtllm_mha"}
# These write and read KV without the layer's scales; the others apply them wherever the cache has
# another dtype than the model.
_IGNORE_KV_SCALES = {"torch_native", "flex_attention"}
# These take any argument and use none; `trtllm_mha` takes any and uses sinks, others know them or
# raise (0.5.17 to 0.5.23).
_IGNORE_SINKS = {"hpc_ops"}


def layer_reason(
    layer: AttentionLayer,
    stock_names: Collection[str],
    *,
    kv_is_8_bit: bool,
    same_dtype: bool,
    v_in_k: bool = False,
) -> str | None:
    """Why a ``RadixAttention`` layer is left to the stock backend; None if it is packed.

    Args:
        layer: the layer.
        stock_names: the backends that run its prefill, and its decode when we do not.
        kv_is_8_bit: whether the KV cache holds 8-bit floats.
        same_dtype: whether the KV cache has the model's dtype.
        v_in_k: whether it is the absorbed form of multi-head latent attention.
    """
    window = layer.sliding_window_size
    attn_type = getattr(layer.attn_type, "value", layer.attn_type)
    capped = (layer.logit_cap or 0) > 0
    uncapped_stock = not _IGNORE_LOGIT_CAP.isdisjoint(stock_names)
    # We apply scales to 8-bit caches and to no other. Which stock backends do so too?
    scaled = layer.k_scale is not None or layer.v_scale is not None
    unscaled = [name in _IGNORE_KV_SCALES for name in stock_names]
    other_scales = any(unscaled) if kv_is_8_bit else not same_dtype and not all(unscaled)
    if v_in_k:  # stock backends do not agree on whether, and where, they apply them
        other_scales = any(
            scale is not None and float(scale) != 1 for scale in (layer.k_scale, layer.v_scale)
        )
    found = {
        "sliding-window": window is not None and window > -1,
        "cross-attention": layer.is_cross_attention,
        "attention-type": attn_type != "decoder",
        "position-encoding": layer.use_irope
        or layer.xai_temperature_len > 0
        or layer.pos_encoding_mode != "NONE",
        "logit-capping": capped and (layer.logit_capping_method != "tanh" or uncapped_stock),
        "kv-scales": scaled and other_scales,
        "head-groups": layer.tp_q_head_num % layer.tp_k_head_num != 0,
    }
    return next((reason for reason, holds in found.items() if holds), None)


def argument_reason(
    layer: AttentionLayer, arguments: Mapping[str, Any], stock_names: Collection[str]
) -> str | None:
    """Why what a model passes to a layer beside q, k and v leaves it to stock; None to run it.

    Args:
        layer: the layer.
        arguments: what it was given, by name; None counts as not given.
        stock_names: as of :func:`layer_reason`.
    """
    if not arguments:
        return None
    sinks = arguments.get("sinks")
    if sinks is not None:
        if not _IGNORE_SINKS.isdisjoint(stock_names):
            return "attention-sinks"
        one_per_head = sinks.shape == (layer.tp_q_head_num,) and sinks.is_contiguous()
        if sinks.dtype not in Q_DTYPES or not one_per_head:
            return "unknown-argument"
    others = any(value is not None and name != "sinks" for name, value in arguments.items())
    return "unknown-argument" if others else None


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "on")
