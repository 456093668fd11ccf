"""The native library: found, compiled once, or one line that says why there is none.

Most compilers here are scripts that copy the library that the other tests use.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from prefix_kernels import native_library
from prefix_kernels.executor import choose_executor, make_executor
from prefix_kernels.native_library import NativeUnavailableError, obtain
from prefix_kernels.plan import AttentionShape
from sglang_prefix.cli import doctor

CPU = torch.device("cpu")
TENSORS = (CPU, torch.float32, torch.float32)
SHAPE = AttentionShape(4, 2, 16, 16, 4, 4)

Compiler = Callable[[str], None]


@pytest.fixture
def real() -> Path:
    """The library that this process has loaded."""
    return Path(native_library.library()._name)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Sets the compiler to a script; ``$out`` is what it is to make. Each call adds to a file."""

    def use(script: str) -> None:
        path = tmp_path / "compiler"
        lines = ("#!/bin/sh", f"echo called >> {tmp_path}/calls", "for out; do :; done", script)
        path.write_text("\n".join(lines) + "\n")  # the last argument is the file
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))

    return use


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As a process that has not asked for the library yet, with an empty cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "fresh"))
    native_library._outcome.cache_clear()
    yield
    native_library._outcome.cache_clear()


def num_calls(tmp_path: Path) -> int:
    calls = tmp_path / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def only_library(root: Path) -> Path:
    (path,) = root.glob("*/native-*.so")
    return path


def test_it_is_compiled_once_and_found_again(
    tmp_path: Path, real: Path, compiler: Compiler
) -> None:
    compiler(f'cp {real} "$out"')
    for _ in range(2):
        assert obtain(tmp_path / "root").prefix_products() >= 0
    assert num_calls(tmp_path) == 1
    folder = only_library(tmp_path / "root").parent
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".so"]  # and the lock


def test_a_cache_that_is_there_is_only_read(tmp_path: Path, real: Path, compiler: Compiler) -> None:
    """As in an image whose file system is read-only, and which has no compiler."""
    compiler(f'cp {real} "$out"')
    obtain(tmp_path / "root")
    lock = only_library(tmp_path / "root").with_name("lock")
    lock.unlink()
    (tmp_path / "compiler").write_text("")  # the path is part of the key
    obtain(tmp_path / "root")
    assert not lock.exists()


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + b"x", lambda b: b""]
)
def test_a_damaged_library_is_compiled_again(
    damage: Callable[[bytes], bytes], tmp_path: Path, real: Path, compiler: Compiler
) -> None:
    compiler(f'cp {real} "$out"')
    obtain(tmp_path / "root")
    path = only_library(tmp_path / "root")
    path.write_bytes(damage(path.read_bytes()))
    obtain(tmp_path / "root")
    assert num_calls(tmp_path) == 2
    assert only_library(tmp_path / "root").read_bytes() == real.read_bytes()


