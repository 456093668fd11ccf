"""Check what we touch of SGLang, and put our patches in place.

Called by the backend factory, in the processes that use the backend and in no other.
"""

from __future__ import annotations

from prefix_patches import (
    attention_layers,
    graph_labels,
    kv_pool,
    observability,
    schedule_context,
    stock_backend,
)
from prefix_patches.versions import check_sglang_version

__all__ = ["TOUCHED", "install", "missing_symbols"]

# Without any of these the backend does not start. The touches of `load_generator` concern `bench
# serving` alone, which checks them itself.
TOUCHED = (
    *graph_labels.TOUCHED,
    *schedule_context.TOUCHED,
    *observability.TOUCHED,
    *stock_backend.TOUCHED,
    *kv_pool.TOUCHED,
    *attention_layers.TOUCHED,
)


def missing_symbols() -> list[str]:
    """SGLang symbols that we need and that are not there, as dotted names with the reason."""
    return [problem for touch in TOUCHED if (problem := touch.problem()) is not None]


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
    for touch in TOUCHED:
        touch.install()
        if not touch.installed():
            raise RuntimeError(f"sglang-prefix: the patch {touch.name} did not take effect")
