"""Who may import whom , and how long a file may get: read from the sources."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "prefix_kernels"
PACKAGE = ROOT / "sglang_prefix"
PATCHES = ROOT / "patches" / "prefix_patches"
MAX_LINES = 400

# Modules and folders of sglang_prefix that may import SGLang.
GLUE = ("backend", "delegation", "served_layers", "plugin", "cli", "bench")

# What the host side may import besides the standard library, module by module: dependencies point
# one way. A folder stands for all its modules.
HOST_IMPORTS = {
    "compiled": {"numba"},
    "forest_loops": {"numpy", "sglang_prefix.jit"},
    "forest": {"numpy", "sglang_prefix.forest_jit"},
    "packing": {"numpy", "sglang_prefix.jit", "sglang_prefix.forest", "sglang_prefix.packing"},
    "plan": {"numpy", "sglang_prefix.jit", "sglang_prefix.packing", "prefix_kernels.executor"},
    "workspace": {"sglang_prefix.packing", "prefix_kernels"},
    "gate": {
        "numpy",
        "torch",
        "sglang_prefix.forest",
        "sglang_prefix.packing",
        "sglang_prefix.plan",
    },
    "planner": {
        "numpy",
        "sglang_prefix.forest",
        "sglang_prefix.packing",
        "sglang_prefix.plan",
    },
    "runner": {
        "numpy",
        "torch",
        "sglang_prefix.packing",
        "sglang_prefix.plan",
        "prefix_kernels",
    },
    "checks": {"numpy", "torch", "sglang_prefix.forest"},
    "wrapper": {"numpy", "torch", "sglang_prefix", "prefix_kernels"},
}


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            if module == "sglang_prefix":  # `from sglang_prefix import checks` imports a module
                names |= {f"{module}.{alias.name}" for alias in node.names}
            else:
                names.add(module)
    return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}


def imports_sglang(path: Path) -> bool:
    return any(name.split(".")[0] == "sglang" for name in imported(path))


def module_of(path: Path) -> str:
    """Module, or folder, directly below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_within(name: str, allowed: set[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in allowed)


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", python_files(KERNELS), ids=label)
def test_kernels_know_nothing_of_sglang(path: Path) -> None:
    foreign = {
        name
        for name in imported(path)
        if not is_within(name, {"torch", "triton", "numpy", "prefix_kernels"})
    }
    assert not foreign


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=label)
def test_only_glue_imports_sglang(path: Path) -> None:
    if module_of(path) not in GLUE:
        assert not imports_sglang(path)


@pytest.mark.parametrize("module", HOST_IMPORTS)
def test_the_host_side_depends_one_way(module: str) -> None:
    paths = [path for path in python_files(PACKAGE) if module_of(path) == module]
    assert paths
    glue = {f"sglang_prefix.{name}" for name in GLUE}
    for name in {name for path in paths for name in imported(path)}:
        assert is_within(name, HOST_IMPORTS[module])
        assert not is_within(name, glue)


@pytest.mark.parametrize("path", python_files(PATCHES), ids=label)
def test_every_patch_says_for_which_releases_and_what_else(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    names_a_symbol = any(
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("sglang.srt.")
        for node in ast.walk(tree)
    )
    if imports_sglang(path) or names_a_symbol:
        assert re.search(r"\b0\.5\.\d+|[tT]ouch\(", text), "name the releases"
        assert re.search(r"\bgone\b|[tT]ouch\(", text), "say what happens when the symbol is gone"


def test_source_roots_are_not_packages() -> None:
    """`kernels` and `patches` would shadow others' packages: SGLang depends on a PyPI `kernels`."""
    assert not list(ROOT.glob("kernels/__init__.py"))
    assert not list(ROOT.glob("patches/__init__.py"))


def test_no_file_is_too_long() -> None:
    folders = ("sglang_prefix", "kernels", "patches", "tests", "benchmarks", "examples")
    lengths = {
        label(path): len(path.read_text().splitlines())
        for folder in folders
        for path in python_files(ROOT / folder)
    }
    assert len(lengths) > 20
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}
