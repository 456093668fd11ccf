"""Options that commands share, and the checks of their values, all before a command begins.

Every number has bounds: one without becomes memory or time. Files are looked at here, so that
nothing runs for an hour and then finds that it cannot write its result.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer import BadParameter, Option

from sglang_prefix.api_key import ApiKey
from sglang_prefix.cli.output import FLAG, STDOUT
from sglang_prefix.files import check_folder, check_writable

__all__ = [
    "MAX_PAGE",
    "MAX_REPEATS",
    "MAX_REQUESTS",
    "MAX_SECONDS",
    "MAX_SEED",
    "MAX_TOKENS",
    "ApiKeyOption",
    "JsonOption",
    "PageSize",
    "existing_path",
    "folder_to_write",
    "is_given",
    "loadable_model",
    "picture_to_write",
    "readable_file",
    "server_url",
    "writable_file",
]

T = TypeVar("T")

# As NumPy's and torch's generators and SGLang's --random-seed all take it.
MAX_SEED = (1 << 32) - 1
MAX_SECONDS = 7 * 24 * 3600
MAX_REPEATS = 100_000
# Of one batch; SGLang's own limits are lower.
MAX_REQUESTS = 1 << 14
MAX_PAGE = 1 << 16
# That slots with 32 bits can number.
MAX_TOKENS = (1 << 31) - 1
_MODEL_FILES = ("config.json", "params.json", "tokenizer_config.json", "tokenizer.json")


def checked(check: Callable[[T], object], legal: str = "") -> Callable[[Any], Any]:
    """A callback of an option that checks every value that is given.

    Args:
        check: raises ValueError, whose message says what is legal, or OSError.
        legal: what to say is legal after an OSError.
    """

    def callback(value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None:
                try:
                    check(one)
                except OSError as error:
                    raise BadParameter(f"{one}: {error.strerror}; legal: {legal}") from None
                except ValueError as error:
                    raise BadParameter(str(error)) from None
        return value

    return callback


def _check_readable(path: str | Path) -> None:
    if Path(path).is_dir():
        raise IsADirectoryError(0, "it is a folder")
    Path(path).stat()
    if not os.access(path, os.R_OK):
        raise PermissionError(0, "it cannot be read")


def _check_json_target(target: str) -> None:
    if target != STDOUT:
        check_writable(target)


def _check_picture(path: Path) -> None:
    """The folder may have to be made; that comes with the picture."""
    if path.parent.exists():
        check_writable(path)
    else:
        check_folder(path.parent)


def _check_url(url: str) -> None:
    from urllib.parse import urlsplit

    legal = "http://HOST:PORT or https://HOST:PORT, perhaps with a path"
    try:
        parts = urlsplit(url)
        is_legal = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no number, or none of a port
        is_legal = False
    if not is_legal or "@" in parts.netloc or parts.query or parts.fragment or " " in url:
        # Not the URL itself where it holds a password.
        raise ValueError(f"{'it' if '@' in url else url} is no address; legal: {legal}")


def _check_model(name: str) -> None:
    """A folder, a GGUF file, or a name on the hub, whose files are not looked at."""
    path, legal = Path(name), "a model's folder, or its name on the Hugging Face hub"
    if path.is_dir():
        if not any((path / file).is_file() for file in _MODEL_FILES):
            raise ValueError(f"{name} is a folder without {_MODEL_FILES[0]}; legal: {legal}")
        return
    if path.exists() or "://" in name:  # a GGUF file, or what SGLang's connectors load
        is_connector = "://" in name and not name.startswith(("http:", "https:"))
        if not is_connector and path.suffix not in (".gguf", ".json"):
            raise ValueError(f"{name} is no model; legal: {legal}")
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"{name}: there is no such folder; legal: {legal}") from None


readable_file = checked(_check_readable, "a file to read")
existing_path = checked(Path.stat, "a file or a folder")
writable_file = checked(check_writable, "a file to write")
picture_to_write = checked(_check_picture, "a file to write")
folder_to_write = checked(check_folder, "a folder of yours, or the name of a new one")
server_url = checked(_check_url)
loadable_model = checked(_check_model, "a model's folder, or its name on the Hugging Face hub")

JsonOption = Annotated[
    str | None,
    Option(
        FLAG,
        metavar="[FILE]",
        help="Write the result as JSON to FILE, or to standard output without FILE.",
        callback=checked(_check_json_target, "a file to write, or - for standard output"),
    ),
]
ApiKeyOption = Annotated[
    str | None,
    Option(
        metavar="KEY",
        help="Key of the server. Default: SGLANG_API_KEY, or else OPENAI_API_KEY, which no list "
        "of processes shows.",
        show_default=False,
        callback=checked(ApiKey.find),
    ),
]
PageSize = Annotated[int, Option(min=1, max=MAX_PAGE, help="Tokens per page of the KV pool.")]


def is_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter stands in the command line."""
    source = context.get_parameter_source(name)
    # By name: typer may bring a click of its own.
    return source is not None and source.name == "COMMANDLINE"
