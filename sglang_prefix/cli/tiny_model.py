"""`sglang-prefix tiny-model`: write a small random model to disk."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import typer

from sglang_prefix.cli.output import JsonOption, console, fail, say, write_json
from sglang_prefix.tiny_model import Arch, Dtype, TinyModelConfig, build_tiny_model

__all__ = ["tiny_model"]

_DEFAULTS = TinyModelConfig()


def tiny_model(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to.")],
    arch: Annotated[
        Arch, typer.Option(help="The others alternate sliding-window and full layers.")
    ] = _DEFAULTS.arch,
    hidden_size: int = _DEFAULTS.hidden_size,
    num_layers: Annotated[int, typer.Option("--layers")] = _DEFAULTS.num_layers,
    num_heads: Annotated[int, typer.Option("--heads")] = _DEFAULTS.num_heads,
    num_kv_heads: Annotated[int, typer.Option("--kv-heads")] = _DEFAULTS.num_kv_heads,
    head_dim: Annotated[
        int | None, typer.Option(help="Default: hidden size divided by heads.")
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(help="sglang.benchmark.one_batch needs 10000.")
    ] = _DEFAULTS.vocab_size,
    context_length: Annotated[
        int, typer.Option("--context", help="Longest sequence, in tokens.")
    ] = _DEFAULTS.context_length,
    dtype: Dtype = _DEFAULTS.dtype,
    std: Annotated[float, typer.Option(help="Spread of the weights.")] = _DEFAULTS.std,
    seed: int = _DEFAULTS.seed,
    sliding_window: Annotated[
        int | None, typer.Option(help="Tokens that a sliding-window layer sees.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write into a folder that is not empty.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Write a small model with random weights and a byte-level tokenizer. Needs no network."""
    try:
        names = {field.name for field in fields(TinyModelConfig)}
        config = TinyModelConfig(**{k: v for k, v in context.params.items() if k in names})
        if not force and directory.is_dir() and any(directory.iterdir()):
            fail(f"{directory} is not empty; --force writes into it all the same")
        num_parameters = build_tiny_model(directory, config)
    except ValueError as error:
        fail(str(error), 2)
    except OSError as error:
        fail(f"cannot write to {directory}: {error.strerror or error}")
    text = f"{directory}: {config.arch}, {num_parameters:,} parameters in {config.dtype}"
    say(console(json_file), text)
    write_json(
        {"directory": str(directory), "num_parameters": num_parameters, **asdict(config)}, json_file
    )
