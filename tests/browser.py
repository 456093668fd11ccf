"""A headless Chromium for tests of pages: a named one, Playwright's own, or one that npm brings.

Playwright's own download is not reachable everywhere that the package index and npm are.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["launched", "missing", "screenshot"]

# Names a Chromium to use in place of any other.
VARIABLE = "SGLANG_PREFIX_TEST_CHROMIUM"
# With 1 a test that finds no browser fails; else it is skipped, with what is missing.
REQUIRE = "SGLANG_PREFIX_TEST_REQUIRE_BROWSER"
_PACKAGE = "@sparticuz/chromium@147.0.0"
_SECONDS = 300
# The package unpacks what it brings: the browser, and libraries and fonts that a bare host lacks.
_UNPACK = """
import("@sparticuz/chromium").then(async (package) => {
  const executable_path = await package.default.executablePath();
  const { LD_LIBRARY_PATH, FONTCONFIG_PATH } = process.env;
  console.log(JSON.stringify({ executable_path, env: { LD_LIBRARY_PATH, FONTCONFIG_PATH } }));
});
"""
_FONTS_CONF = '<fontconfig><dir prefix="relative">fonts</dir></fontconfig>'
# Without a GPU a browser fails to draw pictures that are much higher, or repeats their top.
_SEGMENT = 2000


def missing(what: str) -> NoReturn:
    """Skip the test for what is missing, or fail it where a browser is required."""
    if os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{what}; {REQUIRE} is 1", pytrace=False)
    pytest.skip(what)


@contextmanager
def launched() -> Iterator[Browser]:
    """A running headless browser; the test is skipped or fails where there is none."""
    try:
        from playwright import sync_api
    except ImportError:
        missing("the package playwright is missing")
    with sync_api.sync_playwright() as playwright:
        named, own = os.environ.get(VARIABLE), playwright.chromium.executable_path
        is_here = named or Path(own).exists()
        options = {"executable_path": named or own} if is_here else from_npm()
        # Containers run tests as root, and hosts forbid user namespaces: it only opens our pages.
        arguments = ["--no-sandbox", "--disable-gpu", "--headless=shell"]
        browser = playwright.chromium.launch(args=arguments, **options)
        yield browser
        browser.close()


def from_npm() -> dict[str, Any]:
    """Where npm's Chromium is, kept below this environment, and what it runs with."""
    folder = Path(sys.prefix) / "chromium"
    folder.mkdir(exist_ok=True)
    # Libraries are unpacked only on the host that the package is made for.
    environment = os.environ | {"TMPDIR": str(folder), "AWS_EXECUTION_ENV": "AWS_Lambda_nodejs22.x"}
    commands = (
        ["npm", "install", "--silent", "--prefix", str(folder), _PACKAGE],
        ["node", "--eval", _UNPACK],
    )
    said = ""
    for command in commands:
        try:
            run = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True,
                timeout=_SECONDS, check=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            missing(
                f"no Chromium: {VARIABLE} names none, Playwright has none, {command[0]}: {reason}"
            )
        said = run.stdout
    found: dict[str, Any] = json.loads(said)
    (folder / "fonts" / "fonts.conf").write_text(_FONTS_CONF)
    return found | {"env": {**os.environ, **found["env"]}}


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
