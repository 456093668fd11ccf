"""Plots as SVG elements that may stand in one page together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from sglang_prefix.bench.plots import PLOTS, svg_text

__all__ = ["embedded_plots"]

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


def embedded_plots(data: Mapping[str, Any], key: str) -> list[tuple[str, str]]:
    """Every picture of a result file for a page: its caption, and an `<svg>` element.

    Args:
        data: a parsed result file; without cases it has no pictures.
        key: letters and digits, unique in the page: what all ids in the elements begin with, for
            matplotlib numbers its own from the start in every figure.
    """
    plots = PLOTS.get(data["kind"], {}) if data["cases"] else {}
    found = []
    for number, draw in enumerate(plots.values(), 1):
        caption = (inspect.getdoc(draw) or "").partition("\n")[0].rstrip(".")
        svg = svg_text(draw, data, f"{key}p{number}")
        found.append((caption, _isolated(svg, caption, f"{key}p{number}")))
    return found


def _isolated(svg: str, title: str, key: str) -> str:
    """The root element alone, its ids made the page's own, its metadata and its size dropped."""
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        for attribute, value in element.attrib.items():
            if attribute == "id":
                element.set(attribute, f"{key}-{value}")
            elif attribute in (f"{{{_XLINK}}}href", "href"):
                element.set(attribute, value.replace("#", f"#{key}-", 1))
            else:
                element.set(attribute, value.replace("url(#", f"url(#{key}-"))
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"role": "img", "aria-label": title}
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")
