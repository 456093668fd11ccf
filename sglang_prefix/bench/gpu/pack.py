"""What is carried to a GPU host without a network: archives in one folder, within a bound.

Beside a checkout: Triton's cache, so that little is compiled there (batches that are drawn at
random, plans that differ from those without a GPU, and tiles of further pack shapes may need a
kernel that was not recorded); a kit of Python packages for kernels of others; FastTree's kernels,
which are sources.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

__all__ = ["CACHE", "FASTTREE", "MAX_BYTES", "carried_files", "pack"]

# Of the checkout and all archives.
MAX_BYTES = 64 << 20
CACHE, FASTTREE = "cache", "fasttree"
# Folders of a kit, each with archives of packages that are to come first on the Python path.
_KIT_PARTS = ("core", "ops")
_SUFFIX = ".tar.xz"
_ROOT = Path(__file__).parents[3]


def carried_files(folder: Path) -> dict[str, Path]:
    """The archives of a folder that :func:`pack` made, by name.

    Raises:
        ValueError: there is none.
    """
    found = {file.name.removesuffix(_SUFFIX): file for file in sorted(folder.glob(f"*{_SUFFIX}"))}
    if not found:
        raise ValueError(f"--carried {folder} holds no archives; legal: a folder made with --pack")
    return found


def pack(
    folder: Path, *, cache: Path | None, kit: Path | None, fasttree: Path | None
) -> dict[str, int]:
    """Make the folder anew.

    Args:
        folder: what was packed there before is replaced.
        cache: Triton's, compiled for the GPU host; None to carry none.
        kit: a folder with the parts "core" and perhaps "ops", each of archives; None for none.
        fasttree: the ``kernel_bench`` folder of a clone; None for none.

    Returns:
        Bytes of every part, those of the checkout first.

    Raises:
        ValueError: a folder does not hold what it should, or all is more than
            :data:`MAX_BYTES`; nothing is changed.
        OSError: it cannot be written.
    """
    if kit is not None and not list(kit.glob(f"{_KIT_PARTS[0]}/*{_SUFFIX}")):
        raise ValueError(
            f"--kit {kit} holds no {_KIT_PARTS[0]}/*{_SUFFIX}; legal: a folder that does"
        )
    if fasttree is not None and not (fasttree / "fasttree.py").is_file():
        raise ValueError(
            f"--fasttree {fasttree} holds no fasttree.py; legal: FastTree's kernel_bench"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=folder.parent) as scratch:
        for name, source in ((CACHE, cache), (FASTTREE, fasttree)):
            if source is not None:
                _archive(source, Path(scratch, f"{name}{_SUFFIX}"))
        for part in _KIT_PARTS:
            for file in sorted(kit.glob(f"{part}/*{_SUFFIX}")) if kit is not None else ():
                shutil.copyfile(file, Path(scratch, f"kit-{file.name}"))
        made = sorted(Path(scratch).iterdir())
        sizes = {"checkout": _checkout_bytes(), **{file.name: file.stat().st_size for file in made}}
        total = sum(sizes.values())
        if total > MAX_BYTES:
            parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items())
            raise ValueError(
                f"what is carried takes {total / 2**20:.1f} MiB ({parts}); legal: up to "
                f"{MAX_BYTES >> 20}"
            )
        folder.mkdir(exist_ok=True)
        for old in folder.glob(f"*{_SUFFIX}"):
            old.unlink()
        for file in made:
            os.replace(file, folder / file.name)
    return sizes


def _archive(source: Path, target: Path) -> None:
    """All files below a folder, without owners; caches of Python and of git are left behind."""

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        left = {"__pycache__", ".git"} & set(Path(member.name).parts)
        return None if left else member

    with tarfile.open(target, "w:xz") as archive:
        for path in sorted(source.iterdir()):
            archive.add(path, path.name, filter=kept)


def _checkout_bytes() -> int:
    """Files of the checkout that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=_ROOT, capture_output=True, check=True).stdout
    files = (_ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name)
    return sum(file.stat().st_size for file in files if file.is_file())
