"""One self-contained HTML page from result files."""

from sglang_prefix.bench.report.folder import write_folder_page
from sglang_prefix.bench.report.page import build_page
from sglang_prefix.bench.report.sources import ResultError, Source, find_sources

__all__ = ["ResultError", "Source", "build_page", "find_sources", "write_folder_page"]
