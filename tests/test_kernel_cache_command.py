"""`sglang-prefix kernels --cache`: what it prints, and what it refuses."""

from __future__ import annotations

import errno
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import triton
from rich.console import Console
from typer.testing import CliRunner

from prefix_kernels import kernel_cache
from prefix_kernels.kernel_cache import CachedKernel, KernelLaunch
from prefix_kernels.launches import MERGE_MODES
from prefix_kernels.triton_identity import installed_triton
from sglang_prefix.cli import kernel_cache as command
from sglang_prefix.cli.main import app
from tests.test_kernel_cache import ARCH, entry_in, wheel_of

BASE = ["kernels", "--arch", ARCH]


def test_the_command_knows_latents_by_their_dims() -> None:
    """Of all rows that a server's batches have; the strides of a V that is not read are no key."""
    shapes, dtypes = ("16:1:576:512", "8:1:128"), (("bf16", "bf16"),)
    arguments = (shapes, dtypes, ARCH, MERGE_MODES, False, (), Console(quiet=True))
    forward = [
        dict(one.arguments)
        for one in command._launches(*arguments)
        if one.name == "pack_forward_kernel"
    ]
    found = {(one["HEAD_DIM"], one["V_HEAD_DIM"], one["V_IN_K"]) for one in forward}
    assert found == {(576, 512, True), (128, 128, False)}
    latents = [one for one in forward if one["V_IN_K"]]
    assert {one["BLOCK_M"] for one in latents} == {16, 32, 64}
    assert {(one["K_STRIDE"], one["V_STRIDE"]) for one in latents} == {(576, 0)}


def test_the_command_compiles_for_the_sinks_that_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def collect(work: Any) -> list[KernelLaunch]:
        asked.append([layers.sinks for layers in work.args[0]])
        return []

    monkeypatch.setattr(kernel_cache, "collect_launches", collect)
    options = ["--cache", str(tmp_path), "--model-shape", "64:8:64"]
    for sinks in ([], ["--sinks", "bf16"], ["--sinks", "bf16", "--sinks", "fp32"]):
        CliRunner().invoke(app, [*BASE, *options, *sinks])
    assert asked == [[None], ["bf16"], ["bf16", "fp32"]]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> list[KernelLaunch]:
    """The command without the processes that compile; what it finds is every second kernel."""
    launches = [KernelLaunch("m", f"k{i}", (("BLOCK", i),)) for i in range(4)]
    monkeypatch.setattr(kernel_cache, "collect_launches", lambda _: launches)
    kernels = [CachedKernel(one, "key", 1 << 20, i == 0) for i, one in enumerate(launches)]
    monkeypatch.setattr(kernel_cache, "compile_launches", lambda *_, **__: iter(kernels))
    monkeypatch.setattr(kernel_cache, "find_launches", lambda *_, **__: [True, False, True, False])
    return launches


@pytest.mark.usefixtures("stub")
def test_a_disk_that_is_full_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_launches(*_: Any, **__: Any) -> Iterator[CachedKernel]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    monkeypatch.setattr(kernel_cache, "compile_launches", compile_launches)
    done = CliRunner().invoke(app, [*BASE, "--cache", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr == f"sglang-prefix: cannot write to {tmp_path}: No space left on device\n"


@pytest.mark.usefixtures("stub")
def test_what_the_command_prints(tmp_path: Path) -> None:
    triton_here = installed_triton()
    done = CliRunner().invoke(app, [*BASE, "--cache", str(tmp_path), "--json"])
    assert done.exit_code == 0
    first, second, third = done.stderr.splitlines()
    assert first == "4 kernels for sm_90, 4.0 MiB; 3 of them compiled now"
    assert second.startswith(f"for Triton {triton_here.version} ({triton_here.digest}); ")
    assert third == f"start servers with TRITON_CACHE_DIR={tmp_path}"
    expected = {
        "folder": str(tmp_path),
        "arch": ARCH,
        "triton": triton_here.version,
        "triton_digest": triton_here.digest,
        "kernels": 4,
    }
    assert json.loads(done.stdout) == expected | {"compiled": 3, "bytes": 4 << 20}

    entry_in(tmp_path, "moved", paths_in=tmp_path / "gone")
    done = CliRunner().invoke(app, [*BASE, "--cache", str(tmp_path), "--check", "--json"])
    assert done.exit_code == 1
    assert "1 kernels have moved here" in done.stderr
    assert "2 of 4 kernels for sm_90" in done.stderr
    assert "2 kernels are missing or damaged: k1, k3" in done.stderr
    assert json.loads(done.stdout) == expected | {"found": 2, "moved": 1}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--check"], "--check goes with --cache only"),
        (["--model-shape", "32:8:128"], "--model-shape goes with --cache only"),
        (["--logit-cap"], "--logit-cap goes with --cache only"),
        (["--sinks", "bf16"], "--sinks goes with --cache only"),
        (["--cache", "new", "--sinks", "fp8"], "--sinks is fp8; legal: bf16, fp16, fp32"),
        (["--cache", "new", "--head-dim", "64"], "--head-dim goes without --cache only"),
        (["--cache", "new", "--group-size", "4"], "--group-size goes without --cache only"),
        (["--cache", "new", "--check"], "--cache new is no folder; legal: "),
        (["--cache", "a file"], "'--cache': a file: Not a directory; legal: "),
        (["--cache", "new", "--model-shape", "32:8"], "'--model-shape': it is '32:8'; legal: "),
        (["--cache", "new", "--model-shape", "32:7:128"], "it is '32:7:128'; legal: QO:KV:DIM"),
        (["--cache", "new", "--model-shape", "32:8:128:0"], "it is '32:8:128:0'; legal: QO:KV:DIM"),
        (["--cache", "new", "--model-shape", "32:8:512"], "it is '32:8:512'; legal: QO:KV:DIM"),
        (["--cache", "new", "--model-shape", "32:1:576"], "or 576:512, where v is in k"),
        (["--cache", "new", "--wheel", "a file"], "--wheel a file: it is no wheel of Triton"),
        # Read as an archive it would be damaged; others of its kind have no end.
        (["--cache", "new", "--wheel", "/dev/null"], "it is no wheel of Triton: it is no file"),
    ],
)
def test_mistakes(
    options: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a file").touch()
    done = CliRunner().invoke(app, [*BASE, *options])
    assert done.exit_code == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir() == ["a file"]


def test_a_wheel_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def complaint(wheel: Path) -> str:
        options = ["--cache", "new", "--wheel", str(wheel)]
        done = CliRunner().invoke(app, [*BASE, *options])
        assert done.exit_code == 2
        (line,) = done.stderr.splitlines()
        return line

    legal = f"legal: a wheel of Triton {triton.__version__}"
    assert f"is Triton 1.0; {legal}" in complaint(wheel_of(tmp_path, version="1.0"))
    line = complaint(wheel_of(tmp_path, without="library"))
    assert "it is no wheel of Triton: " in line
    assert "libtriton.so" in line
    wheel = wheel_of(tmp_path)
    data = bytearray(wheel.read_bytes())
    data[200:20_000] = b"x" * 19_800
    wheel.write_bytes(data)
    assert "it is no wheel of Triton: " in complaint(wheel)
    assert zipfile.is_zipfile(io.BytesIO(data))
