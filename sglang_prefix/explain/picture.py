"""A batch as a picture: one row per query token of a request, KV positions from left to right.

The whole area is what stock kernels read. What has one colour is one pack, read once for all rows
that it spans. :func:`svg_picture` draws it with a key, :func:`html_page` with tables beside it.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree as ET

import numpy as np

from prefix_kernels.plan import split_bounds
from sglang_prefix.explain.format import plural
from sglang_prefix.explain.segments import Explanation, Pack, Segment
from sglang_prefix.explain.text import (
    Row,
    batch_line,
    counts_line,
    gate_line,
    row_of,
    rows_of,
    totals,
)

__all__ = ["draw", "html_page", "svg_picture"]

T = TypeVar("T")

_WIDTH = 1000
_MARGIN = 64
_FONT = "system-ui, sans-serif"
_INK, _PALE, _LINE, _OURS = "#1d2330", "#e9ebef", "#a9b0bd", "#94bee6"
_LETTER = 6.1  # width of a letter at 11 px, on average
_LINE_HEIGHT = 17
# Height of all rows together, and of one.
_ROWS_HEIGHT, _MAX_ROW = 460, 22.0
# Width between two positions where something begins or ends.
_MIN_WIDTH = 24.0
# Thinner boxes are nothing but colour.
_MIN_OUTLINED = 3.0
# Of a kind: tails, packs, nodes. More are thinner than can be seen, and slow to show.
_MAX_BOXES = 8000

_TEMPLATE = Path(__file__).with_name("page.html.j2")


def svg_picture(explanation: Explanation) -> str:
    """The picture with its key, as the text of an SVG file."""
    drawing = draw(explanation, with_key=True)
    ET.indent(drawing)
    return ET.tostring(drawing, encoding="unicode") + "\n"


def html_page(explanation: Explanation) -> str:
    """One HTML page that needs nothing else: the picture, and tables beside it."""
    from jinja2 import StrictUndefined, Template

    drawing = ET.tostring(draw(explanation, with_key=False), encoding="unicode", method="html")
    template = Template(
        _TEMPLATE.read_text(encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page: str = template.render(
        explanation=explanation,
        drawing=drawing,
        rows=rows_of(explanation),
        colour=_row_colour,
        totals=totals(explanation),
        counts=counts_line(explanation),
        row_is=_row_is(explanation),
    )
    return page


def _pack_colour(pack: Pack) -> str:
    """A colour for a shared pack; neighbours differ by the golden angle."""
    red, green, blue = colorsys.hls_to_rgb((0.58 + pack.index * 0.381966) % 1, 0.74, 0.62)
    return "#" + "".join(f"{round(255 * share):02x}" for share in (red, green, blue))


def _row_colour(row: Row) -> str | None:
    """The colour of a row's first pack; white where others read its tokens."""
    if not row.segments:
        return None
    first = row.segments[0]
    if not first.is_node:
        return _PALE
    return _pack_colour(first.packs[0]) if first.packs else "#ffffff"


def draw(explanation: Explanation, *, with_key: bool) -> ET.Element:
    """The drawing.

    Args:
        explanation: what to draw.
        with_key: say below the picture what every row of segments is.
    """
    canvas = _Canvas(explanation)
    canvas.header()
    canvas.tails()
    canvas.packs()
    canvas.nodes()
    canvas.axis()
    if with_key:
        canvas.key()
    return canvas.finished()


