"""The native executor's library: compiled once for each CPU and torch, kept, and loaded.

Sources are in ``native/``. They are compiled into a folder below ``TORCH_EXTENSIONS_DIR``, or where
torch keeps the extensions that it builds. We call the compiler ourselves: torch's extension loader
needs ninja and setuptools, and links with Python, of which this library knows nothing.

A library is named by a digest of its content and put in place in one step, so one that is there and
fits its name is whole. A folder stands for the sources, torch, the compiler and the instructions of
the CPU: a home directory that moves to another machine never brings instructions that it lacks.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import torch

__all__ = ["CPU_FLAGS", "NativeUnavailableError", "describe", "library", "obtain", "why_not"]

SOURCES = Path(__file__).with_name("native")
_COMPILERS = ("c++", "g++", "clang++")
# Compiling takes 6 to 15 s. Beyond this something hangs; a server starts without the library then.
_TIMEOUT_S = 600
_POLL_S = 0.1
_ON_ARM = platform.machine() in ("aarch64", "arm64")
# No -ffast-math: NaN must stay NaN. No -fopenmp: see GOMP_parallel in native.cpp.
_FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared")
CPU_FLAGS = ("-mcpu=native",) if _ON_ARM else ("-march=native",)

logger = logging.getLogger(__name__)


class NativeUnavailableError(RuntimeError):
    """The library cannot be had here: why, and what to do about it, in one line."""


def library() -> ctypes.CDLL:
    """The library, compiled if there is none yet. Waits while another process compiles it.

    Raises:
        NativeUnavailableError: there is none and there will be none in this process.
    """
    found = _outcome()
    if isinstance(found, str):
        raise NativeUnavailableError(found)
    return found


def why_not() -> str | None:
    """Why there is no library; None if there is one. Compiles it if need be."""
    found = _outcome()
    return found if isinstance(found, str) else None


def describe() -> str:
    """What the library makes of 16-bit values on this CPU.

    Raises:
        NativeUnavailableError: there is no library.
    """
    products = library().prefix_products()
    dtypes = [name for bit, name in ((1, "bfloat16"), (2, "float16")) if products & bit]
    others = [name for name in ("bfloat16", "float16") if name not in dtypes]
    parts = [f"{' and '.join(dtypes)} by oneDNN"] * bool(dtypes)
    parts += [f"{' and '.join(others)} widened to float32"] * bool(others)
    return ", ".join(parts)


@cache
def _outcome() -> ctypes.CDLL | str:
    try:
        return obtain()
    except NativeUnavailableError as error:
        logger.warning("the native executor cannot be used: %s", error)
        return str(error)


def obtain(root: Path | None = None, cpu_flags: Sequence[str] = CPU_FLAGS) -> ctypes.CDLL:
    """Find or compile the library, and load it.

    Args:
        root: folder of all libraries; None for the usual one.
        cpu_flags: options of the compiler; tests compile for other instructions.

    Raises:
        NativeUnavailableError: there is no compiler, it fails, the folder cannot be written to, or
            what it made does not load.
    """
    try:
        folder = (root or _default_root()) / f"sglang_prefix_{_key(cpu_flags)}"
        path = _whole_library(folder) or _build(folder, cpu_flags)
        return _load(path)
    except OSError as error:
        detail = error.strerror or str(error)
        where = f" ({error.filename})" if error.filename else ""
        raise NativeUnavailableError(
            f"its library cannot be kept or loaded: {detail}{where}; "
            "TORCH_EXTENSIONS_DIR can name another folder"
        ) from None


def _load(path: Path) -> ctypes.CDLL:
    """Load a library; one that does not load is removed, so that the next process makes another."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        with suppress(OSError):
            path.unlink()
        raise


def _default_root() -> Path:
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path(os.path.expanduser("~/.cache"))) / "torch_extensions"


def _key(cpu_flags: Sequence[str]) -> str:
    """What a library depends on, as the end of a folder's name."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    facts = (torch.__version__, os.environ.get("CXX", ""), *_FLAGS, *cpu_flags, _instructions())
    digest.update("\0".join(facts).encode())
    return f"{platform.machine()}_{digest.hexdigest()[:16]}"


def _instructions() -> str:
    """The instruction sets that this CPU has, as Linux lists them."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return " ".join(sorted(value.split()))
    return platform.processor()


def _whole_library(folder: Path) -> Path | None:
    """The library in a folder, if there is one that is as it was made."""
    for path in folder.glob("native-*.so"):
        if path.name == _name(path):
            return path
    return None


def _name(library: Path) -> str:
    return f"native-{hashlib.sha256(library.read_bytes()).hexdigest()[:32]}.so"


def _build(folder: Path, cpu_flags: Sequence[str]) -> Path:
    """Compile the library, unless another process just does; what is damaged is removed.

    A process that has waited for one that failed fails for its reason, and does not try again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock") as (lock, has_waited):
        path = _whole_library(folder)
        if path is not None:
            return path
        reason = lock.read() if has_waited else ""
        lock.seek(0)
        lock.truncate()
        if not reason:
            for damaged in folder.glob("native-*.so"):
                damaged.unlink()
            for abandoned in folder.glob("build-*"):
                shutil.rmtree(abandoned, ignore_errors=True)
            logger.info("compiling the native executor into %s, once", folder)
            with TemporaryDirectory(prefix="build-", dir=folder) as scratch:
                made = Path(scratch) / "native.so"
                reason = _compile(made, cpu_flags)
                if not reason:
                    return made.replace(folder / _name(made))
        lock.write(reason)
    raise NativeUnavailableError(reason)


@contextmanager
def _locked(path: Path) -> Iterator[tuple[IO[str], bool]]:
    """Hold a lock that ends with its process; also whether another process had it before."""
    deadline = time.monotonic() + _TIMEOUT_S
    has_waited = False
    with path.open("a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                has_waited = True
                if time.monotonic() > deadline:
                    raise NativeUnavailableError(
                        f"another process has been compiling it for {_TIMEOUT_S} s ({path})"
                    ) from None
                time.sleep(_POLL_S)
        lock.seek(0)
        yield lock, has_waited


def _compile(target: Path, cpu_flags: Sequence[str]) -> str:
    """Compile the library into a file; the reason if that fails, empty if it does not."""
    compiler = _compiler()
    if not compiler:
        return f"no C++ compiler was found ({', '.join(_COMPILERS)}); install the package g++"
    torch_root = Path(torch.__file__).parent
    command = [
        *compiler,
        *_FLAGS,
        *cpu_flags,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *("-isystem", str(torch_root / "include")),
        str(SOURCES / "native.cpp"),
        *(f"-L{torch_root / 'lib'}", "-lc10", "-ltorch_cpu"),
        *("-o", str(target)),
    ]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"{compiler[0]} did not end within {_TIMEOUT_S} s"
    except OSError as error:
        return f"{compiler[0]} cannot be run: {error.strerror}; install the package g++"
    if done.returncode == 0 and target.exists():
        return ""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "no space" in line.lower()]
    detail = (telling or lines[-1:] or ["it says nothing"])[0][:300]
    return f"{compiler[0]} ended with status {done.returncode}: {detail}"


def _compiler() -> list[str]:
    """The compiler's command: ``CXX``, or the first of the usual ones; empty if there is none."""
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    return [path for path in map(shutil.which, _COMPILERS) if path][:1]
