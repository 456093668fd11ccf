"""What the backend does not serve itself, and why: one table, and the tests that fill it in.

Whatever is found here goes to the stock backend, is counted under its name, and is said once.
"""

from __future__ import annotations

import os
from typing import Any

from sglang_prefix.checks import KV_DTYPES, Q_DTYPES

__all__ = ["REASONS", "layer_reason", "server_reason"]

REASONS = {
    # The whole server: nothing is ever packed.
    "gate-never": "SGLANG_PREFIX_GATE=never",
    "cuda-graph": "decode graphs are on, which are not supported yet; --disable-cuda-graph packs",
    "draft-model": "this is the draft model of speculative decoding",
    "mla": "the model uses multi-head latent attention",
    "encoder-decoder": "the model is an encoder-decoder",
    "deterministic": "--enable-deterministic-inference needs results that no other request affects",
    "metadata-glue-graph": "SGLANG_ENABLE_METADATA_GLUE_GRAPH replays metadata without Python",
    "context-parallel": "decode context parallelism spreads one request's KV over ranks",
    "kv-layout": "the KV pool is not laid out as [slot, head, dim]",
    "kv-dtype": "the KV cache dtype is not one that the executors read",
    "kv-quantized": "the KV cache is quantised in blocks",
    "no-layer": "no attention layer of the model is supported",
    # One layer: the others are packed all the same.
    "sliding-window": "the layer attends to a window only",
    "cross-attention": "the layer attends to an encoder",
    "attention-type": "the layer is not causal decoder attention",
    "position-encoding": "the layer encodes positions inside attention",
    "logit-capping": "the layer caps logits in another way than tanh, or the stock backend, which "
    "serves its prefill, ignores the cap",
    "head-groups": "query heads do not come in whole groups per KV head",
    # One batch.
    "no-request-info": "the batch came without its requests (warm-up, or a row without a request)",
    "no-radix-paths": "this tree cannot be read on the CPU; "
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python can",
    "speculative": "the batch carries speculative state",
    # One call.
    "other-batch": "the call has another number of queries than the batch that was planned",
    "unknown-argument": "the model passes an attention argument that the executors do not know",
    "error": "planning or running failed; see the traceback in the log",
}


def server_reason(model_runner: Any, gate: str) -> str | None:
    """Why nothing on this runner is packed, as a key of :data:`REASONS`; None to go ahead."""
    server_args, pool = model_runner.server_args, model_runner.token_to_kv_pool
    is_cuda = str(model_runner.device).startswith("cuda")
    quantised = getattr(pool, "is_quantized_kv_cache", False)
    layout = getattr(pool, "kv_cache_layout", "nhd")
    found = {
        "gate-never": gate == "never",
        "draft-model": model_runner.is_draft_worker,
        "mla": model_runner.use_mla_backend,
        "encoder-decoder": getattr(model_runner.model_config, "is_encoder_decoder", False),
        "deterministic": getattr(server_args, "enable_deterministic_inference", False),
        "metadata-glue-graph": _is_set("SGLANG_ENABLE_METADATA_GLUE_GRAPH"),
        "context-parallel": (getattr(server_args, "dcp_size", 1) or 1) > 1,
        "kv-quantized": quantised() if callable(quantised) else quantised,
        "kv-layout": layout != "nhd" or _is_set("SGLANG_USE_HND_KVCACHE"),
        "kv-dtype": pool.dtype not in KV_DTYPES or model_runner.dtype not in Q_DTYPES,
        "cuda-graph": is_cuda and not _decode_graphs_disabled(server_args),
    }
    return next((reason for reason, holds in found.items() if holds), None)


# torch_native computes neither prefill nor decode with a cap (0.5.17 to 0.5.23). A capped decode
# after an uncapped prefill would be neither stock's result nor the model's.
_IGNORE_LOGIT_CAP = ("torch_native",)


def layer_reason(layer: Any, stock_name: str) -> str | None:
    """Why a ``RadixAttention`` layer is left to the stock backend; None if it is packed."""
    window = layer.sliding_window_size
    capped = (layer.logit_cap or 0) > 0
    other_cap = layer.logit_capping_method != "tanh" or stock_name in _IGNORE_LOGIT_CAP
    attn_type = getattr(layer.attn_type, "value", layer.attn_type)
    found = {
        "sliding-window": window is not None and window > -1,
        "cross-attention": layer.is_cross_attention,
        "attention-type": attn_type != "decoder",
        "position-encoding": layer.use_irope
        or layer.xai_temperature_len > 0
        or layer.pos_encoding_mode != "NONE",
        "logit-capping": capped and other_cap,
        "head-groups": layer.tp_q_head_num % layer.tp_k_head_num != 0,
    }
    return next((reason for reason, holds in found.items() if holds), None)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _decode_graphs_disabled(server_args: Any) -> bool:
    """``--disable-cuda-graph``, or the decode phase of the graph configuration switched off."""
    if getattr(server_args, "disable_cuda_graph", False):
        return True
    config = getattr(server_args, "cuda_graph_config", None)
    backend = getattr(getattr(config, "decode", None), "backend", None)
    return str(getattr(backend, "value", backend)).lower() == "disabled"
