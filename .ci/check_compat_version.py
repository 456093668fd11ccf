"""The argument of ``make compat``: one SGLang release of the range in pyproject.toml.

Runs before there is an environment, so with the standard library alone.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
RELEASE = r"\d+(?:\.\d+)+(?:\.post\d+)?"


def supported_range() -> tuple[str, str]:
    """The oldest release, and the one that ends the range, from the dependency on SGLang."""
    dependencies = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    (sglang,) = (name for name in dependencies if name.startswith("sglang"))
    found = re.fullmatch(rf"sglang>=({RELEASE}),<({RELEASE})", sglang)
    if found is None:
        raise SystemExit(f"{PYPROJECT.name}: cannot read the range of {sglang!r}")
    return found[1], found[2]


def release_key(version: str) -> tuple[int, ...]:
    """Numbers to compare releases by; a post release follows its release."""
    return tuple(map(int, re.findall(r"\d+", version)))


def main(version: str) -> None:
    """Exit with one line unless ``version`` is a release of the range."""
    oldest, end = supported_range()
    legal = f"legal: a release >={oldest},<{end}, as in `make compat VERSION={oldest}`"
    if not version:
        raise SystemExit(f"make compat: VERSION is missing; {legal}")
    if not re.fullmatch(RELEASE, version):
        raise SystemExit(f"make compat: VERSION={version} is not a release; {legal}")
    if not release_key(oldest) <= release_key(version) < release_key(end):
        raise SystemExit(f"make compat: VERSION={version} is out of range; {legal}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
