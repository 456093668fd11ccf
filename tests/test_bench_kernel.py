"""`bench kernel`: a real run on small batches, what it refuses, and how it is taken up again."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from prefix_kernels.oracle import decode_attention_oracle
from sglang_prefix.bench import contenders, kernel_run, measure, plots
from sglang_prefix.bench.baselines import Baseline
from sglang_prefix.bench.cells import KernelOptions, kernel_cells
from sglang_prefix.bench.contenders import Contender, StepSeconds, TorchPacked
from sglang_prefix.bench.gpu_contenders import GpuBaseline, TritonPacked
from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.workloads.inputs import AttentionInputs
from sglang_prefix.cli import bench_kernel
from sglang_prefix.cli.main import app

SMALL = ("--heads", "4:2:16", "--rounds", "2", "--threads", "1")
TREES = ("--tree", "1,4_64,16", "--tree", "3_32")


def bench(out: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["bench", "kernel", "--out", str(out), *options])


@pytest.fixture
def no_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stock kernel that is here at once: SGLang takes seconds to import."""

    class Stock(TorchPacked):
        kind = "stock"

    def find(device: torch.device) -> tuple[dict[str, Callable[..., Contender]], dict[str, str]]:
        return {"stock": lambda inputs: Stock(inputs, "query")}, {"other": "not here"}

    monkeypatch.setattr(kernel_run, "find_stock", find)


@pytest.mark.slow
def test_a_quick_run_against_sglang(tmp_path: Path) -> None:
    options = ("--quick", "--workload", "^fixed|uneven", "--dtype", "float32", "--json")
    result = bench(tmp_path / "new", *options, *SMALL)
    assert result.exit_code == 0, result.output
    data = read_result(tmp_path / "new" / "kernel.json", "bench-kernel")
    assert json.loads(result.stdout) == data
    assert data["quick"] is True
    assert data["not_run"] == []
    assert data["environment"]["threads"] == 1
    gpu = {"sglang-triton", "flashinfer", "fa3", "flashinfer-cascade"}
    assert gpu <= set(data["absent"])
    for name in gpu:
        assert f"absent: {name}: needs a GPU" in result.stderr
    names = [cell["name"] for cell in data["cells"]]
    assert names == ["uneven/24-requests/4:2:16", "fixed/8x512+32/4:2:16"]
    for cell in data["cells"]:
        assert_cell(cell)
        assert cell["best_stock"] == "sglang-torch-native"
        assert set(cell["contenders"]) == {
            "sglang-torch-native",
            *(f"torch/{policy}" for policy in ("pat", "node", "chunk", "query")),
        }
    assert data["cells"][1]["tokens"] == {"ideal": 512 + 8 * 32, "logical": 8 * 544}
    assert data["cells"][1]["contenders"]["torch/node"]["packs"] == 9
    pictures = sorted(tmp_path.glob("new/*.svg"))
    assert [path.stem for path in pictures] == sorted(plots.FIGURES)
    for path in pictures:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def assert_cell(cell: dict[str, Any]) -> None:
    assert cell["failed"] == {}
    assert cell["bandwidth_gb_s"] > 0
    token_bytes = cell["heads"]["kv"] * (cell["heads"]["dim"] + cell["heads"]["v_dim"]) * 4
    assert cell["bytes"] == {name: n * token_bytes for name, n in cell["tokens"].items()}
    stock = cell["contenders"][cell["best_stock"]]["ms"]
    for contender in cell["contenders"].values():
        assert len(contender["raw_ms"]) == 2
        assert contender["speedup"] == pytest.approx(stock / contender["ms"])
        assert contender["bytes_read"] == pytest.approx(
            contender["kv_read_ratio"] * cell["bytes"]["logical"]
        )
        assert contender["max_abs_error"] < 1e-4
        if contender["kind"] == "ours":
            parts = [contender[f"{part}_ms"] for part in ("plan", "copy", "forward", "merge")]
            assert all(part is None or part > 0 for part in parts)
        else:
            assert contender["kv_read_ratio"] == 1


