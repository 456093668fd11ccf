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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend each request's query to the KV that its row names. Knows nothing of packs.

    Args:
        q: [B, Hq, D].
        k_cache, v_cache: [slots, Hkv, D] and [slots, Hkv, Dv].
        req_to_token: [rows, context] slot of every position.
        req_pool_indices: [B] row of each request.
        seq_lens: [B] positions to attend to.
        sm_scale: factor on the scores.
        logit_cap: scores become ``cap * tanh(score / cap)``; 0 for none.
        k_scale, v_scale: dequantisation factors, a number or a tensor of shape [] or [Hkv].

    Returns:
        Output [B, Hq, Dv] and natural-log lse [B, Hq], both float64, on the device of q.
    """
    num_kv_heads = k_cache.shape[1]
    group = q.shape[1] // num_kv_heads
    k_factor = _per_head(k_scale, num_kv_heads, q.device)
    v_factor = _per_head(v_scale, num_kv_heads, q.device)
    out = torch.empty(*q.shape[:2], v_cache.shape[2], dtype=torch.float64, device=q.device)
    lse = torch.empty(*q.shape[:2], dtype=torch.float64, device=q.device)
    for b, (row, length) in enumerate(
        zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)
    ):
        slots = req_to_token[row, :length].long()
        k = (k_cache[slots].double() * k_factor).repeat_interleave(group, dim=1)
        v = (v_cache[slots].double() * v_factor).repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,thd->ht", q[b].double(), k) * sm_scale
        if logit_cap > 0:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        lse[b] = torch.logsumexp(scores, dim=-1)
        out[b] = torch.einsum("ht,thd->hd", torch.softmax(scores, dim=-1), v)
    return out, lse


def _per_head(scale: float | torch.Tensor, num_kv_heads: int, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(scale, dtype=torch.float64, device=device).expand(num_kv_heads)[:, None]
