"""Compiled loops: planning walks small trees, which numpy has no operations for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

__all__ = ["jit"]

Function = TypeVar("Function", bound=Callable[..., object])


def jit(function: Function) -> Function:
    """Compile a loop over int64 and float64 arrays with numba, at its first call.

    Callers pass C-contiguous, writable arrays, since any other kind would be compiled anew, and
    `packing.planner.warm_up` calls every loop once when a planner is built, so that nothing is
    compiled while serving. The machine code is kept beside the source, or else where the user's
    caches are; where neither can be written, every process compiles for itself. numba looks at the
    age of one file only, so a loop may call loops of its own module and no others.

    SGLang depends on numba. A host that runs only the kernels may lack it: the same functions are
    then run by Python, with the same results and some fifty times slower.
    """
    try:
        from numba import njit
    except ImportError:
        return function
    try:
        return cast(Function, njit(function, cache=True))
    except RuntimeError:  # no place for a cache
        return cast(Function, njit(function))
