"""The meaning of decode attention over a slot table, in float64, and how far results may be off."""

from __future__ import annotations

import torch

__all__ = [
    "KERNEL_TOLERANCES",
    "RELATIVE_TOLERANCES",
    "TOLERANCES",
    "decode_attention_oracle",
]

# (relative, absolute). Everything is computed in float32 from the same rounded inputs that the
# oracle sees, so float32 differs by summation order and by exp of scores that are off by some
# 1e-6; the 16-bit types by half a unit in the last place of the final rounding on top: 2**-11 and
# 2**-8. lse is float32 for all of them.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2**-11 + 1e-5, 1e-5),
    torch.bfloat16: (2**-8 + 1e-5, 1e-5),
}

# The kernels round softmax weights, each at most 1, to q's dtype before the second product: half a
# unit in the last place of every weight, against values of up to some 4.
KERNEL_TOLERANCES = {
    torch.float32: TOLERANCES[torch.float32],
    torch.float16: (2**-10, 4 * 2**-11),
    torch.bfloat16: (2**-7, 4 * 2**-8),
}

# Norm of the error of one head's output over the norm of that output: the check for long contexts,
# where outputs are small and an absolute tolerance says little. Rounding the weights and the
# output, each by up to half a unit in the last place, leaves a fifth of this or less.
RELATIVE_TOLERANCES = {torch.float32: 2e-5, torch.float16: 2.5e-3, torch.bfloat16: 1e-2}


def decode_attention_oracle(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float,
    logit_cap: float = 0.0,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    sinks: torch.Tensor | None = None,
    query_lens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend each request's queries to the KV that its row names. Knows nothing of packs.

    Args:
        q: [R, Hq, D], one row per query, request after request.
        k_cache, v_cache: [slots, Hkv, D] and [slots, Hkv, Dv].
        req_to_token: [rows, context] slot of every position.
        req_pool_indices: [B] row of each request.
        seq_lens: [B] KV tokens of each request, query tokens included.
        sm_scale: factor on the scores.
        logit_cap: scores become ``cap * tanh(score / cap)``; 0 for none.
        k_scale, v_scale: dequantisation factors, a number or a tensor of shape [] or [Hkv].
        sinks: [Hq] a logit more for the softmax of each head, whose value is 0; None for none.
        query_lens: [B] query tokens of each request, its last positions; each attends to the
            positions up to its own. None for one each.

    Returns:
        Output [R, Hq, Dv] and natural-log lse [R, Hq] of the KV, without the sinks, both float64,
        on the device of q.
    """
    num_kv_heads = k_cache.shape[1]
    group = q.shape[1] // num_kv_heads
    k_factor = _per_head(k_scale, num_kv_heads, q.device)
    v_factor = _per_head(v_scale, num_kv_heads, q.device)
    out = torch.empty(*q.shape[:2], v_cache.shape[2], dtype=torch.float64, device=q.device)
    lse = torch.empty(*q.shape[:2], dtype=torch.float64, device=q.device)
    counts = [1] * len(seq_lens) if query_lens is None else query_lens.tolist()
    r = 0
    for row, length, count in zip(
        req_pool_indices.tolist(), seq_lens.tolist(), counts, strict=True
    ):
        slots = req_to_token[row, :length].long()
        keys = (k_cache[slots].double() * k_factor).repeat_interleave(group, dim=1)
        values = (v_cache[slots].double() * v_factor).repeat_interleave(group, dim=1)
        for sees in range(length - count + 1, length + 1):
            scores = torch.einsum("hd,thd->ht", q[r].double(), keys[:sees]) * sm_scale
            if logit_cap > 0:
                scores = logit_cap * torch.tanh(scores / logit_cap)
            lse[r] = torch.logsumexp(scores, dim=-1)
            if sinks is not None:
                scores = torch.cat((scores, sinks.double()[:, None]), dim=-1)
            weights = torch.softmax(scores, dim=-1)[:, :sees]
            out[r] = torch.einsum("ht,thd->hd", weights, values[:sees])
            r += 1
    return out, lse


def _per_head(scale: float | torch.Tensor, num_kv_heads: int, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(scale, dtype=torch.float64, device=device).expand(num_kv_heads)[:, None]
