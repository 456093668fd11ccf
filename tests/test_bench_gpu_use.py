"""`bench gpu --use`: what results of a run become, what is refused, and what pages say."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from prefix_kernels.tiles import TileShape, formula_tile
from sglang_prefix import gate
from sglang_prefix.bench.gpu import use
from sglang_prefix.bench.results import read_result, write_result
from sglang_prefix.cli.main import app
from tests.report_files import check_result, gpu_result, kernel_result, tune_result

ROOT = Path(__file__).parents[1]


def gpu(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", "gpu", *map(str, words)])


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
