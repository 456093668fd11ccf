"""Compiled loops: planning walks small trees, which numpy has no operations for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

__all__ = ["compiled"]

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """Compile a loop over int64 and float64 arrays with numba, at its first call.

    SGLang depends on numba. A host that runs only the kernels may lack it; the same function is
    then run by Python, with the same results and some fifty times slower. Nothing is cached on
    disk: an installation may be read-only, and :func:`sglang_prefix.planner.warm_up` compiles all
    of them when a planner is built. Callers pass C-contiguous, writable arrays, since every other
    kind would be compiled anew.
    """
    try:
        from numba import njit
    except ImportError:
        return function
    return cast(Function, njit(function))
