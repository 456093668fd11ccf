"""``sglang.benchmark.serving``, SGLang's own load generator, used as a library.

Why: both servers of a comparison must get the same requests as token ids, and the same requests
once more to compare tokens; the tool can neither give its requests away nor take any.
Touched, for the length of one call: ``run_benchmark`` (held back while the tool's own parser reads
flags), ``get_dataset`` (gives the requests that it is handed) and
``get_mooncake_request_over_time`` (the trace replay, which draws text from hash ids, takes rows of
token ids). How requests are sent, timed and summed up stays the tool's.
Releases: 0.5.17 to 0.5.23, where the module has these names and ``cli_main``.
When one is gone: ``missing`` names it, and ``sglang-prefix bench serving`` ends before it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any
from unittest.mock import patch

__all__ = ["Namespace", "load_requests", "missing", "parse", "run"]

Namespace = argparse.Namespace
_SYMBOLS = ("cli_main", "run_benchmark", "get_dataset", "get_mooncake_request_over_time")


def _module() -> Any:
    from sglang.benchmark import serving

    return serving


def missing() -> list[str]:
    """Symbols that we need and that are not there, as dotted names."""
    try:
        serving = _module()
    except ImportError as error:
        return [f"sglang.benchmark.serving ({error})"]
    return [f"{serving.__name__}.{name}" for name in _SYMBOLS if not hasattr(serving, name)]


def parse(flags: Sequence[str]) -> Namespace:
    """Read flags with the tool's own parser.

    Args:
        flags: as on its command line.

    Raises:
        ValueError: the tool refuses them; its own message.
    """
    serving = _module()
    found: list[Namespace] = []
    said = tempfile.SpooledTemporaryFile(mode="w+")  # noqa: SIM115
    with (
        said,
        patch.object(serving, "run_benchmark", found.append),
        patch.object(sys, "argv", ["sglang.benchmark.serving", *flags]),
    ):
        try:
            with contextlib.redirect_stderr(said):
                serving.cli_main()
        except SystemExit:
            said.seek(0)
            raise ValueError(said.read().strip().splitlines()[-1]) from None
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
    import random

    import numpy as np

    random.seed(arguments.seed)
    np.random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as home, patch.dict(os.environ, {"HOME": home}):
        # Generated prefixes are kept under the home folder by their lengths and the class of the
        # tokenizer. Those of another model could hold ids that this one does not have.
        rows: list[Any] = _module().get_dataset(arguments, tokenizer, arguments.model)
    return rows


def run(arguments: Namespace, rows: Sequence[Any]) -> dict[str, Any]:
    """Send requests to the server that the flags name, and return what the tool found.

    Args:
        arguments: from :func:`parse`.
        rows: from :func:`load_requests`; with the data set "mooncake" objects that also have
            ``timestamp``, in ms, which are sent at that time over the flag's slow-down factor.
    """
    serving = _module()
    given: list[Any] = list(rows)
    if arguments.dataset_name == "mooncake":
        given = [_TraceRecord(row) for row in rows]

    def replay(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        return _over_time(rows, arguments.mooncake_slowdown_factor)

    with _replaced(serving, get_dataset=lambda *args: given, get_mooncake_request_over_time=replay):
        found: dict[str, Any] = serving.run_benchmark(arguments)
    return found


class _TraceRecord(dict[str, Any]):
    """What the tool reads of a trace before it asks for the rows, and (0.5.17) of rows later."""

    def __init__(self, row: Any) -> None:
        super().__init__(timestamp=row.timestamp, output_length=row.output_len)
        self.__dict__.update(vars(row))


@contextlib.contextmanager
def _replaced(module: Any, **replacements: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, value in replacements.items():
            stack.enter_context(patch.object(module, name, value))
        yield


async def _over_time(rows: Sequence[Any], slowdown: float) -> AsyncIterator[Any]:
    begin = time.perf_counter()
    for row in rows:
        due = begin + (row.timestamp - rows[0].timestamp) / 1000 * slowdown
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield row
