"""The wheel in a clean environment: what it installs, and that nothing of this checkout helps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
SOURCES = ("sglang_prefix", "kernels", "patches")
FILES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(output)]
    run(sys.executable, "-m", "pip", "wheel", *options, str(source))
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of an environment with the wheel, and our dependencies from this one's.

    The dependencies come by a path file behind the environment's own packages. Its folder's path
    files, the editable install of this checkout among them, are not read that way.
    """
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "-q", "--no-deps", "--no-index", wheel)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command without anything of ours in its environment; return what it printed."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=cwd, env=inherited, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_the_wheel_holds_our_packages_and_no_other_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    (metadata,) = [name for name in top if name.endswith(".dist-info")]
    assert top == {"sglang_prefix", "prefix_kernels", "prefix_patches", metadata}
    assert "prefix_patches/sgl_kernel_cpu/sgl_kernel/__init__.py" in names
    assert "prefix_patches/radix_paths.py" in names
    assert "sglang_prefix/packing/__init__.py" in names
    assert "sglang_prefix/py.typed" in names
    assert "sglang_prefix/bench/serving/workloads.json" in names
    assert {f"sglang_prefix/bench/report/page.{e}" for e in ("html.j2", "css", "js")} <= {*names}
    assert "prefix_kernels/tuned_tiles.json" in names
    for path in (ROOT / "sglang_prefix" / "bench" / "workloads").iterdir():
        assert path.relative_to(ROOT).as_posix() in names


def test_every_module_of_the_checkout_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for root, package in (
        (ROOT, "sglang_prefix"),
        (ROOT / "kernels", "prefix_kernels"),
        (ROOT / "patches", "prefix_patches"),
    ):
        for path in (root / package).rglob("*.py"):
            assert path.relative_to(root).as_posix() in names


@pytest.mark.parametrize("name", ["sglang_prefix", "prefix_kernels", "prefix_patches"])
def test_packages_are_imported_from_the_wheel(name: str, python: Path, tmp_path: Path) -> None:
    found = run(python, "-c", f"import {name}; print({name}.__file__)", cwd=tmp_path)
    assert Path(found).is_relative_to(python.parents[1])


def test_the_command_starts(python: Path, tmp_path: Path) -> None:
    printed = run(python.parent / "sglang-prefix", "--help", cwd=tmp_path)
    for command in ("exec", "doctor", "tiny-model", "demo", "report"):
        assert command in printed


def test_exec_uses_the_stand_in_of_the_wheel(python: Path, tmp_path: Path) -> None:
    code = "import sgl_kernel; print(sgl_kernel.IS_STAND_IN, sgl_kernel.__file__)"
    command = (python.parent / "sglang-prefix", "exec", "--", python, "-c", code)
    is_stand_in, where = run(*command, cwd=tmp_path).split()
    assert is_stand_in == "True"
    assert Path(where).is_relative_to(python.parents[1])


def test_sglang_finds_the_plugin(python: Path, tmp_path: Path) -> None:
    code = """
import sys
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES
load_plugins()
print(ATTENTION_BACKEND_CHOICES.count("prefix"), sys.modules["sglang_prefix.plugin"].__file__)
"""
    command = (python.parent / "sglang-prefix", "exec", "--", python, "-c", code)
    count, where = run(*command, cwd=tmp_path).splitlines()[-1].split()
    assert count == "1"
    assert Path(where).is_relative_to(python.parents[1])
