"""Run what stands in the documentation, in a folder of its own, against one server.

Every command runs as it stands, but for the port: 30000 becomes one that is free, here as in the
server's own command. The server gets a few options more, which bound its memory and let it wait
without spinning. While it starts, blocks run that do not talk to it. A command that stands on two
pages runs once. Our environment stands in the folder as `.venv` and is not on PATH: what it
holds is found once a page has said how to activate it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from sglang_prefix.bench.child import kill_session
from sglang_prefix.bench.engine import free_port
from tests.docs.pages import ACTIVATE, ROOT, Block, Page

__all__ = ["PATHS", "Outcome", "Reader", "chains"]

PORT = "30000"
START_S, BLOCK_S = 400, 300
SERVER_OPTIONS = "--enable-metrics --max-total-tokens 20000 --mem-fraction-static 0.3"
SERVER_OPTIONS += " --sleep-on-idle --random-seed 0"
# Where programs that run outside our environment find us.
PATHS = os.pathsep.join(
    [str(ROOT), str(ROOT / "kernels"), str(ROOT / "patches"), os.environ.get("PYTHONPATH", "")]
)

Outcome = tuple[Literal["ran", "failed", "not run"], str]


class Reader:
    """Somebody who types in what the pages say; the server ends with the context.

    Args:
        folder: an empty one; the parts of the repository are linked into it.

    Attributes:
        printed: what all blocks printed, in order.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._log = folder, folder / "server.log"
        self._port = str(free_port())
        self._server: subprocess.Popen[bytes] | None = None
        self._serves: set[str] = set()
        self._done: set[str] = set()
        self._activate = ""
        self.printed: list[str] = []
        for part in ("docs", "examples", "tests", "Makefile"):
            (folder / part).symlink_to(ROOT / part)
        (folder / ".venv").symlink_to(sys.prefix)
        ours = Path(sys.executable).parent
        others = [p for p in os.environ["PATH"].split(os.pathsep) if p and Path(p) != ours]
        self._env = os.environ | {
            "PATH": os.pathsep.join(others),
            "PYTHONPATH": PATHS,
            "SGLANG_PREFIX_KEEP_PLAN": "1",  # for `explain`, which asks the server for its plan
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            kill_session(self._server)

    def take(self, block: Block) -> Outcome:
        """Do what a block says; what came of it, and the reason or what was printed."""
        if block.kind in ("skip", "tested by"):
            return "not run", f"{block.kind}: {block.detail}"
        if block.kind == "prints":
            same = self.printed[-1].split() == block.text.split()
            return ("ran", "") if same else ("failed", f"it prints:\n{self.printed[-1]}")
        if block.kind == "server":
            return self._serve(block.text)
        if self._done.issuperset(block.text.splitlines()):
            return "not run", "repeats another page"
        self._done.update(block.text.splitlines())
        problem = self._wait_for_server() if PORT in block.text and self._server else ""
        return ("failed", problem) if problem else self._run(block.language, block.text)

    def counters(self) -> dict[str, Any]:
        """What the server's backend has counted."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/server_info") as answer:
            (found,) = json.load(answer)["internal_states"][0]["sglang_prefix"]
        return dict(found)

    def _run(self, language: str, text: str) -> Outcome:
        if language == "bash":
            # Every block has a shell of its own; the one who reads stays in one.
            self._activate = f"{ACTIVATE}\n" if ACTIVATE in text else self._activate
            text = self._activate + text
        program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
        try:
            done = subprocess.run(
                [*program[language], text.replace(PORT, self._port)],
                cwd=self._folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=BLOCK_S,
            )
        except subprocess.TimeoutExpired:
            return "failed", f"no end within {BLOCK_S} s"
        if done.returncode:
            return "failed", f"status {done.returncode}: {(done.stdout + done.stderr)[-3000:]}"
        self.printed.append(done.stdout)
        return "ran", done.stdout

    def _serve(self, text: str) -> Outcome:
        """Start the server, or see that the one that runs is as this block wants it."""
        wanted = set(shlex.split(text, comments=True))
        if self._server is not None:
            extra = wanted - self._serves
            return ("failed", f"the server runs without {extra}") if extra else ("ran", "")
        command = text.strip() + f" {SERVER_OPTIONS} --port {self._port}"
        command += f" --nccl-port {int(self._port) + 1}"
        self._serves = set(shlex.split(command, comments=True))
        with self._log.open("wb") as output:
            self._server = subprocess.Popen(
                ["bash", "-c", f"{self._activate}exec {command}"],
                cwd=self._folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return "ran", ""

    def _wait_for_server(self) -> str:
        """Wait until it is up; what is wrong with it, or nothing."""
        assert self._server is not None
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health").close()
                return ""
            if self._server.poll() is not None or time.monotonic() > deadline:
                return f"no server: {self._log.read_text(errors='replace')[-3000:]}"
            time.sleep(0.5)


def chains(pages: Iterable[Page]) -> list[Sequence[Block]]:
    """Each block with those that say what it prints, in the order in which they are to be taken.

    Up to the server as they stand; then first those that do not need it, while it starts.
    """
    found: list[list[Block]] = []
    for block in (block for page in pages for block in page.blocks if block.kind != "text"):
        if block.kind == "prints":
            found[-1].append(block)
        else:
            found.append([block])
    first = 1 + next((i for i, c in enumerate(found) if c[0].kind == "server"), -1)
    return [*found[:first], *sorted(found[first:], key=lambda chain: PORT in chain[0].text)]
