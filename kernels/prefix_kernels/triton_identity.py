"""Which Triton a cache of compiled kernels belongs to: the installed one, or that of a wheel.

The hash is Triton's own (`triton.runtime.cache.triton_key`). It covers the compiler's library, of
which there is one for each release of Python, so the Triton of another Python has another cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

__all__ = ["TritonIdentity", "installed_triton", "triton_of_wheel"]

_CHUNK = 1 << 20
_MAX_SOURCE_BYTES = 8 << 20
_LIBRARY = "triton/_C/libtriton.so"
# In the order in which the hash takes them; the library comes before the last.
_FILE, _FOLDERS, _LAST_FOLDER = (
    "triton/runtime/cache.py",
    ("triton/compiler", "triton/backends"),
    "triton/language",
)
# What a file that is no archive, or a damaged one, makes of reading it.
_DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError)


@dataclass(frozen=True, slots=True)
class TritonIdentity:
    """A Triton, as its cache knows it: those that are equal find each other's kernels.

    Attributes:
        version: of the release.
        key: hashes of the files that make the compiler.
    """

    version: str
    key: str

    @property
    def digest(self) -> str:
        """The key in eight characters."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:8]


def installed_triton() -> TritonIdentity:
    """The Triton of this Python."""
    import triton
    from triton.runtime.cache import triton_key

    return TritonIdentity(triton.__version__, triton_key())


def triton_of_wheel(path: str | os.PathLike[str]) -> TritonIdentity:
    """The Triton that a wheel installs; nothing of it is run.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no wheel of Triton; without the file's name.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a device or a pipe may have no end
        raise ValueError("it is no wheel of Triton: it is no file")
    try:
        with zipfile.ZipFile(path) as wheel:
            version = _version(_source(wheel, "triton/__init__.py"))
            sources = [_FILE, *(name for folder in _FOLDERS for name in _modules(wheel, folder))]
            hashes = [_hash(_source(wheel, name)) for name in sources]
            hashes.append(_hash_of_library(wheel))
            hashes += [_hash(_source(wheel, name)) for name in _modules(wheel, _LAST_FOLDER)]
    except _DAMAGES as error:
        raise ValueError(f"it is no wheel of Triton: {error}") from None
    return TritonIdentity(version, version + "-".join(hashes))


def _modules(wheel: zipfile.ZipFile, folder: str) -> Iterator[str]:
    """Files of the modules below a package, as `pkgutil.walk_packages` goes through them."""
    start, names = len(folder) + 1, set(wheel.namelist())
    entries = {name[start:].split("/")[0] for name in names if name.startswith(f"{folder}/")}
    for entry in sorted(entries - {"__init__.py"}):
        path = f"{folder}/{entry}"
        if f"{path}/__init__.py" in names:
            yield f"{path}/__init__.py"
            yield from _modules(wheel, path)
        elif path.endswith(".py") and path in names:
            yield path


def _source(wheel: zipfile.ZipFile, name: str) -> bytes:
    if wheel.getinfo(name).file_size > _MAX_SOURCE_BYTES:
        raise ValueError(f"it is no wheel of Triton: {PurePosixPath(name).name} is too large")
    return wheel.read(name)


def _hash_of_library(wheel: zipfile.ZipFile) -> str:
    digest = hashlib.sha256()
    with wheel.open(_LIBRARY) as library:
        while chunk := library.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version(source: bytes) -> str:
    found = re.search(rb"^__version__ = ['\"]([\w.+]+)['\"]", source, re.MULTILINE)
    if found is None:
        raise ValueError("it is no wheel of Triton: it does not say its version")
    return found[1].decode()
