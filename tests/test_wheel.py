"""The wheel: that all of us is in it, and that it runs where nothing of this checkout helps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"sglang_prefix": ROOT, "prefix_kernels": ROOT / "kernels"}
PACKAGES |= {"prefix_patches": ROOT / "patches", "sgl_kernel_cpu": ROOT / "patches"}
PROBE = """
import json, sys
import prefix_kernels, prefix_patches, sgl_kernel, sglang_prefix
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES
load_plugins()
plugin = sys.modules["sglang_prefix.plugin"]
ours = prefix_kernels, prefix_patches, sgl_kernel, sglang_prefix, plugin
found = ATTENTION_BACKEND_CHOICES.count("prefix"), sgl_kernel.IS_STAND_IN
print(json.dumps([found, [module.__file__ for module in ours]]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("sglang_prefix", "kernels", "patches"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(output)]
    # setuptools warns of a package that is missing in its list, on everybody's first screen.
    assert run(sys.executable, "-m", "pip", "wheel", *options, str(source)) == ""
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
        command,
        cwd=cwd,
        env=inherited,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout.strip()


def test_the_wheel_holds_every_file_of_our_packages_and_no_other_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    (metadata,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    top = {"sglang_prefix", "prefix_kernels", "prefix_patches", metadata}
    assert {name.split("/")[0] for name in names} == top
    expected = set()
    for package, root in PACKAGES.items():
        # The stand-in rides inside the patches, so that its name is not importable.
        to = "prefix_patches/" if package == "sgl_kernel_cpu" else ""
        files = [f for f in (root / package).rglob("*.*") if "__pycache__" not in f.parts]
        expected |= {to + file.relative_to(root).as_posix() for file in files}
    assert len(expected) > 100
    assert expected - names == set()


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.timeout(600)
def test_what_runs_is_in_the_wheel(python: Path, tmp_path: Path) -> None:
    """Our packages, the stand-in, and the plugin that SGLang finds."""
    command = (python.parent / "sglang-prefix", "exec", "--", python, "-c", PROBE)
    found, files = json.loads(run(*command, cwd=tmp_path).splitlines()[-1])
    assert found == [1, True]
    assert [file for file in files if not Path(file).is_relative_to(python.parents[1])] == []