class _Canvas:
    """The picture while it is drawn, from top to bottom.

    Args:
        explanation: what is drawn.
    """

    def __init__(self, explanation: Explanation) -> None:
        self._explanation = explanation
        self._forest = explanation.forest
        self._svg = ET.Element(
            "svg", {"xmlns": "http://www.w3.org/2000/svg", "font-family": _FONT, "font-size": "11"}
        )
        _title(self._svg, f"{explanation.record.source}: packs of a batch")
        self._y = 0.0
        plan, order = explanation.plan, self._forest.order
        counts = np.ones_like(order) if plan.query_lens is None else plan.query_lens[order]
        # Rows of query tokens above each request, in their order here.
        self._rows_above = np.append(0, np.cumsum(counts)).tolist()
        self._row = min(_MAX_ROW, _ROWS_HEIGHT / self._rows_above[-1])
        self._nodes = explanation.segments[: self._forest.num_nodes]
        self._tails = explanation.segments[self._forest.num_nodes :]
        self._breaks, self._at, self._is_stretched = self._scale()
        self._num_boxes = self._num_hidden = 0

    def _shown(self, things: Iterable[T]) -> Iterator[T]:
        """Those that there is room for; the others are counted."""
        for thing in things:
            if self._num_boxes < _MAX_BOXES:
                self._num_boxes += 1
                yield thing
            else:
                self._num_hidden += 1

    def _scale(self) -> tuple[list[int], list[float], bool]:
        """Positions and where they are drawn: in proportion, but nothing too thin to see."""
        ends = [int(self._forest.seq_lens.max()), *self._forest.node_stop.tolist()]
        for tail in self._tails:  # where its first query sees less than its last
            if tail.num_queries > 1:
                ends += [tail.stop - tail.num_queries + 1, tail.stop]
        breaks = sorted({0, *ends})
        lengths = np.diff(breaks)
        width = _WIDTH - _MARGIN - 8
        least = min(_MIN_WIDTH, width / 2 / len(lengths))
        wide = lengths * (width / lengths.sum())
        is_stretched = bool((wide < least).any())
        if is_stretched:
            wide = least + lengths * ((width - least * len(lengths)) / lengths.sum())
        return breaks, [_MARGIN, *(_MARGIN + np.cumsum(wide)).tolist()], is_stretched

    def _x(self, position: int) -> float:
        return float(np.interp(position, self._breaks, self._at))

    def _top(self, place: int) -> float:
        """Where the rows of the request at a place of ``forest.order`` begin."""
        return float(self._y + self._rows_above[place] * self._row)

    def _add(self, tag: str, **style: str | float) -> ET.Element:
        """An element; numbers get two digits."""
        said = {
            name.replace("_", "-"): value if isinstance(value, str) else f"{value:.2f}"
            for name, value in style.items()
        }
        return ET.SubElement(self._svg, tag, said)

    def _text(self, x: float, y: float, text: str, **style: str) -> None:
        self._add("text", x=x, y=y, fill=_INK, **style).text = text

    def _line(
        self, text: str, x: float = 8, *, fill: str | None = None, width: float = 11, **style: str
    ) -> None:
        """Text in a line of its own, below what has been drawn; behind a patch of ``fill``."""
        self._y += _LINE_HEIGHT
        if fill:
            place = {"x": x, "y": self._y - 10, "width": width, "height": 11}
            self._add("rect", fill=fill, stroke=_LINE, **place)
            x += width + 7
        self._text(x, self._y, text, **style)

    def _box(self, start: int, stop: int, begin: int, end: int, **style: str) -> ET.Element:
        """Positions ``[start, stop)`` of the requests ``[begin, end)``."""
        x, y = self._x(start), self._top(begin)
        width, height = max(self._x(stop) - x, 0.5), self._top(end) - y
        if min(width, height) < _MIN_OUTLINED:
            style.pop("stroke", None)
        return self._add("rect", x=x, y=y, width=width, height=height, **style)

    def header(self) -> None:
        """What batch this is, and three bars: what stock reads, what we read, the least."""
        self._line(self._explanation.record.source, font_size="15", font_weight="600")
        self._line(batch_line(self._explanation))
        self._line(gate_line(self._explanation))
        for name, tokens, num_bytes, share in totals(self._explanation):
            fill = _OURS if name == "this plan" else _LINE
            label = f"{tokens} KV tokens, {num_bytes}: {name}"
            self._line(label, fill=fill, width=max(share * 420, 1))
        self._y += _LINE_HEIGHT

    def tails(self) -> None:
        """What requests hold alone, and what they read for themselves: pale, by their parents.

        Of several query tokens each sees a position more than the one before it.
        """
        style = {"stroke": _LINE} if self._row >= _MIN_OUTLINED else {}
        self._num_boxes = 0
        groups = (list(found) for _, found in groupby(self._tails, key=lambda tail: tail.parent))
        for tails in self._shown(groups):
            path = ""
            for tail in tails:
                path += self._outline(tail)
            shape = self._add("path", d=path, fill=_PALE, **style)
            _title(shape, "\n".join(row_of(tails).lines))

    def _outline(self, tail: Segment) -> str:
        """The path around a tail; a slope where the steps of its queries could not be seen."""
        left, top, stop = self._x(tail.pack_start), self._top(tail.begin), tail.stop
        first = stop - tail.num_queries + 1
        path = f"M{left:.1f} {top:.2f}"
        if self._row >= _MIN_OUTLINED:
            rights = (self._x(end) for end in range(first, stop + 1))
            path += "".join(f"H{right:.1f}v{self._row:.2f}" for right in rights)
        else:
            path += f"H{self._x(first):.1f}L{self._x(stop):.1f} {self._top(tail.end):.2f}"
        return path + f"H{left:.1f}Z"

    def packs(self) -> None:
        """Shared packs, a colour for each; broken lines where one is cut into splits."""
        self._num_boxes = 0
        place = np.argsort(self._forest.order)
        for pack in self._shown(pack for node in self._nodes for pack in node.packs):
            length, rows = pack.end - pack.start, np.sort(place[pack.requests])
            said = f"pack {pack.index}: {plural(length, 'token')}, {len(rows)} readers"
            if pack.num_queries > len(rows):
                said += f", {plural(pack.num_queries, 'query token')}"
            style = {"fill": _pack_colour(pack), "stroke": "white"}
            for run in self._shown(np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)):
                begin, end = int(run[0]), int(run[-1]) + 1
                _title(self._box(pack.start, pack.end, begin, end, **style), said)
                for split in self._shown(range(1, pack.num_splits)):
                    cut = pack.start + split_bounds(length, pack.num_splits, split)[0]
                    self._box(cut, cut, begin, end, fill=_INK, fill_opacity="0.35")

    def nodes(self) -> None:
        """Outlines and names of nodes; broken where others read their tokens."""
        self._num_boxes = 0
        for node in self._shown(self._nodes):
            place = (node.start, node.stop, node.begin, node.end)
            box = self._box(*place, fill="white", fill_opacity="0", stroke=_INK)
            if not node.packs:
                box.set("stroke-dasharray", "4 3")
            _title(box, "\n".join(row_of([node]).lines))
            self._label(node)

    def _label(self, node: Segment) -> None:
        left, right = self._x(node.start), self._x(node.stop)
        height = self._top(node.end) - self._top(node.begin)
        long = f"{plural(node.tokens, 'token')}, {plural(node.num_readers, 'reader')}"
        for text in (long, f"{node.tokens:,} x {node.num_readers}"):
            if len(text) * _LETTER + 6 < right - left and height >= 13:
                middle = self._top(node.begin) + height / 2 + 4
                style = {"text_anchor": "middle", "pointer_events": "none"}
                self._text((left + right) / 2, middle, text, **style)
                return

    def axis(self) -> None:
        """Batch rows on the left, positions below."""
        order = self._forest.order.tolist()
        if self._row * np.diff(self._rows_above).min() >= 10:
            for place, request in enumerate(order):
                y = (self._top(place) + self._top(place + 1)) / 2 + 4
                self._text(_MARGIN - 6, y, f"req {request}", text_anchor="end")
        else:
            self._text(8, self._y + 12, f"{len(order):,}")
            self._text(8, self._y + 25, "requests")
        self._y = self._top(len(order)) + 14
        last = -1e9
        for position, x in zip(self._breaks, self._at, strict=True):
            if x - last > 52:
                anchor = "end" if x > _WIDTH - 40 else "middle"
                self._text(x, self._y, f"{position:,}", text_anchor=anchor)
                last = x
        self._line(
            f"KV position; a row is {_row_is(self._explanation)}, a colour is a pack that is read "
            "once for its rows, grey is read by one request alone",
            _MARGIN,
        )
        if self._is_stretched:
            self._line("not to scale: short segments are widened to be seen", _MARGIN)
        if self._num_hidden:
            self._line(f"{self._num_hidden:,} more outlines are not drawn", _MARGIN)

    def key(self) -> None:
        """Every row of segments in words."""
        self._y += 10
        for row in rows_of(self._explanation):
            indent = 8 + 18 * row.depth
            if row.segments:
                text = "; ".join(row.lines[:2])
                self._line(text, indent, fill=_row_colour(row), font_weight="600")
            self._line(row.lines[-1], indent + 18)
        for note in self._explanation.notes:
            self._line(note)

    def finished(self) -> ET.Element:
        """The drawing in its size."""
        self._svg.set("viewBox", f"0 0 {_WIDTH} {self._y + 14:.0f}")
        self._svg.set("width", str(_WIDTH))
        return self._svg


def _row_is(explanation: Explanation) -> str:
    """What a row of the picture is."""
    one_each = explanation.plan.query_lens is None
    return "a request" if one_each else "a query token of a request"


def _title(element: ET.Element, text: str) -> None:
    ET.SubElement(element, "title").text = text
