"""Settings from the environment."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from sglang_prefix.config import PrefixConfig

DOCS = Path(__file__).parents[1] / "docs" / "configuration.md"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GATE", "always"),
        ("POLICY", "node"),
        ("STOCK_BACKEND", "triton"),
        ("VERIFY", "1"),
        ("KEEP_PLAN", "1"),
        ("EXECUTOR", "torch"),
        ("LAUNCH_MODE", "fused"),
        ("MERGE_MODE", "in_kernel"),
        ("WORKSPACE_MIB", "64"),
    ],
)
def test_every_setting(name: str, value: str) -> None:
    assert PrefixConfig.from_env({}) == PrefixConfig()
    parsed: Any = {"1": True, "64": 64}.get(value, value)
    assert getattr(PrefixConfig(), name.lower()) != parsed
    config = PrefixConfig.from_env({f"SGLANG_PREFIX_{name}": value})
    assert config == dataclasses.replace(PrefixConfig(), **{name.lower(): parsed})


def test_the_switch() -> None:
    assert PrefixConfig.from_env({"SGLANG_PREFIX": "1"}) == PrefixConfig(wrap=True)
    with pytest.raises(ValueError, match="SGLANG_PREFIX='yes' is not legal; legal: 0, 1"):
        PrefixConfig.from_env({"SGLANG_PREFIX": "yes"})


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        ("GATE", "sometimes", "auto, always, never"),
        ("POLICY", "PAT", "pat"),
        ("VERIFY", "yes", "0, 1"),
        ("KEEP_PLAN", "plan.json", "0, 1"),
        ("EXECUTOR", "cuda", "auto, torch, native, triton"),
        ("LAUNCH_MODE", "stream", "streams, fused"),
        ("MERGE_MODE", "atomic", "launch, in_kernel"),
        ("WORKSPACE_MIB", "0", "a positive whole number"),
        ("WORKSPACE_MIB", "-3", "a positive whole number"),
        ("WORKSPACE_MIB", "1.5", "a positive whole number"),
        ("WORKSPACE_MIB", "²", "a positive whole number"),
    ],
)
def test_a_value_that_is_not_legal_names_variable_and_values(
    name: str, value: str, legal: str
) -> None:
    message = f"SGLANG_PREFIX_{name}={value!r} is not legal; legal: "
    with pytest.raises(ValueError, match=re.escape(message)) as failure:
        PrefixConfig.from_env({f"SGLANG_PREFIX_{name}": value})
    named = str(failure.value).removeprefix(message).split(", ")
    assert set(legal.split(", ")) <= set(named)


def test_the_table_in_the_docs_lists_every_setting_and_its_default() -> None:
    rows = dict(re.findall(r"^\| `SGLANG_PREFIX(\w*)` \| `?([^|`]*)`? \|", DOCS.read_text(), re.M))
    default = dataclasses.asdict(PrefixConfig())
    rows["_WRAP"] = rows.pop("")
    assert rows.keys() == {f"_{name.upper()}" for name in default}
    for name, value in default.items():
        shown = {None: "", False: "0"}.get(value, str(value))
        assert rows[f"_{name.upper()}"].strip() == shown, name
