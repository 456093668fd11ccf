"""The page that the bench commands leave beside their result files."""

from __future__ import annotations

from pathlib import Path

from sglang_prefix.bench.report.page import build_page
from sglang_prefix.bench.report.sources import find_sources
from sglang_prefix.bench.results import write_whole

__all__ = ["PAGE", "write_folder_page"]

PAGE = "report.html"
# Of one folder that both commands were given; whatever else is in it is not looked at.
_FILES = ("kernel.json", "serving.json")


def write_folder_page(folder: Path, *, plots: bool) -> Path:
    """Write the page of the bench commands' result files in a folder; return where it is.

    Args:
        folder: has at least one of them.
        plots: whether to draw the plots, which needs matplotlib.

    Raises:
        ResultError: a file does not hold what its kind should; one line that names it.
        OSError: the page cannot be written; one of before is left as it was.
    """
    sources, _ = find_sources([path for name in _FILES if (path := folder / name).is_file()])
    out = folder / PAGE
    write_whole(out, build_page(sources, title="sglang-prefix results", plots=plots))
    return out
