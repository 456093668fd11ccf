"""Runs a server that ends with whoever started it: ``python -m sglang_prefix.bench.serving.guard``.

Arguments are the command. When the other end of standard input closes, however that process ended,
this process group is killed, server and all. Must lead a process group of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

__all__ = ["main"]


def _die_with_parent() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Run the command and return its status, that of one killed by a signal as shells do."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    status = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, check=False).returncode
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    # Not `sys.exit`, which would wait for the thread that reads.
    os._exit(main())
