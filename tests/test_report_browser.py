"""The report's page in a real browser: from disk, without any network, in light and dark."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from typer.testing import CliRunner

from sglang_prefix.cli.main import app
from tests import report_files
from tests.browser import MissingError, launched, missing, screenshot

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CPU_RESULT = ROOT / "docs" / "results" / "cpu" / "2026-11-21-6d537cb-kernel.json"
SCREENSHOTS = ROOT / "build" / "screenshots"
WIDE: ViewportSize = {"width": 1280, "height": 900}
NARROW: ViewportSize = {"width": 400, "height": 800}
EVIL = '<script>window.owned = true</script><img src="https://example.org/x.png">'


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a committed CPU result, of both bench commands and of a GPU benchmark."""
    folder = tmp_path_factory.mktemp("results")
    shutil.copy(CPU_RESULT, folder)
    kernel = report_files.kernel_result()
    evil = copy.deepcopy(kernel["cells"][0])
    kernel["cells"].append(evil | {"name": EVIL})
    # Matplotlib would take this for mathematics, and fail.
    kernel["cells"].append(evil | {"name": "$\\frac{$"})
    for result in (
        kernel,
        report_files.serving_result(),
        report_files.gpu_bench_result(dry=False),
    ):
        (folder / f"{result['kind']}.json").write_text(json.dumps(result), encoding="utf-8")
    out = tmp_path_factory.mktemp("page") / "page.html"
    done = CliRunner().invoke(app, ["report", str(folder), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    try:
        from playwright import sync_api
    except ImportError:
        missing("the package playwright is missing")
    with sync_api.sync_playwright() as playwright:
        try:
            with launched(playwright) as running:
                yield running
        except MissingError as error:
            missing(str(error))


@dataclass
class Opened:
    """A page, and what went wrong in it or went beyond it."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def opened(context: BrowserContext, path: Path) -> Opened:
    """Open a page from disk; whatever it asks for beyond itself is refused and remembered."""
    url = path.as_uri()
    context.set_offline(True)
    context.route(
        "**/*", lambda route: route.continue_() if route.request.url == url else route.abort()
    )
    result = Opened(context.new_page())
    result.page.on("console", lambda message: result.complaints.append(message.text))
    result.page.on("pageerror", lambda error: result.complaints.append(str(error)))
    result.page.on("requestfailed", lambda request: result.complaints.append(request.url))
    result.page.on("request", lambda request: result.requests.append(request.url))
    result.page.goto(url)
    return result


@pytest.fixture(scope="module", params=["light", "dark"])
def shown(request: pytest.FixtureRequest, browser: Browser, page_file: Path) -> Iterator[Opened]:
    """The page in both colour schemes."""
    context = browser.new_context(viewport=WIDE, color_scheme=request.param)
    yield opened(context, page_file)
    context.close()


def scheme(shown: Opened) -> str:
    dark = shown.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    return "dark" if dark else "light"


def test_nothing_fails_and_nothing_is_asked_for(shown: Opened, page_file: Path) -> None:
    assert shown.complaints == []
    assert shown.requests == [page_file.as_uri()]
    assert shown.page.evaluate("window.owned") is None
    assert shown.page.title() == "sglang-prefix results"


def test_the_screenshot_is_no_blank(shown: Opened) -> None:
    height = shown.page.evaluate("document.documentElement.scrollHeight")
    path = SCREENSHOTS / f"report-{scheme(shown)}.png"
    picture = screenshot(shown.page, path)
    shown.page.set_viewport_size(WIDE)
    print(f"screenshot: {path}")
    pixels = np.asarray(picture.convert("L"))
    assert pixels.shape == (height, WIDE["width"])
    background = np.median(pixels[::8])
    assert background > 200 if scheme(shown) == "light" else background < 60
    # Every stretch as high as a window has text, lines or a plot in it.
    for top in range(0, height - WIDE["height"], WIDE["height"]):
        stretch = pixels[top : top + WIDE["height"]].astype(np.float32)
        assert stretch.std() > 5, f"nothing to see from {top} px on"
        assert np.mean(np.abs(stretch - background) > 60) > 0.005


def test_every_row_of_every_table_is_visible(shown: Opened) -> None:
    rows = shown.page.locator("tbody tr").evaluate_all(
        "rows => rows.map(r => [r.checkVisibility({opacityProperty: true, "
        "visibilityProperty: true}), r.offsetWidth, r.offsetHeight, r.cells[0].innerText])"
    )
    assert len(rows) > 60
    for is_visible, width, height, text in rows:
        assert is_visible, text
        assert text.strip()
        assert width > 100, text
        assert height > 10, text
    first = {text.strip() for *_, text in rows}
    for result in (report_files.kernel_result(), report_files.serving_result()):
        assert {cell["name"] for cell in result["cells"]} <= first
        assert {*result["absent"], *result["not_run"]} <= first
    assert EVIL in first


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_page_is_as_wide_as_the_window(shown: Opened, size: ViewportSize) -> None:
    shown.page.set_viewport_size(size)
    try:
        needed = shown.page.evaluate("document.documentElement.scrollWidth")
        assert needed <= size["width"]
        # Tables that are wider scroll by themselves, and are not cut off.
        wide = shown.page.locator(".scroll").evaluate_all(
            "boxes => boxes.filter(e => e.scrollWidth > e.clientWidth)"
            ".map(e => getComputedStyle(e).overflowX)"
        )
        assert set(wide) <= {"auto"}
        assert wide or size == WIDE
    finally:
        shown.page.set_viewport_size(WIDE)


def test_plots_have_room_and_ids_of_their_own(shown: Opened) -> None:
    plots = shown.page.locator("figure.plot svg")
    assert plots.count() == 6
    for width, height, paths, label in plots.evaluate_all(
        "plots => plots.map(e => [e.getBoundingClientRect().width, "
        "e.getBoundingClientRect().height, e.querySelectorAll('path').length, e.ariaLabel])"
    ):
        assert width > 300, label
        assert height > 100, label
        assert paths > 10, label
        assert label
    ids = shown.page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    dangling = shown.page.evaluate(
        "[...document.querySelectorAll('svg use')].map(e => e.getAttribute('xlink:href').slice(1))"
        ".filter(id => !document.getElementById(id))"
    )
    assert dangling == []


def test_losing_rows_look_like_it(shown: Opened) -> None:
    style = "e => { const s = getComputedStyle(e); return [s.backgroundColor, s.color].join(' ') }"
    back = "cells => [...new Set(cells.map(e => getComputedStyle(e).backgroundColor))]"
    losing = shown.page.locator("tbody tr.losing > *").evaluate_all(back)
    others = shown.page.locator("tbody tr:not(.losing) > *").evaluate_all(back)
    assert shown.page.locator("tbody tr.losing").count() >= 10
    assert len(losing) == 1
    assert losing[0] not in others
    gain, loss = ".bar.gaining", ".bar.losing"
    colours = [shown.page.locator(each).first.evaluate(style) for each in (gain, loss)]
    assert colours[0] != colours[1]
    summary = shown.page.locator("#summary .losing").first
    assert summary.is_visible()
    normal = shown.page.locator("#summary").evaluate("e => getComputedStyle(e).color")
    assert summary.evaluate("e => getComputedStyle(e).color") != normal


def test_headings_sort_their_table(shown: Opened) -> None:
    table = shown.page.locator("table", has=shown.page.get_by_text("chunk-4096", exact=True)).first
    names = table.locator("tbody th")
    before = names.all_inner_texts()
    heading = table.get_by_role("button", name="speed-up")
    heading.click()
    assert names.all_inner_texts()[0] == "unrelated-8"
    assert table.locator("thead th[aria-sort='ascending']").inner_text() == "speed-up"
    heading.click()
    assert names.all_inner_texts()[0] == "pat-tree-02"
    # A cell without a number is last in both directions.
    assert names.all_inner_texts()[-1] == "chunk-4096"
    assert sorted(names.all_inner_texts()) == sorted(before)


def test_the_page_is_whole_without_scripts(browser: Browser, page_file: Path) -> None:
    context = browser.new_context(viewport=WIDE, java_script_enabled=False)
    plain = opened(context, page_file).page
    assert "slower in" in plain.locator("#summary").inner_text()
    assert len([text for text in plain.locator("tbody tr").all_inner_texts() if text.strip()]) > 60
    assert plain.locator("thead button").count() == 0
    context.close()
