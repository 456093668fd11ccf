"""The plugin entry point and the version check behind it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from prefix_patches import versions
from prefix_patches.versions import SUPPORTED_SGLANG, check_sglang_version
from sglang_prefix.plugin import create_prefix_backend, register


def test_registering_twice_leaves_one_choice_and_our_factory() -> None:
    register()
    register()
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    assert ATTENTION_BACKEND_CHOICES.count("prefix") == 1
    assert ATTENTION_BACKENDS["prefix"] is create_prefix_backend


@pytest.mark.parametrize("module", ["sglang_prefix.plugin", "sglang_prefix.cli.main"])
def test_the_plugin_and_help_import_nothing_heavy(module: str) -> None:
    heavy = ("torch", "sglang", "transformers", "sglang_prefix.backend")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        ("0.5.16", False),
        ("0.5.16.post3", False),
        ("0.5.17", True),
        ("0.5.23", True),
        ("0.5.23.post1", True),
        ("0.5.24.dev3+gabc", True),
        ("0.5.30", True),
        ("0.6.0", False),
        ("0.6.0rc1", False),
        ("1.0", False),
        (None, False),
    ],
)
def test_the_factory_refuses_an_sglang_outside_the_range_and_names_it(
    found: str | None, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(versions, "version", version)
    if fits:
        assert check_sglang_version() == found
        return
    said = f"SGLang {found} is installed" if found else "no SGLang is installed"
    with pytest.raises(RuntimeError, match=re.escape(said)) as failure:
        create_prefix_backend(object())
    assert SUPPORTED_SGLANG in str(failure.value)


def test_the_metadata_declares_the_same_range() -> None:
    declared = [Requirement(text) for text in requires("sglang-prefix") or []]
    (sglang,) = [requirement for requirement in declared if requirement.name == "sglang"]
    assert sglang.specifier == SpecifierSet(SUPPORTED_SGLANG)
