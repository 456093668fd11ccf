"""`sglang-prefix bench kernel`: decode attention on workloads that share, ours against stock."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sglang_prefix.cli.output import fail

__all__ = ["kernel"]


def kernel(
    out: Annotated[Path, typer.Option(help="Folder for kernel.json and the plots.")],
) -> None:
    """Compare decode attention kernels on batches that share prefixes."""
    fail(f"bench kernel --out {out} is not there yet")
