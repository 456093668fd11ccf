"""The documentation, read and typed in by a program: `make docs-check`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.docs.pages import ACTIVATE, ROOT, Block, pages, read_page
from tests.docs.run import Outcome, Reader, chains


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with Reader(tmp_path_factory.mktemp("reader")) as one:
        yield one


@pytest.mark.engine
@pytest.mark.extended
@pytest.mark.parametrize("chain", chains(pages()), ids=lambda chain: chain[0].where)
def test_a_block_does_what_its_page_says(chain: Sequence[Block], reader: Reader) -> None:
    for block in chain:
        status, detail = reader.take(block)
        assert status != "failed", f"{block.where}: {detail}"
        if status == "not run":
            pytest.skip(f"{block.where}: {detail}")


@pytest.mark.engine
@pytest.mark.extended
def test_the_blocks_did_what_the_pages_are_about(reader: Reader) -> None:
    """After the test above: its blocks have run against a server that packs."""
    printed = "\n".join(reader.printed)
    assert len(reader.printed) >= 8
    assert "agent 0, turn 0: price(oak) -> one oak costs 120 euros" in printed
    ratios = re.findall(r"agent 3, turn 2: .*\n.*\nKV tokens read / KV tokens: ([\d.]+)", printed)
    assert [ratio for ratio in ratios if float(ratio) < 0.7]
    counters = reader.counters()
    assert counters["packed_steps"] > 0
    assert counters["kv_read_ratio"] < 0.8
    # The table of counters has what a server shows.
    assert set(counters) <= {code for _, code in read_page(ROOT / "docs/metrics.md").code}


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ("```bash\nexit 3\n```", "status 3"),
        ("```bash\nfalse | true\n```", "status 1"),
        ("```python\nprint(1)\n```\n\n<!-- docs-check: prints -->\n```\n2\n```", "it prints:\n1"),
        ("```python\n1 / 0\n```", "ZeroDivisionError"),
    ],
)
def test_a_planted_command_that_fails_is_found(
    planted: str, complaint: str, tmp_path: Path
) -> None:
    status, detail = read(planted, tmp_path)[-1]
    assert status == "failed"
    assert complaint in detail


def test_our_commands_are_found_after_activation_only(tmp_path: Path) -> None:
    commands = ("command -v sglang-prefix", ACTIVATE, "type -P sglang-prefix")
    planted = "\n".join(f"```bash\n{command}\n```\n" for command in commands)
    assert [status for status, _ in read(planted, tmp_path)] == ["failed", "ran", "ran"]


def read(text: str, folder: Path) -> list[Outcome]:
    """What becomes of the blocks of a page."""
    (folder / "scratch").mkdir()
    (folder / "page.md").write_text(f"# Page\n\n{text}\n")
    page = read_page(folder / "page.md", folder)
    with Reader(folder / "scratch") as reader:
        return [reader.take(block) for chain in chains([page]) for block in chain]
