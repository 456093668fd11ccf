"""Every touch of an SGLang internal: one file per touched symbol.

Each file says which symbol, why, for which releases, and what happens when it is gone.
:func:`install` applies the patches; it is called by the backend factory, in the processes that
use the backend and nowhere else. SGLang's own hook registry is not used: it skips a target that
another plugin has patched, without a word, and turns a missing target into a log line.
"""

from __future__ import annotations

from prefix_patches import (
    attention_names,
    decode_graph_runner,
    forward_batch_init_new,
    model_runner_forward,
    req_reset_for_retract,
    scheduler_internal_state,
)
from prefix_patches.versions import check_sglang_version

__all__ = ["install", "missing_symbols"]

_PATCHES = (
    decode_graph_runner,
    forward_batch_init_new,
    model_runner_forward,
    req_reset_for_retract,
    scheduler_internal_state,
)
_TOUCHED = (*_PATCHES, attention_names)


def missing_symbols() -> list[str]:
    """SGLang symbols that we need and that are not there, as dotted names with the reason."""
    return [problem for module in _TOUCHED for problem in module.missing()]


def install() -> None:
    """Check the release, apply all patches, and make sure that they are in place. Idempotent.

    Raises:
        RuntimeError: the release is not supported, a symbol is missing, or a patch did not take.
    """
    found = check_sglang_version()
    missing = missing_symbols()
    if missing:
        raise RuntimeError(
            f"sglang-prefix cannot attach to SGLang {found}; missing: {'; '.join(missing)}"
        )
    for patch in _PATCHES:
        patch.install()
        if not patch.installed():
            raise RuntimeError(f"sglang-prefix: the patch {patch.__name__} did not take effect")
