"""Checks of plain arguments: one ``ValueError`` of one line with name, value and what is legal.

The type comes first, the value after: an array or a tensor compares with nothing. Integers of NumPy
are integers; ``True`` and arrays of one element are not.
"""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "INT32_MAX",
    "INT64_MAX",
    "check_choice",
    "check_flag",
    "check_integer",
    "check_integers",
    "check_number",
    "refusal",
]

IntArray = NDArray[np.int64]

INT32_MAX = (1 << 31) - 1
INT64_MAX = (1 << 63) - 1

# Executors compute in float32, whose exponents go to 127. A score is a product of q and k, which in
# float16 stays below 2**43, of two such factors, and perhaps over a cap: within these bounds it is
# finite, and no factor or quotient of two becomes 0.
_LEAST, _MOST = 2.0**-32, 2.0**32

_LONGEST = 100  # characters of a value in a message


def refusal(name: str, value: object, legal: str) -> ValueError:
    """What to raise: ``name=value; legal: ...``, or the type of a value that takes many lines."""
    is_short = isinstance(value, str | bytes) or not hasattr(value, "__len__")
    try:
        shown = repr(value) if is_short else ""
    except Exception:  # an integer of thousands of digits, for one
        shown = ""
    if not shown.isprintable() or not 0 < len(shown) <= _LONGEST:
        return ValueError(f"{name} is a {type(value).__name__}; legal: {legal}")
    return ValueError(f"{name}={shown}; legal: {legal}")


def check_integer(name: str, value: Any, least: int = 1, most: int = INT32_MAX) -> int:
    """An integer within bounds, as Python's."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or not least <= int(value) <= most:
        raise refusal(name, value, f"an integer of at least {least}, up to {most}")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """A number above 0, small and large enough for products of a few to be normal in float32."""
    try:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        number = float(value) if is_number else 0.0
    except (OverflowError, ValueError):
        number = 0.0
    if not _LEAST <= number <= _MOST:
        raise refusal(name, value, "a finite number above 0, from 2**-32 to 2**32")
    return number


def check_flag(name: str, value: Any) -> bool:
    """True or False, NumPy's included."""
    if not isinstance(value, bool | np.bool_):
        raise refusal(name, value, "True or False")
    return bool(value)


def check_choice(name: str, value: Any, legal: Collection[str]) -> str:
    """One of some names."""
    if not isinstance(value, str) or value not in legal:
        raise refusal(name, value, ", ".join(map(repr, legal)))
    return value


def check_integers(
    name: str, values: Any, least: int, most: int, *, size: int | None = None
) -> IntArray:
    """A sequence or one-dimensional array of integers within bounds, as int64.

    Args:
        name: of the argument.
        values: what was given; never changed, and perhaps what is returned.
        least, most: bounds of every entry.
        size: entries that there must be; None for any number.
    """
    try:
        found = np.asarray(values)
    except Exception:  # ragged; or a tensor on a device, or one that has gradients
        raise refusal(name, values, "a sequence of integers on the host") from None
    if found.dtype.kind not in "iu" and found.size:
        raise refusal(name, values, "a sequence of integers on the host")
    if found.ndim != 1 or (size is not None and len(found) != size):
        raise ValueError(
            f"{name} has shape {found.shape}; legal: [{'n' if size is None else size}]"
        )
    bad = np.flatnonzero((found < least) | (found > most))
    if len(bad):
        raise ValueError(f"{name}[{bad[0]}]={found[bad[0]]}; legal: {least} to {most}")
    return found.astype(np.int64, copy=False)
