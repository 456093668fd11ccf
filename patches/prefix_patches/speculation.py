"""Verify passes of speculative decoding: what they check, and where SGLang sends them.

In such a pass the target model gets several tokens of each request: the one that was accepted last
and the drafts behind it. Where those are a chain, each attends to what stands before it, and the
pass is causal attention. Where they are a tree, siblings must not see each other; a mask says so.

EAGLE, MTP (NEXTN) and a draft model of its own draft a chain with ``--speculative-eagle-topk 1``.
The n-gram tables of SGLang do so with a breadth of 1 only where a match is as long as it may be:
what a shorter one lacks is filled with drafts of token 0 behind the first token, a tree. Its mask
is made on the CPU (``NGRAMWorker._prepare_draft_tokens``) and noted here.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from prefix_patches.attributes import ModelRunner, ScheduleBatch
from prefix_patches.patch import RELEASES, Touch, resolve
from prefix_patches.stock_backend import resolved_args

__all__ = ["TOUCHED", "Speculation", "are_chains", "can_verify", "install", "speculation_of"]

# Those that draft chains, by SGLang's names for `--speculative-algorithm` once it is resolved:
# NEXTN is EAGLE, or FROZEN_KV_MTP. Others check blocks of their own kinds.
_DRAFTING = ("EAGLE", "EAGLE3", "FROZEN_KV_MTP", "STANDALONE")
_NGRAM = "NGRAM"
# Of a schedule batch: tokens and mask of its n-gram drafts, on the CPU.
_DRAFTS_ATTRIBUTE = "_sglang_prefix_drafts"


class Speculation(NamedTuple):
    """How a server speculates.

    Attributes:
        drafts: tokens of each request that a verify pass checks, at most.
        breadth: drafts that may follow a token; 1 for chains.
        comes_here: whether verify passes come to the backend that decodes.
        prefill_name: of the backend that prefills.
        is_ngram: whether tables of n-grams draft.
        is_known: whether its drafts are known to be chains where the breadth is 1.
    """

    drafts: int
    breadth: int
    comes_here: bool
    prefill_name: str | None
    is_ngram: bool
    is_known: bool


def speculation_of(model_runner: ModelRunner) -> Speculation | None:
    """How the server of a runner speculates; None if it does not, or the runner drafts.

    A backend of two has verify passes served by the one for prefill unless
    ``--speculative-attention-mode decode`` is given.
    """
    args = resolved_args(model_runner)
    if args.speculative_algorithm is None or model_runner.is_draft_worker:
        return None
    name = args.speculative_algorithm.upper()
    prefill = args.prefill_attention_backend or args.attention_backend
    decode = args.decode_attention_backend or args.attention_backend
    return Speculation(
        args.speculative_num_draft_tokens or 0,
        args.speculative_eagle_topk or 0,
        prefill == decode or args.speculative_attention_mode == "decode",
        prefill,
        name == _NGRAM,
        name in (*_DRAFTING, _NGRAM),
    )


def can_verify(stock: AttentionBackend) -> bool:
    """Whether a stock backend checks drafts: ``torch_native`` does not (0.5.17 to 0.5.23).

    It takes the pass for an extend and reads lengths that the pass does not have, which ends the
    server.
    """
    home = "sglang.srt.layers.attention.torch_native_backend"
    return bool(stock.forward_extend.__module__ != home)


def are_chains(
    spec_info: Any, schedule_batch: ScheduleBatch | None, *, greedy: bool = False
) -> bool | None:
    """Whether the drafts of every request of a verify pass are known to be a chain.

    Args:
        spec_info: of the pass.
        schedule_batch: behind it; None where none is known.
        greedy: whether SGLang accepts what is most likely and nothing else, as it always does on a
            CPU. Then a draft that repeats a sibling is never reached, whatever it attends to.

    Returns:
        None where the pass came without its drafts.
    """
    eagle, ngram = _inputs()
    if not isinstance(spec_info, (eagle, ngram)):
        return False
    checked: Any = spec_info
    if isinstance(spec_info, eagle):
        return bool(checked.topk == 1)
    noted = None if schedule_batch is None else vars(schedule_batch).get(_DRAFTS_ATTRIBUTE)
    if noted is None:
        return None
    tokens, mask = noted
    return _is_causal(tokens, mask, checked.draft_token_num, greedy=greedy)


def _is_causal(
    tokens: NDArray[np.integer], mask: NDArray[np.integer], count: int, *, greedy: bool
) -> bool:
    """Whether every draft sees exactly those before it, unless it cannot matter."""
    tokens, mask = tokens.reshape(-1, count), mask.reshape(-1, count, count).astype(bool)
    wrong = (mask != np.tri(count, dtype=bool)).any(-1)  # [B, count]
    if not wrong.any():
        return True
    if not greedy:
        return False
    # Behind the first token alone, as a sibling before it of the same token is.
    behind_first = (mask.sum(-1) == 2) & mask[..., 0] & mask.diagonal(axis1=-2, axis2=-1)
    same = tokens[:, :, None] == tokens[:, None, :]
    earlier = np.tri(count, k=-1, dtype=bool)
    repeats = (same & behind_first[:, None, :] & earlier).any(-1) & behind_first
    return bool((repeats | ~wrong).all())


@cache
def _inputs() -> tuple[type, type]:
    """Classes of what a verify pass checks: of EAGLE and its kin, and of n-grams."""
    home = "sglang.srt.speculative"
    eagle: type = resolve(f"{home}.eagle_info:EagleVerifyInput")
    ngram: type = resolve(f"{home}.ngram_info:NgramVerifyInput")
    return eagle, ngram


def _prepare_draft_tokens(original: Any, self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    tokens, mask = original(self, batch, *args, **kwargs)
    setattr(batch, _DRAFTS_ATTRIBUTE, (tokens, mask))
    return tokens, mask


TOUCHED = (
    Touch(
        "sglang.srt.speculative.ngram_worker:NGRAMWorker._prepare_draft_tokens",
        why="its mask says whether n-gram drafts are chains, and is on the CPU nowhere else",
        releases=f"{RELEASES}, returns tokens [B * n] and the mask [B * n * n] as NumPy arrays",
        if_gone="the backend of a server that drafts with n-grams refuses to start",
        parameters=("self", "batch"),
        replacement=_prepare_draft_tokens,
    ),
)


def install() -> None:
    """Note n-gram drafts; only on servers that have some. Idempotent.

    Raises:
        RuntimeError: SGLang lacks what is needed, or a patch did not take.
    """
    for touch in TOUCHED:
        problem = touch.problem()
        if problem is not None:
            raise RuntimeError(f"sglang-prefix cannot see the drafts of n-grams: {problem}")
        touch.install()
        if not touch.installed():
            raise RuntimeError(f"sglang-prefix: the patch {touch.name} did not take effect")
