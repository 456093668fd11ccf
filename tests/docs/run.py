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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_prefix.bench.engine import free_port, kill_session
from tests.docs.pages import ACTIVATE, ROOT, Block, Page

__all__ = ["Outcome", "Reader", "reader"]

PORT = "30000"
START_S, BLOCK_S = 400, 300
SERVER_OPTIONS = "--enable-metrics --max-total-tokens 20000 --mem-fraction-static 0.3"
SERVER_OPTIONS += " --sleep-on-idle --random-seed 0"
# Commands of examples' docstrings that this module does not run, and what does.
ELSEWHERE = {
    "pip install": "skip installs packages",
    "examples/serve.sh": "the server that runs already",
    "examples/offline_rollouts.py": "tests/engine/test_server.py",
    "examples/router_workers.py": "tests/engine/test_docs.py",
}


@dataclass(frozen=True)
class Outcome:
    """What became of a block: "ran", "failed", "server", "skipped", "tested" or "repeated"."""

    block: Block
    status: str
    detail: str = ""
    seconds: float = 0.0


class Reader:
    """Somebody who types in what the pages say.

    Args:
        folder: an empty one; the parts of the repository are linked into it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = str(free_port())
        self._log = folder / "server.log"
        self.server: subprocess.Popen[bytes] | None = None
        self._serves: set[str] = set()
        self._done: set[str] = set()
        for part in ("benchmarks", "docs", "examples", "tests", "Makefile"):
            (folder / part).symlink_to(ROOT / part)
        (folder / ".venv").symlink_to(sys.prefix)
        self._activate = ""
        ours = Path(sys.executable).parent
        others = [p for p in os.environ["PATH"].split(os.pathsep) if p and Path(p) != ours]
        paths = [ROOT, ROOT / "kernels", ROOT / "patches", os.environ.get("PYTHONPATH", "")]
        self.env = os.environ | {
            "PATH": os.pathsep.join(others),
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "SGLANG_PREFIX_KEEP_PLAN": "1",  # for `explain`, which asks the server for its plan
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def read(self, pages: Iterable[Page]) -> Iterator[Outcome]:
        """Run all blocks: in order up to the server, then those first that do not need it."""
        chains = list(_chains(block for page in pages for block in page.blocks))
        first = 1 + next((i for i, c in enumerate(chains) if c[0].kind == "server"), -1)
        others = sorted(chains[first:], key=lambda chain: PORT in chain[0].text)
        for chain in (*chains[:first], *others):
            printed = ""
            for block in chain:
                began = time.monotonic()
                status, detail = self._take(block, printed)
                printed = detail if status == "ran" else printed
                yield Outcome(block, status, detail, time.monotonic() - began)

    def counters(self) -> dict[str, Any]:
        """What the server's backend has counted."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/server_info") as answer:
            (found,) = json.load(answer)["internal_states"][0]["sglang_prefix"]
        return dict(found)

    def _take(self, block: Block, printed: str) -> tuple[str, str]:
        if block.kind == "skip":
            return "skipped", block.detail
        if block.kind == "tested by":
            return "tested", block.detail
        if block.kind == "prints":
            same = printed.split() == block.text.split()
            return ("compared", "") if same else ("failed", f"it prints:\n{printed}")
        if block.kind == "server":
            return self._serve(block)
        text = block.text
        if block.where.startswith("examples/"):
            text, elsewhere = _without_elsewhere(text)
            if not text:
                return "tested", elsewhere
        if self._done.issuperset(text.splitlines()):
            return "repeated", ""
        self._done.update(text.splitlines())
        problem = self._wait_for_server() if PORT in text and self.server else ""
        return ("failed", problem) if problem else self._run(block.language, text)

    def _run(self, language: str, text: str) -> tuple[str, str]:
        if language == "bash":
            # Every block has a shell of its own; the one who reads stays in one.
            self._activate = f"{ACTIVATE}\n" if ACTIVATE in text else self._activate
            text = self._activate + text
        program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
        try:
            done = subprocess.run(
                [*program[language], text.replace(PORT, self.port)],
                cwd=self.folder,
                env=self.env,
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
        return "ran", done.stdout

    def _serve(self, block: Block) -> tuple[str, str]:
        """Start the server, or see that the one that runs is as this block wants it."""
        wanted = set(shlex.split(block.text, comments=True))
        if self.server is not None:
            extra = wanted - self._serves
            return ("failed", f"the server runs without {extra}") if extra else ("server", "")
        command = block.text.strip() + f" {SERVER_OPTIONS} --port {self.port}"
        command += f" --nccl-port {int(self.port) + 1}"
        self._serves = set(shlex.split(command, comments=True))
        with self._log.open("wb") as output:
            self.server = subprocess.Popen(
                ["bash", "-c", f"{self._activate}exec {command}"],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return "server", ""

    def _wait_for_server(self) -> str:
        """Wait until it is up; what is wrong with it, or nothing."""
        assert self.server is not None
        deadline = time.monotonic() + START_S
        while not self._is_healthy():
            if self.server.poll() is not None or time.monotonic() > deadline:
                return f"no server: {self._log.read_text(errors='replace')[-3000:]}"
            time.sleep(0.5)
        return ""

    def _is_healthy(self) -> bool:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health").close()
            return True
        return False


@contextlib.contextmanager
def reader(folder: Path) -> Iterator[Reader]:
    """A reader whose server ends with the context."""
    one = Reader(folder)
    try:
        yield one
    finally:
        if one.server is not None:
            kill_session(one.server)


def _chains(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Each block with those that say what it prints; texts are left out."""
    chain: list[Block] = []
    for block in blocks:
        if block.kind == "text":
            continue
        if block.kind != "prints" and chain:
            yield chain
            chain = []
        chain.append(block)
    if chain:
        yield chain


def _without_elsewhere(text: str) -> tuple[str, str]:
    """The commands to run here, and what runs the last of the others."""
    kept, reason = [], ""
    for line in text.splitlines():
        found = [why for part, why in ELSEWHERE.items() if part in line]
        reason = found[0] if found else reason
        kept += [] if found else [line]
    is_set_up = all(line.startswith("sglang-prefix tiny-model") for line in kept)
    return ("" if is_set_up else "\n".join(kept) + "\n"), reason
