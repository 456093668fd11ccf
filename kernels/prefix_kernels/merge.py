"""Merging partial attention results by online softmax."""

from __future__ import annotations

import torch

__all__ = ["merge_partials"]


def merge_partials(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    request_indptr: torch.Tensor,
    max_partials_per_request: int,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """Combine each request's partials into its attention output.

    The weight of partial ``i`` is ``exp(lse_i - lse)`` with ``lse = logsumexp(lse_i)``
    (PAT, arXiv 2511.22333, section 4; the online softmax of arXiv 1805.02867). A partial over no
    tokens has lse = -inf, weighs nothing, and its output is not looked at.

    Args:
        partial_out: [num_partials, Hq, Dv] float32, each normalised by its own softmax sum.
        partial_lse: [num_partials, Hq] float32, natural log.
        request_indptr: [B + 1] int64; request ``b`` owns partials ``indptr[b]`` to
            ``indptr[b + 1]``, at least one with lse > -inf.
        max_partials_per_request: largest number of partials of one request (host integer).
        out: [B, Hq, Dv], any float dtype; written.
        lse: [B, Hq] float32; written where given.
    """
    batch = out.shape[0]
    width = max_partials_per_request
    if width == 1:
        out.copy_(partial_out)
        if lse is not None:
            lse.copy_(partial_lse)
        return
    if partial_out.shape[0] == batch * width:  # every request has as many: nothing to gather
        values = partial_out.view(batch, width, *out.shape[1:])
        logs = partial_lse.view(batch, width, out.shape[1])
    else:
        index = request_indptr[:-1, None] + torch.arange(width, device=request_indptr.device)
        missing = index >= request_indptr[1:, None]
        index = index.masked_fill_(missing, 0)
        values = partial_out[index]
        logs = partial_lse[index].masked_fill_(missing[..., None], -torch.inf)
    total = torch.logsumexp(logs, dim=1)
    weights = torch.exp(logs - total[:, None])
    # Not a plain product: an unused partial may hold anything, and 0 * nan is nan.
    values = torch.where(weights[..., None] > 0, values, 0)
    out.copy_((weights[..., None] * values).sum(dim=1))
    if lse is not None:
        lse.copy_(total)
