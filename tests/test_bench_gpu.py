"""`bench gpu` without a GPU: its dry run, steps that go wrong, what is packed."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from typer.testing import CliRunner

from sglang_prefix.bench.gpu import counters, launches, pack, run
from sglang_prefix.bench.gpu.run import GpuRun
from sglang_prefix.bench.gpu.steps import STEPS, Step
from sglang_prefix.bench.results import read_result, write_result
from sglang_prefix.bench.run import NotRunError
from sglang_prefix.bench.settings import SETTINGS
from sglang_prefix.bench.workloads.registry import load_registry
from sglang_prefix.cli.main import app
from tests.gpu import launches as checks
from tests.gpu.variants import MORE_GRAPHS, variants
from tests.report_files import kernel_result

ROOT = Path(__file__).parents[1]


def gpu(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", "gpu", *map(str, words)])


# -- the steps -------------------------------------------------------------------------------------


def test_steps_fit_into_nine_minutes_and_begin_with_what_must_hold() -> None:
    assert sum(step.limit_s for step in STEPS) <= 560
    names = [step.name for step in STEPS]
    assert names[:3] == ["cache", "compile", "correct"]
    assert [step.name for step in STEPS if step.must_hold] == ["correct"]
    sanitizers = STEPS[-1].commands[0]
    needs = float(sanitizers[sanitizers.index("--sanitizer-s") + 1])
    # As `run_cases` decides, after ten seconds of imports.
    assert 10 + needs < STEPS[-1].limit_s - STEPS[-1].margin_s
    checks = [step for step in STEPS if "pytest" in step.commands[0]]
    assert len(checks) == 3
    assert all(step.margin_s >= 12 for step in checks)


def test_checks_and_batches_that_steps_name_are_there() -> None:
    """`-k` and `--workload` choose nothing, and say nothing, where a name has changed."""
    modes = ("graph", "sanitizer/memcheck", "sanitizer/racecheck")
    names = [*(variant.name for variant in variants()), *MORE_GRAPHS, *modes]
    words = [command for step in STEPS for command in step.commands if "pytest" in command]
    chosen = [command[command.index("-k") + 1] for command in words]
    words_of = (re.findall(r"[^\s()]+", expression) for expression in chosen)
    terms = {term for words in words_of for term in words} - {"and", "or", "not"}
    assert len(terms) > 10
    for term in terms:
        assert any(term in name for name in names), term
    assert len(load_registry("gpu-minutes")) == 8
    settings = next(step for step in STEPS if step.name == "settings").commands[0]
    pattern = settings[settings.index("--workload") + 1]
    files = ("rollouts", "trees", "unrelated")
    found = [c.name for f in files for c in load_registry(f) if re.search(pattern, c.name)]
    assert len(found) == 5


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_dry_run_from_the_first_step_to_the_last(tmp_path: Path) -> None:
    done = gpu("--dry", "--budget-s", "1700", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    data = read_result(tmp_path / "gpu.json", "bench-gpu")
    assert {case["name"]: case["status"] for case in data["cases"]} == {
        step.name: "done" for step in STEPS if not step.after
    }
    assert data["not_run"] == {"compile": "not needed: cache found no compiled"}
    said = {case["name"]: case["says"] for case in data["cases"]}
    assert said["correct"]["passed"] == said["correct-more"]["passed"] == 1
    kernel = read_result(tmp_path / "settings" / "kernel.json", "bench-kernel")
    named = {f"triton/pat/{name}" for name in SETTINGS}
    for case in kernel["cases"]:
        assert named <= set(case["providers"]), case["failed"]
    peers = read_result(tmp_path / "peers" / "kernel.json")["cases"][0]["providers"]
    assert {"triton/pat/fused/in_kernel", "triton/query"} <= set(peers)
    assert said["tiles"]["dim128/bf16/rows16"].startswith("16x")
    assert said["sanitizers"] == {
        f"{tool}: {what}": number
        for tool in ("memcheck", "racecheck")
        for what, number in (("passed", 0), ("not run", 1))
    }
    assert done.output.index("compiled") > done.output.index("Steps")


def python(source: str, limit_s: float = 60, **more: Any) -> Step:
    """A step of one line of Python, that takes its folder as an argument."""
    return Step(source[:20], limit_s, (("-c", source, "{folder}"),), "", **more)


RESULT = (
    "import sys; from tests.report_files import check_result; "
    "from sglang_prefix.bench.results import write_result; "
    "write_result(sys.argv[1] + '/check.json', check_result() | {'failed': %s})"
)
RIGHT, WRONG = RESULT % "{}", RESULT % "{'graph': 'off by 1'}"
HANGS = "import time; time.sleep(99)"


def run_steps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *steps: Step, more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The result of a dry run of other steps, whose names are the first letters of their code."""
    named = tuple(
        Step(str(i), s.limit_s, s.commands, "", must_hold=s.must_hold, after=s.after)
        for i, s in enumerate(steps)
    )
    monkeypatch.setattr(GpuRun, "steps", named)
    monkeypatch.setattr(run, "_DRY_PATIENCE", 1)
    gpu("--dry", "--out", folder, *more)
    return read_result(folder / "gpu.json", "bench-gpu")


