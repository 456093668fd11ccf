"""Requirements of the SGLang that is installed without any, and of this package: ``make compat``.

SGLang 0.5.18 to 0.5.22 pin a pre-release of cuda-tile that the package index has as a placeholder
only: installing it fetches the real wheel from a host of its own. The CPU engine does not use it,
so that one pin is dropped here, and nothing else. Prints one requirement per line.
"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
UNPINNED = ("cuda-tile",)


def main() -> None:
    """Print them."""
    of_sglang = [text for text in requires("sglang") or () if "extra ==" not in text]
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    ours = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for text in (*of_sglang, *ours):
        (name,) = re.findall(r"^[A-Za-z0-9._-]+", text)
        if name != "sglang":
            print(name if name in UNPINNED else text)


if __name__ == "__main__":
    main()
