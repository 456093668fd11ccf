"""Settings from the environment."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from sglang_prefix.config import PrefixConfig

DOCS = Path(__file__).parents[1] / "docs" / "configuration.md"


def test_defaults() -> None:
    assert PrefixConfig.from_env({}) == PrefixConfig()
    assert PrefixConfig().gate == "auto"


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("GATE", "always", "gate", "always"),
        ("POLICY", "node", "policy", "node"),
        ("STOCK_BACKEND", "triton", "stock_backend", "triton"),
        ("VERIFY", "1", "verify", True),
        ("KEEP_PLAN", "1", "keep_plan", True),
        ("EXECUTOR", "torch", "executor", "torch"),
        ("LAUNCH_MODE", "fused", "launch_mode", "fused"),
        ("MERGE_MODE", "in_kernel", "merge_mode", "in_kernel"),
        ("WORKSPACE_MIB", "64", "workspace_mib", 64),
    ],
)
def test_every_setting(name: str, value: str, field: str, expected: object) -> None:
    config = PrefixConfig.from_env({f"SGLANG_PREFIX_{name}": value})
    changed: dict[str, Any] = {field: expected}
    assert config == dataclasses.replace(PrefixConfig(), **changed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GATE", "sometimes"),
        ("POLICY", "PAT"),
        ("VERIFY", "yes"),
        ("KEEP_PLAN", "plan.json"),
        ("EXECUTOR", "cuda"),
        ("LAUNCH_MODE", "stream"),
        ("MERGE_MODE", "atomic"),
        ("WORKSPACE_MIB", "0"),
        ("WORKSPACE_MIB", "-3"),
        ("WORKSPACE_MIB", "1.5"),
        ("WORKSPACE_MIB", "²"),
    ],
)
def test_a_value_that_is_not_legal_names_variable_and_values(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"SGLANG_PREFIX_{name}={re.escape(repr(value))}.*legal"):
        PrefixConfig.from_env({f"SGLANG_PREFIX_{name}": value})


def test_the_table_in_the_docs_lists_every_setting_and_its_default() -> None:
    rows = dict(re.findall(r"^\| `SGLANG_PREFIX_(\w+)` \| `?([^|`]*)`? \|", DOCS.read_text(), re.M))
    default = dataclasses.asdict(PrefixConfig())
    assert rows.keys() == {name.upper() for name in default}
    for name, value in default.items():
        shown = {None: "", False: "0"}.get(value, str(value))
        assert rows[name.upper()].strip() == shown, name
