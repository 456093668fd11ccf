"""The `sglang-prefix` command: one typer application, one module per command."""

from __future__ import annotations

import errno
import os
import sys

import typer

from sglang_prefix.cli.bench_gpu import gpu
from sglang_prefix.cli.bench_kernel import host, kernel, tune
from sglang_prefix.cli.bench_profile import profile
from sglang_prefix.cli.bench_serving import serving
from sglang_prefix.cli.command import Command, ExecCommand, Group, JsonCommand
from sglang_prefix.cli.demo import demo
from sglang_prefix.cli.doctor import doctor
from sglang_prefix.cli.exec import exec_command
from sglang_prefix.cli.explain import explain
from sglang_prefix.cli.kernels import kernels
from sglang_prefix.cli.output import complain
from sglang_prefix.cli.report import report
from sglang_prefix.cli.smollm2 import smollm2
from sglang_prefix.cli.tiny_model import tiny_model

__all__ = ["app", "main"]

app = typer.Typer(
    name="sglang-prefix",
    cls=Group,
    help="Decode attention for SGLang that reads a shared prefix once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# Options behind CMD are CMD's own, with or without `--` before it.
_OWN_OPTIONS = {"allow_interspersed_args": False}
app.command("exec", cls=ExecCommand, context_settings=_OWN_OPTIONS)(exec_command)
app.command("doctor", cls=JsonCommand)(doctor)
app.command("tiny-model", cls=JsonCommand)(tiny_model)
app.command("smollm2", cls=JsonCommand)(smollm2)
app.command("demo", cls=JsonCommand)(demo)
app.command("explain", cls=JsonCommand)(explain)
app.command("kernels", cls=JsonCommand)(kernels)
app.command("report", cls=Command)(report)

bench_app = typer.Typer(
    cls=Group,
    help="Compare with stock SGLang on this machine; results are JSON files and plots.",
    no_args_is_help=True,
)
bench_app.command("kernel", cls=JsonCommand)(kernel)
bench_app.command("tune", cls=JsonCommand)(tune)
bench_app.command("profile", cls=JsonCommand)(profile)
bench_app.command("host", cls=JsonCommand)(host)
bench_app.command("gpu", cls=JsonCommand)(gpu)
bench_app.command("serving", cls=JsonCommand)(serving)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point of the console script."""
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:  # as where it was closed
                sys.stdout.flush()
    except OSError as error:
        # Of standard output, which a shell may lead to a full disk. Files are the commands' own,
        # and a pipe that nobody reads is typer's.
        if error.errno not in _NO_ROOM or error.filename is not None:
            raise
        complain(f"cannot write: {error.strerror}")
        # Or Python tries once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
