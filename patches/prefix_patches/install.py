"""Check what we touch of SGLang, and put our patches in place.

Called by the backend factory, in the processes that use the backend and in no other.
"""

from __future__ import annotations

import dis
import functools
import inspect
import logging
from importlib.metadata import version
from types import FunctionType
from typing import Any, Protocol, get_type_hints

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from prefix_patches import (
    attention_layers,
    graph_labels,
    kv_pool,
    observability,
    schedule_context,
    stock_backend,
)
from prefix_patches.attributes import HOMES, ModelRunner, Only, ServerArgs
from prefix_patches.patch import RELEASES, resolve
from prefix_patches.versions import check_sglang_version

__all__ = [
    "TOUCHED",
    "check_attributes",
    "declared",
    "install",
    "is_newer_than_read",
    "lacks_attributes",
    "missing_attributes",
    "missing_symbols",
]

logger = logging.getLogger(__name__)

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


def lacks_attributes(model_runner: ModelRunner) -> list[str]:
    """Attributes of `attributes.py` that SGLang's classes or this runner's objects do not have."""
    args = stock_backend.resolved_args(model_runner)
    of_objects = [*_missing_of(ModelRunner, model_runner), *_missing_of(ServerArgs, args)]
    return list(dict.fromkeys([*missing_attributes(), *of_objects]))


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


def declared(view: type, release: str) -> set[str]:
    """Attributes of a class of `attributes.py` that a release has."""
    number = Version(release).base_version  # a nightly build is the release that it comes before
    names = set()
    for name, hint in get_type_hints(view, include_extras=True).items():
        only = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Only)]
        if all(SpecifierSet(mark.releases).contains(number) for mark in only):
            names.add(name)
    methods = (vars(cls).items() for cls in view.__mro__ if cls not in (Protocol, object))
    public = {n for items in methods for n, v in items if inspect.isfunction(v) and n[0] != "_"}
    return names | public


def is_newer_than_read(release: str) -> bool:
    """Whether a release is newer than those whose source was read for what we touch."""
    newest = Version(RELEASES.split()[-1])
    return Version(Version(release).base_version) > newest


@functools.cache
def missing_attributes() -> tuple[str, ...]:
    """Declared attributes that SGLang's classes lack, as dotted names. Imports SGLang."""
    release = version("sglang")
    missing = []
    for view, symbol in HOMES.items():
        try:
            found = _names_of(resolve(symbol))
        except (ImportError, AttributeError) as error:
            missing.append(f"{symbol.replace(':', '.')} ({error})")
            continue
        lacking = sorted(declared(view, release) - found)
        missing += [f"{symbol.partition(':')[2]}.{name}" for name in lacking]
    return tuple(missing)


def _missing_of(view: type, instance: object) -> list[str]:
    """Declared attributes that an object lacks, of which its class promised that it has them."""
    names = declared(view, version("sglang"))
    return [f"{view.__name__}.{name}" for name in sorted(names) if not hasattr(instance, name)]


def _names_of(home: Any) -> set[Any]:
    """What a class defines or assigns anywhere, or what a function passes on by keyword."""
    if isinstance(home, FunctionType):
        # One tuple of names where there are few, a string each where there are many.
        constants = home.__code__.co_consts
        return {n for c in constants for n in (c if isinstance(c, tuple) else (c,))}
    names: set[Any] = set()
    for cls in home.__mro__:
        names |= set(vars(cls)) | set(inspect.get_annotations(cls))
        for function in filter(inspect.isfunction, vars(cls).values()):
            code = inspect.unwrap(function).__code__
            names |= {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"}
    return names
