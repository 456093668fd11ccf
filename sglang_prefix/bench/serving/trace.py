"""Replay of a request trace in Mooncake's format, scaled down to what a server can hold.

The trace has no text: every block id gets one fixed block of random tokens, so that requests which
begin with the same ids begin with the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_prefix.bench.workloads.traces import BLOCK_TOKENS, TraceRequest

__all__ = ["TraceRow", "scale_trace"]


@dataclass(slots=True)
class TraceRow:
    """A request to send: token ids, tokens to generate, and when to send it in ms."""

    prompt: list[int]
    output_len: int
    timestamp: float


def scale_trace(
    trace: Sequence[TraceRequest],
    token_ids: Sequence[int],
    *,
    block_tokens: int,
    max_prompt_tokens: int,
    max_output_tokens: int,
    seed: int,
) -> list[TraceRow]:
    """Turn a trace into requests with token ids.

    Args:
        trace: what `workloads.traces.read_trace` returned, or a part of it.
        token_ids: ids to draw from.
        block_tokens: tokens of a block here, 1 to 512; all lengths shrink in proportion.
        max_prompt_tokens, max_output_tokens: longer prompts lose their end, so that what they share
            stays shared; longer answers end sooner.
        seed: of the blocks; an id's block depends on nothing but the id and this.
    """
    ids = np.asarray(token_ids)
    blocks: dict[int, list[int]] = {}

    def block(hash_id: int) -> list[int]:
        if hash_id not in blocks:
            drawn = np.random.default_rng([seed, hash_id]).integers(len(ids), size=block_tokens)
            blocks[hash_id] = ids[drawn].tolist()
        return blocks[hash_id]

    rows = []
    for request in trace:
        length = min(_scaled(request.input_length, block_tokens), max_prompt_tokens)
        prompt: list[int] = []
        for hash_id in request.hash_ids:
            if len(prompt) >= length:
                break
            prompt += block(hash_id)
        output = min(_scaled(request.output_length, block_tokens), max_output_tokens)
        # Two tokens at least: the first comes from prefill and says nothing about decode.
        rows.append(TraceRow(prompt[:length], max(output, 2), request.timestamp))
    return rows


def _scaled(tokens: int, block_tokens: int) -> int:
    return max(1, round(tokens * block_tokens / BLOCK_TOKENS))
