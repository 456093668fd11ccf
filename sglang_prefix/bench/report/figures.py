"""Matplotlib figures as SVG elements that may stand in one page together."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from sglang_prefix.bench.report.model import Figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

__all__ = ["embedded"]

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def embedded(draw: Callable[[], Drawing], title: str, key: str) -> Figure:
    """Draw a figure as an `<svg>` element without a fixed size.

    Args:
        draw: makes the figure.
        title: what it shows.
        key: letters and digits, unique in the page: what all ids in the element begin with, for
            matplotlib numbers its own from the start in every figure.
    """
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.hashsalt": key,
        # Outlines: a page from disk brings no fonts, and another's would not fit the boxes.
        "svg.fonttype": "path",
    }
    file = io.StringIO()
    with matplotlib.rc_context(settings):
        draw().savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return Figure(title, _isolated(file.getvalue(), title, key))


def _isolated(svg: str, title: str, key: str) -> str:
    """The root element alone, its ids made the page's own, its metadata dropped."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{_SVG}}}metadata":
                parent.remove(child)
    for element in root.iter():
        for attribute, value in element.attrib.items():
            if attribute == "id":
                element.set(attribute, f"{key}-{value}")
            elif attribute in (f"{{{_XLINK}}}href", "href") and value.startswith("#"):
                element.set(attribute, f"#{key}-{value[1:]}")
            elif "url(#" in value:
                element.set(attribute, _REFERENCE.sub(rf"url(#{key}-\1)", value))
    # The page decides how wide it is; the view box keeps the shape.
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-label", title)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")
