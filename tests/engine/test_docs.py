"""The documentation, read and typed in by a program; and the examples that nothing else runs."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sglang_prefix.bench.engine import kill_session
from tests.docs.facts import problems
from tests.docs.pages import ROOT, pages, read_page
from tests.docs.run import Reader, reader

(PINNED,) = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.startswith("sglang==")
]
pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not PINNED.specifier.contains(version("sglang")),
        reason=f"the documentation is about {PINNED}",
    ),
]

EXAMPLES = ROOT / "examples"
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT), str(ROOT / "kernels"), str(ROOT / "patches"), os.environ.get("PYTHONPATH", "")]
    ),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def test_everything_that_the_pages_tell_to_run_runs(tmp_path: Path) -> None:
    with reader(tmp_path) as one:
        outcomes = list(one.read(pages()))
        failed = [o for o in outcomes if o.status == "failed"]
        assert not failed, "\n\n".join(f"{o.block.where}: {o.detail}" for o in failed)
        counters = one.counters()
    status = [o.status for o in outcomes]
    assert status.count("ran") >= 8
    assert status.count("server") >= 2
    assert status.count("compared") >= 3
    printed = "\n".join(o.detail for o in outcomes if o.status == "ran")
    assert "agent 0, turn 0: price(oak) -> one oak costs 120 euros" in printed
    ratios = re.findall(r"agent 3, turn 2: .*\n.*\nKV tokens read / KV tokens: ([\d.]+)", printed)
    assert [ratio for ratio in ratios if float(ratio) < 0.7]
    # The blocks did what the pages are about, and the table of counters has what a server shows.
    assert counters["packed_steps"] > 0
    assert counters["kv_read_ratio"] < 0.8
    named = {code for _, code in read_page(ROOT / "docs/metrics.md").code}
    assert set(counters) <= named


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ("```bash\nexit 3\n```", "status 3"),
        ("```bash\nfalse | true\n```", "status 1"),
        ("```python\nprint(1)\n```\n\n<!-- docs-check: prints -->\n```\n2\n```", "it prints:\n1"),
        ("```python\n1 / 0\n```", "ZeroDivisionError"),
    ],
)
def test_a_planted_command_that_fails_is_found(
    planted: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "page.md").write_text(f"# Page\n\n{planted}\n")
    (tmp_path / "scratch").mkdir()
    outcomes = list(Reader(tmp_path / "scratch").read([read_page(tmp_path / "page.md", tmp_path)]))
    assert outcomes[-1].status == "failed"
    assert complaint in outcomes[-1].detail


def test_requests_of_one_prefix_meet_on_one_worker(models: dict[str, str], tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--mem-fraction-static", "0.3", "--max-total-tokens", "20000"]
    # Long answers: the first prefix must still be running when the router places the second,
    # however busy this machine is.
    options += ["--new-tokens", "96"]
    printed = run_example(
        "router_workers.py", "--model-path", models["llama"], *options, cwd=tmp_path
    )
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
    assert run_script("compare.sh", str(tmp_path / "out"), path=tmp_path).returncode == 0
    lines = calls.read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["bench", "bench", "report"]
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
        kill_session(process)  # type: ignore[arg-type]
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
