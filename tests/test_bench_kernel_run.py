"""`bench kernel`: files that cannot be resumed, memory and disks that do not suffice, the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

from sglang_prefix.bench import kernel_run, measure, plots
from sglang_prefix.bench.contenders import Contender, StepSeconds, TorchPacked
from sglang_prefix.bench.output_check import OutputCheck
from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.workloads.inputs import AttentionInputs
from sglang_prefix.cli import bench_kernel
from sglang_prefix.cli.main import app

SMALL = ("--tree", "1,4_64,16", "--tree", "3_32", "--heads", "4:2:16", "--rounds", "1")
LARGER, SMALLER = "tree/1,4_64,16/4:2:16", "tree/3_32/4:2:16"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(autouse=True)
def no_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stock kernel that is here at once: SGLang takes seconds to import."""

    class Stock(TorchPacked):
        kind = "stock"

    stock = {"stock": lambda inputs: Stock(inputs, "query")}
    monkeypatch.setattr(kernel_run, "find_stock", lambda device: (stock, {}))


def bench(out: Path, *options: str) -> Any:
    return CliRunner().invoke(
        app, ["bench", "kernel", "--out", str(out), "--policy", "pat", "--threads", "1", *options]
    )


def resume(out: Path) -> Any:
    return CliRunner().invoke(app, ["bench", "kernel", "--out", str(out), "--resume", "--no-plots"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file of a finished run."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_run, "find_stock", lambda device: ({}, {}))
        done = bench(out, *SMALL, "--no-plots", "--no-report")
    assert done.exit_code == 0, done.output
    return read_result(out / "kernel.json")


def mine(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = data["cells"][0]["contenders"]["torch/pat"]
    return found


MALFORMED: dict[str, tuple[Change, str]] = {
    "no environment": (lambda d: d.pop("environment"), "environment: Field required"),
    "environment of a list": (
        lambda d: d.update(environment=[]),
        "environment: Input should be a valid dictionary",
    ),
    "no failed": (
        lambda d: d["cells"][0].pop("failed"),
        "cannot be resumed: cells[0].failed: Field required",
    ),
    "no contenders": (lambda d: d["cells"][0].pop("contenders"), "cells[0].contenders: Field req"),
    "no best stock": (lambda d: d["cells"][0].pop("best_stock"), "cells[0].best_stock: Field req"),
    "no time": (lambda d: mine(d).pop("ms"), "cells[0].contenders.cpu/pat.ms: Field required"),
    "no split": (lambda d: mine(d).pop("merge_ms"), "contenders.cpu/pat.merge_ms: Field required"),
    "no options": (lambda d: d.pop("options"), "cannot be resumed: options: Field required"),
    "other options": (lambda d: d["options"].update(x=1), "options.x: Extra inputs are not perm"),
    "no policy": (lambda d: d["options"].update(policies=[]), "options.policies: List should"),
    "dtype": (
        lambda d: d["options"].update(dtype="int8"),
        "options.dtype: Input should be 'bfloat16'",
    ),
    "two of a name": (
        lambda d: d["cells"][1].update(name=d["cells"][0]["name"]),
        "two cells are named 'tree/1,4_64,16/4:2:16'",
    ),
}


@pytest.mark.parametrize(("change", "complaint"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_not_resumed(
    change: Change, complaint: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    data = json.loads(json.dumps(whole))
    change(data)
    path = tmp_path / "kernel.json"
    path.write_text(json.dumps(data))
    before = path.read_text()
    done = resume(tmp_path)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith(f"sglang-prefix: {path} ")
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert path.read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["kernel.json"]


def test_wall_time_is_summed_over_resumes(whole: dict[str, Any], tmp_path: Path) -> None:
    assert 0 < whole["wall_s"] < 300
    path = tmp_path / "kernel.json"
    path.write_text(json.dumps(whole | {"wall_s": 1000.0}))
    done = resume(tmp_path)
    assert done.exit_code == 0, done.output
    assert 1000 < read_result(path)["wall_s"] < 1300


@pytest.mark.parametrize(
    ("options", "budget_s"),
    [([], 600), (["--quick"], 240), (["--quick", "--budget-s", "7"], 7), (["--budget-s", "0"], 0)],
)
def test_the_budget(
    options: list[str], budget_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: list[float] = []

    def note(run: Any, budget_s: float, screen: Any) -> bool:
        budgets.append(budget_s)
        return False

    monkeypatch.setattr(bench_kernel, "_measure", note)
    assert bench(tmp_path, *SMALL, *options, "--no-plots").exit_code == 0
    assert budgets == [budget_s]


def test_the_page_is_written_and_named(tmp_path: Path) -> None:
    done = bench(tmp_path, *SMALL)
    assert done.exit_code == 0, done.output
    page = tmp_path / "report.html"
    assert done.stdout.endswith(f"written to {page}\n")
    text = page.read_text()
    assert SMALLER in text
    assert text.count("<svg") == len(plots.FIGURES)
    page.unlink()
    done = bench(tmp_path, *SMALL, "--no-plots", "--no-report")
    assert done.exit_code == 0, done.output
    assert not page.exists()


def test_what_cannot_be_written_beside_the_result_is_one_line_each(tmp_path: Path) -> None:
    # Whoever runs the tests may not replace a folder by a file; root may write anywhere else.
    for name in ("kernel-bytes.svg", "report.html"):
        (tmp_path / name).mkdir()
    done = bench(tmp_path, *SMALL)
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        f"sglang-prefix: plots cannot be written to {tmp_path}: Is a directory",
        f"sglang-prefix: {tmp_path}/report.html cannot be written: Is a directory",
    ]
    assert len(read_result(tmp_path / "kernel.json")["cells"]) == 2
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8.00 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("at", ["AttentionInputs", "OutputCheck"])
def test_a_cell_that_runs_out_of_memory_is_not_run(
    at: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = AttentionInputs.lay_out

    def lay_out(tree: Any, *args: Any, **kwargs: Any) -> Any:
        if at == "AttentionInputs" and len(tree.parent) > 3:
            raise error
        return real(tree, *args, **kwargs)

    class Check(OutputCheck):
        def __init__(self, inputs: Any, seed: int) -> None:
            if at == "OutputCheck" and inputs.batch.batch_size > 3:
                raise error
            super().__init__(inputs, seed)

    monkeypatch.setattr(AttentionInputs, "lay_out", lay_out)
    monkeypatch.setattr(measure, "OutputCheck", Check)
    done = bench(tmp_path, *SMALL, "--no-plots")
    assert done.exit_code == 0, done.output
    data = read_result(tmp_path / "kernel.json")
    assert [cell["name"] for cell in data["cells"]] == [SMALLER]
    reason = f"out of memory: {type(error).__name__}: {error}"
    assert data["why_not_run"] == {LARGER: reason}
    assert f"not run: {LARGER}: {reason}" in done.stdout


def test_other_errors_are_no_lack_of_memory() -> None:
    for error in (RuntimeError("illegal memory access"), ValueError("out of memory")):
        assert not measure.is_out_of_memory(error)


@pytest.mark.parametrize(
    ("run", "merge", "forward_ms"),
    [(0.003, 0.001, 2.0), (0.001, 0.003, None), (0.001, 0.001, None), (0.001, None, 1.0)],
)
def test_forward_is_what_is_left_of_the_run(
    run: float, merge: float | None, forward_ms: float | None
) -> None:
    contender = SimpleNamespace(
        inputs=SimpleNamespace(token_bytes=1, logical_tokens=8),
        kind="ours",
        executor="torch",
        policy="pat",
        kv_tokens_read=8,
        num_packs=1,
    )
    steps = [StepSeconds(run, 0.0, 0.0, run, merge)] * 3
    facts = measure._facts(cast(Contender, contender), steps, 0.0)
    assert facts["forward_ms"] == (forward_ms and pytest.approx(forward_ms))


def test_pictures_and_table_say_how_the_split_was_found(whole: dict[str, Any]) -> None:
    texts = [text.get_text() for text in plots.time_split_figure(whole).legends[0].get_texts()]
    assert texts[2:] == ["forward (run less merge)", "merge (timed alone after the step)"]
    caption = str(bench_kernel.kernel_table(whole, "torch/pat").caption)
    assert "merge is timed alone, after the step" in re.sub(r"\s+", " ", caption)
