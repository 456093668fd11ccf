"""The one place where kernels are launched, so that launches can be recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["fix_key", "launch", "recorded"]

Recorder = Callable[[Any, tuple[int, ...], dict[str, Any]], None]

_recorders: list[tuple[Recorder, bool]] = []
_has_fixed_key: set[int] = set()


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a Triton kernel on the current stream.

    Args:
        kernel: the jitted function.
        grid: programs per axis.
        arguments: its parameters by name, and compile options such as ``num_warps``.
    """
    runs = True
    for recorder, lets_run in _recorders:
        recorder(kernel, grid, arguments)
        runs = runs and lets_run
    if runs:
        if id(kernel) not in _has_fixed_key:
            fix_key(kernel)
        kernel[grid](**arguments)


def fix_key(kernel: Any) -> None:
    """Have Triton hash what a kernel calls before the kernel itself.

    Else, up to Triton 3.6 at least, the hash by which the cache finds a kernel has the constants of
    a function that it calls only if another kernel was hashed before that calls it, too: it would
    depend on which kernel a process happens to launch first. A kernel of the interpreter has none.
    """
    if id(kernel) in _has_fixed_key:
        return
    _has_fixed_key.add(id(kernel))
    if not hasattr(type(kernel), "cache_key"):
        return
    for name in kernel.fn.__code__.co_names:
        called = kernel.fn.__globals__.get(name)
        if hasattr(type(called), "cache_key"):
            fix_key(called)
    _ = kernel.cache_key


@contextmanager
def recorded(recorder: Recorder, *, run: bool = True) -> Iterator[None]:
    """For a ``with`` block, tell ``recorder`` of every launch before it happens.

    Args:
        recorder: gets the kernel, the grid and the arguments.
        run: False to record launches that then do not happen, as where there is no GPU.
    """
    entry = (recorder, run)
    _recorders.append(entry)
    try:
        yield
    finally:
        _recorders.remove(entry)