@pytest.mark.parametrize("fact", ["cpu", "torch", "source"])
def test_a_library_of_other_facts_is_not_loaded(
    fact: str, tmp_path: Path, real: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home directory on another machine, another torch, another release of ours."""
    compiler(f'cp {real} "$out"')
    obtain(tmp_path / "root")
    if fact == "cpu":
        monkeypatch.setattr(native_library, "_instructions", lambda: "sse2")
    elif fact == "torch":
        monkeypatch.setattr(torch, "__version__", "2.0.0")
    else:
        sources = shutil.copytree(native_library.SOURCES, tmp_path / "sources")
        monkeypatch.setattr(native_library, "SOURCES", Path(sources))
        (tmp_path / "sources" / "work.h").write_text("// other\n")
    obtain(tmp_path / "root")
    assert num_calls(tmp_path) == 2
    assert len(list((tmp_path / "root").glob("*/native-*.so"))) == 2


def test_what_a_killed_build_left_is_in_nobodys_way(
    tmp_path: Path, real: Path, compiler: Compiler
) -> None:
    compiler(f'cp {real} "$out"')
    obtain(tmp_path / "root")
    path = only_library(tmp_path / "root")
    path.rename(path.with_name("native-0.so"))
    scratch = path.with_name("build-x")
    scratch.mkdir()
    (scratch / "native.so").write_bytes(b"half")
    path.with_name("lock").write_text("some reason")
    obtain(tmp_path / "root")
    assert num_calls(tmp_path) == 2
    assert only_library(tmp_path / "root") == path
    assert not scratch.exists()


def test_a_lock_ends_with_its_process(tmp_path: Path, real: Path, compiler: Compiler) -> None:
    compiler(f'cp {real} "$out"')
    folder = tmp_path / "root" / f"sglang_prefix_{native_library._key(native_library.CPU_FLAGS)}"
    folder.mkdir(parents=True)
    hold = (
        "import fcntl, sys, time; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(99)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / "lock")], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(obtain, tmp_path / "root")
        time.sleep(0.3)
        assert not waiting.done()
        assert num_calls(tmp_path) == 0
        holder.kill()
        holder.wait()
        waiting.result(timeout=60)


def test_a_lock_is_not_waited_for_without_end(
    tmp_path: Path, real: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_library, "_TIMEOUT_S", 0.5)
    compiler("exec sleep 60")
    folder = tmp_path / "root" / f"sglang_prefix_{native_library._key(native_library.CPU_FLAGS)}"
    folder.mkdir(parents=True)
    with native_library._locked(folder / "lock"):  # noqa: SIM117
        with pytest.raises(NativeUnavailableError, match=r"another process .* for 0\.5 s"):
            obtain(tmp_path / "root")
    with pytest.raises(NativeUnavailableError, match=r"compiler did not end within 0\.5 s"):
        obtain(tmp_path / "root")


@pytest.mark.parametrize("fails", [False, True])
def test_several_at_once_compile_once(
    fails: bool, tmp_path: Path, real: Path, compiler: Compiler
) -> None:
    """The locks of three files are those of three processes. All of them get the one answer."""
    compiler("sleep 2; " + ("echo error: no; exit 1" if fails else f'cp {real} "$out"'))
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(obtain, tmp_path / "root") for _ in range(3)]
        errors = [str(one.exception(timeout=60)) for one in waiting]
    assert num_calls(tmp_path) == 1
    assert len(set(errors)) == 1
    assert ("ended with status 1: error: no" in errors[0]) == fails
    if fails:  # who comes later may try again: the cause may be gone
        compiler(f'cp {real} "$out"')
        obtain(tmp_path / "root")


REASONS = {
    "fails": (
        "echo 'a.h:7: fatal error: x.h: No such file'; exit 1",
        "status 1: a.h:7: fatal error",
    ),
    "full disk": (
        "echo as: ; echo '/tmp/cc.s: No space left on device' >&2; exit 2",
        "status 2: /tmp/cc.s: No space left on device",
    ),
    "silent": ("exit 3", "status 3: it says nothing"),
    "makes nothing": ("true", "status 0: it says nothing"),
    "makes nonsense": ('echo nonsense > "$out"', "kept or loaded: .*(too short|invalid ELF)"),
    "makes another": ('cp /bin/true "$out"', "kept or loaded: "),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_compiler_that_does_not_do_its_work(
    name: str, fresh: None, compiler: Compiler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The torch executor serves, the reason is one line, and the compiler is asked once."""
    script, reason = REASONS[name]
    compiler(script)
    assert choose_executor("auto", *TENSORS) == "torch"
    with pytest.raises(ValueError, match=f"executor='native' cannot be used here: .*{reason}"):
        choose_executor("native", *TENSORS)
    assert num_calls(tmp_path) == 1
    assert [len(text.splitlines()) for text in caplog.messages] == [1]
    with pytest.raises(NativeUnavailableError, match=reason):
        make_executor("native", SHAPE, CPU)
    assert not list((tmp_path / "fresh").glob("*/build-*"))
    assert not list((tmp_path / "fresh").glob("*/native-*.so")), "the next process tries again"


@pytest.mark.parametrize("named", ["", "/no/such/compiler"])
def test_no_compiler(
    named: str, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", named)
    assert choose_executor("auto", *TENSORS) == "torch"
    with pytest.raises(ValueError, match="install the package g\\+\\+; legal: 'torch'"):
        choose_executor("native", *TENSORS)


@pytest.mark.parametrize("folder", ["file/below", "/proc/sglang-prefix"])
def test_a_folder_that_cannot_be_written(
    folder: str, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / folder))
    assert choose_executor("auto", *TENSORS) == "torch"
    with pytest.raises(ValueError, match=r"kept or loaded: .*; TORCH_EXTENSIONS_DIR can"):
        choose_executor("native", *TENSORS)


@pytest.mark.extended
def test_a_file_that_may_not_grow(fresh: None, tmp_path: Path) -> None:
    """A real compiler without room for what it makes, as on a full disk."""
    program = (
        "import resource, torch; from prefix_kernels.executor import choose_executor as c; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        "print(c('auto', torch.device('cpu'), torch.float32, torch.float32))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["torch"], done.stderr
    assert "the native executor cannot be used: " in done.stderr
    assert not list((tmp_path / "fresh").glob("*/native-*.so"))


def test_the_folder_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert native_library._default_root() == Path("/home/somebody/.cache/torch_extensions")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert native_library._default_root() == Path("/caches/torch_extensions")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/here")
    assert native_library._default_root() == Path("/here")


def test_it_is_for_the_cpu_and_for_dtypes_that_it_reads() -> None:
    native = {"name": "native", "q_dtype": torch.float32, "kv_dtype": torch.float32}
    with pytest.raises(ValueError, match="it runs on the CPU, not on cuda:0"):
        choose_executor(**native, device=torch.device("cuda:0"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"it does not read torch\.float64"):
        choose_executor("native", CPU, torch.float64, torch.float32)


def test_doctor_says_what_runs_and_why_nothing_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr(native_library, "_outcome", lambda: "there is no compiler")
        says = "torch, the native executor cannot be used: there is no compiler"
        assert doctor.SGLANG_CHECKS["executor"]() == says
    assert doctor.SGLANG_CHECKS["executor"]().startswith("native, ")


def test_what_it_makes_of_16_bit_values() -> None:
    text = native_library.describe()
    assert "bfloat16" in text
    assert "float16" in text.replace("bfloat16", "")


def test_the_sources_are_part_of_the_package() -> None:
    assert os.listdir(native_library.SOURCES)
    assert (native_library.SOURCES / "native.cpp").exists()
