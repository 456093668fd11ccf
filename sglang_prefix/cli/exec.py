"""`sglang-prefix exec`: run a command so that SGLang works on this host, GPU or not."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from sglang_prefix.cli.output import fail
from sglang_prefix.sglang_environment import find_sgl_kernel, sglang_environment

__all__ = ["exec_command"]

# Exit statuses that shells use for commands that cannot be started.
_NOT_EXECUTABLE = 126
_NOT_FOUND = 127


def exec_command(
    command: Annotated[
        list[str], typer.Argument(metavar="CMD...", help="The command and its arguments.")
    ],
) -> None:
    """Run CMD; where the real sgl_kernel does not load, with a stand-in for it.

    On a GPU host CMD runs untouched. Elsewhere PYTHONPATH and SGLANG_USE_CPU_ENGINE=1 are set for
    it. CMD takes the place of this process, so signals reach it and its status is the result.
    """
    environment = sglang_environment(find_sgl_kernel())
    # Python ignores these two for itself, and ignored signals would stay ignored in CMD.
    for name in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(name, signal.SIG_DFL)
    program = command[0]
    # As a shell finds it, then beside our own interpreter: the environment that we are installed
    # in need not be activated.
    found = shutil.which(program) or shutil.which(program, path=Path(sys.executable).parent)
    if found is None and not (os.sep in program and Path(program).exists()):
        fail(f"{program}: command not found", _NOT_FOUND)
    try:
        os.execve(found or program, command, environment)
    except OSError as error:
        fail(f"{program}: cannot be run: {error.strerror}", _NOT_EXECUTABLE)
