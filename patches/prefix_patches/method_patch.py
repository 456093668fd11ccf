"""Replacing a method once, verifiably."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["is_patched", "patch_method"]

_MARKER = "_sglang_prefix_patch"


def patch_method(
    owner: type, name: str, wrapper: Callable[..., Any], *, classmethod_: bool = False
) -> None:
    """Replace ``owner.name`` by one that calls ``wrapper(original, *args, **kwargs)``.

    Another plugin's patch under ours or over ours keeps working; doing it twice does nothing.
    """
    if is_patched(owner, name):
        return
    descriptor = vars(owner)[name]
    original = descriptor.__func__ if classmethod_ else descriptor

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(patched, _MARKER, True)
    setattr(owner, name, classmethod(patched) if classmethod_ else patched)


def is_patched(owner: type, name: str) -> bool:
    """Whether our patch is in the chain of wrappers behind ``owner.name``."""
    function = getattr(owner, name, None)
    function = getattr(function, "__func__", function)
    while function is not None:
        if vars(function).get(_MARKER) and "__wrapped__" in vars(function):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
