"""A Triton cache that was filled elsewhere, made one that Triton finds where it lies now."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from sglang_prefix.files import read_json, write_file

__all__ = ["settle"]


def settle(folder: str | os.PathLike[str]) -> int:
    """Let the entries of a cache that has moved name their files by where they are now.

    Triton lists the files of an entry by absolute path, and compiles anew if they are not there.
    An entry whose files are where it says is left alone. Processes may do this at the same time.

    Args:
        folder: the cache, as `TRITON_CACHE_DIR` names it; may be missing.

    Returns:
        How many entries were changed.

    Raises:
        OSError: an entry would have to be changed, and cannot be.
    """
    # Not resolved: Triton does not look where a link leads to, either.
    return sum(map(_settle_entry, Path(os.path.abspath(folder)).glob("*/__grp__*.json")))


def _settle_entry(group: Path) -> bool:
    paths: dict[str, str] = {}
    # Damaged: Triton compiles anew.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        paths = dict(read_json(group)["child_paths"])
    here = {name: group.with_name(name) for name in paths if name == os.path.basename(name)}
    is_found = all(isinstance(path, str) and os.path.exists(path) for path in paths.values())
    if not paths or is_found or len(here) < len(paths) or not all(map(Path.is_file, here.values())):
        return False
    write_file(group, json.dumps({"child_paths": {n: str(path) for n, path in here.items()}}))
    return True
