"""Who imports whom: the picture in docs/design.md is what the sources do. And files stay short."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "design.md"
SECTION = "## Packages and who imports whom"
# Our packages, and the folders that their import statements start from.
PACKAGES = {
    "prefix_kernels": ROOT / "kernels",
    "sgl_kernel": ROOT / "patches" / "sgl_kernel_cpu",
    "prefix_patches": ROOT / "patches",
    "sglang_prefix": ROOT,
}
# About 400; a test file may hold one table more.
MAX_LINES = {"tests": 550, "others": 450}
# What the kernels may import, and what there is on a GPU host without SGLang.
OF_KERNELS = {"numpy", "torch", "triton"}
OF_GPU_HOSTS = OF_KERNELS | {"hypothesis", "jinja2", "numba", "pytest", "rich", "typer"}
# psutil may be missing there, and is imported where it is used.
ON_GPU_HOSTS = (
    "prefix_kernels.",
    "sglang_prefix.bench.gpu.",
    "sglang_prefix.bench.workloads.",
    "sglang_prefix.bench.providers.",
)


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its name; a package is its ``__init__.py``."""
    found = {}
    for package, root in PACKAGES.items():
        for file in sorted((root / package).rglob("*.py")):
            name = ".".join(file.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


@cache
def imports(module: str) -> dict[str, bool]:
    """Modules that a module imports, and whether it does so as soon as it is imported itself.

    Those for type checkers alone are left out; of others' modules the first name counts.
    """
    found: dict[str, bool] = {}
    for node, at_once in _import_statements(ast.parse(modules()[module].read_text()), True):
        for name in _names(node):
            ours = name.split(".")[0] in PACKAGES
            key = name if ours else name.split(".")[0]
            if key not in sys.stdlib_module_names:
                found[key] = found.get(key, False) or at_once
    return found


def _import_statements(node: ast.AST, at_once: bool) -> Iterator[tuple[ast.stmt, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_once
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _import_statements(child, at_once and not is_function)


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert isinstance(node, ast.ImportFrom)
    assert node.level == 0, f"{ast.unparse(node)}: imports are absolute"
    members = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in modules() else str(node.module) for name in members]


def package_of(module: str) -> str:
    """As the picture names it: the folder, or the file below `sglang_prefix`.

    Loops that are compiled (`forest_jit`) belong to the module that they were taken out of.
    """
    first, *rest = module.split(".")
    if first != "sglang_prefix":
        return first
    below = [part for i, part in enumerate(rest) if i == 0 or _is_folder(module, i + 2)]
    return ".".join(below).removesuffix("_jit") or first


def _is_folder(module: str, depth: int) -> bool:
    file = modules().get(".".join(module.split(".")[:depth]))
    return file is not None and file.name == "__init__.py"


def real() -> dict[str, set[str]]:
    """What every package imports of ours and of SGLang."""
    found: dict[str, set[str]] = defaultdict(set)
    for module in modules():
        named = {name for name in imports(module) if name.split(".")[0] in (*PACKAGES, "sglang")}
        found[package_of(module)] |= {package_of(name) for name in named}
    return {package: names - {package} for package, names in found.items()}


def drawn() -> dict[str, set[str]]:
    """The picture: one line per package, `a -> b, c`."""
    section = PICTURE.read_text().partition(f"{SECTION}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    lines = (line.partition("->") for line in block.splitlines())
    return {
        package.strip(): {name.strip() for name in names.split(",") if name.strip()}
        for package, _, names in lines
    }


def test_the_picture_shows_what_the_sources_import() -> None:
    sources, picture = real(), drawn()
    wrong = [
        f"{package} imports {name}: the picture does not say so"
        for package, names in sources.items()
        for name in sorted(names - picture.get(package, set()))
    ]
    wrong += [
        f"{package} -> {name} is drawn, and nothing in {package} imports it"
        for package, names in picture.items()
        for name in sorted(names - sources.get(package, set()))
    ]
    wrong += [f"{package} is not drawn" for package in sorted(sources.keys() - picture.keys())]
    wrong += [f"{package} is drawn and gone" for package in sorted(picture.keys() - sources.keys())]
    assert not wrong, "\n".join([*wrong, "", "What it should say:", *_lines(sources)])


def _lines(packages: Mapping[str, set[str]]) -> list[str]:
    width = max(map(len, packages))
    return [f"{p:{width}} -> {', '.join(sorted(names))}".rstrip() for p, names in packages.items()]


def test_no_modules_import_each_other_in_a_circle() -> None:
    """When they are imported; a function may import what was there before it."""
    graph = {
        module: {name for name, at_once in imports(module).items() if at_once} & modules().keys()
        for module in modules()
    }
    assert sum(map(len, graph.values())) > 100
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(reversed(error.args[1]))}")


def test_kernels_can_be_used_alone() -> None:
    for module in modules():
        if module.startswith("prefix_kernels"):
            others = {name for name in imports(module) if not name.startswith("prefix_kernels")}
            assert others <= OF_KERNELS, module


def test_what_runs_on_gpu_hosts_imports_only_what_they_have() -> None:
    """At once, that is; libraries that such a host may lack are imported where they are used."""
    waiting = [module for module in modules() if module.startswith(ON_GPU_HOSTS)]
    assert len(waiting) > 15
    seen: set[str] = set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        at_once = {name for name, is_at_once in imports(module).items() if is_at_once}
        missing = {name for name in at_once if name not in modules()} - OF_GPU_HOSTS
        assert not missing, f"{module} imports {sorted(missing)}"
        waiting += [name for name in at_once if name in modules() and name not in seen]


@pytest.mark.parametrize("module", [m for m in modules() if m.startswith("prefix_patches")])
def test_every_patch_says_for_which_releases_and_what_else(module: str) -> None:
    text = modules()[module].read_text()
    declares = re.search(r"\b[Tt]ouch\(|\bif_gone=", text)  # which asks for both
    if not declares and ("sglang" in imports(module) or '"sglang.' in text):
        assert re.search(r"\b0\.5\.\d+", text), "name the releases"
        assert re.search(r"\bgone\b", text), "say what happens when the symbol is gone"


def test_source_roots_are_not_packages() -> None:
    """`kernels` and `patches` would shadow others' packages: SGLang depends on a PyPI `kernels`."""
    assert not list(ROOT.glob("kernels/__init__.py"))
    assert not list(ROOT.glob("patches/__init__.py"))


def test_no_file_is_too_long() -> None:
    folders = ("sglang_prefix", "kernels", "patches", "tests", "examples", ".ci")
    files = [(folder, file) for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    too_long = {}
    for folder, file in files:
        length = len(file.read_text().splitlines())
        if length > MAX_LINES.get(folder, MAX_LINES["others"]):
            too_long[str(file.relative_to(ROOT))] = length
    assert too_long == {}
