"""Files of users: every one that we write is written here, every one that we read is read here.

A file is written whole or not at all, and what is no regular file is not replaced by one. What is
read has bounds before it is parsed: a few bytes of JSON can become much memory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Any

__all__ = [
    "MAX_READ_BYTES",
    "MAX_VALUES",
    "check_folder",
    "check_writable",
    "one_line",
    "parse_json",
    "read_json",
    "read_tail",
    "read_text",
    "write_file",
]

MAX_READ_BYTES = 32 << 20
# Of a JSON document; an empty list takes two characters and 56 bytes.
MAX_VALUES = 1 << 20
_MAX_DEPTH = 64
# Of folders that are made in one go; `mkdir` and `rmtree` call themselves once for each.
_MAX_NEW_FOLDERS = 64
_TOO_LARGE = "it has a number that is too large"
# What stands there belongs to a process and is never replaced, also where it is a regular file.
_OPEN_FILES = ("/dev/fd/", "/dev/std", "/proc/")


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file whole or not at all.

    A link is followed, and permissions of a file that is replaced are kept. Character devices,
    pipes and open files such as /dev/stdout are written to as they are.

    Args:
        path: a new name in a folder that is there, or a file that may be replaced.
        content: text, written as UTF-8, or bytes.

    Raises:
        OSError: it cannot be written. What was there before still is.
    """
    # Half of a pair, as a name in a command line may have, is no character of UTF-8.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    target = Path(path)
    before = _status(target)
    if _is_stream(target, before):
        _write_through(target, data)
        return
    target = Path(os.path.realpath(target))
    _refuse(target, before)
    beside = _name_beside(target)
    try:
        with beside.open("xb") as file:
            file.write(data)
        if before is not None:
            beside.chmod(stat.S_IMODE(before.st_mode))
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before a long run whether :func:`write_file` can write there; writes nothing.

    Raises:
        OSError: it cannot.
    """
    target = Path(path)
    before = _status(target)
    if _is_stream(target, before):
        if before is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return
    target = Path(os.path.realpath(target))
    _refuse(target, before)
    beside = _name_beside(target)
    beside.open("xb").close()
    beside.unlink()


def check_folder(path: str | os.PathLike[str]) -> None:
    """Find out whether a folder is there, or can be made, and takes files; leaves nothing.

    Raises:
        OSError: it is something else, or cannot be made or written to.
    """
    # Not `resolve`, which raises RuntimeError for links that lead to each other.
    folder, missing = Path(os.path.realpath(path)), list[str]()
    while _status(folder) is None:
        missing.append(folder.name)
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    longest = max((len(os.fsencode(name)) for name in missing), default=0)
    if len(missing) > _MAX_NEW_FOLDERS or longest > os.pathconf(folder, "PC_NAME_MAX"):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    tempfile.TemporaryFile(dir=folder).close()


def _status(target: Path) -> os.stat_result | None:
    """Of what the name leads to; None if there is nothing yet."""
    try:
        return target.stat()
    except FileNotFoundError:
        return None
    except ValueError as error:  # a NUL in it
        raise OSError(errno.EINVAL, str(error)) from None


def _is_stream(target: Path, status: os.stat_result | None) -> bool:
    if os.path.abspath(target).startswith(_OPEN_FILES):
        return True
    return status is not None and (stat.S_ISCHR(status.st_mode) or stat.S_ISFIFO(status.st_mode))


def _write_through(target: Path, data: bytes) -> None:
    # Without waiting for a reader of a pipe, and at the end of a file that a shell has opened.
    number = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    os.set_blocking(number, True)
    with open(number, "wb") as file:
        file.write(data)


def _refuse(target: Path, status: os.stat_result | None) -> None:
    """Raise OSError if there is something that may not be replaced."""
    if not target.name or (status is not None and stat.S_ISDIR(status.st_mode)):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a device or a socket")
    if status is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if len(os.fsencode(target.name)) > os.pathconf(target.parent, "PC_NAME_MAX"):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def _name_beside(target: Path) -> Path:
    return target.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.part")


def read_text(path: str | os.PathLike[str], *, max_bytes: int = MAX_READ_BYTES) -> str:
    """Read a text file.

    Args:
        path: the file; pipes and devices are read to their end, too.
        max_bytes: that it may have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or is not UTF-8; without the file's name.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
        except ValueError as error:  # a NUL in the name
            raise OSError(errno.EINVAL, str(error)) from None
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from None


def one_line(text: str) -> str:
    """A text that quotes somebody else's, as a line that a terminal shows."""
    return "".join(c if c.isprintable() else "?" for c in text)


def read_tail(path: str | os.PathLike[str], max_bytes: int = 1 << 16) -> str:
    """The last bytes of a log that may have grown to any size.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - max_bytes))
        return file.read(max_bytes).decode(errors="replace")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file, see :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """Parse JSON that somebody else wrote.

    Raises:
        ValueError: it is not JSON, has more than :data:`MAX_VALUES` values, is nested deeper than
            any file of ours, or has numbers or text that cannot be written down again: NaN,
            infinity, halves of surrogate pairs.
    """
    if sum(map(text.count, "[{,")) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES:,} values")
    try:
        data = json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        # Of an integer with more digits than Python reads, or ours.
        many_digits = "integer string conversion" in str(error)
        raise ValueError(_TOO_LARGE if many_digits else str(error)) from None
    _check_values(data)
    return data


def _no_number(name: str) -> None:
    raise ValueError(f"it is not JSON: {name} is no number")


def _check_values(data: Any) -> None:
    level: list[Any] = [data]
    for _ in range(_MAX_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
    raise ValueError("it is nested too deep")


def _inside(value: Any) -> list[Any]:
    """What a list or an object holds."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("it has text that is not Unicode") from None
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        raise ValueError(_TOO_LARGE)
    return []
