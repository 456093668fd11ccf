"""``sglang.benchmark.utils.get_tokenizer``: the tokenizer as SGLang's load generator loads it.

Why: our own drivers must draw their prompts from the same ids as the load generator.
Releases: 0.5.17 to 0.5.23, called with a folder or a name.
When it is gone: ``missing`` names it, and ``sglang-prefix bench serving`` ends before it measures.
"""

from __future__ import annotations

from typing import Any

__all__ = ["load_tokenizer", "missing"]

_SYMBOL = "sglang.benchmark.utils.get_tokenizer"


def missing() -> list[str]:
    """What is not as we need it."""
    try:
        from sglang.benchmark.utils import get_tokenizer  # noqa: F401
    except ImportError as error:
        return [f"{_SYMBOL} ({error})"]
    return []


def load_tokenizer(name: str) -> Any:
    """The tokenizer in a folder or of that name; OSError or ValueError where there is none."""
    from sglang.benchmark.utils import get_tokenizer

    return get_tokenizer(name)
