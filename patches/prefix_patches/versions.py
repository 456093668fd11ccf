"""Which SGLang releases our patches were written for and tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

__all__ = ["SUPPORTED_SGLANG", "check_sglang_version"]

# The dependency in pyproject.toml says the same; this copy is for environments that were put
# together without a resolver, and a test keeps the two equal.
SUPPORTED_SGLANG = ">=0.5.17,<0.6"


def check_sglang_version() -> str:
    """Return the version of the installed SGLang, read from its metadata without importing it.

    Raises:
        RuntimeError: SGLang is not installed or lies outside `SUPPORTED_SGLANG`.
    """
    try:
        found = version("sglang")
    except PackageNotFoundError:
        raise RuntimeError(
            f"sglang-prefix needs SGLang {SUPPORTED_SGLANG}, but no SGLang is installed"
        ) from None
    # A nightly build of a supported release is welcome, hence prereleases.
    if not SpecifierSet(SUPPORTED_SGLANG).contains(found, prereleases=True):
        raise RuntimeError(
            f"sglang-prefix needs SGLang {SUPPORTED_SGLANG}, but SGLang {found} is installed: "
            f"install a supported release, or choose another attention backend"
        )
    return found
