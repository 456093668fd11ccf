"""`sglang-prefix tiny-model`: write a small random model to disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sglang_prefix.cli.output import JsonOption, console, fail, write_json
from sglang_prefix.tiny_model import Arch, Dtype, TinyModelConfig, build_tiny_model

__all__ = ["tiny_model"]

_DEFAULTS = TinyModelConfig()


def tiny_model(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to.")],
    arch: Annotated[
        Arch, typer.Option(help="The others alternate sliding-window and full layers.")
    ] = _DEFAULTS.arch,
    hidden_size: int = _DEFAULTS.hidden_size,
    layers: int = _DEFAULTS.num_layers,
    heads: int = _DEFAULTS.num_heads,
    kv_heads: int = _DEFAULTS.num_kv_heads,
    head_dim: Annotated[
        int | None, typer.Option(help="Default: hidden size divided by heads.")
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(help="sglang.benchmark.one_batch needs 10000.")
    ] = _DEFAULTS.vocab_size,
    context: Annotated[
        int, typer.Option(help="Longest sequence, in tokens.")
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
        config = TinyModelConfig(
            arch=arch,
            hidden_size=hidden_size,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=vocab_size,
            context_length=context,
            dtype=dtype,
            std=std,
            seed=seed,
            sliding_window=sliding_window,
        )
        if not force and directory.is_dir() and any(directory.iterdir()):
            fail(f"{directory} is not empty; --force writes into it all the same")
        num_parameters = build_tiny_model(directory, config)
    except ValueError as error:
        fail(str(error), 2)
    except OSError as error:
        fail(f"cannot write to {directory}: {error.strerror or error}")
    console(json_file).print(
        f"{directory}: {config.arch}, {num_parameters:,} parameters in {config.dtype}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    write_json(
        {"directory": str(directory), "num_parameters": num_parameters, **asdict(config)}, json_file
    )
