"""What the tests of `explain` share: two shapes, settings to plan for, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from sglang_prefix.cli.main import app
from sglang_prefix.explain.sources import Setting
from sglang_prefix.packing import AttentionShape

__all__ = ["LLAMA", "QUERY_BYTES", "SMALL", "TOKEN_BYTES", "run", "setting"]

# 2 x (8 + 8) x 4 bytes of K and V and 4 of a slot index: 132 bytes for a token. A query and its
# partial: 128 + 288 = 416.
SMALL = AttentionShape(4, 2, 8, 8, 4, 4)
TOKEN_BYTES, QUERY_BYTES = 132, 416
LLAMA = AttentionShape(32, 8, 128, 128, 2, 2)


def setting(shape: AttentionShape = SMALL, device: str = "cpu", **options: Any) -> Setting:
    values: dict[str, Any] = {
        "is_assumed": False,
        "policy": "pat",
        "page_size": 1,
        "stock_backend": "fa3",
    }
    return Setting(shape, device, **(values | options))


def run(*arguments: str | Path, columns: int = 160) -> Result:
    environment = {"COLUMNS": str(columns)}
    return CliRunner().invoke(app, ["explain", *map(str, arguments)], env=environment)
