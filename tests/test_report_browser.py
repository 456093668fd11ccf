"""The report's page in a real browser: from disk, without any network, in light and dark."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sglang_prefix.cli.main import app
from tests import browser as chromium
from tests.report_files import MADE_UP

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize

SCREENSHOTS = Path(__file__).parents[1] / "build" / "screenshots"
WIDE: ViewportSize = {"width": 1280, "height": 900}
NARROW: ViewportSize = {"width": 400, "height": 800}
EVIL = '<script>window.owned = true</script><img src="https://example.org/x.png">'


@pytest.mark.slow
@pytest.mark.extended
class TestShown:
    """What a reader sees."""

    @pytest.fixture(scope="class")
    def page_file(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A page of all kinds, in which a name is evil and one would be mathematics in a plot."""
        folder = tmp_path_factory.mktemp("results")
        for kind, make in MADE_UP.items():
            result = make()
            if kind == "bench-kernel":
                result["cases"] += [result["cases"][0] | {"name": n} for n in (EVIL, "$\\frac{$")]
            (folder / f"{kind}.json").write_text(json.dumps(result), encoding="utf-8")
        done = CliRunner().invoke(app, ["report", str(folder), "--out", str(folder / "page.html")])
        assert done.exit_code == 0, done.output
        return folder / "page.html"

    @pytest.fixture(scope="class")
    def running(self) -> Iterator[Browser]:
        """A headless Chromium."""
        try:
            from playwright import sync_api
        except ImportError:
            chromium.missing("the package playwright is missing")
        with sync_api.sync_playwright() as playwright:
            try:
                with chromium.launched(playwright) as browser:
                    yield browser
            except chromium.MissingError as error:
                chromium.missing(str(error))

    @pytest.fixture(scope="class", params=["light", "dark"])
    def shown(
        self, request: pytest.FixtureRequest, running: Browser, page_file: Path
    ) -> Iterator[Page]:
        """The page in both colour schemes: nothing fails in it or is asked for beyond it."""
        context = running.new_context(viewport=WIDE, color_scheme=request.param)
        complaints: list[str] = []
        page = opened(context, page_file, complaints)
        yield page
        assert complaints == []
        assert page.evaluate("window.owned") is None
        context.close()

    def test_the_screenshot_is_no_blank(self, shown: Page) -> None:
        is_dark = shown.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        height = shown.evaluate("document.documentElement.scrollHeight")
        path = SCREENSHOTS / f"report-{'dark' if is_dark else 'light'}.png"
        pixels = np.asarray(chromium.screenshot(shown, path).convert("L"))
        shown.set_viewport_size(WIDE)
        assert pixels.shape == (height, WIDE["width"])
        background = np.median(pixels[::8])
        assert background < 60 if is_dark else background > 200
        # Every segment as high as a window has text, lines or a plot in it.
        for top in range(0, height - WIDE["height"], WIDE["height"]):
            segment = pixels[top : top + WIDE["height"]].astype(np.float32)
            assert segment.std() > 5, f"nothing to see from {top} px on"
            assert np.mean(np.abs(segment - background) > 60) > 0.005

    def test_every_row_of_every_table_is_visible(self, shown: Page) -> None:
        rows = shown.locator("tbody tr").evaluate_all(
            "rows => rows.map(r => [r.cells[0].innerText.trim(), r.offsetWidth > 100 && "
            "r.offsetHeight > 10 && r.checkVisibility({opacityProperty: true, "
            "visibilityProperty: true})])"
        )
        assert len(rows) > 60
        assert all(name and is_visible for name, is_visible in rows)
        names = {case["name"] for kind in MADE_UP for case in named_in_rows(MADE_UP[kind]())}
        assert names | {EVIL, "chunk-4096", "flashinfer-cascade"} <= {name for name, _ in rows}

    @pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
    def test_the_page_is_as_wide_as_the_window(self, shown: Page, size: ViewportSize) -> None:
        shown.set_viewport_size(size)
        needed = shown.evaluate("document.documentElement.scrollWidth")
        # Tables that are wider scroll by themselves, and are not cut off.
        wide = shown.locator(".scroll").evaluate_all(
            "boxes => boxes.filter(e => e.scrollWidth > e.clientWidth)"
            ".map(e => getComputedStyle(e).overflowX)"
        )
        shown.set_viewport_size(WIDE)
        assert needed <= size["width"]
        assert set(wide) <= {"auto"}
        assert wide or size == WIDE

    def test_plots_have_room_and_ids_of_their_own(self, shown: Page) -> None:
        sizes = shown.locator("figure.plot svg").evaluate_all(
            "plots => plots.map(e => [e.getBoundingClientRect().width, "
            "e.getBoundingClientRect().height, e.querySelectorAll('path').length, e.ariaLabel])"
        )
        assert len(sizes) == 6
        for width, height, paths, label in sizes:
            assert label
            assert (width > 300, height > 100, paths > 10) == (True, True, True), label
        ids = shown.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))
        used = shown.evaluate(
            "[...document.querySelectorAll('svg use')].map(e => e.getAttribute('xlink:href'))"
        )
        assert {each.removeprefix("#") for each in used} <= {*ids}

    def test_losing_rows_look_like_it(self, shown: Page) -> None:
        colour = "cells => [...new Set(cells.map(e => getComputedStyle(e).{}))]"
        (back,) = shown.locator("tbody tr.losing > *").evaluate_all(
            colour.format("backgroundColor")
        )
        others = shown.locator("tbody tr:not(.losing) > *")
        assert back not in others.evaluate_all(colour.format("backgroundColor"))
        assert shown.locator("tbody tr.losing").count() >= 8
        bars = [
            shown.locator(f".bar{tone}").first.evaluate("e => getComputedStyle(e).color")
            for tone in (".gaining", ".losing")
        ]
        assert bars[0] != bars[1]
        normal = shown.locator("#summary").evaluate_all(colour.format("color"))
        assert shown.locator("#summary .losing").evaluate_all(colour.format("color")) != normal

    def test_headings_sort_their_table(self, shown: Page) -> None:
        table = shown.locator("table", has=shown.get_by_text("chunk-4096", exact=True)).first
        names = table.locator("tbody th")
        before = names.all_inner_texts()
        heading = table.get_by_role("button", name="speed-up")
        for direction, first in (("ascending", "unrelated-8"), ("descending", "pat-tree-02")):
            heading.click()
            now = names.all_inner_texts()
            # A cell without a number is last in both directions.
            assert (now[0], now[-1]) == (first, "chunk-4096")
            assert sorted(now) == sorted(before)
            sorted_by = table.locator(f"thead th[aria-sort='{direction}']")
            assert sorted_by.inner_text().startswith("speed-up")

    def test_the_page_is_whole_without_scripts(self, running: Browser, page_file: Path) -> None:
        context = running.new_context(viewport=WIDE, java_script_enabled=False)
        page = opened(context, page_file, [])
        assert "slower in" in page.locator("#summary").inner_text()
        assert len([t for t in page.locator("tbody tr").all_inner_texts() if t.strip()]) > 60
        assert page.locator("thead button").count() == 0
        context.close()


