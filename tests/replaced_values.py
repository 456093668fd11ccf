"""Parsed JSON in which one value, anywhere, is another one or gone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

__all__ = ["VALUES", "replace_value", "replaced_values"]

Path = tuple[str | int, ...]

_DELETED = object()
_DEEP: list[Any] = []
for _ in range(50):
    _DEEP = [_DEEP]

# What JSON can hold, of every kind; of NaN and infinity Python writes and reads names.
VALUES = st.one_of(
    st.none() | st.booleans(),
    st.integers(-3, 9) | st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.sampled_from(["", "x", "pat", "\ud800", "[b]x[/]", "two\nlines"]),
    st.lists(st.integers(-1, 9) | st.integers(0, 1 << 40), max_size=6),
    st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=2) | st.just(_DEEP),
    st.dictionaries(st.sampled_from(["", "name"]), st.integers() | st.text(max_size=2), max_size=1),
)


def replace_value(document: Any, path: Path, value: object) -> Any:
    """A copy of the document with another value at a path of keys and places."""
    whole = copy.deepcopy(document)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    if value is _DELETED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = copy.deepcopy(value)
    return whole


def replaced_values(document: Any) -> st.SearchStrategy[Any]:
    """Copies of a document with one of its values, at any depth, replaced or deleted."""
    paths = st.sampled_from(list(_paths(document)))
    return st.builds(replace_value, st.just(document), paths, st.just(_DELETED) | VALUES)


def _paths(value: Any) -> Iterator[Path]:
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
        yield from ((key, *path) for path in _paths(item))