@pytest.mark.usefixtures("no_sglang")
def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_cell = measure.measure_cell
    calls = []

    def stopped_at_the_second(*args: Any, **kwargs: Any) -> dict[str, Any]:
        calls.append(args[0].name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_cell(*args, **kwargs)

    monkeypatch.setattr(kernel_run, "measure_cell", stopped_at_the_second)
    trees = ("--tree", "2_8", *TREES)
    stopped = bench(tmp_path, *trees, *SMALL, "--no-plots", "--policy", "node", "--seed", "7")
    assert stopped.exit_code == 130
    assert f"interrupted; --resume --out {tmp_path} goes on" in stopped.stderr
    first = read_result(tmp_path / "kernel.json")
    assert first["wall_s"] > 0
    assert first["not_run"] == ["tree/1,4_64,16/4:2:16", "tree/3_32/4:2:16"]
    assert "not run: tree/1,4_64,16/4:2:16, tree/3_32/4:2:16: interrupted" in stopped.stdout

    refused = bench(tmp_path, "--resume", "--seed", "8")
    assert refused.exit_code == 2
    assert "--seed with --resume: the run in" in refused.stderr
    resumed = bench(tmp_path, "--resume", "--no-plots")
    assert resumed.exit_code == 0, resumed.output
    data = read_result(tmp_path / "kernel.json")
    assert data["cells"][0] == first["cells"][0]
    assert data["seed"] == 7
    assert data["not_run"] == []
    assert [list(cell["contenders"]) for cell in data["cells"]] == [["stock", "torch/node"]] * 3
    assert len(calls) == 4

    data["environment"]["cpu"] = "another"
    (tmp_path / "kernel.json").write_text(json.dumps(data))
    refused = bench(tmp_path, "--resume")
    assert refused.exit_code == 2
    assert "cannot be resumed: its cpu is 'another', here it is " in refused.stderr


@pytest.mark.usefixtures("no_sglang")
def test_what_is_too_large_or_too_late_is_listed(tmp_path: Path) -> None:
    result = bench(tmp_path, *TREES, *SMALL, "--max-tokens", "100", "--no-plots")
    assert result.exit_code == 0, result.output
    data = read_result(tmp_path / "kernel.json")
    assert [cell["name"] for cell in data["cells"]] == ["tree/3_32/4:2:16"]
    assert data["why_not_run"] == {"tree/1,4_64,16/4:2:16": "128 KV tokens, over --max-tokens 100"}
    result = bench(tmp_path, *TREES, *SMALL, "--budget-s", "0")
    assert result.exit_code == 0, result.output
    data = read_result(tmp_path / "kernel.json")
    assert data["cells"] == []
    assert data["not_run"] == ["tree/1,4_64,16/4:2:16", "tree/3_32/4:2:16"]
    assert "not run: tree/1,4_64,16/4:2:16, tree/3_32/4:2:16: not enough was" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tree", "1,8_512"], "tree '1,8_512': 2 levels of nodes but 1 of tokens; legal:"),
        (["--trace", "/nowhere.jsonl"], "trace /nowhere.jsonl cannot be read: No such file"),
        (["--policy", "best"], "--policy is 'best'; legal: pat, node, chunk, query"),
        (["--dtype", "int8"], "--dtype is 'int8'; legal: bfloat16, float16, float32"),
        (["--heads", "8:3"], "heads '8:3'; legal: QO:KV"),
        (["--workload", "nothing-like-it"], "matches no cell; legal: a file (chunk, "),
        (["--workload", "("], "workload '(' is no regular expression"),
        (["--tree", "1,2_3,4", "--page-size", "16"], "page size 16 does not divide the 3 tokens"),
        (["--resume"], "kernel.json cannot be read: No such file"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    options: list[str], message: str, tmp_path: Path
) -> None:
    result = bench(tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_broken_trace_names_the_line(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0}\n')
    result = bench(tmp_path / "out", "--trace", str(trace))
    assert result.exit_code == 2
    assert f"trace {trace}, line 1: input_length is None; legal: a whole" in result.stderr


def test_an_unwritable_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    result = bench(file / "below", *TREES)
    assert result.exit_code == 2
    assert f"--out {file}/below cannot be written: " in result.stderr
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        assert bench(tmp_path / "locked", *TREES).exit_code == 2


def test_plots_without_matplotlib_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_kernel, "find_spec", lambda name: None)
    result = bench(tmp_path / "out", *TREES)
    assert result.exit_code == 2
    assert "plots need matplotlib: pip install 'sglang-prefix[bench]'" in result.stderr
    assert not (tmp_path / "out").exists()


class Wrong(TorchPacked):
    """Right in every head but one."""

    def first_layer(self) -> torch.Tensor:
        out = super().first_layer()
        out[0, 0] *= 1.1
        return out

    def step(self) -> StepSeconds:
        raise AssertionError("a contender with a wrong output was timed")


def refuse(inputs: AttentionInputs) -> Contender:
    raise NotImplementedError("the forest is no set of levels")


def measured(makers: dict[str, Callable[..., Contender]]) -> dict[str, Any]:
    (cell,) = kernel_cells(KernelOptions(trees=("1,4_64,16",), heads=("4:2:16",)))
    return measure.measure_cell(
        cell, makers, torch.device("cpu"), dtype=torch.float32, seed=0, rounds=1, seconds=1
    )


def test_a_wrong_output_is_caught_and_not_timed() -> None:
    cell = measured(
        {
            "right": lambda inputs: TorchPacked(inputs, "pat"),
            "wrong": lambda inputs: Wrong(inputs, "pat"),
            "inapplicable": refuse,
        }
    )
    assert list(cell["contenders"]) == ["right"]
    assert cell["failed"]["wrong"].startswith("WrongOutputError: off by 0.")
    assert cell["absent"] == {"inapplicable": "the forest is no set of levels"}
    assert cell["best_stock"] is None
    assert cell["contenders"]["right"]["speedup"] is None


class Levels(Baseline):
    """A kernel of another project that reads every level once, as the cascade does."""

    name, stock = "levels", False

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return None

    @classmethod
    def inapplicable(cls, inputs: AttentionInputs) -> str | None:
        return None if inputs.batch.levels() else "no levels"

    def plan(self) -> None:
        self.workload.out.fill_(torch.nan)

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.workload
        caches = (w.req_to_token, w.rows, w.seq_lens)
        return decode_attention_oracle(w.q, k, v, *caches, sm_scale=w.sm_scale)[0].to(w.q.dtype)


def test_the_contenders_of_a_gpu_run_in_the_interpreter() -> None:
    cell = measured(
        {
            "triton/pat": lambda inputs: TritonPacked(inputs, "pat"),
            "levels": lambda inputs: GpuBaseline(inputs, Levels),
        }
    )
    assert cell["failed"] == {}
    ours, peer = cell["contenders"]["triton/pat"], cell["contenders"]["levels"]
    assert (ours["kind"], peer["kind"]) == ("ours", "peer")
    assert min(ours[f"{part}_ms"] for part in ("plan", "copy", "forward")) > 0
    assert ours["merge_ms"] is None  # it is in the graph, with the forward pass
    assert peer["bytes_read"] == cell["bytes"]["ideal"] < ours["bytes_read"] * 1.01


def test_ours_being_wrong_ends_the_command_with_its_name(
    no_sglang: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TorchPacked", Wrong)
    result = bench(tmp_path, "--tree", "2_8", *SMALL, "--policy", "node")
    assert result.exit_code == 1
    assert "tree/2_8/4:2:16: cpu/node: WrongOutputError: off by" in result.stderr
    assert "FAILED" in result.stdout


def test_a_missing_sglang_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("No module named 'sglang'")

    monkeypatch.setattr(contenders, "torch_native_decode", fail)
    makers, absent = contenders.find_stock(torch.device("cpu"))
    assert makers == {}
    assert absent["sglang-torch-native"] == "ImportError: No module named 'sglang'"


def test_losing_rows_are_marked(tmp_path: Path) -> None:
    cell = measured({"torch/pat": lambda inputs: TorchPacked(inputs, "pat")})
    mine = cell["contenders"]["torch/pat"]
    stock = mine | {"kind": "stock", "policy": None, "ms": mine["ms"] / 2, "speedup": 1.0}
    losing = cell | {
        "name": "loses",
        "best_stock": "s",
        "contenders": {"s": stock, "torch/pat": mine | {"speedup": 0.5}},
    }
    winning = cell | {
        "name": "wins",
        "best_stock": "s",
        "contenders": {"s": stock, "torch/pat": mine | {"speedup": 2.0}},
    }
    where = {"gpu": None, "cpu": "a CPU", "threads": 1}
    options = KernelOptions().as_json()
    data: dict[str, Any] = {
        "environment": where,
        "options": options,
        "cells": [losing, cell, winning],
    }
    assert plots.our_contender(data) == "torch/pat"
    bars = plots.speedup_figure(data).axes[0].patches
    assert [bar.get_facecolor() == bars[0].get_facecolor() for bar in bars] == [True, False]
    rows = [bench_kernel._row(c, "torch/pat", with_stock=False) for c in data["cells"]]
    assert [style for _, style in rows] == ["red", None, None]
    assert rows[0][0][5] == "0.50x slower"
    assert rows[1][0][3] == "absent"
    assert len(plots.save_plots(data, tmp_path)) == len(plots.FIGURES)
    remarks = bench_kernel._remarks(
        data | {"absent": {}, "why_not_run": {}, "cells": [cell | {"failed": {"s": "no [memory]"}}]}
    )
    assert remarks == [f"failed in {cell['name']}: s: no [memory]"]
    nothing = data | {"cells": []}
    for draw in plots.FIGURES.values():
        draw(nothing)
