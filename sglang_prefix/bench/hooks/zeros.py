"""A control: packed decode gives zeros while the file named by ``SGLANG_PREFIX_ZEROS_FILE`` exists.

Whoever claims that equal tokens show a correct attention must show that a broken one changes them.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

from sglang_prefix.bench.hooks import patch_after_import

__all__ = ["FILE_VARIABLE"]

FILE_VARIABLE = "SGLANG_PREFIX_ZEROS_FILE"


def _break_run(module: ModuleType) -> None:
    run = module.PlanExecutor.run

    def broken(
        self: Any, q: Any, k_cache: Any, v_cache: Any, out: Any, *args: Any, **kwargs: Any
    ) -> None:
        run(self, q, k_cache, v_cache, out, *args, **kwargs)
        if os.path.exists(os.environ[FILE_VARIABLE]):
            out.zero_()

    module.PlanExecutor.run = broken


if FILE_VARIABLE in os.environ:
    patch_after_import({"prefix_kernels.executor": _break_run})
