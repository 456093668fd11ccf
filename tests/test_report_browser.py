"""The report's page in a real browser: from disk, without any network, in light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

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
        with chromium.launched() as browser:
            yield browser

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
        names = {"pat-tree-01", "forks", "pair/logprobs", "many", "dim128", "forest", "graph/fused"}
        names |= {EVIL, "chunk-4096", "flashinfer-cascade"}
        assert names <= {name.removeprefix("▼ ") for name, _ in rows}

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

    def test_plots_are_drawn_and_have_room(self, shown: Page) -> None:
        plots = shown.locator("figure.plot img").evaluate_all(
            "plots => plots.map(e => [e.alt, e.clientWidth, e.clientHeight, e.naturalWidth])"
        )
        assert len(plots) == 3
        for label, width, height, drawn in plots:
            assert label
            assert (width > 300, height > 100, drawn > 100) == (True, True, True), label

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
        table = shown.locator("table", has=shown.get_by_role("button", name="over hydragen")).first
        names = table.locator("tbody th")
        before = names.all_inner_texts()
        heading = table.get_by_role("button", name="over hydragen")
        for direction, first in (("ascending", "pat-tree-03"), ("descending", "pat-tree-01")):
            heading.click()
            now = [name.removeprefix("▼ ") for name in names.all_inner_texts()]
            # A cell without a number is last in both directions.
            assert (now[0], now[-1]) == (first, "unrelated-8")
            assert sorted(now) == sorted(before)
            sorted_by = table.locator(f"thead th[aria-sort='{direction}']")
            assert sorted_by.inner_text().startswith("over hydragen")

    def test_the_page_is_whole_without_scripts(self, running: Browser, page_file: Path) -> None:
        context = running.new_context(viewport=WIDE, java_script_enabled=False)
        page = opened(context, page_file, [])
        assert "slower in" in page.locator("#summary").inner_text()
        assert len([t for t in page.locator("tbody tr").all_inner_texts() if t.strip()]) > 60
        assert page.locator("thead button").count() == 0
        context.close()


def opened(context: BrowserContext, path: Path, complaints: list[str]) -> Page:
    """Open a page from disk, offline; what it asks for beyond itself is noted."""
    url = path.as_uri()
    context.set_offline(True)
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: complaints.append(r.url) if r.url != url else None)
    page.goto(url)
    return page


def test_a_required_browser_that_is_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(chromium.REQUIRE, "1")
    with pytest.raises(pytest.fail.Exception, match=f"no npm; {chromium.REQUIRE} is 1"):
        chromium.missing("no npm")
