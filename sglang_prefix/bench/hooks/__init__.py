"""Hooks: modules that are loaded first in every process of an engine, to patch what comes later.

An engine's processes are started by SGLang, and import it before anyone could patch it. Python
itself imports ``sitecustomize`` at the start of every process, and ours, in this folder, imports
the modules that ``SGLANG_PREFIX_HOOKS`` names. A hook calls :func:`patch_after_import`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

__all__ = ["HOOKS_FOLDER", "HOOKS_VARIABLE", "Patch", "patch_after_import"]

# Names of modules, separated by commas.
HOOKS_VARIABLE = "SGLANG_PREFIX_HOOKS"
# First on PYTHONPATH, for its `sitecustomize`.
HOOKS_FOLDER = Path(__file__).parent

Patch = Callable[[ModuleType], None]


def patch_after_import(patches: Mapping[str, Patch]) -> None:
    """Patch modules, by name, right after they are imported.

    Several hooks may patch the same module; the patches are applied in the order of the calls.
    """
    finder = next((one for one in sys.meta_path if isinstance(one, _PatchingFinder)), None)
    if finder is None:
        finder = _PatchingFinder()
        sys.meta_path.insert(0, finder)
    for name, patch in patches.items():
        finder.patches.setdefault(name, []).append(patch)


class _PatchingFinder(importlib.abc.MetaPathFinder):
    """Finds the modules that are patched, and patches each when its loader has run it."""

    def __init__(self) -> None:
        self.patches: dict[str, list[Patch]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.patches:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_patch(module: ModuleType) -> None:
                load(module)
                for patch in self.patches[fullname]:
                    patch(module)

            vars(spec.loader)["exec_module"] = load_and_patch
        return spec
