"""One self-contained HTML page from result files, and the same tables for the terminal."""

from sglang_prefix.bench.report.page import build_page, section_of, write_folder_page
from sglang_prefix.bench.report.section import print_section
from sglang_prefix.bench.report.sources import Source, find_sources
from sglang_prefix.bench.results import ResultError

__all__ = [
    "ResultError",
    "Source",
    "build_page",
    "find_sources",
    "print_section",
    "section_of",
    "write_folder_page",
]
