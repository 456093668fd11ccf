"""SGLang's load generator, ``sglang.benchmark.serving``, and its frontend language, as libraries.

Why: both servers of a comparison must get the same requests as token ids, and the same requests
once more to compare tokens; the tool can neither give its requests away nor take any. How requests
are sent, timed and summed up stays the tool's; what the language asks for stays the language's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import io
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np

from prefix_patches.patch import RELEASES, Touch

__all__ = [
    "TOUCHED",
    "Namespace",
    "dataset_row",
    "endpoint",
    "load_requests",
    "load_tokenizer",
    "missing",
    "parse",
    "run",
]

Namespace = argparse.Namespace

_TOOL = "sglang.benchmark.serving"
_ENDPOINT = "sglang.lang.backend.runtime_endpoint:RuntimeEndpoint"

_touch = functools.partial(
    Touch,
    if_gone="`missing` names it, and `sglang-prefix bench serving` ends before it measures",
)

TOUCHED = (
    _touch(f"{_TOOL}:cli_main", why="reads flags with the tool's own parser"),
    _touch(f"{_TOOL}:run_benchmark", why="runs the tool; held back while its parser reads flags"),
    _touch(
        f"{_TOOL}:get_dataset",
        why="makes the tool's requests; for the length of a run it gives those that it is handed",
    ),
    _touch(
        f"{_TOOL}:get_request",
        why="sends requests as fast as it may; those of a trace are sent at their times",
    ),
    _touch(
        "sglang.benchmark.datasets:DatasetRow",
        why="the rows of a trace are made by us; the tool takes none but its own",
        keywords=("prompt", "prompt_len", "output_len", "timestamp"),
    ),
    _touch(
        "sglang.benchmark.utils:get_tokenizer",
        why="our own drivers must draw their prompts from the same ids as the tool",
        releases=f"{RELEASES}, called with a folder or a name",
    ),
    _touch(
        f"{_ENDPOINT}.generate",
        why="the language asks for whole answers, in which the times of their tokens are lost",
        releases=f"{RELEASES}, with the prompt in `s.text_`",
        parameters=("self", "s", "sampling_params"),
        exact=True,
    ),
)


def missing() -> list[str]:
    """Symbols that `bench serving` needs and that are not there, with the reason."""
    return [problem for touch in TOUCHED if (problem := touch.problem()) is not None]


def _module() -> Any:
    from sglang.benchmark import serving

    return serving


def parse(flags: Sequence[str]) -> Namespace:
    """Read flags with the tool's own parser.

    Args:
        flags: as on its command line.

    Raises:
        ValueError: the tool refuses them; its own message.
    """
    serving = _module()
    found: list[Namespace] = []
    said = io.StringIO()
    try:
        with (
            contextlib.redirect_stderr(said),
            patch.object(serving, "run_benchmark", found.append),
            patch.object(sys, "argv", [_TOOL, *flags]),
        ):
            serving.cli_main()
    except SystemExit:
        raise ValueError(said.getvalue().strip().splitlines()[-1]) from None
    (arguments,) = found
    arguments.tokenize_prompt = _takes_token_ids(arguments.dataset_name)
    return arguments


def _takes_token_ids(dataset: str) -> bool:
    """Whether a data set comes as token ids; generated shared prefixes do from 0.5.23 on."""
    if dataset != "generated-shared-prefix":
        return True
    from sglang.benchmark.datasets.generated_shared_prefix import GeneratedSharedPrefixDataset

    return "input_ids" in {field.name for field in dataclasses.fields(GeneratedSharedPrefixDataset)}


def load_requests(arguments: Namespace, tokenizer: Any) -> list[Any]:
    """The requests that the tool makes for these flags: objects with prompt and output_len."""
    random.seed(arguments.seed)
    np.random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as home, patch.dict(os.environ, {"HOME": home}):
        # Generated prefixes are kept under the home folder by their lengths and the class of the
        # tokenizer. Those of another model could hold ids that this one does not have.
        rows: list[Any] = _module().get_dataset(arguments, tokenizer, arguments.model)
    return rows


def run(arguments: Namespace, rows: Sequence[Any], url: str, speed: float | None) -> dict[str, Any]:
    """Send requests to a server, and return what the tool found.

    Args:
        arguments: from :func:`parse`.
        rows: from :func:`load_requests` or :func:`dataset_row`.
        url: of the server.
        speed: to send each at its timestamp, so many times faster; None for as fast as the flags
            allow.
    """
    serving = _module()
    changed: dict[str, Any] = {"get_dataset": lambda *args: list(rows)}
    if speed is not None:
        changed["get_request"] = lambda *args: _over_time(rows, speed)
    given = Namespace(**{**vars(arguments), "base_url": url})
    with patch.multiple(serving, **changed):
        found: dict[str, Any] = serving.run_benchmark(given)
    return found


async def _over_time(rows: Sequence[Any], speed: float) -> AsyncIterator[Any]:
    begin = time.perf_counter()
    for row in rows:
        due = begin + (row.timestamp - rows[0].timestamp) / 1000 / speed
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield row


def dataset_row(prompt: list[int], output_len: int, timestamp: float) -> Any:
    """A request of these token ids, sent at a time in ms, for so many tokens."""
    from sglang.benchmark.datasets import DatasetRow

    return DatasetRow(
        prompt=prompt, prompt_len=len(prompt), output_len=output_len, timestamp=timestamp
    )


def load_tokenizer(name: str) -> Any:
    """The tokenizer in a folder or of that name; OSError or ValueError where there is none."""
    from sglang.benchmark.utils import get_tokenizer

    return get_tokenizer(name)


def endpoint(
    url: str, generate: Callable[[str, int], tuple[str, dict[str, Any]]], key: str | None
) -> Any:
    """The language's server at a URL, whose answers come from ``generate``.

    Args:
        url: of the server.
        generate: called with a prompt and the number of tokens; returns the text of the answer
            and its meta information.
        key: that the server wants.
    """
    from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

    class Endpoint(RuntimeEndpoint):  # type: ignore[misc, unused-ignore]
        def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
            return generate(s.text_, sampling_params.max_new_tokens)

    return Endpoint(url, api_key=key)
