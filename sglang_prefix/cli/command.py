"""The classes of our commands: what is wrong with a command line is one line, and status 2.

What holds for all options is checked here, so that a new one need not think of it: values are text
that can be written down again, not empty, not endless, and numbers are finite. Ranges and kinds of
files are the options' own, see :mod:`sglang_prefix.cli.options`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from typer.core import TyperCommand, TyperGroup

from sglang_prefix.cli.output import FLAG, STDOUT, fail

__all__ = ["Command", "ExecCommand", "Group", "JsonCommand", "typed_command"]

# As long as a path may be.
_MAX_CHARACTERS = 4096
_API_KEY = "--api-key"


class Command(TyperCommand):
    """A command that says in one line which of its options is wrong, and what is legal."""

    # A parameter whose words are another program's own, which may be empty or long.
    passes_on = "server_args"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does, but without its frame around what is wrong."""
        with _in_one_line():
            words, _, _ = self.make_parser(ctx).parse_args(args=list(args))
            for parameter in self.params:
                self._check_words(parameter, words.get(parameter.name or ""))
            rest = super().parse_args(ctx, args)
            for parameter in self.params:
                _check_finite(parameter, ctx.params.get(parameter.name or ""))
        return rest

    def _check_words(self, parameter: Any, given: Any) -> None:
        """End the command if a value is nothing that any option could take."""
        name, is_passed_on = _name_of(parameter), parameter.name == self.passes_on
        for word in _each(given):
            if not isinstance(word, str):
                continue
            if not word and not is_passed_on:
                fail(f"{name} is empty; legal: {parameter.metavar or 'a value'}", 2)
            if len(word) > _MAX_CHARACTERS and not is_passed_on:
                long = f"{len(word):,} characters long"
                fail(f"{name} is {long}; legal: up to {_MAX_CHARACTERS:,}", 2)
            if "\0" in word or any("\ud800" <= character <= "\udfff" for character in word):
                fail(f"{name} has bytes that are not text; legal: UTF-8 without NUL", 2)


class JsonCommand(Command):
    """A command whose `--json` may stand without a value; pass it as `cls` with `JsonOption`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare `--json` its value, since typer has no options with an optional one."""
        return super().parse_args(ctx, _with_json_value(args))


class ExecCommand(Command):
    """The command that runs another, whose words are not looked at."""

    def _check_words(self, parameter: Any, given: Any) -> None:
        pass


class Group(TyperGroup):
    """A group of commands that says in one line that there is none of that name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does, without its frame."""
        with _in_one_line():
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As typer does, without its frame, and with the names that there are."""
        with _in_one_line(f"; legal: {', '.join(self.commands)}"):
            return super().resolve_command(ctx, args)


def typed_command() -> list[str]:
    """What the user typed, for a result file; without the key of a server."""
    words = ["sglang-prefix", *sys.argv[1:]]
    for index, word in enumerate(words):
        if words[index - 1] == _API_KEY:
            words[index] = "***"
        elif word.startswith(f"{_API_KEY}="):
            words[index] = f"{_API_KEY}=***"
    return words


@contextmanager
def _in_one_line(legal: str = "") -> Iterator[None]:
    """Within it, a usage error ends the command with one line.

    Args:
        legal: is appended, if the message does not say so itself.
    """
    try:
        yield
    except Exception as error:
        say = getattr(error, "format_message", None)  # of usage errors alone
        # By name: typer may bring a click of its own.
        if say is None or type(error).__name__ == "NoArgsIsHelpError":
            raise
        message = say().replace("Value error, ", "")
        legal = legal or _range_of(getattr(error, "param", None))
        if legal and "legal: " not in message:
            message = message.rstrip(".") + legal
        fail(message, 2)


def _range_of(parameter: Any) -> str:
    """The legal values of a number with bounds, for the end of a message."""
    kind = getattr(parameter, "type", parameter)  # where older releases of typer have them
    least, most = (
        getattr(parameter, name, None) or getattr(kind, name, None) for name in ("min", "max")
    )
    return "" if most is None else f"; legal: {least or 0} to {most}"


def _check_finite(parameter: Any, value: Any) -> None:
    for number in _each(value):
        if isinstance(number, float) and not math.isfinite(number):
            fail(f"{_name_of(parameter)} is {number}{_range_of(parameter)}", 2)


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _name_of(parameter: Any) -> str:
    """As the user knows it."""
    is_option = parameter.param_type_name == "option"
    return str(parameter.opts[0] if is_option else parameter.metavar or parameter.name)


def _with_json_value(args: list[str]) -> list[str]:
    completed = list(args)
    for index, argument in enumerate(args):
        after = args[index + 1] if index + 1 < len(args) else "--"
        if argument == FLAG and after.startswith("-") and after != STDOUT:
            completed[index] = f"{FLAG}={STDOUT}"
    return completed
