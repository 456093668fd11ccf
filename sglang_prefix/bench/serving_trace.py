"""Replay of a request trace in Mooncake's format, scaled down to what a server can hold.

A line has ``timestamp`` (ms), ``input_length`` and ``output_length`` (tokens) and ``hash_ids``: ids
of the prompt's blocks of 512 tokens. The trace has no text: every id gets one fixed block of random
tokens, so that requests which begin with the same ids begin with the same tokens.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BLOCK_TOKENS", "TraceRequest", "TraceRow", "read_trace", "scale_trace"]

# Tokens of a block in the trace, as Mooncake published it.
BLOCK_TOKENS = 512
_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """A line of the trace: milliseconds, tokens, tokens, block ids."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


@dataclass(slots=True)
class TraceRow:
    """A request to send: token ids, tokens to generate, and when to send it in ms.

    The names, and the attributes below, are those of the rows of SGLang's bench_serving.
    """

    prompt: list[int]
    output_len: int
    timestamp: float


def read_trace(path: str | os.PathLike[str], count: int) -> list[TraceRequest]:
    """Read the first requests of a trace.

    Args:
        path: JSON lines, gzip or plain.
        count: how many to read, at least 1; a trace may have fewer.

    Raises:
        ValueError: the file cannot be read or is no such trace; one line with its name and why.
    """
    found: list[TraceRequest] = []
    try:
        for number, line in enumerate(_lines(path), 1):
            if len(found) == count:
                break
            if line.strip():
                found.append(_request(line, f"{path}, line {number}"))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a trace: it is not text") from None
    if not found:
        raise ValueError(f"{path} is not a trace: it holds no request")
    return sorted(found, key=lambda request: request.timestamp)


def _lines(path: str | os.PathLike[str]) -> Iterator[str]:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed:
        with gzip.open(path, "rt", encoding="utf-8") as text:
            yield from text
    else:
        with open(path, encoding="utf-8") as text:
            yield from text


def _request(line: str, where: str) -> TraceRequest:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg}") from None
    if not isinstance(data, dict) or not set(_FIELDS) <= data.keys():
        raise ValueError(f"{where}: a trace line is an object with {', '.join(_FIELDS)}")
    time, tokens, new_tokens, ids = (data[name] for name in _FIELDS)
    if not _is_number(time) or time < 0:
        raise ValueError(f"{where}: timestamp is {time!r}; legal: milliseconds, 0 or more")
    for name, value in (("input_length", tokens), ("output_length", new_tokens)):
        if not _is_number(value) or value != int(value) or value < 1:
            raise ValueError(f"{where}: {name} is {value!r}; legal: whole numbers from 1 on")
    whole = isinstance(ids, list) and all(type(one) is int and one >= 0 for one in ids)
    if not whole or len(ids) * BLOCK_TOKENS < tokens:
        raise ValueError(
            f"{where}: hash_ids is not a list of whole numbers, one for each {BLOCK_TOKENS} tokens "
            f"of the prompt's {tokens}"
        )
    return TraceRequest(float(time), int(tokens), int(new_tokens), tuple(ids))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


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
        trace: what :func:`read_trace` returned.
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
