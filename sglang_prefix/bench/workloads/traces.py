"""Batches from traces in Mooncake's format: what was running at a moment, and what it shared.

One JSON object per line: ``timestamp`` (ms), ``input_length`` and ``output_length`` (tokens), and
``hash_ids``, one id per block of 512 prompt tokens. Two requests that start with the same ids share
that prefix (kvcache-ai/Mooncake, FAST25-release/traces).
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_prefix.bench.workloads.trees import Tree
from sglang_prefix.files import parse_json

__all__ = ["BLOCK_TOKENS", "TraceBatch", "TraceRequest", "read_trace", "trace_batches"]

BLOCK_TOKENS = 512
# Some times Mooncake's largest, whose 24,000 requests have 400,000 blocks in all.
_MAX_BYTES, _MAX_LINES, _MAX_BLOCKS = 32 << 20, 1 << 18, 1 << 21
# Least and most of a number: years of milliseconds, more tokens than any context.
_LEGAL = {"timestamp": (0, 1 << 42), "input_length": (1, 1 << 30), "output_length": (1, 1 << 30)}
_MAX_ID = (1 << 63) - 1
# A trace does not say how fast answers were written. This decides which requests run at the same
# time: 50 ms per token is the usual bound on the time per output token.
_MS_PER_TOKEN = 50


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line of a trace; see the module text for the fields."""

    timestamp: int
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TraceBatch:
    """Requests that run at one moment.

    Attributes:
        moment_ms: on the trace's clock.
        tree: what they share.
        left_out: requests that ran at that moment too, but did not fit.
    """

    moment_ms: int
    tree: Tree
    left_out: int


def read_trace(path: str | os.PathLike[str]) -> list[TraceRequest]:
    """Read a trace, ``.jsonl`` or ``.jsonl.gz``, in order of arrival.

    Raises:
        ValueError: the file cannot be read, or a line is malformed; one line that names it.
    """
    opener: Any = gzip.open if os.fspath(path).endswith(".gz") else open
    requests: list[TraceRequest] = []
    left, number, num_blocks = _MAX_BYTES, 0, 0
    try:
        with opener(path, "rb") as file:
            # What a few compressed bytes become is without bound, and so is a line.
            while data := file.readline(left + 1):
                left, number = left - len(data), number + 1
                if left < 0 or number > _MAX_LINES:
                    most = f"{_MAX_BYTES >> 20} MiB of text, or {_MAX_LINES:,} lines"
                    raise ValueError(f"--trace {path} has more than {most}")
                if line := data.decode().strip():
                    requests.append(_parse(line, f"--trace {path}, line {number}"))
                    num_blocks += len(requests[-1].hash_ids)
                    if num_blocks > _MAX_BLOCKS:
                        raise ValueError(f"--trace {path} has more than {_MAX_BLOCKS:,} hash_ids")
    except UnicodeDecodeError:
        raise ValueError(f"--trace {path} is not text; legal: .jsonl, or .jsonl.gz") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--trace {path} cannot be read: {reason}") from None
    if not requests:
        raise ValueError(f"--trace {path} holds no request; legal: one JSON object per line")
    return sorted(requests, key=lambda request: request.timestamp)


def _parse(line: str, where: str) -> TraceRequest:
    try:
        data = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where}: no JSON object; legal: an object with hash_ids")
    for name, (least, most) in _LEGAL.items():
        if not _is_count(data.get(name), least, most):
            legal = f"a whole number from {least} to {most}"
            raise ValueError(f"{where}: {name} is {repr(data.get(name))[:40]}; legal: {legal}")
    ids, length = data.get("hash_ids"), data["input_length"]
    blocks = -(-length // BLOCK_TOKENS)
    if not isinstance(ids, list) or not all(map(_is_count, ids)) or len(ids) != blocks:
        legal = f"{blocks} whole numbers, one per {BLOCK_TOKENS} of input_length {length}"
        raise ValueError(f"{where}: hash_ids is {repr(ids)[:40]}; legal: {legal}")
    return TraceRequest(data["timestamp"], length, data["output_length"], tuple(ids))


def _is_count(value: object, least: int = 0, most: int = _MAX_ID) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def trace_batches(
    requests: Sequence[TraceRequest], count: int, max_tokens: int
) -> list[TraceBatch]:
    """Batches at evenly spaced moments of a trace.

    A request runs from its arrival for 50 ms per output token; at a moment in between it has
    written that many. Requests join in order of arrival as long as the batch's KV, every shared
    block once, fits; one that does not fit is left out.

    Args:
        requests: in order of arrival.
        count: number of moments.
        max_tokens: KV tokens that a batch may hold.

    Raises:
        ValueError: at a moment no running request fits ``max_tokens``.
    """
    first, last = requests[0].timestamp, requests[-1].timestamp
    batches = []
    for number in range(1, count + 1):
        moment = first + (last - first) * number // (count + 1)
        running = [
            r
            for r in requests
            if r.timestamp <= moment < r.timestamp + r.output_length * _MS_PER_TOKEN
        ]
        if not running:  # idle: the next one to arrive is a batch of its own
            running = [next((r for r in requests if r.timestamp >= moment), requests[-1])]
            moment = running[0].timestamp
        batches.append(_batch(running, moment, max_tokens))
    return batches


def _batch(running: Sequence[TraceRequest], moment: int, max_tokens: int) -> TraceBatch:
    nodes: dict[tuple[int, int], int] = {}  # (node above, block id) -> node
    parent: list[int] = []
    length: list[int] = []
    leaf: list[int] = []
    stored = 0
    for request in running:
        whole = request.hash_ids[: request.input_length // BLOCK_TOKENS]
        # The newest token is always the request's own.
        written = 1 + (moment - request.timestamp) // _MS_PER_TOKEN
        tail = request.input_length % BLOCK_TOKENS + written
        node, known = -1, 0
        for block in whole:
            if (node, block) not in nodes:
                break
            node, known = nodes[node, block], known + 1
        new = (len(whole) - known) * BLOCK_TOKENS + tail
        if stored + new > max_tokens:
            continue
        stored += new
        for block in whole[known:]:
            nodes[node, block] = len(parent)
            parent.append(node)
            length.append(BLOCK_TOKENS)
            node = len(parent) - 1
        leaf.append(len(parent))
        parent.append(node)
        length.append(tail)
    if not leaf:
        raise ValueError(
            f"none of the {len(running)} requests at {moment} ms fits into {max_tokens} tokens"
        )
    cut = [0] * len(leaf)
    tree = Tree(*(np.asarray(part, dtype=np.int64) for part in (parent, length, leaf, cut)))
    return TraceBatch(moment, tree, len(running) - len(leaf))
