"""The documentation as data: pages, their headings, links and code blocks.

A block of bash or Python is run, unless a comment right above it says otherwise::

    <!-- docs-check: skip REASON -->           not run; the reason stands in the summary
    <!-- docs-check: tested by FILE::TEST -->  not run; that test runs it
    <!-- docs-check: server -->                starts a server, which the blocks after it talk to
    <!-- docs-check: prints -->                this block is what the one before it prints
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

__all__ = ["ACTIVATE", "ROOT", "RUNNABLE", "Block", "Page", "pages", "read_page"]

ROOT = Path(__file__).parents[2]
RUNNABLE = ("bash", "python")
# What makes the commands of our environment known to a shell.
ACTIVATE = "source .venv/bin/activate"
KINDS = ("skip", "tested by", "server", "prints")
_NOTE = re.compile(r"<!-- docs-check: (.*?) -->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        where: page and line.
        line: of its fence.
        language: "bash", "python", or "" for text.
        text: its content.
        kind: one of `KINDS`, "run", or "text".
        detail: the reason, or the test.
    """

    where: str
    line: int
    language: str
    text: str
    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Page:
    """A page: Markdown, or the docstring of an example.

    Attributes:
        path: file below the root.
        blocks: in order.
        links: targets of links and images, with their line.
        anchors: of headings, as GitHub makes them.
        code: inline code, with its line.
        text: all of it.
    """

    path: Path
    blocks: tuple[Block, ...]
    links: tuple[tuple[int, str], ...] = ()
    anchors: frozenset[str] = frozenset()
    code: tuple[tuple[int, str], ...] = ()
    text: str = ""


def pages(root: Path = ROOT) -> list[Page]:
    """Every page, the README first."""
    first = [root / "README.md", root / "docs" / "quickstart.md"]
    others = sorted(set(root.glob("docs/*.md")) - set(first))
    markdown = [read_page(file, root) for file in (*first, *others, root / "CONTRIBUTING.md")]
    return markdown + [_read_example(file, root) for file in sorted(root.glob("examples/*.py"))]


def read_page(file: Path, root: Path = ROOT) -> Page:
    """Parse a Markdown file."""
    text = file.read_text(encoding="utf-8")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    path = file.relative_to(root)
    blocks, links, code = [], [], []
    anchors: list[str] = []
    for index, token in enumerate(tokens):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "fence":
            note = _NOTE.fullmatch(tokens[index - 1].content.strip()) if index else None
            blocks.append(_block(path, line, token, note[1] if note else ""))
        for child in token.children or ():
            if child.type in ("link_open", "image"):
                links.append((line, str(child.attrs.get("href", child.attrs.get("src")))))
            if child.type == "code_inline":
                code.append((line, child.content))
        if token.type == "heading_open":
            anchors.append(_unique(_slug(tokens[index + 1]), anchors))
    return Page(path, tuple(blocks), tuple(links), frozenset(anchors), tuple(code), text)


def _block(path: Path, line: int, token: Token, note: str) -> Block:
    where, language = f"{path}:{line}", token.info.strip()
    kind = next((k for k in KINDS if note == k or note.startswith(f"{k} ")), "")
    if note and not kind:
        raise ValueError(f"{where}: docs-check: {note!r} is unknown; legal: {', '.join(KINDS)}")
    detail = " ".join(note.removeprefix(kind).split())
    if kind in ("skip", "tested by") and not detail:
        raise ValueError(f"{where}: docs-check: {kind} says nothing more; legal: {kind} …")
    kind = kind or ("run" if language in RUNNABLE else "text")
    return Block(where, line, language, token.content, kind, detail)


def _slug(heading: Token) -> str:
    """GitHub's anchor of a heading: its text in lower case, dashes for spaces, no punctuation."""
    text = "".join(c.content for c in heading.children or () if c.type in ("text", "code_inline"))
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def _unique(slug: str, taken: list[str]) -> str:
    names = (slug if n == 0 else f"{slug}-{n}" for n in range(len(taken) + 1))
    return next(name for name in names if name not in taken)


def _read_example(file: Path, root: Path) -> Page:
    """The commands in a program's docstring, as one block that is not run: pages have the same."""
    text, path = file.read_text(encoding="utf-8"), file.relative_to(root)
    docstring = ast.get_docstring(ast.parse(text)) or ""
    commands = "\n".join(line.strip() for line in docstring.splitlines() if line.startswith("    "))
    return Page(path, (Block(f"{path}:1", 1, "bash", commands, "text"),), text=docstring)
