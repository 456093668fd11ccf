"""Decode attention for SGLang that reads a prefix shared by several requests once.

The public names are loaded on first use, so that importing a light submodule (the command line,
the plugin entry point) costs neither torch nor SGLang.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefix_kernels.plan import PackPlan
    from sglang_prefix.forest import PrefixForest
    from sglang_prefix.wrapper import PrefixDecodeWrapper

__version__ = "0.1.0"
__all__ = ["PackPlan", "PrefixDecodeWrapper", "PrefixForest", "__version__"]

_HOME_OF = {
    "PackPlan": "prefix_kernels.plan",
    "PrefixDecodeWrapper": "sglang_prefix.wrapper",
    "PrefixForest": "sglang_prefix.forest",
}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
