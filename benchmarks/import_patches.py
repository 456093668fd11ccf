"""Patches that are applied to modules right after they are imported, in any process.

For ``sitecustomize`` hooks, which run before the modules that they are about can be imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

__all__ = ["Patch", "patch_after_import"]

Patch = Callable[[ModuleType], None]


def patch_after_import(patches: Mapping[str, Patch]) -> None:
    """Patch modules, by name, when they are imported; each lies in a package."""
    sys.meta_path.insert(0, _PatchingFinder(patches))


class _PatchedLoader(importlib.abc.Loader):
    """Loads a module as its own loader does, then patches it."""

    def __init__(self, loader: importlib.abc.Loader, patch: Patch) -> None:
        self._loader, self._patch = loader, patch

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._patch(module)


class _PatchingFinder(importlib.abc.MetaPathFinder):
    """Finds the modules that are patched."""

    def __init__(self, patches: Mapping[str, Patch]) -> None:
        self._patches = patches

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._patches:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchedLoader(spec.loader, self._patches[fullname])
        return spec
