"""The examples: what they print with real workers, what they start, what they refuse."""

from __future__ import annotations

import importlib
import os
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sglang_prefix.bench.child import kill_session
from sglang_prefix.tiny_model import build_tiny_model
from tests.docs.facts import problems
from tests.docs.pages import ROOT, read_page
from tests.docs.run import PATHS

EXAMPLES = ROOT / "examples"
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": PATHS,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
PREFIXES, QUESTIONS = ["Oak ", "Birch ", "Cedar "], 3


@pytest.mark.engine
@pytest.mark.extended
@pytest.mark.timeout(1200)
def test_requests_of_one_prefix_meet_on_one_worker(tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "model")
    options = ["--dtype", "float32", "--mem-fraction-static", "0.3", "--max-total-tokens", "20000"]
    # Long answers: the first prefix must still be running when the router places the second,
    # however busy this machine is.
    options += ["--new-tokens", "200"]
    printed = run_example("router_workers.py", "--model-path", "model", *options, cwd=tmp_path)
    homes = []
    for line in (line for line in printed.splitlines() if "%" in line):
        shares = [float(share) for share in re.findall(r"([\d.]+)%", line)]
        # All begin with the same words, which the other worker has seen, too.
        assert max(shares) > 95
        assert min(shares) < 10
        homes.append(shares.index(max(shares)))
    assert len(homes) == 4
    assert set(homes) == {0, 1}  # different prefixes spread
    ratios = [float(r) for r in re.findall(r"KV tokens read / KV tokens: ([\d.]+)", printed)]
    assert len(ratios) == 2
    assert max(ratios) < 0.5


def test_a_prefix_is_sent_once_the_router_counts_those_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A router counts a request a while after it came, and answers all once the last has come."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("router_workers")
    seen: list[tuple[str, int]] = []
    counted: list[str] = []
    lock, whole = threading.Lock(), threading.Event()

    def generate(_: str, prompt: str, __: int) -> None:
        with lock:
            seen.append((prompt, len(counted)))
            if len(seen) == len(PREFIXES) * QUESTIONS:
                whole.set()
        time.sleep(0.05)
        counted.append(prompt)
        assert whole.wait(20)

    monkeypatch.setattr(example, "generate", generate)
    monkeypatch.setattr(example, "running", lambda _: len(counted))
    example.ask_questions("http://router", PREFIXES, QUESTIONS, 4)
    first = seen[: len(PREFIXES)]
    assert first == [(f"{prefix}Question 0?", i) for i, prefix in enumerate(PREFIXES)]
    others = {prompt for prompt, _ in seen[len(PREFIXES) :]}
    assert others == {f"{prefix}Question {i}?" for prefix in PREFIXES for i in (1, 2)}


def test_the_server_script_adds_one_flag(tmp_path: Path) -> None:
    stub(tmp_path / "sglang-prefix", 'echo "$@"')
    has_gpu = any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd"))
    device = [] if has_gpu else ["--device", "cpu"]
    model, flag = str(tmp_path / "model"), ["--decode-attention-backend", "prefix"]
    done = run_script("serve.sh", model, "--port", "31000", path=tmp_path)
    expected = ["exec", "--", "sglang", "serve", "--model-path", model, *device, *flag]
    assert done.stdout.split() == [*expected, "--port", "31000"]


def test_the_comparison_run_calls_what_exists(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    stub(tmp_path / "sglang-prefix", f'echo "sglang-prefix $@" >> {calls}')
    done = run_script("compare.sh", "out", "--model-path", "tiny", path=tmp_path)
    assert done.stdout.splitlines()[-1] == "open out/report.html"
    lines = calls.read_text().splitlines()
    assert lines == [
        "sglang-prefix bench kernel --out out --quick",
        "sglang-prefix bench serving --out out --quick --model-path tiny",
        "sglang-prefix report out --out out/report.html",
    ]
    (tmp_path / "page.md").write_text("```bash\n" + "\n".join(lines) + "\n```\n")
    found = problems([read_page(tmp_path / "page.md", tmp_path)])
    assert [problem for problem in found if "place on one machine" not in problem] == []


@pytest.mark.parametrize("name", ["compare.sh", "serve.sh"])
def test_scripts_say_what_is_missing(name: str, tmp_path: Path) -> None:
    done = run_script(name, "folder", path=tmp_path, inherit=False)
    assert done.returncode == 127
    assert "sglang-prefix is not on PATH" in done.stderr
    assert run_script(name, "--help", path=tmp_path, inherit=False).returncode == 0


def test_the_comparison_run_wants_a_folder(tmp_path: Path) -> None:
    done = run_script("compare.sh", path=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "compare.sh: name the folder for the results"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["openai_n.py", "--base-url", "http://127.0.0.1:9"], "no server answers at http://127"),
        (["agents_with_tools.py", "--base-url", "http://127.0.0.1:9"], "no server answers at"),
        (["agents_with_tools.py", "--turns", "0"], "--turns 0; legal: 1 and above"),
        (["router_workers.py", "--model-path", "."], ". holds no config.json; is it a model?"),
    ],
)
def test_examples_say_in_one_line_what_is_wrong(
    arguments: list[str], complaint: str, tmp_path: Path
) -> None:
    program, *others = arguments
    done = subprocess.run(
        [sys.executable, EXAMPLES / program, *others],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert complaint in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def run_example(program: str, *arguments: str, cwd: Path) -> str:
    """Run an example in a session of its own, which ends with it; return what it printed."""
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / program, *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=900)
    finally:
        kill_session(process)
    assert process.returncode == 0, printed[-3000:]
    return printed


def run_script(
    name: str, *arguments: str, path: Path, inherit: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a shell script of the examples with ``path`` first on PATH."""
    others = os.environ["PATH"] if inherit else "/usr/bin:/bin"
    return subprocess.run(
        ["bash", EXAMPLES / name, *arguments],
        cwd=path,
        env={"PATH": f"{path}{os.pathsep}{others}"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def stub(file: Path, text: str) -> None:
    """An executable that does what one line of shell says."""
    file.write_text(f"#!/usr/bin/env bash\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
