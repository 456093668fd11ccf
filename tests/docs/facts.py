"""What the documentation says of files, links, options, variables and metrics, and is it so?

Each function returns what is wrong, one line each with page and line.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.docs.pages import ACTIVATE, ROOT, Page

__all__ = ["problems"]

SOURCES = ("sglang_prefix", "kernels", "patches")
_OURS = re.compile(
    r"(?:sglang_prefix|kernels|patches|tests|benchmarks|examples|docs|\.ci)/[\w./-]*"
)
# The pages that people begin with, and commands that come from our environment.
_ENTRIES = (Path("README.md"), Path("docs/quickstart.md"))
_TAKEN = re.compile(r"^(?:sglang|python)\b", re.MULTILINE)
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def problems(pages: Sequence[Page]) -> list[str]:
    """Everything that is wrong with the pages, but for what running them shows."""
    of_code = (paths, tests_named, variables, metrics, commands, options)
    of_pages = (links, activation, tables, places)
    return [problem for check in (*of_code, *of_pages) for problem in check(pages)]


def links(pages: Sequence[Page]) -> Iterator[str]:
    """Relative links lead to files, and their anchors to headings."""
    anchors = {page.path: page.anchors for page in pages}
    for page in pages:
        for line, target in page.links:
            file, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            found = (ROOT / page.path.parent / file).resolve()
            if not found.exists() or not found.is_relative_to(ROOT):
                yield f"{page.path}:{line}: the link {target} leads nowhere"
                continue
            headings = anchors.get(found.relative_to(ROOT), ()) if file else page.anchors
            if anchor and anchor not in headings:
                yield f"{page.path}:{line}: {target} names no heading"


def paths(pages: Sequence[Page]) -> Iterator[str]:
    """Files and folders named in code exist."""
    for page in pages:
        for line, code in page.code:
            name = code.partition("::")[0]
            if _OURS.fullmatch(name) and not (ROOT / name).exists():
                yield f"{page.path}:{line}: there is no {name}"


def tests_named(pages: Sequence[Page]) -> Iterator[str]:
    """Tests that are said to check something exist."""
    for page in pages:
        named = [(str(line), code) for line, code in page.code if "::test_" in code]
        named += [(b.where.split(":")[1], b.detail) for b in page.blocks if b.kind == "tested by"]
        for line, name in named:
            file, _, test = name.rpartition("::") if "::" in name else (name, "", "")
            files = list(ROOT.glob(f"tests/**/{Path(file).name}")) if file.endswith(".py") else []
            files = files or ([] if file.endswith(".py") else list(ROOT.glob("tests/**/test_*.py")))
            if not any(f"def {test}(" in f.read_text() or not test for f in files):
                yield f"{page.path}:{line}: there is no test {name}"


def variables(pages: Sequence[Page]) -> Iterator[str]:
    """Environment variables are those of the code; the table of settings has all of ours."""
    settings = set(re.findall(r"SGLANG_PREFIX_[A-Z_]+", _text("sglang_prefix/config.py")))
    environ = Path(_origin("sglang"), "srt", "environ.py")
    known = environ.read_text() if environ.exists() else ""
    files = [f for source in SOURCES for f in (ROOT / source).rglob("*.py")]
    # What tests read stands in the modules that they share; a test may name what there is not.
    files += [f for f in (ROOT / "tests").glob("*.py") if not f.name.startswith("test_")]
    known += "".join(f.read_text() for f in files)
    for page in pages:
        for name in sorted(set(re.findall(r"\bSGLANG_[A-Z0-9_]+[A-Z0-9]", page.text))):
            if not re.search(rf"\b{name}\b", known):
                yield f"{page.path}: nothing reads {name}"
        if page.path.name == "configuration.md":
            listed = set(re.findall(r"^\| `(SGLANG_PREFIX_[A-Z_]+)`", page.text, re.MULTILINE))
            for name in sorted(settings - listed):
                yield f"{page.path}: the table lacks {name}"


def metrics(pages: Sequence[Page]) -> Iterator[str]:
    """Metrics and counters in their tables are those of the code, all of them."""
    from sglang_prefix.backend.counters import BackendCounters

    source = _text("sglang_prefix/backend/metrics.py")
    made = {f"sglang_prefix_{name}" for name in re.findall(r'counter\(\s*"(\w+)"', source)}
    for page in pages:
        named = set(re.findall(r"sglang_prefix_\w+_total", page.text))
        for name in sorted(named - made):
            yield f"{page.path}: there is no metric {name}"
        if page.path.name == "metrics.md":
            for name in sorted(made - named):
                yield f"{page.path}: the table lacks {name}"
            for name in sorted(set(BackendCounters().as_dict()) - {code for _, code in page.code}):
                yield f"{page.path}: the table lacks the counter {name}"


def activation(pages: Sequence[Page]) -> Iterator[str]:
    """Where people begin, a block says how to activate `.venv` before one takes commands from it.

    Blocks that are not run here stand for other environments.
    """
    for page in pages:
        if page.path not in _ENTRIES:
            continue
        for block in (b for b in page.blocks if b.language == "bash"):
            if ACTIVATE in block.text:
                break
            if block.kind in ("run", "server") and _TAKEN.search(block.text):
                yield f"{block.where}: nothing above says `{ACTIVATE}`"
                break


def commands(pages: Sequence[Page]) -> Iterator[str]:
    """Commands in blocks and in the text exist, with the options that they get."""
    for page in pages:
        lines = [(str(line), code) for line, code in page.code]
        for block in page.blocks:
            if block.language == "bash":
                joined = block.text.replace("\\\n", " ")
                lines += [(block.where.split(":")[1], text) for text in joined.splitlines()]
        for line, text in lines:
            for problem in _wrong_with(text):
                yield f"{page.path}:{line}: {problem}"


def options(pages: Sequence[Page]) -> Iterator[str]:
    """Options in the text are options of some program that the pages are about."""
    known = (
        _server_options() | _router_options() | _options_in("benchmarks", "examples", "tests/docs")
    )
    known |= {name for names in _own_commands().values() for name in names}
    known |= _options_in_text((ROOT / "Makefile").read_text())
    for page in pages:
        for line, code in page.code:
            for name in _OPTION.findall(code):
                if name not in known:
                    yield f"{page.path}:{line}: no program has the option {name}"


def tables(pages: Sequence[Page]) -> Iterator[str]:
    """Rows of CPU numbers stand in the result file that is named above them."""
    for page in pages:
        file = None
        for line, text in enumerate(page.text.splitlines(), 1):
            named = re.findall(r"docs/results/cpu/[\w.-]+\.json", text)
            file = named[-1] if named else file
            if re.match(r"\| \d+ \| \d+ \+ \d+ \|", text) and (
                file is None or text not in _rows_of(file)
            ):
                yield f"{page.path}:{line}: this row does not stand in {file}"


def places(pages: Sequence[Page]) -> Iterator[str]:
    """The index has every page, and no page names a folder of one machine."""
    index = next((page for page in pages if page.path == Path("docs/README.md")), None)
    for page in pages:
        for found in re.findall(r"(?<![\w.])/(?:work|root|home)/[\w./-]*", page.text):
            yield f"{page.path}: {found} is a place on one machine"
        listed = {target for _, target in index.links} if index else set()
        if (
            index
            and page.path.parent == Path("docs")
            and page.path.name not in {*listed, "README.md"}
        ):
            yield f"{index.path}: {page.path.name} is not listed"


def _wrong_with(text: str) -> Iterator[str]:
    """What is wrong with one command line, or piece of inline code."""
    try:
        words = shlex.split(text.replace("…", ""), comments=True)
    except ValueError:
        return
    for start, word in enumerate(words):
        rest = words[start + 1 :]
        if word == "make":
            targets = [w for w in rest if re.fullmatch(r"[a-z][a-z-]+", w)]
            yield from (f"make has no target {t}" for t in targets if t not in _make_targets())
            return
        if word == "sglang-prefix":
            yield from _wrong_with_ours(rest)
            if rest[:1] != ["exec"]:
                return
        if word in ("serve", "sglang.launch_server"):
            yield from _unknown("sglang serve", rest, _server_options())
        if word.startswith("examples/") and word.endswith(".py") and (ROOT / word).exists():
            more = _server_options() if "parse_known_args" in _text(word) else set()
            yield from _unknown(word, rest, _options_in_text(_text(word)) | more)
        if word == "sglang_router.launch_router":
            yield from _unknown(word, rest, _router_options())


def _wrong_with_ours(rest: list[str]) -> Iterator[str]:
    known = _own_commands()
    named = " ".join(rest[:1])
    if not re.fullmatch(r"[a-z][a-z-]*", named):
        return
    two = " ".join(rest[:2])
    if two in known:
        named = two
    if named not in known:
        yield f"there is no command sglang-prefix {named}"
    elif named != "exec":
        yield from _unknown(f"sglang-prefix {named}", rest, known[named])


def _unknown(program: str, words: Iterable[str], known: set[str]) -> Iterator[str]:
    for word in words:
        if word in ("|", ";", "&&"):
            return
        name = word.partition("=")[0]
        if _OPTION.fullmatch(name) and name not in known | {"--help"}:
            yield f"{program} has no option {name}"


@cache
def _own_commands() -> dict[str, set[str]]:
    """Options of each of our commands, by its name after `sglang-prefix`."""
    import typer.main

    from sglang_prefix.cli.main import app

    found: dict[str, set[str]] = {}

    def walk(command: Any, name: str) -> None:
        found[name] = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        for sub, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{name} {sub}".strip())

    walk(typer.main.get_command(app), "")
    return found


@cache
def _server_options() -> set[str]:
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return set(parser._option_string_actions)


@cache
def _router_options() -> set[str]:
    folder = Path(_origin("sglang_router"))
    return {o for file in folder.glob("*.py") for o in _options_in_text(file.read_text())}


@cache
def _options_in(*folders: str) -> set[str]:
    files = [f for name in folders for end in ("py", "sh") for f in (ROOT / name).rglob(f"*.{end}")]
    return {o for file in files for o in _options_in_text(file.read_text())}


def _options_in_text(text: str) -> set[str]:
    return set(_OPTION.findall(text))


@cache
def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", _text("Makefile"), re.MULTILINE))


@cache
def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def _origin(package: str) -> str:
    spec = find_spec(package)
    return str(Path(spec.origin).parent) if spec and spec.origin else "/nonexistent"


@cache
def _rows_of(file: str) -> set[str]:
    """The rows of a result file of `make bench-cpu`, as the tables have them."""
    rows = set()
    for case in json.loads(_text(file))["cases"]:
        names = ("sglang-torch-native", "torch/query", "torch/pat")
        stock, query, pat = (case["providers"][name]["ms"] for name in names)
        *shared, own = case["tree"].split("_")[1].split(",")
        cells = [case["batch"], f"{(shared or [0])[0]} + {own}", case["dtype"], case["slots"]]
        cells += [f"{ms:.1f}" for ms in (stock, query, pat)]
        cells += [f"{stock / pat:.2f}x", f"{query / pat:.2f}x"]
        rows.add(f"| {' | '.join(map(str, cells))} |")
    return rows
