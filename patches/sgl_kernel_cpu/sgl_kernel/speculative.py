"""What SGLang imports from `sgl_kernel.speculative` for drafts of n-grams."""

from __future__ import annotations

from typing import Any

__all__ = ["reconstruct_indices_from_tree_mask"]


def reconstruct_indices_from_tree_mask(
    tree_mask: Any,
    verified_seq_len: Any,
    positions: Any,
    retrive_index: Any,
    retrive_next_token: Any,
    retrive_next_sibling: Any,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """The links of trees of drafts, and the position of each draft, from who attends to whom.

    Args:
        tree_mask: [B * n * n], 1 where a draft attends to another, which is above it, or itself.
        verified_seq_len: [B] tokens before the drafts.
        positions: [B * n], written.
        retrive_index, retrive_next_token, retrive_next_sibling: [B, n], written; see
            :func:`sgl_kernel.verify_tree_greedy_cpu`.
        batch_size: B.
        draft_token_num: n.
    """
    count = draft_token_num
    trees = tree_mask.view(batch_size, count, count).tolist()
    for b, (tree, length) in enumerate(zip(trees, verified_seq_len.tolist(), strict=True)):
        above = [[j for j in range(i) if tree[i][j]] for i in range(count)]
        parents = [found[-1] if found else -1 for found in above]
        for i in range(count):
            behind = [k for k in range(i + 1, count) if parents[k] == i]
            beside = [k for k in range(i + 1, count) if i and parents[k] == parents[i]]
            positions[b * count + i] = length + len(above[i])
            retrive_index[b, i] = b * count + i
            retrive_next_token[b, i] = behind[0] if behind else -1
            retrive_next_sibling[b, i] = beside[0] if beside else -1
