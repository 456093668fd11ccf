"""A stand-in for SGLang's compiled kernels on hosts without a GPU.

SGLang imports a handful of CPU functions from `sgl_kernel` at start-up that a plain dense model
never calls on the CPU. The published package only loads where CUDA is, so on other hosts those
imports alone would keep SGLang from starting. This module has exactly these names, and what
speculative decoding with n-grams asks for: integers, moved about, slow and plain, and no trees of a
model's drafts. Anything else is absent, so that SGLang's optional imports stay optional.
"""

from __future__ import annotations

import ctypes
import dis
import sys
from typing import Any, NoReturn

__version__ = "0.0.0+stand.in"

# Tells this module from the real one, for `sglang-prefix exec` and `sglang-prefix doctor`.
IS_STAND_IN = True


# Torch is the caller's, and not imported here. What drafts of n-grams need:


def assign_req_to_token_pool_cpu(
    rows: Any, req_to_token: Any, start: Any, end: Any, slots: Any, width: int
) -> None:
    """Write slots, request after request, to positions ``[start, end)`` of each one's row."""
    taken = 0
    for row, first, last in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
        req_to_token[row, first:last] = slots[taken : taken + last - first].to(req_to_token.dtype)
        taken += last - first


def assign_extend_cache_locs_cpu(
    rows: Any, req_to_token: Any, start: Any, end: Any, slots: Any, width: int
) -> None:
    """Read into ``slots`` what :func:`assign_req_to_token_pool_cpu` writes."""
    taken = 0
    for row, first, last in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
        slots[taken : taken + last - first] = req_to_token[row, first:last]
        taken += last - first


def fill_accept_out_cache_loc_cpu(accept_index: Any, out_cache_loc: Any, accepted: Any) -> None:
    """Slots of the tokens that were accepted, without the gaps (-1)."""
    found = out_cache_loc[accept_index[accept_index > -1].long()]
    accepted[: len(found)] = found


def copy_all_layer_kv_cache_cpu(pointers: Any, row_bytes: Any, target: Any, source: Any) -> None:
    """Move rows of every cache from ``source`` to ``target``, as if all at once."""
    moves = [(t, s) for t, s in zip(target.tolist(), source.tolist(), strict=True) if t != s]
    for base, size in zip(pointers.tolist(), row_bytes.tolist(), strict=True):
        rows = [(t, ctypes.string_at(base + s * size, size)) for t, s in moves]
        for slot, row in rows:
            ctypes.memmove(base + slot * size, row, size)


def verify_tree_greedy_cpu(
    predicts: Any,
    accept_index: Any,
    accept_token_num: Any,
    candidates: Any,
    retrive_index: Any,
    retrive_next_token: Any,
    retrive_next_sibling: Any,
    target_predict: Any,
) -> None:
    """Walk each request's drafts from the first token on, along those that the model would say.

    Args:
        predicts: [B * n], written: what the model says behind each accepted token.
        accept_index: [B, depth] of -1, written: indices of accepted tokens, the first one included.
        accept_token_num: [B], written: accepted drafts.
        candidates: [B, n] the first token and its drafts.
        retrive_index: [B, n] index of each in ``predicts``.
        retrive_next_token, retrive_next_sibling: [B, n] the first draft behind each, and the next
            one behind the same; -1 for none.
        target_predict: [B, n] what the model says behind each.
    """
    said = target_predict.flatten().tolist()
    depth = accept_index.shape[1]
    trees = (candidates, retrive_index, retrive_next_token, retrive_next_sibling)
    for b, (tokens, index, child, sibling) in enumerate(
        zip(*(tree.tolist() for tree in trees), strict=True)
    ):
        path, node = [0], child[0]
        while node != -1 and len(path) < depth:
            if tokens[node] == said[index[path[-1]]]:
                path.append(node)
                node = child[node]
            else:
                node = sibling[node]
        for place, node in enumerate(path):
            accept_index[b, place] = index[node]
            predicts[index[node]] = said[index[node]]
        accept_token_num[b] = len(path) - 1


# What drafts of a model need beside that:


def assign_draft_cache_locs_contiguous_cpu(
    rows: Any, req_to_token: Any, seq_lens: Any, slots: Any, width: int, topk: int, steps: int
) -> None:
    """Read into ``slots`` those behind each request, one for each draft."""
    count = topk * steps
    for i, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        slots[i * count : (i + 1) * count] = req_to_token[row, length : length + count]


def fill_bonus_tokens_cpu(tokens: Any, lengths: Any, bonus: Any, stride: int) -> None:
    """The last of the tokens that each request has accepted."""
    flat = tokens.flatten()
    for i, length in enumerate(lengths.tolist()):
        bonus[i] = flat[i * stride + length - 1]


def build_tree_kernel_efficient_cpu(
    parents: Any,
    selected: Any,
    verified_seq_len: Any,
    tree_mask: Any,
    positions: Any,
    retrive_index: Any,
    retrive_next_token: Any,
    retrive_next_sibling: Any,
    topk: int,
    depth: int,
    draft_token_num: int,
    mask_mode: int,
) -> None:
    """The links, the positions and the mask of drafts, where they are chains."""
    if topk != 1:
        raise NotImplementedError("the stand-in for sgl_kernel builds no trees; legal: topk 1")
    count = draft_token_num
    mask = tree_mask.view(-1, count, count)
    for b, length in enumerate(verified_seq_len.tolist()):
        for i in range(count):
            positions[b * count + i] = length + i
            retrive_index[b, i] = b * count + i
            retrive_next_token[b, i] = i + 1 if i + 1 < count else -1
            retrive_next_sibling[b, i] = -1
            mask[b, i] = False
            mask[b, i, : i + 1] = True


def __getattr__(name: str) -> NoReturn:
    message = (
        f"sgl_kernel has no {name!r}: this is sglang-prefix's stand-in for hosts where the real "
        f"sgl_kernel does not load"
    )
    # `from sgl_kernel import X` would turn an AttributeError into an ImportError without a reason;
    # `hasattr` needs the AttributeError.
    caller = sys._getframe(1)
    if caller.f_code.co_code[caller.f_lasti] == dis.opmap["IMPORT_FROM"]:
        raise ImportError(message, name="sgl_kernel")
    raise AttributeError(message)
