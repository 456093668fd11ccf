"""Multi-head latent attention as SGLang runs it: which of its layers decode, and with what query.

A layer is two objects. ``attn_mqa`` is the absorbed form, which decodes: its one KV head is the row
of the pool, the latent and the part with RoPE. ``attn_mha`` has heads that no pool holds; it only
prefills, with K and V that it is given (0.5.17 to 0.5.23, ``models/deepseek_v2.py``).
"""

from __future__ import annotations

from typing import Any

import torch

from prefix_patches.attributes import AttentionLayer

__all__ = ["decodes", "join_rope"]


def decodes(layer: AttentionLayer, latent: tuple[int, int] | None) -> bool:
    """Whether a layer ever decodes over a pool with these :func:`kv_pool.latent_dims`."""
    rows = (layer.tp_k_head_num, layer.qk_head_dim, layer.v_head_dim)
    return latent is None or rows == (1, sum(latent), latent[0])


def join_rope(
    q: torch.Tensor, layer: AttentionLayer, arguments: dict[str, Any], *, joins: bool
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The whole query of a layer, and the arguments that are none of its parts.

    Models hand the parts of q and k with RoPE over apart where the name of the stock backend is on
    SGLang's list of those that want it so (``FORWARD_ABSORB_CORE_ATTENTION_BACKENDS`` in
    ``models/deepseek_common/utils.py``), and joined to the latent parts elsewhere. Where a kernel
    applies RoPE itself they add ``cos_sin_cache``, which no executor knows.

    Args:
        q: [B, Hq * D] or [B, Hq, D]; its latent part where the arguments have ``q_rope``.
        layer: the layer.
        arguments: what it was given beside q, k and v.
        joins: whether to join the parts; if not, q is returned as it is.
    """
    q_rope = arguments.get("q_rope")
    if q_rope is None:
        return q, arguments
    if joins:
        heads = (q.shape[0], layer.tp_q_head_num, -1)
        q = torch.cat((q.reshape(heads), q_rope.reshape(heads)), dim=-1)
    return q, {name: value for name, value in arguments.items() if name not in _PARTS}


_PARTS = ("q_rope", "k_rope")
