"""A batch as one HTML page that needs nothing else: the picture, and tables beside it."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from sglang_prefix.explain.format import amount, plural, size, total_rows
from sglang_prefix.explain.groups import group_parts
from sglang_prefix.explain.picture import draw, group_colour, walk
from sglang_prefix.explain.segments import Explanation
from sglang_prefix.explain.text import group_lines, hidden_line

__all__ = ["html_page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2330; background: #fff;
       max-width: 1040px; margin: 2em auto; padding: 0 1em; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1em 0; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 4px 10px;
         border-bottom: 1px solid #d8dce3; }
td.number, th.number { text-align: right; white-space: nowrap; }
.swatch { display: inline-block; width: 12px; height: 12px; border: 1px solid #a9b0bd;
          margin-right: 6px; }
.why { color: #566074; }
"""
_HOW_TO_READ = (
    "Each row is a request of the batch, its KV cache from the first position to the newest token. "
    "Stock decode kernels read all of it, row by row, at every step and in every layer. A colour "
    "is one pack: KV that several requests share, read once for all of them. Grey is what one "
    "request reads alone. A box is a node of the forest; where its outline is broken, the packs "
    "below read its tokens. The mouse shows the numbers of each part."
)


def html_page(explanation: Explanation) -> str:
    """The page, as text."""
    html = ET.Element("html", lang="en")
    head, body = ET.SubElement(html, "head"), ET.SubElement(html, "body")
    ET.SubElement(head, "meta", charset="utf-8")
    ET.SubElement(head, "meta", name="viewport", content="width=device-width")
    ET.SubElement(head, "title").text = f"sglang-prefix explain: {explanation.record.source}"
    ET.SubElement(head, "style").text = _STYLE
    ET.SubElement(body, "h1").text = "What this batch shares, and how it is packed"
    body.append(draw(explanation, with_key=False))
    ET.SubElement(body, "p").text = _HOW_TO_READ
    _add_groups(body, explanation)
    _add_totals(body, explanation)
    notes = ET.SubElement(body, "ul")
    for note in explanation.notes:
        ET.SubElement(notes, "li").text = note
    return "<!DOCTYPE html>\n" + ET.tostring(html, encoding="unicode", method="html") + "\n"


def _add_groups(body: ET.Element, explanation: Explanation) -> None:
    ET.SubElement(body, "h2").text = "Nodes and packs"
    table = _table(body, "what", "how it is read", "why", "reads", "saves")
    root = group_parts(explanation)
    for depth, group in walk(root):
        what, how, _, why = group_lines(group)
        row = ET.SubElement(table, "tr")
        cell = ET.SubElement(row, "td", style=f"padding-left: {10 + 18 * min(depth, 12)}px")
        colour = f"background: {group_colour(group)}"
        swatch = ET.SubElement(cell, "span", {"class": "swatch", "style": colour})
        swatch.tail = what
        hidden = hidden_line(group)
        if hidden:
            ET.SubElement(cell, "br").tail = hidden
        ET.SubElement(row, "td").text = how
        ET.SubElement(row, "td", {"class": "why"}).text = why
        for number in (group.bytes_read, group.bytes_saved):
            ET.SubElement(row, "td", {"class": "number"}).text = size(number)
    hidden = hidden_line(root)
    if hidden:
        ET.SubElement(ET.SubElement(table, "tr"), "td", colspan="5").text = hidden


def _add_totals(body: ET.Element, explanation: Explanation) -> None:
    ET.SubElement(body, "h2").text = "KV read in one layer"
    table = _table(body, "", "tokens", "bytes", "share")
    token_bytes = explanation.plan.costs.shape.kv_token_bytes
    for name, tokens, share in total_rows(explanation):
        row = ET.SubElement(table, "tr")
        ET.SubElement(row, "td").text = name
        for text in (amount(tokens), size(tokens * token_bytes), f"{share:.3f}"):
            ET.SubElement(row, "td", {"class": "number"}).text = text
    stats = explanation.stats
    text = f"{plural(stats.num_packs, 'pack')}, {plural(stats.num_partials, 'partial result')}."
    ET.SubElement(body, "p").text = text


def _table(body: ET.Element, *names: str) -> ET.Element:
    table = ET.SubElement(body, "table")
    row = ET.SubElement(table, "tr")
    for name in names:
        kind = "number" if name in ("reads", "saves", "tokens", "bytes", "share") else "text"
        ET.SubElement(row, "th", {"class": kind}).text = name
    return table
