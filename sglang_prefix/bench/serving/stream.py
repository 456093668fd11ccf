"""Streamed answers of a server, line by line: each is checked before it is kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

__all__ = ["Answer", "add_chunk"]

_MAX_TOKEN_CHARS = 1024  # a token of spaces is long
_Count = Annotated[int, Field(ge=0, lt=1 << 31)]


class _MetaInfo(TypedDict):
    completion_tokens: _Count


class _Chunk(TypedDict):
    """A line of a streamed answer: its sample, and what of that has come so far."""

    index: NotRequired[_Count]
    text: str
    output_ids: list[_Count]
    meta_info: _MetaInfo


_CHUNK: TypeAdapter[_Chunk] = TypeAdapter(_Chunk)


@dataclass(slots=True)
class Answer:
    """One streamed answer.

    Attributes:
        began: when it was asked for.
        chunks: (seconds, tokens so far) of what came.
        text, ids: of the whole answer.
    """

    began: float
    chunks: list[tuple[float, int]] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)


def add_chunk(answers: Sequence[Answer], line: bytes, sampling: Mapping[str, Any]) -> None:
    """Take a line of a stream to the answer that it is of; RuntimeError if it is of none."""
    now = time.perf_counter()
    try:
        chunk = _CHUNK.validate_json(line, strict=True)
    except ValidationError:
        said = " ".join(line[:300].decode(errors="replace").split())
        raise RuntimeError(f"the server failed: {said}") from None
    index, ids, most = chunk.get("index", 0), chunk["output_ids"], sampling["max_new_tokens"]
    count = chunk["meta_info"]["completion_tokens"]
    so_far = answers[index].chunks if index < len(answers) else []
    is_legal = index < len(answers) and (so_far[-1][1] if so_far else 0) <= count <= most
    # A line without a new token may come at the end.
    is_legal = is_legal and len(so_far) <= most + 1 and len(ids) <= most
    if not is_legal or len(chunk["text"]) > _MAX_TOKEN_CHARS * most:
        raise RuntimeError("the server answers with more than it was asked for")
    so_far.append((now, count))
    answers[index].text, answers[index].ids = chunk["text"], ids
