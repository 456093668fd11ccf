"""The checks of `sglang-prefix doctor`, run as a module in the environment that SGLang would get.

Prints one JSON object: `versions`, `device` and `checks`. A process of its own, because loading
SGLang and its plugins cannot be undone, and because its environment must be set before.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distributions, entry_points, version

__all__ = ["Check", "main"]

_PACKAGES = ("sglang-prefix", "sglang", "torch", "triton", "transformers", "sglang-kernel")
_PLUGIN_GROUP = "sglang.srt.plugins"
_REINSTALL = "install sglang-prefix again into this environment"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: `advice` says what to do about it and is empty when all is well."""

    name: str
    ok: bool
    detail: str
    advice: str = ""


def main() -> None:
    """Run all checks and print what they found as JSON."""
    # SGLang and what it imports may print; standard output belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        result = {
            "versions": _versions(),
            "checks": [asdict(check) for check in _run_checks()],
            "device": _device(),
        }
    print(json.dumps(result))


def _run_checks() -> list[Check]:
    found = [_guarded(check) for check in _METADATA_CHECKS]
    # Each of these needs the one before: the first failure explains the rest.
    for check in _SGLANG_CHECKS:
        found.append(_guarded(check))
        if not found[-1].ok:
            break
    return found


def _guarded(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # whatever SGLang raises is the finding
        name = check.__name__.removeprefix("_check_").replace("_", " ")
        return Check(name, False, f"{type(error).__name__}: {error}", _REINSTALL)


def _check_torch() -> Check:
    places = {
        (found.version, str(found.locate_file("")))
        for found in distributions()
        if (found.metadata["Name"] or "").lower() == "torch"
    }
    listing = ", ".join(f"{number} in {folder}" for number, folder in sorted(places))
    if len(places) != 1:
        return Check(
            "torch",
            False,
            f"{len(places)} installations: {listing}" if places else "not installed",
            "use a fresh environment in which only SGLang decides about torch",
        )
    return Check("torch", True, listing)


def _check_sglang_version() -> Check:
    from prefix_patches.versions import SUPPORTED_SGLANG, check_sglang_version

    try:
        found = check_sglang_version()
    except RuntimeError as error:
        return Check("SGLang version", False, str(error), f"install sglang{SUPPORTED_SGLANG}")
    return Check("SGLang version", True, f"{found} is in {SUPPORTED_SGLANG}")


def _check_entry_point() -> Check:
    from sglang_prefix.config import BACKEND_NAME
    from sglang_prefix.plugin import register

    expected = f"{register.__module__}:{register.__name__}"
    values = [entry.value for entry in entry_points(group=_PLUGIN_GROUP, name=BACKEND_NAME)]
    if expected not in values:
        found = f"found {', '.join(values)}" if values else "not found"
        return Check("plugin entry point", False, f"{expected} {found}", _REINSTALL)
    return Check("plugin entry point", True, f"{BACKEND_NAME} = {expected}")


def _check_sglang_import() -> Check:
    import sglang
    import sglang.srt.server_args

    return Check("SGLang import", True, str(sglang.__file__))


def _check_registration() -> Check:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    from sglang_prefix.config import BACKEND_NAME
    from sglang_prefix.plugin import create_prefix_backend

    load_plugins()
    missing = [
        what
        for what, present in (
            ("the choice of the name", BACKEND_NAME in ATTENTION_BACKEND_CHOICES),
            ("our factory", ATTENTION_BACKENDS.get(BACKEND_NAME) is create_prefix_backend),
        )
        if not present
    ]
    if missing:
        return Check(
            "registration",
            False,
            f"SGLang loaded its plugins, but {' and '.join(missing)} is missing",
            "see the log above; SGLANG_PLUGINS, where set, must list prefix, and "
            "SGLANG_PLATFORM must not exclude sglang-prefix",
        )
    return Check("registration", True, f"--attention-backend {BACKEND_NAME} has a factory")


def _check_patched_symbols() -> Check:
    from prefix_patches.install import missing_symbols

    missing = missing_symbols()
    if missing:
        return Check(
            "patched symbols",
            False,
            f"this SGLang lacks {', '.join(missing)}",
            "install another SGLang release of the supported range, or a newer sglang-prefix",
        )
    return Check("patched symbols", True, "all present")


def _check_backend() -> Check:
    import sglang_prefix.backend.backend
    from sglang_prefix.config import PrefixConfig

    try:
        config = PrefixConfig.from_env()
    except ValueError as error:
        return Check("backend", False, str(error), "correct the environment variable")
    return Check("backend", True, f"{sglang_prefix.backend.backend.__name__} imports, {config}")


_METADATA_CHECKS = (_check_torch, _check_sglang_version, _check_entry_point)
_SGLANG_CHECKS = (
    _check_sglang_import,
    _check_registration,
    _check_patched_symbols,
    _check_backend,
)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _device() -> dict[str, str]:
    try:
        import torch
    except ImportError as error:
        return {"kind": "unknown", "name": f"torch does not import: {error}"}
    if torch.cuda.is_available():
        return {"kind": "cuda", "name": torch.cuda.get_device_name()}
    return {"kind": "cpu", "name": platform.processor() or platform.machine()}


if __name__ == "__main__":
    main()
