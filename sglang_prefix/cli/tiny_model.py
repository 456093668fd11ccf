"""`sglang-prefix tiny-model`: write a small random model to disk."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import typer

from sglang_prefix.cli.options import MAX_SEED, JsonOption, folder_to_write
from sglang_prefix.cli.output import console, fail, say, write_json
from sglang_prefix.tiny_model import (
    MAX_CONTEXT,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_LAYERS,
    MAX_STD,
    MAX_VOCAB,
    Arch,
    Dtype,
    TinyModelConfig,
    build_tiny_model,
)

__all__ = ["tiny_model"]

_DEFAULTS = TinyModelConfig()


def tiny_model(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write to.", callback=folder_to_write)
    ],
    arch: Annotated[
        Arch, typer.Option(help="The others alternate sliding-window and full layers.")
    ] = _DEFAULTS.arch,
    hidden_size: Annotated[int, typer.Option(min=1, max=MAX_HIDDEN)] = _DEFAULTS.hidden_size,
    num_layers: Annotated[
        int, typer.Option("--layers", min=1, max=MAX_LAYERS)
    ] = _DEFAULTS.num_layers,
    num_heads: Annotated[int, typer.Option("--heads", min=1, max=MAX_HEADS)] = _DEFAULTS.num_heads,
    num_kv_heads: Annotated[
        int, typer.Option("--kv-heads", min=1, max=MAX_HEADS)
    ] = _DEFAULTS.num_kv_heads,
    head_dim: Annotated[
        int | None,
        typer.Option(min=2, max=MAX_HEAD_DIM, help="Default: hidden size divided by heads."),
    ] = None,
    vocab_size: Annotated[
        int,
        typer.Option(min=1, max=MAX_VOCAB, help="sglang.benchmark.one_batch needs 10000."),
    ] = _DEFAULTS.vocab_size,
    context_length: Annotated[
        int,
        typer.Option("--context", min=1, max=MAX_CONTEXT, help="Longest sequence, in tokens."),
    ] = _DEFAULTS.context_length,
    dtype: Dtype = _DEFAULTS.dtype,
    std: Annotated[
        float, typer.Option(min=1e-6, max=MAX_STD, help="Spread of the weights.")
    ] = _DEFAULTS.std,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = _DEFAULTS.seed,
    sliding_window: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_CONTEXT, help="Tokens that a sliding-window layer sees."),
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
            fail(
                f"DIR is {directory}, not empty; legal: an empty folder or a new one, or --force", 2
            )
        num_parameters = build_tiny_model(directory, config)
    except ValueError as error:
        options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
        name, _, rest = str(error).partition(" ")
        fail(f"{options.get(name, name)} {rest}", 2)
    except OSError as error:
        fail(f"cannot write to {directory}: {error.strerror or error}")
    text = f"{directory}: {config.arch}, {num_parameters:,} parameters in {config.dtype}"
    say(console(json_file), text)
    write_json(
        {"directory": str(directory), "num_parameters": num_parameters, **asdict(config)}, json_file
    )
