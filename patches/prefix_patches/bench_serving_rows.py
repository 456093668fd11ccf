"""``sglang.benchmark.datasets.DatasetRow``: one request of SGLang's load generator.

Why: the rows of a trace are made by us, as token ids; the load generator takes none but its own.
Releases: 0.5.17 to 0.5.23, where it takes prompt, prompt_len, output_len and timestamp.
When it is gone: ``missing`` names it, and ``sglang-prefix bench serving`` ends before it measures.
"""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["dataset_row", "missing"]

_SYMBOL = "sglang.benchmark.datasets.DatasetRow"
_NEEDED = ("prompt", "prompt_len", "output_len", "timestamp")


def missing() -> list[str]:
    """What is not as we need it."""
    try:
        from sglang.benchmark.datasets import DatasetRow
    except ImportError as error:
        return [f"{_SYMBOL} ({error})"]
    lacking = [name for name in _NEEDED if name not in inspect.signature(DatasetRow).parameters]
    return [f"{_SYMBOL} (takes no {', '.join(lacking)})"] if lacking else []


def dataset_row(prompt: list[int], output_len: int, timestamp: float) -> Any:
    """A request of these token ids, sent at a time in ms, for so many tokens."""
    from sglang.benchmark.datasets import DatasetRow

    return DatasetRow(
        prompt=prompt, prompt_len=len(prompt), output_len=output_len, timestamp=timestamp
    )