def opened(context: BrowserContext, path: Path, complaints: list[str]) -> Page:
    """Open a page from disk; whatever it asks for beyond itself is refused and noted."""
    url = path.as_uri()
    context.set_offline(True)
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: complaints.append(r.url) if r.url != url else None)
    context.route("**/*", lambda route: route.continue_() if route.request.url == url
                  else route.abort())  # fmt: skip
    page.goto(url)
    return page


def named_in_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases that have a row of their own name: host times have stages, decoding has loads."""
    kinds = ("bench-kernel", "bench-serving", "bench-tune", "gpu-check")
    return [case for case in result["cases"] if result["kind"] in kinds]


class TestWithoutBrowser:
    """What is missing is said, or fails where a browser is required."""

    @pytest.mark.parametrize("command", ["npm", "node"])
    @pytest.mark.parametrize("is_late", [True, False])
    def test_a_command_that_fails_or_does_not_answer_is_a_lack(
        self, command: str, is_late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def run(args: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            if is_late:
                raise subprocess.TimeoutExpired(args, options["timeout"])
            return subprocess.CompletedProcess(args, 1, "", "Error: unexpected end\nat main")

        package = tmp_path / "package.tgz"
        with tarfile.open(package, "w:gz") as archive:
            for name in chromium._MEMBERS:
                archive.addfile(tarfile.TarInfo(f"package/bin/{name}.br"))
        monkeypatch.setattr(subprocess, "run", run)
        said = "no answer within" if is_late else "Error: unexpected end$"
        bring = {
            "npm": lambda: chromium._downloaded(tmp_path),
            "node": lambda: chromium._unpacked(package, tmp_path),
        }
        with pytest.raises(chromium.MissingError, match=f"{command} cannot .*: {said}"):
            bring[command]()

    def test_a_required_browser_that_is_missing_fails(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(chromium.REQUIRE, raising=False)
        with pytest.raises(pytest.skip.Exception, match="no npm"):
            chromium.missing("no npm")
        monkeypatch.setenv(chromium.REQUIRE, "1")
        with pytest.raises(pytest.fail.Exception, match=f"no npm; {chromium.REQUIRE} is 1"):
            chromium.missing("no npm")
