"""The page: sections of all files in one HTML text that needs nothing from elsewhere."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sglang_prefix.bench.plots import PLOTS, svg_text
from sglang_prefix.bench.report.engine import engine_section
from sglang_prefix.bench.report.kernel import kernel_section
from sglang_prefix.bench.report.section import Section, Verdict
from sglang_prefix.bench.report.serving import serving_section
from sglang_prefix.bench.report.sources import Source, find_sources
from sglang_prefix.bench.report.uncompared import (
    check_section,
    gpu_section,
    host_section,
    profile_section,
    tune_section,
)
from sglang_prefix.bench.results import ResultError
from sglang_prefix.bench.tables import by_reason, is_losing, ratio_text
from sglang_prefix.files import write_file

__all__ = ["PAGE", "build_page", "section_of", "write_folder_page"]

PAGE = "report.html"
# What the bench commands write into a folder; other files in it are not read.
_FOLDER_FILES = (
    "kernel.json",
    "serving.json",
    "engine.json",
    "tune.json",
    "profile.json",
    "host.json",
    "gpu.json",
)
_SECTIONS: dict[str, Callable[[Mapping[str, Any]], Section]] = {
    "bench-kernel": kernel_section,
    "bench-serving": serving_section,
    "bench-engine": engine_section,
    "bench-tune": tune_section,
    "bench-profile": profile_section,
    "bench-host": host_section,
    "gpu-check": check_section,
    "bench-gpu": gpu_section,
}


def section_of(data: Mapping[str, Any]) -> Section:
    """What a result file says; terminal and page show the same of it."""
    return _SECTIONS[data["kind"]](data)


def write_folder_page(folder: Path, *, plots: bool) -> Path:
    """Write the page of the bench commands' result files in a folder; return where it is.

    Args:
        folder: has at least one of them.
        plots: whether to draw the plots, which needs matplotlib.

    Raises:
        ResultError: a file does not hold what its kind should; one line that names it.
        OSError: the page cannot be written; one of before is left as it was.
    """
    sources, _ = find_sources([path for name in _FOLDER_FILES if (path := folder / name).is_file()])
    out = folder / PAGE
    write_file(out, build_page(sources, title="sglang-prefix results", plots=plots))
    return out


def build_page(sources: Sequence[Source], *, title: str, plots: bool = True) -> str:
    """Return the HTML of a page with one section per result file.

    Args:
        sources: from :func:`find_sources`.
        title: heading of the page.
        plots: whether to draw the plots, which needs matplotlib.

    Raises:
        ResultError: a file does not hold what its kind should; one line that names it.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    parts = [_part(source, plots) for source in sources]
    verdicts = [part["section"].verdicts for part in parts]
    style, script, template = (
        (files(__package__) / f"page.{ending}").read_text(encoding="utf-8")
        for ending in ("css", "js", "html.j2")
    )
    # Unset names would be printed as nothing: a page with holes in place of numbers.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"ratio": ratio_text, "by_reason": by_reason}
    environment.tests["losing"] = is_losing
    return environment.from_string(template).render(
        title=title,
        parts=parts,
        total=_together(verdict for found in verdicts for verdict in found[:1]),
        elsewhere=_together(verdict for found in verdicts for verdict in found[1:]),
        style=Markup(style),
        script=Markup(script),
        script_digest=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _part(source: Source, plots: bool) -> dict[str, Any]:
    data, kind = source.data, source.data["kind"]
    drawn = PLOTS.get(kind, {}) if plots and data["cases"] else {}
    try:
        return {
            "kind": kind,
            "source": source.name,
            "section": section_of(data),
            # The first line of a plot's docstring says what it shows.
            "plots": {
                str(draw.__doc__).partition(".")[0]: _picture(draw, data, name)
                for name, draw in drawn.items()
            },
        }
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        # What `schema` does not describe, such as the results of one load in engines.
        reason = f"{type(error).__name__}: {error}"
        raise ResultError(f"{source.path} is not a whole {kind} file: {reason}") from error


def _picture(draw: Callable[[Mapping[str, Any]], Any], data: Mapping[str, Any], name: str) -> str:
    """A plot as the address of a picture that lies in the page itself."""
    return f"data:image/svg+xml;base64,{b64encode(svg_text(draw, data, name).encode()).decode()}"


def _together(verdicts: Iterable[Verdict]) -> Verdict:
    """All verdicts as one, to be counted."""
    found = [(verdict, *item) for verdict in verdicts for item in verdict.found.items()]
    stock = dict.fromkeys(name for verdict, *_ in found for name in verdict.stock)
    cases = {f"{n} {name}": value for n, (_, name, value) in enumerate(found)}
    return Verdict("ours", "stock SGLang", cases, stock=list(stock))
