"""`sglang-prefix report`: one HTML page from result files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sglang_prefix.cli.options import existing_path, writable_file
from sglang_prefix.cli.output import console, fail

if TYPE_CHECKING:
    from sglang_prefix.bench.report import Source

__all__ = ["report"]


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR|FILE...",
            help="Result files, or folders that hold them.",
            callback=existing_path,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The page to write.", callback=writable_file)
    ],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "sglang-prefix results",
    plots: Annotated[
        bool, typer.Option("--plots/--no-plots", help="Draw the plots; needs matplotlib.")
    ] = True,
) -> None:
    """Make one HTML page from result files: environment, tables, plots, all losing rows.

    Takes the files of `bench kernel` and `bench serving`, and those of the project's own
    benchmarks. The page needs nothing from the network.
    """
    from sglang_prefix.bench.report import ResultError, build_page, find_sources
    from sglang_prefix.files import write_file

    try:
        sources, left_out = find_sources(results)
        _check_target(out, sources)
        _check_plots(sources, plots)
        page = build_page(sources, title=title, plots=plots)
    except ResultError as error:
        fail(str(error), 2)
    try:
        write_file(out, page)
    except OSError as error:
        fail(f"cannot write {out}: {error.strerror}")
    screen = console()
    if left_out:
        names = ", ".join(left_out)
        screen.print(f"left out, no result files: {names}", soft_wrap=True, markup=False)
    files = "1 result file" if len(sources) == 1 else f"{len(sources)} result files"
    screen.print(f"{files}; written to {out}", soft_wrap=True, markup=False)


def _check_target(out: Path, sources: list[Source]) -> None:
    if out.resolve() in {source.path for source in sources}:
        fail(f"--out is {out}, one of the result files; legal: another file", 2)


def _check_plots(sources: list[Source], plots: bool) -> None:
    from sglang_prefix.bench.plots import PLOTS, has_matplotlib

    if plots and any(s.data["kind"] in PLOTS for s in sources) and not has_matplotlib():
        fail("plots need matplotlib: pip install 'sglang-prefix[bench]', or --no-plots")
