"""Loads the hooks named by ``SGLANG_PREFIX_HOOKS``; Python imports this file at start-up."""

from __future__ import annotations

import importlib
import os
import traceback

try:
    for name in filter(None, os.environ.get("SGLANG_PREFIX_HOOKS", "").split(",")):
        importlib.import_module(name)
except Exception:
    # Python would only print the error and go on without the hook.
    traceback.print_exc()
    raise SystemExit("a hook of SGLANG_PREFIX_HOOKS does not load") from None
