"""What `make compat` asks before it makes an environment for a release of SGLang, and after.

`check VERSION` exits with one line unless that is a release of the range in pyproject.toml.
`requirements` prints what SGLang, which was installed without any, and this package require.
Runs with the standard library alone.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
RELEASE = r"\d+(?:\.\d+)+(?:\.post\d+)?"
# SGLang 0.5.18 to 0.5.22 pin a pre-release of cuda-tile that the package index has as a placeholder
# only: installing it fetches the real wheel from a host of its own. The CPU engine does not use it,
# so that one pin is dropped, and nothing else.
UNPINNED = ("cuda-tile",)


def check(version: str) -> None:
    """Exit with one line unless ``version`` is a release of the range."""
    (sglang,) = (name for name in PROJECT["dependencies"] if name.startswith("sglang"))
    found = re.fullmatch(rf"sglang>=({RELEASE}),<({RELEASE})", sglang)
    if found is None:
        raise SystemExit(f"pyproject.toml: cannot read the range of {sglang!r}")
    oldest, end = found.groups()
    legal = f"legal: a release >={oldest},<{end}, as in `make compat VERSION={oldest}`"
    if not version:
        raise SystemExit(f"make compat: VERSION is missing; {legal}")
    if not re.fullmatch(RELEASE, version):
        raise SystemExit(f"make compat: VERSION={version} is not a release; {legal}")
    # A post release follows its release.
    low, asked, high = ([int(n) for n in re.findall(r"\d+", v)] for v in (oldest, version, end))
    if not low <= asked < high:
        raise SystemExit(f"make compat: VERSION={version} is out of range; {legal}")


def requirements() -> None:
    """Print one requirement per line."""
    of_sglang = [text for text in requires("sglang") or () if "extra ==" not in text]
    ours = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    for text in (*of_sglang, *ours):
        (name,) = re.findall(r"^[A-Za-z0-9._-]+", text)
        if name != "sglang":
            print(name if name in UNPINNED else text)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["check", *version]:
            check("".join(version))
        case ["requirements"]:
            requirements()
        case _:
            raise SystemExit(__doc__)
