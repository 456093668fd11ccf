"""What commands print: JSON on request, everything meant for people on standard error then."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from sglang_prefix.files import write_file

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Command", "JsonCommand", "JsonOption", "console", "fail", "say", "write_json"]

_FLAG = "--json"
_STDOUT = "-"

JsonOption = Annotated[
    str | None,
    typer.Option(
        _FLAG,
        metavar="[FILE]",
        help="Write the result as JSON to FILE, or to standard output without FILE.",
    ),
]


class Command(TyperCommand):
    """A command that says in one line which of its options is wrong, and what is legal."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does, but without its frame around what is wrong."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            say = getattr(error, "format_message", None)  # of usage errors alone
            if say is None:
                raise
            fail(say().replace("Value error, ", ""), 2)


class JsonCommand(Command):
    """A command whose `--json` may stand without a value; pass it as `cls` with `JsonOption`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare `--json` its value, since typer has no options with an optional one."""
        return super().parse_args(ctx, _with_json_value(args))


def _with_json_value(args: list[str]) -> list[str]:
    completed = list(args)
    for index, argument in enumerate(args):
        after = args[index + 1] if index + 1 < len(args) else "--"
        if argument == _FLAG and after.startswith("-") and after != _STDOUT:
            completed[index] = f"{_FLAG}={_STDOUT}"
    return completed


def console(json_target: str | None = None) -> Console:
    """Return the console for tables and progress.

    Args:
        json_target: the value of `--json`. When JSON goes to standard output nothing else may,
            so the console then writes to standard error.
    """
    from rich.console import Console

    return Console(stderr=json_target == _STDOUT)


def say(out: Console, text: str) -> None:
    """Print one line of text as it is."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def write_json(data: Mapping[str, Any] | Sequence[Any], target: str | None) -> None:
    """Write `data` to where `--json` points: a file, standard output ("-") or nowhere (None)."""
    if target is None:
        return
    text = json.dumps(data, indent=2) + "\n"
    if target == _STDOUT:
        sys.stdout.write(text)
        return
    try:
        write_file(target, text)
    except OSError as error:
        fail(f"cannot write {target}: {error.strerror}")


def fail(message: str, status: int = 1) -> NoReturn:
    """End the command with one line on standard error."""
    typer.echo(f"sglang-prefix: {message}", err=True)
    raise typer.Exit(status)
