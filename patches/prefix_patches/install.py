"""Check what we touch of SGLang, and put our patches in place.

Called by the backend factory, in the processes that use the backend and in no other.
"""

from __future__ import annotations

import logging
from importlib.metadata import version

from prefix_patches import graph_labels, kv_pool, observability, schedule_context, stock_backend
from prefix_patches.attributes import (
    ModelRunner,
    ServerArgs,
    is_newer_than_read,
    missing_attributes,
    missing_of,
)
from prefix_patches.versions import check_sglang_version

__all__ = ["TOUCHED", "check_attributes", "install", "lacks_attributes", "missing_symbols"]

logger = logging.getLogger(__name__)

# Without any of these the backend does not start. The touches of `load_generator` concern `bench
# serving` alone, which checks them itself.
TOUCHED = (
    *graph_labels.TOUCHED,
    *schedule_context.TOUCHED,
    *observability.TOUCHED,
    *stock_backend.TOUCHED,
    *kv_pool.TOUCHED,
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


def lacks_attributes(model_runner: ModelRunner) -> list[str]:
    """Attributes of `attributes.py` that SGLang's classes or this runner's objects do not have."""
    args = stock_backend.resolved_args(model_runner)
    missing = [*missing_attributes(), *missing_of(ModelRunner, model_runner)]
    return [*missing, *missing_of(ServerArgs, args)]


def check_attributes(model_runner: ModelRunner) -> None:
    """See to it that nothing that we read is missing, or say so where the release is a new one.

    Raises:
        RuntimeError: something is missing in a release that was read for it.
    """
    missing = ", ".join(lacks_attributes(model_runner))
    release = version("sglang")
    if missing and not is_newer_than_read(release):
        raise RuntimeError(f"SGLang {release} lacks {missing}, which sglang-prefix reads")
    if missing:
        logger.warning("prefix attention: SGLang %s lacks %s: nothing is packed", release, missing)
