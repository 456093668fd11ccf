"""`bench gpu` without a GPU: its dry run, steps that go wrong, what is packed, what is used."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from typer.testing import CliRunner

from prefix_kernels.tiles import TileShape, formula_tile
from sglang_prefix import gate
from sglang_prefix.bench.gpu import counters, launches, pack, run, use
from sglang_prefix.bench.gpu.run import GpuRun
from sglang_prefix.bench.gpu.steps import STEPS, Step
from sglang_prefix.bench.results import read_result, write_result
from sglang_prefix.bench.run import NotRunError
from sglang_prefix.bench.settings import SETTINGS
from sglang_prefix.bench.workloads.registry import load_registry
from sglang_prefix.cli.main import app
from tests.gpu import launches as checks
from tests.gpu.variants import MORE_GRAPHS, variants
from tests.report_files import check_result, gpu_result, kernel_result, tune_result

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
    assert len(load_registry("gpu-minutes")) == 7
    settings = next(step for step in STEPS if step.name == "settings").commands[0]
    pattern = settings[settings.index("--workload") + 1]
    files = ("rollouts", "trees", "unrelated")
    found = [c.name for f in files for c in load_registry(f) if re.search(pattern, c.name)]
    assert len(found) == 5


@pytest.mark.extended
@pytest.mark.slow
def test_a_dry_run_from_the_first_step_to_the_last(tmp_path: Path) -> None:
    done = gpu("--dry", "--out", tmp_path)
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
        python(f"{forks}; {HANGS}", limit_s=5),
        python(fails),
        python(RIGHT, must_hold=True),
    )
    first, second, third = data["cases"]
    assert (first["status"], first["failed"]) == ("overran", {"log1": "killed after 5 s"})
    assert first["says"] == {"passed": 1, "not run": 0}  # what it wrote before stays
    assert 5 <= first["wall_s"] < 10
    assert second["failed"] == {"log1": "status 1: no such kernel: ValueError"}
    assert (third["status"], data["not_run"]) == ("done", {})
    size = marker.stat().st_size
    time.sleep(0.2)
    assert 0 < size == marker.stat().st_size, "a process of a killed step lives on"


@pytest.mark.parametrize(
    ("source", "limit_s"), [(WRONG, 60), (f"{WRONG}; {HANGS}", 4), ("pass", 60), ("1/0", 60)]
)
def test_what_is_wrong_or_proves_nothing_stops_everything(
    source: str, limit_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = python(source, limit_s, must_hold=True)
    data = run_steps(tmp_path, monkeypatch, first, python(RIGHT), python(RIGHT))
    assert len(data["cases"]) == 1
    assert data["not_run"] == dict.fromkeys("12", "0 failed, which has to hold first")
    # So it does where the run goes on, whatever the kernels are then.
    if source.startswith(WRONG) and limit_s > 4:
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


# -- what is used ----------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A made-up run, dry, so that it cannot be taken for a measurement."""
    folder = tmp_path / "run"
    kernel = kernel_result() | {"dry": True}
    limits = {"read_bytes_per_s": 4e12, "empty_launch_us": 1.5, "flop_per_s": 7e14}
    shape = {"head_dim": 128, "v_head_dim": 128, "q_itemsize": 2, "kv_itemsize": 2}
    formula = formula_tile(16, TileShape(128, 128, 2, 2))
    case = tune_result()["cases"][0] | {
        "shape": shape,
        "tiles": {"16x64": {"tile": asdict(formula), "kernel_us": 3.0}},
    }
    tune = tune_result() | {"device_name": "NVIDIA H200", "arch": "sm_90", "cases": [case]}
    run_data = gpu_result() | {"dry": True}
    done = run_data["cases"][0]
    run_data["cases"] += [done | {"name": name} for name in ("correct-more", "limits", "tiles")]
    write_result(folder / "gpu.json", run_data)
    write_result(folder / "correct" / "check.json", check_result() | {"dry": True})
    write_result(folder / "limits" / "kernel.json", kernel | {"limits": limits, "cases": []})
    write_result(folder / "peers" / "kernel.json", kernel | {"limits": limits})
    write_result(folder / "tiles" / "tune.json", tune | {"dry": True})
    # A step that this run has not begun, and an older one had.
    write_result(folder / "settings" / "kernel.json", kernel)
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What of a checkout is written to."""
    root = tmp_path / "checkout"
    for name in (*use.PAGES, "kernels/prefix_kernels/tuned_tiles.json", "sglang_prefix/x"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, root / name)
    return root


def test_results_become_tables_and_pages(results: Path, checkout: Path) -> None:
    refused = gpu("--use", results)
    assert refused.exit_code == 2
    assert "is a dry run's: name another --into than" in refused.stderr
    assert refused.stderr.count("\n") == 1

    done = gpu("--use", results, "--into", checkout)
    assert done.exit_code == 0, done.output
    assert "not proven: sanitizers was not run" in done.output
    assert "correct-more" not in done.output
    place = checkout / "docs" / "results" / "no-gpu"
    stem = "2026-01-01-0000000"
    assert sorted(path.name for path in place.iterdir()) == [
        f"{stem}-{name}.json"
        for name in ("correct-check", "gpu", "limits-kernel", "peers-kernel", "tiles-tune")
    ]
    tiles = json.loads((checkout / "kernels/prefix_kernels/tuned_tiles.json").read_text())
    assert tiles["NVIDIA H200"]["result_file"].endswith(f"{stem}-tiles-tune.json")
    limits = gate.load_limits(checkout / "sglang_prefix" / "device_limits.json")
    assert limits["no GPU"] == {"read_bytes_per_s": 4e12, "flop_per_s": 7e14, "launch_us": 1.5}
    rows = {name: blocks(checkout / name)[0].splitlines()[6:] for name in use.PAGES}
    performance, reproduction = rows.values()
    assert [len(found) for found in (performance, reproduction)] == [4, 4]
    times = "| torch_native | 8,000 | hydragen | 3,000 | pat | 2,000 | 4.00x | 1.50x |"
    assert performance[0].startswith(f"| pat-tree-01 | 1:1:1 |  {times}")
    # The same file again changes no page.
    before = [(checkout / name).read_text() for name in use.PAGES]
    assert gpu("--use", results, "--into", checkout).exit_code == 0
    assert [(checkout / name).read_text() for name in use.PAGES] == before


@pytest.mark.parametrize(
    ("step", "changes", "complaint"),
    [
        ("correct", {"status": "failed"}, "the step 'correct' is not done, so nothing is proven"),
        ("correct", {"says": {"passed": 7, "not run": 2}}, "'correct' left out 2 checks"),
        ("correct-more", {"failed": {"check: fp8": "off by 1"}}, "is wrong: check: fp8: off by 1"),
    ],
)
def test_nothing_is_used_of_a_run_whose_kernels_are_wrong(
    step: str, changes: dict[str, Any], complaint: str, results: Path, checkout: Path
) -> None:
    before = contents(checkout)
    wrong = read_result(results / "gpu.json")
    next(case for case in wrong["cases"] if case["name"] == step).update(changes)
    write_result(results / "gpu.json", wrong)
    refused = gpu("--use", results, "--into", checkout)
    assert refused.exit_code == 2
    assert complaint in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert contents(checkout) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "overran", "failed": {"log1": "killed after 70 s"}},
        {"says": {"memcheck: passed": 0, "memcheck: not run": 1}},
    ],
)
def test_a_check_that_is_not_whole_is_said(
    changes: dict[str, Any], results: Path, checkout: Path
) -> None:
    data = read_result(results / "gpu.json")
    next(case for case in data["cases"] if case["name"] == "correct-more").update(changes)
    write_result(results / "gpu.json", data)
    done = gpu("--use", results, "--into", checkout)
    assert done.exit_code == 0, done.output
    assert "not proven: correct-more " in done.output


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        ("page", "performance.md has no block for results; legal: "),
        ("tiles", "is no table of tuned tiles"),
        ("limits", "is no table of device limits"),
        ("check", "check.json is not a result file"),
    ],
)
def test_what_cannot_be_used_changes_nothing(
    file: str, complaint: str, results: Path, checkout: Path
) -> None:
    """Neither a table or a page, nor a copy of a result."""
    if file == "page":
        (checkout / "docs" / "performance.md").write_text("no block\n")
    elif file == "tiles":
        (checkout / "kernels/prefix_kernels/tuned_tiles.json").write_text('{"x": 1}')
    elif file == "limits":
        data = read_result(results / "limits" / "kernel.json")
        data["limits"]["empty_launch_us"] = 0.0
        write_result(results / "limits" / "kernel.json", data)
    else:
        (results / "correct" / "check.json").write_text("{")
    before = contents(checkout)
    refused = gpu("--use", results, "--into", checkout)
    assert refused.exit_code == 2, refused.output
    assert complaint in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert contents(checkout) == before


def contents(folder: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


def blocks(page: Path) -> list[str]:
    return re.findall(f"{re.escape(use._BEGIN)}(.*?){use._END}", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("name", use.PAGES)
def test_pages_say_what_their_result_says(name: str) -> None:
    (block,) = blocks(ROOT / name)
    if source := re.search(r"\((\.\./docs/results/.*\.json)\)", block):
        data = read_result(ROOT / "docs" / source[1], "bench-kernel")
        assert block == use.measured_block(data, source[1].removeprefix("../"), use.PAGES[name])
    else:
        assert re.search("[Nn]ot(hing has been)? measured", block)


def test_the_gate_knows_a_device_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        name, major, multi_processor_count, L2_cache_size = "made-up", 9, 100, 1 << 20

    table = tmp_path / "limits.json"
    row = {"read_bytes_per_s": 3e12, "flop_per_s": 5e14, "launch_us": 1.25}
    table.write_text(json.dumps({"made-up": row}))
    monkeypatch.setattr(gate, "LIMITS_FILE", table)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    found = gate.limits_of(torch.device("cuda"))
    assert found == gate.DeviceLimits(3e12, 5e14, 1 << 20, 100, 1.25)
    table.write_text("{}")
    assert gate.limits_of(torch.device("cuda")).flop_per_s == 100 * gate._FLOP_PER_SM[9]


@pytest.mark.parametrize("value", [0, -1, True, "1", None, 1e30])
def test_a_table_of_limits_has_numbers(value: Any, tmp_path: Path) -> None:
    table = tmp_path / "limits.json"
    row = {"read_bytes_per_s": 3e12, "flop_per_s": 5e14, "launch_us": value}
    table.write_text(json.dumps({"card": row}))
    with pytest.raises(ValueError, match=r"is no table of device limits: .*launch_us of card is"):
        gate.load_limits(table)
