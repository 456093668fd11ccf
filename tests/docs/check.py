"""`make docs-check`: is everything true that the documentation says, and does it run?

``--static`` runs nothing and needs seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.docs.facts import problems
from tests.docs.pages import pages
from tests.docs.run import Outcome, reader

_SHOWN = {"ran": "green", "server": "green", "compared": "green", "failed": "red"}


def main() -> int:
    """Check, run, print a summary; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--static", action="store_true", help="run no command")
    arguments = parser.parse_args()
    console, found = Console(), pages()
    wrong = problems(found)
    for problem in wrong:
        console.print(f"[red]wrong[/red]: {escape(problem)}", soft_wrap=True)
    outcomes: list[Outcome] = []
    if not arguments.static:
        with tempfile.TemporaryDirectory(prefix="docs-check-") as folder, reader(Path(folder)) as r:
            for outcome in r.read(found):
                outcomes.append(outcome)
                console.print(_line(outcome), soft_wrap=True)
        console.print(summary(outcomes))
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    console.print(
        f"{len(found)} pages, {len(outcomes)} blocks: {len(failed)} failed, {len(wrong)} wrong"
    )
    return 1 if failed or wrong else 0


def _line(outcome: Outcome) -> str:
    color = _SHOWN.get(outcome.status, "yellow")
    detail = outcome.detail if outcome.status in ("failed", "skipped", "tested") else ""
    text = f"[{color}]{outcome.status:8}[/{color}] {outcome.block.where} {outcome.seconds:.1f} s"
    return f"{text} {escape(detail)}".rstrip()


def summary(outcomes: list[Outcome]) -> Table:
    """What was not run, and why."""
    table = Table(title="not run here", title_justify="left")
    for name in ("block", "", "why, or by which test"):
        table.add_column(name, overflow="fold")
    for outcome in outcomes:
        if outcome.status in ("skipped", "tested"):
            table.add_row(outcome.block.where, outcome.status, escape(outcome.detail))
    return table


if __name__ == "__main__":
    sys.exit(main())
