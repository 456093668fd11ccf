"""SGLang's arguments as its own code resolves them from flags, on the CPU, without an engine."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sglang_prefix.plugin import register
from sglang_prefix.tiny_model import TinyModelConfig, build_tiny_model

__all__ = ["model_folder", "server_args"]

_DECODE = "--decode-attention-backend prefix"


@functools.cache
def model_folder() -> str:
    """A model on disk, since SGLang looks at it to resolve arguments."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build_tiny_model(Path(folder) / "model", TinyModelConfig())
    return str(Path(folder) / "model")


@functools.cache
def server_args(flags: str = _DECODE) -> Any:
    """``ServerArgs`` of a server that is started on the CPU with these flags.

    Args:
        flags: as on a command line; without a backend's name, decode is ours.

    Raises:
        SystemExit: SGLang does not know a flag or value.
        Exception: SGLang refuses the combination.
    """
    from sglang.srt.server_args import prepare_server_args

    register()
    named = flags if "attention-backend" in flags else f"{_DECODE} {flags}"
    command = ["--model-path", model_folder(), "--device", "cpu", *named.split()]
    # SGLang sets variables, and takes the log over, as a process of its own may.
    with patch.dict(os.environ), patch("logging.basicConfig"):
        found = prepare_server_args(command)
        if hasattr(found, "resolve_once"):  # from 0.5.19 on; before, they are resolved when made
            found.resolve_once()
    return found