def test_a_step_that_overruns_or_fails_leaves_the_others_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "alive"
    child = f"while True: open({str(marker)!r}, 'a').write('x')"
    forks = f"import sys, subprocess as s; s.Popen([sys.executable, '-c', {child!r}]); {RIGHT}"
    fails = "import sys; print('first'); sys.exit('no such kernel: ValueError')"
    data = run_steps(
        tmp_path,
        monkeypatch,
        python(f"{forks}; {HANGS}", limit_s=10),
        python(fails),
        python(RIGHT, must_hold=True),
    )
    first, second, third = data["cases"]
    assert (first["status"], first["failed"]) == ("overran", {"log1": "killed after 10 s"})
    assert first["says"] == {"passed": 1, "not run": 0}  # what it wrote before stays
    assert 10 <= first["wall_s"] < 20
    assert second["failed"] == {"log1": "status 1: no such kernel: ValueError"}
    assert (third["status"], data["not_run"]) == ("done", {})
    size = marker.stat().st_size
    time.sleep(0.2)
    assert 0 < size == marker.stat().st_size, "a process of a killed step lives on"


@pytest.mark.parametrize(
    ("source", "limit_s"), [(WRONG, 60), (f"{WRONG}; {HANGS}", 8), ("pass", 60), ("1/0", 60)]
)
def test_what_is_wrong_or_proves_nothing_stops_everything(
    source: str, limit_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = python(source, limit_s, must_hold=True)
    data = run_steps(tmp_path, monkeypatch, first, python(RIGHT), python(RIGHT))
    assert len(data["cases"]) == 1
    assert data["not_run"] == dict.fromkeys("12", "0 failed, which has to hold first")
    # So it does where the run goes on, whatever the kernels are then.
    if source.startswith(WRONG) and limit_s > 8:
        right = [python(RIGHT, must_hold=True), python(RIGHT), python(RIGHT)]
        again = run_steps(tmp_path, monkeypatch, *right, more=("--resume",))
        assert (again["cases"], again["not_run"]) == (data["cases"], data["not_run"])
        assert data["cases"][0]["failed"] == {"check: graph": "off by 1"}


def test_what_must_hold_and_overran_gets_another_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, right = python(HANGS, 1, must_hold=True), python(RIGHT, must_hold=True)
    data = run_steps(tmp_path, monkeypatch, slow, python(RIGHT))
    assert [case["status"] for case in data["cases"]] == ["overran"]
    data = run_steps(tmp_path, monkeypatch, right, python(RIGHT), more=("--resume",))
    assert [case["status"] for case in data["cases"]] == ["done", "done"]
    # Where nothing is left for it, the steps after it do not go first.
    stopped = run_steps(tmp_path, monkeypatch, right, python(RIGHT), more=("--budget-s", "0"))
    assert stopped["cases"] == []
    stopped["not_run"].pop("0")
    step = GpuRun.steps[1]
    resumed = GpuRun.__new__(GpuRun)
    resumed.data = stopped
    with pytest.raises(NotRunError, match="0 was not run, which has to hold first"):
        resumed._run(step)


def test_two_results_of_a_step_and_those_of_an_older_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each says its own; what an older run left is gone, also of a step that does not run."""
    old = tmp_path / "1" / "kernel.json"
    write_result(old, kernel_result())
    twice = RIGHT + "; write_result(sys.argv[1] + '/other.json', check_result() | {'cases': []})"
    data = run_steps(
        tmp_path, monkeypatch, python(twice, must_hold=True), python(RIGHT, after=("0", "x"))
    )
    (case,) = data["cases"]
    assert not old.exists()
    assert {name: case["says"][name] for name in ("check: passed", "other: passed")} == {
        "check: passed": 1,
        "other: passed": 0,
    }


def test_a_step_is_passed_over_where_another_found_no_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = "import sys; open(sys.argv[1] + '/facts.json', 'w').write('{\"compiled\": %d}')"
    steps = [python(writes % 0), python(writes % 3), python("1/0")]
    needs = [python("pass", after=(str(i), "compiled")) for i in (0, 1, 2, 99)]
    data = run_steps(tmp_path, monkeypatch, *steps, *needs)
    assert data["not_run"] == {"3": "not needed: 0 found no compiled"}
    assert [case["name"] for case in data["cases"]] == ["0", "1", "2", "4", "5", "6"]


def test_counters_of_ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = tmp_path / "facts.json"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert counters.count(facts, dry=True) == {"ncu": "not installed"}
    stalls = [f"smsp__average_warps_issue_stalled_{n}_per_issue_active.ratio" for n in "abcd"]
    names = ("ID", "Kernel Name", "gpu__time_duration.sum", "other", "dram__bytes_read.sum")
    values = ("0", "pack_forward_kernel", "1,041.5", "7", "n/a", "1.5", "0.25", "9", "3")
    table = ((*names, *stalls), ("", "", "us", *6 * ("%",)), values)
    rows = "==PROF== 1\n" + "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in table)
    fake = tmp_path / "ncu"
    fake.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[6 + 1], 'w').write({rows!r})\n")
    fake.chmod(0o755)
    counted = counters.count(facts, dry=True)
    assert list(counted.values()) == [1041.5, 9, 3, 1.5]
    assert next(iter(counted)) == "0 pack_forward_kernel gpu__time_duration.sum"
    fake.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('==ERROR== LibraryNotLoaded')\n")
    (tmp_path / "facts.csv").unlink()
    with pytest.raises(RuntimeError, match="ncu: ==ERROR== LibraryNotLoaded"):
        counters.count(facts, dry=True)


# -- what is carried -------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | Path]:
    """A cache, to which nothing is added, a kit and FastTree's folder, and their options."""
    monkeypatch.setattr("sglang_prefix.bench.gpu.launches.WORKS", ())
    for name in ("cache/KEY/kernel.cubin", "kit/core/core.tar.xz", "kit/ops/ops.tar.xz"):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_bytes(os.urandom(1000))
    (tmp_path / "tree" / "__pycache__").mkdir(parents=True)
    (tmp_path / "tree" / "fasttree.py").write_text("x = 1\n")
    shutil.make_archive(str(tmp_path / "kit/core/core"), "xztar", tmp_path / "tree")
    shutil.copy(tmp_path / "kit/core/core.tar.xz", tmp_path / "kit/ops/ops.tar.xz")
    names = {"--cache": "cache", "--kit": "kit", "--fasttree": "tree"}
    return [word for option, name in names.items() for word in (option, tmp_path / name)]


def test_what_is_carried_is_used_on_the_other_side(
    parts: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "carried"
    done = gpu("--pack", folder, *parts)
    assert done.exit_code == 0, done.output
    files = ["cache.tar.xz", "fasttree.tar.xz", "kit-core.tar.xz", "kit-ops.tar.xz"]
    assert sorted(path.name for path in folder.iterdir()) == files
    for name in ("checkout", *files, "in all"):
        assert re.search(rf"\d\.\d MiB  {re.escape(name)}\n", done.stdout), done.stdout

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = tmp_path / f"sglang-prefix-{os.getuid()}"
    stale = place / "site" / "stale.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    place.chmod(0o777)
    says = (
        "import json, os, sys; from pathlib import Path; import fasttree; "
        "cache = Path(os.environ['TRITON_CACHE_DIR'], 'KEY', 'kernel.cubin').stat().st_size; "
        "tree = os.listdir(os.environ['FASTTREE_KERNEL_BENCH']); "
        "facts = {'cache': cache, 'tree': ' '.join(tree), 'site': fasttree.x}; "
        "open(sys.argv[1] + '/facts.json', 'w').write(json.dumps(facts))"
    )
    monkeypatch.setattr(GpuRun, "steps", (python(says),))
    words = ("--dry", "--out", tmp_path / "run", "--carried", folder)
    assert gpu(*words, "--budget-s", "0").exit_code == 0
    done = gpu(*words, "--resume")
    assert done.exit_code == 0, done.output
    (case,) = read_result(tmp_path / "run" / "gpu.json")["cases"]
    assert case["says"] == {"cache": 1000, "tree": "fasttree.py", "site": 1}
    assert not stale.exists()
    assert place.stat().st_mode & 0o777 == 0o700
    # Python would import from it, so it must be nobody else's.
    shutil.rmtree(place)
    place.symlink_to(tmp_path)
    for uid in (os.getuid(), os.getuid() + 1):
        monkeypatch.setattr(os, "getuid", lambda uid=uid: uid)
        tmp_path.joinpath(f"sglang-prefix-{uid}").mkdir(exist_ok=True)
        refused = gpu("--dry", "--out", tmp_path / "other", "--carried", folder)
        assert refused.exit_code == 2
        assert f"sglang-prefix-{uid} is no folder of this user; legal: TMPDIR" in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_what_the_steps_launch_is_recorded() -> None:
    """Kernels of the first step and of the sanitizers, and the merge that overlaps."""
    from prefix_kernels.kernel_cache import collect_launches

    works = [work.__name__ for work in launches.WORKS]
    assert works[0] == "launch_one_layer"
    assert {"launch_settings", "launch_checks"} <= set(works)
    settings = collect_launches(partial(launches.launch_settings, "sm_90"))
    options = [dict(one.arguments) for one in settings]
    assert any(one.get("launch_pdl") for one in options)
    assert {one.get("CARRIES_ITEM") for one in options if one.get("BLOCK_M") == 16} == {True, False}


def test_the_checks_launch_what_sanitizers_watch_and_every_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(checks, "variants", list)
    monkeypatch.setattr(checks, "run", lambda *arguments: None)
    monkeypatch.setattr(checks, "GraphServer", lambda *_, **options: seen.append(options))

    def planned(variant: Any, *arguments: Any, **options: Any) -> MagicMock:
        seen.append((variant.name, variant.kv_dtype))
        return MagicMock()

    monkeypatch.setattr(checks, "planned", planned)
    checks.launch_checks()
    for one in (("small", None), ("small", torch.float8_e4m3fn), {}, {"overlap_merge": True}):
        assert one in seen


def test_what_cannot_be_packed_is_one_line_and_changes_nothing(
    parts: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "carried"
    gpu("--pack", folder, *parts)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(pack, "MAX_BYTES", 1 << 20)
    for words, message in (
        (parts, r"what is carried takes \d\.\d MiB \(checkout \d.*\); legal: up to 1$"),
        (["--kit", tmp_path / "tree"], r"tree holds no core/\*\.tar\.xz; legal: "),
        (["--fasttree", tmp_path / "kit"], r"kit holds no fasttree\.py; legal: "),
    ):
        refused = gpu("--pack", folder, *words)
        assert refused.exit_code == 2
        assert re.search(message, refused.stderr.strip()), refused.stderr
        assert refused.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not list(tmp_path.glob(".pack-*"))
    refused = gpu("--dry", "--out", tmp_path / "run", "--carried", tmp_path / "kit")
    assert refused.exit_code == 2
    assert "kit holds no archives; legal: a folder made with --pack" in refused.stderr
    (folder / "cache.tar.xz").write_bytes(b"damaged")
    refused = gpu("--dry", "--out", tmp_path / "run", "--carried", folder)
    assert refused.exit_code == 2
    assert "cache.tar.xz cannot be unpacked: " in refused.stderr
    assert refused.stderr.count("\n") == 1
