"""What commands print: JSON on request, everything meant for people on standard error then."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from sglang_prefix.files import write_file

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["FLAG", "STDOUT", "complain", "console", "fail", "say", "track", "write_json"]

T = TypeVar("T")

FLAG, STDOUT = "--json", "-"
# Of a message, which may quote what a user gave; what is longer loses its middle.
_MAX_CHARACTERS = 2000


def console(json_target: str | None = None) -> Console:
    """Return the console for tables and progress.

    Args:
        json_target: the value of `--json`. When JSON goes to standard output nothing else may,
            so the console then writes to standard error.
    """
    from rich.console import Console

    return Console(stderr=json_target == STDOUT)


def say(out: Console, text: str) -> None:
    """Print one line of text as it is."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def track(items: Iterable[T], total: int, description: str, out: Console) -> list[T]:
    """Everything of `items`, with a bar that shows how many of `total` are there."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(
        *columns, TimeElapsedColumn(), console=out, transient=True, disable=not out.is_terminal
    )
    with bar:
        return list(bar.track(items, total=total, description=description))


def write_json(data: Mapping[str, Any] | Sequence[Any], target: str | None) -> None:
    """Write `data` to where `--json` points: a file, standard output ("-") or nowhere (None)."""
    if target is None:
        return
    text = json.dumps(data, indent=2) + "\n"
    if target == STDOUT:
        sys.stdout.write(text)
        return
    try:
        write_file(target, text)
    except OSError as error:
        fail(f"cannot write {target}: {error.strerror}")


def complain(message: str) -> None:
    """Print what is wrong on standard error, in one line whatever it quotes."""
    if len(message) > _MAX_CHARACTERS:
        half = _MAX_CHARACTERS // 2
        message = f"{message[:half]} … {message[-half:]}"
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    typer.echo(f"sglang-prefix: {line}", err=True)


def fail(message: str, status: int = 1) -> NoReturn:
    """End the command with one line on standard error."""
    complain(message)
    raise typer.Exit(status)
