"""One way to say what of SGLang we touch, to check that it is there, and to replace a method."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["RELEASES", "Touch", "optional_module", "resolve"]

RELEASES = "0.5.17 to 0.5.23"  # those whose source was read for what we touch
_MARKER = "_sglang_prefix_patch"


def optional_module(module: str) -> Any:
    """A module of SGLang that not every release has, else None."""
    try:
        return import_module(module)
    except ImportError:
        return None


def resolve(symbol: str) -> Any:
    """What ``module:name`` or ``module:Class.name`` is. Raises ImportError or AttributeError."""
    module, _, path = symbol.partition(":")
    return functools.reduce(getattr, path.split("."), import_module(module))


@dataclass(frozen=True, slots=True)
class Touch:
    """One symbol of SGLang that we use or replace.

    SGLang's own hook registry is not used: it silently skips a target that another plugin has
    patched, and turns a missing target into a log line.

    Attributes:
        symbol: ``module:name`` or ``module:Class.name``. A class must have the name itself, a base
            class that has it does not count.
        why: what we need it for.
        releases: which releases have it, and how they differ.
        if_gone: what the user of a release without it meets.
        kind: what it must be an instance of.
        parameters: names of its leading parameters; of a classmethod those after ``cls``.
        exact: whether it may have no others.
        keywords: names of parameters that it must have, at any place.
        if_loaded: it counts only where its module has been imported already.
        replacement: called as ``replacement(original, *args, **kwargs)`` in place of the method;
            None where the symbol is used and not replaced.
    """

    symbol: str
    why: str
    releases: str = RELEASES
    if_gone: str = "the backend factory refuses to start, with one message"
    kind: type = object
    parameters: tuple[str, ...] = ()
    exact: bool = False
    keywords: tuple[str, ...] = ()
    if_loaded: bool = False
    replacement: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """The symbol as Python writes it."""
        return self.symbol.replace(":", ".")

    def problem(self) -> str | None:
        """What is not as we need it: the symbol and the reason; None if all is well."""
        if not self._counts():
            return None
        try:
            found = self._found()
        except ImportError as error:
            return f"{self.name} ({error})"
        except (AttributeError, KeyError):
            return f"{self.name} (no such name)"
        if not isinstance(found, self.kind):
            return f"{self.name} (not a {self.kind.__name__})"
        if not (self.parameters or self.keywords):
            return None
        owner, attribute = self._place()
        names = tuple(inspect.signature(getattr(owner, attribute)).parameters)
        leading = names if self.exact else names[: len(self.parameters)]
        if self.parameters and leading != self.parameters:
            which = "other parameters" if self.exact else "other leading parameters"
            return f"{self.name} ({which} than {', '.join(self.parameters)})"
        if lacking := [name for name in self.keywords if name not in names]:
            return f"{self.name} (takes no {', '.join(lacking)})"
        return None

    def install(self) -> None:
        """Replace the method, once.

        Another plugin's patch under ours or over ours keeps working. Where the symbol does not
        count, nothing happens.
        """
        replacement = self.replacement
        if replacement is None or self.installed():
            return
        owner, attribute = self._place()
        descriptor = vars(owner)[attribute]
        is_classmethod = isinstance(descriptor, classmethod)
        original = descriptor.__func__ if is_classmethod else descriptor

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        setattr(patched, _MARKER, True)
        setattr(owner, attribute, classmethod(patched) if is_classmethod else patched)

    def installed(self) -> bool:
        """Whether our replacement is in the chain of wrappers behind the symbol, or not needed."""
        if self.replacement is None or not self._counts():
            return True
        owner, attribute = self._place()
        function = getattr(owner, attribute, None)
        function = getattr(function, "__func__", function)
        while function is not None:
            if vars(function).get(_MARKER) and "__wrapped__" in vars(function):
                return True
            function = getattr(function, "__wrapped__", None)
        return False

    def _counts(self) -> bool:
        return not self.if_loaded or self.symbol.split(":")[0] in sys.modules

    def _place(self) -> tuple[Any, str]:
        """The module or class that has the symbol, and its name there."""
        module, _, path = self.symbol.partition(":")
        *outer, attribute = path.split(".")
        return functools.reduce(getattr, outer, import_module(module)), attribute

    def _found(self) -> Any:
        owner, attribute = self._place()
        return vars(owner)[attribute] if isinstance(owner, type) else getattr(owner, attribute)
