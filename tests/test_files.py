"""Writing and reading files of users: `sglang_prefix/files.py`."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from sglang_prefix.files import (
    MAX_VALUES,
    check_folder,
    check_writable,
    parse_json,
    read_text,
    write_file,
)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replaces_whole_and_keeps_permissions(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("before")
    target.chmod(0o640)
    write_file(target, "after")
    assert target.read_text() == "after"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert listing(tmp_path) == ["page.html"]


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_file(tmp_path / "new", b"\xff")
    assert (tmp_path / "new").read_bytes() == b"\xff"
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("exists", [True, False])
def test_follows_links(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if exists:
        (folder / "real").write_text("before")
    link = tmp_path / "link"
    link.symlink_to("folder/real")
    write_file(link, "after")
    assert link.is_symlink()
    assert (folder / "real").read_text() == "after"


def test_what_is_no_character_is_escaped(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "ä\ud800")
    assert (tmp_path / "file").read_text() == "ä\\ud800"


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("before")
    code = (
        "import resource, signal, sys\n"
        "from sglang_prefix.files import write_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_file(sys.argv[1], 'x' * 10_000)\n"
        "except OSError as error:\n    print(error.strerror)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "File too large\n", done.stderr
    assert target.read_text() == "before"
    assert listing(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "directory"),
        ("folder", "directory"),
        ("absent/file", "No such file"),
        ("file/below", "Not a directory"),
        ("loop", "symbolic links"),
        ("socket", "device or a socket"),
        ("pipe", "No such device"),  # nobody reads it
        ("/dev/full", "No space"),
        ("x" * 256, "too long"),
        ("nul\0", "null"),
    ],
)
def test_refuses(tmp_path: Path, name: str, says: str) -> None:
    import socket

    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        before = listing(tmp_path), os.lstat("/dev/full")
        path = os.path.join(tmp_path, name)
        with pytest.raises(OSError, match=says):
            write_file(path, "text")
        if name not in ("pipe", "/dev/full"):
            with pytest.raises(OSError, match=says):
                check_writable(path)
    assert (listing(tmp_path), os.lstat("/dev/full")) == before


def test_refuses_a_file_that_is_read_only(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("needs a user other than root, who may write everything")
    target = tmp_path / "file"
    target.touch(0o444)
    with pytest.raises(PermissionError):
        write_file(target, "text")


def test_streams_are_written_to_as_they_are(tmp_path: Path) -> None:
    node = os.lstat("/dev/null")
    write_file("/dev/null", "text")
    check_writable("/dev/null")
    assert os.lstat("/dev/null") == node
    code = "from sglang_prefix.files import write_file; write_file('/dev/stdout', 'text')"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"text"
    into = tmp_path / "appended"
    into.write_text("before ")
    with into.open("a") as file:
        subprocess.run(command, stdout=file, check=True)
    assert into.read_text() == "before text"
    assert listing(tmp_path) == ["appended"]


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / ("n" * 255))
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"x" * 11, "larger"), (b"\xff", "not UTF-8 text: invalid start byte at byte 0")],
)
def test_read_text_refuses(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_text(path, max_bytes=10)


def test_reading_a_device_without_end_is_bounded() -> None:
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        read_text("/dev/zero", max_bytes=1 << 20)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[NaN]", "NaN is no number"),
        ("[1e999]", "too large"),
        ("1" * 5000, "too large"),
        ('{"a": "\\ud800"}', "not Unicode"),
        ('{"\\udc00": 1}', "not Unicode"),
        ("[" * 100 + "]" * 100, "too deep"),
        ("[" * 100_000, "too deep"),
        ("[" + "[]," * MAX_VALUES + "1]", "more than"),
    ],
)
def test_parse_json_refuses(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_json(text)


def test_parsing_takes_little_memory() -> None:
    text = "[" + "{}," * (MAX_VALUES // 2 - 2) + '{"a": "\\u00e4"}]'
    tracemalloc.start()
    try:
        assert parse_json(text)[-1] == {"a": "ä"}
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def test_a_folder_far_below_what_is_there_is_refused(tmp_path: Path) -> None:
    """`mkdir` and `rmtree` end with RecursionError at some thousand."""
    check_folder(tmp_path / ("m/" * 60))
    with pytest.raises(OSError, match="too long"):
        check_folder(tmp_path / ("m/" * 1500))
    assert listing(tmp_path) == []
