"""The one place where kernels are launched, so that launches can be recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["launch", "recorded"]

_recorders: list[Callable[[Any, tuple[int, ...], dict[str, Any]], None]] = []


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a Triton kernel on the current stream.

    Args:
        kernel: the jitted function.
        grid: programs per axis.
        arguments: its parameters by name, and compile options such as ``num_warps``.
    """
    for recorder in _recorders:
        recorder(kernel, grid, arguments)
    kernel[grid](**arguments)


@contextmanager
def recorded(
    recorder: Callable[[Any, tuple[int, ...], dict[str, Any]], None],
) -> Iterator[None]:
    """For a ``with`` block, tell ``recorder`` of every launch before it happens."""
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.remove(recorder)
