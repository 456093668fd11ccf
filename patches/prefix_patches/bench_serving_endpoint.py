"""``RuntimeEndpoint``, the server behind SGLang's frontend language, with every ``gen`` streamed.

Why: the language asks for whole answers, in which the times of their tokens are lost. What it
sends, and when, stays the language's.
Releases: 0.5.17 to 0.5.23, with ``generate(s, sampling_params)`` and ``generate_stream`` of the
same parameters, which yields pairs of new text and meta information.
When it is gone: ``missing`` names it, and ``sglang-prefix bench serving`` ends before it measures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["endpoint", "missing", "streaming_endpoint"]

_SYMBOL = "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint"
_METHODS = ("generate", "generate_stream")
_PARAMETERS = ["self", "s", "sampling_params"]

Chunks = Iterator[tuple[str, dict[str, Any]]]


def missing() -> list[str]:
    """What is not as we need it."""
    try:
        from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
    except ImportError as error:
        return [f"{_SYMBOL} ({error})"]
    # Its base class has them too, and does nothing in them.
    found = [(name, vars(RuntimeEndpoint).get(name)) for name in _METHODS]
    return [
        f"{_SYMBOL}.{name} (not a method of s, sampling_params)"
        for name, method in found
        if method is None or list(inspect.signature(method).parameters) != _PARAMETERS
    ]


def endpoint(url: str) -> Any:
    """The language's server at a URL."""
    from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

    return RuntimeEndpoint(url)


def streaming_endpoint(url: str, gather: Callable[[Chunks], tuple[str, dict[str, Any]]]) -> Any:
    """The same, each of whose answers is streamed.

    Args:
        url: of the server.
        gather: makes the text and the meta information of an answer from its chunks, new text and
            meta information each. The request is sent when it asks for the first.
    """
    from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

    class Streaming(RuntimeEndpoint):  # type: ignore[misc, unused-ignore]
        def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
            return gather(self.generate_stream(s, sampling_params))

    return Streaming(url)
