"""The page: sections of all files in one HTML text that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import log2

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sglang_prefix.bench.report.cells import geomean, ratio_text
from sglang_prefix.bench.report.cpu import cpu_section
from sglang_prefix.bench.report.drawings import draw
from sglang_prefix.bench.report.gpu import gpu_section
from sglang_prefix.bench.report.kernel import kernel_section
from sglang_prefix.bench.report.model import Section
from sglang_prefix.bench.report.serving import serving_section
from sglang_prefix.bench.report.sources import CPU, ResultError, Source

__all__ = ["build_page"]

# Ratios from 1/16 to 16 keep within their bar.
_BAR_DOUBLINGS = 4


def build_page(sources: Sequence[Source], *, title: str, plots: bool = True) -> str:
    """Return the HTML of a page with one section per result file.

    Args:
        sources: from :func:`find_sources`.
        title: heading of the page.
        plots: whether to draw the plots, which needs matplotlib.

    Raises:
        ResultError: a file does not hold what its kind should; one line that names it.
    """
    sections = [_section(source, f"s{n}", plots) for n, source in enumerate(sources, 1)]
    resources = files(__package__)
    style, script, template = (
        (resources / f"page.{ending}").read_text(encoding="utf-8")
        for ending in ("css", "js", "html.j2")
    )
    # Unset names would be printed as nothing: a page with holes in place of numbers.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"ratio": ratio_text, "bar": _bar}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(template).render(
        title=title,
        sections=sections,
        total=_Total.of(sections),
        geomean=lambda gains: geomean(gains.values()),
        style=Markup(style),
        script=Markup(script),
        script_digest=digest,
        svg=Markup,
    )


def _section(source: Source, key: str, plots: bool) -> Section:
    try:
        if source.kind == "bench-kernel":
            return kernel_section(source, draw(source, key) if plots else [])
        if source.kind == "bench-serving":
            return serving_section(source, draw(source, key) if plots else [])
        return cpu_section(source) if source.kind == CPU else gpu_section(source)
    except (AttributeError, LookupError, TypeError, ZeroDivisionError) as error:
        # What `schema` does not describe, such as a candidate that was timed and has no time.
        reason = f"{type(error).__name__}: {error}"
        raise ResultError(f"{source.path} is not a whole {source.kind} file: {reason}") from error


@dataclass(frozen=True, slots=True)
class _Total:
    """First verdicts of all sections together, and what the others have lost."""

    won: int
    lost: int
    compared: int
    not_compared: int
    stock: list[str]
    lost_elsewhere: int
    compared_elsewhere: int

    @classmethod
    def of(cls, sections: Sequence[Section]) -> _Total:
        first = [section.verdicts[0] for section in sections if section.verdicts]
        others = [verdict for section in sections for verdict in section.verdicts[1:]]
        return cls(
            sum(len(verdict.won) for verdict in first),
            sum(len(verdict.lost) for verdict in first),
            sum(len(verdict.gains) for verdict in first),
            sum(len(verdict.not_compared) for verdict in first),
            list(dict.fromkeys(name for verdict in first for name in verdict.stock)),
            sum(len(verdict.lost) for verdict in others),
            sum(len(verdict.gains) for verdict in others),
        )


def _bar(value: float) -> str:
    """Where a bar from 1 to this ratio begins and ends, logarithmic, 1 in the middle."""
    end = 50 + 50 * max(-1.0, min(1.0, log2(value) / _BAR_DOUBLINGS))
    low, high = sorted((50.0, end))
    return f"--from:{low:.1f}%;--to:{high:.1f}%"
