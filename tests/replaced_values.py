"""Parsed JSON in which one value, or one key, anywhere, is another one or gone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

__all__ = ["VALUES", "WORST", "paths_of", "replace_value", "replaced_values"]

Path = tuple[str | int, ...]

_DELETED = object()
_DEEP: list[Any] = []
_DEEP_OBJECT: dict[str, Any] = {}
for _ in range(50):
    _DEEP, _DEEP_OBJECT = [_DEEP], {"a": _DEEP_OBJECT}

# What a reader may take for a size, an index, a time, a name or a table. Of NaN and infinity Python
# writes and reads names.
WORST: list[Any] = [
    *(10**8, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 10**30, -1, -(2**63), 0, True, None),
    *(1e18, 1e308, -1e308, 5e-324, float("nan"), float("inf"), -float("inf")),
    *("", "\ud800", "\x00\x1b[2J\r", "x" * 100_000, "9" * 5000, "../" * 50),
    *([], {}, _DEEP, _DEEP_OBJECT, [0] * 50_000, [10**8] * 9, {str(n): n for n in range(5000)}),
]

# What JSON can hold, of every kind.
VALUES = st.one_of(
    st.sampled_from(WORST),
    st.none() | st.booleans(),
    st.integers(-3, 9) | st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.sampled_from(["", "x", "pat", "\ud800", "[b]x[/]", "two\nlines"]),
    st.lists(st.integers(-1, 9) | st.integers(0, 1 << 40), max_size=6),
    st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=2) | st.just(_DEEP),
    st.dictionaries(st.sampled_from(["", "name"]), st.integers() | st.text(max_size=2), max_size=1),
)


@dataclass(frozen=True)
class _Key:
    """Another name for what stands at a path."""

    name: str


_KEYS = [_Key(name) for name in ("", "x", "\ud800", "name", "9" * 5000, "a\nb\x1b")]


def replace_value(document: Any, path: Path, value: object) -> Any:
    """A copy of the document with another value, or key, at a path of keys and places."""
    whole = copy.deepcopy(document)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    if value is _DELETED:
        del inner[path[-1]]
    elif isinstance(value, _Key):
        inner[value.name] = inner.pop(path[-1])
    else:
        inner[path[-1]] = copy.deepcopy(value)
    return whole


def replaced_values(document: Any) -> st.SearchStrategy[Any]:
    """Copies of a document with one value or key of it, at any depth, replaced or deleted."""

    def other(path: Path) -> st.SearchStrategy[Any]:
        values = st.just(_DELETED) | VALUES
        return values | st.sampled_from(_KEYS) if isinstance(path[-1], str) else values

    paths = st.sampled_from(list(paths_of(document)))
    return paths.flatmap(
        lambda path: st.builds(replace_value, *map(st.just, (document, path)), other(path))
    )


def paths_of(value: Any) -> Iterator[Path]:
    """The place of everything; of a list of plain values only of the first."""
    if isinstance(value, dict):
        items: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list):
        has_inner = any(isinstance(item, dict | list) for item in value)
        items = list(enumerate(value if has_inner else value[:1]))
    else:
        return
    for key, item in items:
        yield (key,)
        yield from ((key, *path) for path in paths_of(item))
