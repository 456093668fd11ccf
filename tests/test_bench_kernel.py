"""`bench kernel`: a real run on small batches, what it refuses, and how it is resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sglang_prefix.bench import kernel, plots, timing
from sglang_prefix.bench.cases import KernelOptions, kernel_cases
from sglang_prefix.bench.providers import ours, sglang
from sglang_prefix.bench.providers.find import find_providers
from sglang_prefix.bench.providers.ours import TorchOurs
from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.run import NotRunError
from sglang_prefix.bench.workloads.inputs import AttentionInputs
from sglang_prefix.cli.main import app
from tests.bare_host import run_bare

CPU = torch.device("cpu")
LIMITS = {"flop_per_s_float32": 1e12, "read_bytes_per_s": 1e3, "empty_launch_us": 0.0}
TREES = ("--tree", "1,4_64,16", "--tree", "3_32")
SMALL = ("--heads", "4:2:16", "--rounds", "2", "--threads", "1")
FEW = (*TREES, *SMALL, "--policy", "pat", "--no-plots")
LARGER, SMALLER = "tree/1,4_64,16/4:2:16", "tree/3_32/4:2:16"


def bench(out: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["bench", "kernel", "--out", str(out), *options])


@pytest.fixture(autouse=True, scope="module")
def quick_limits() -> Iterator[None]:
    """What the machine reaches is not the question here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing._STREAM_BYTES, "cpu", 1 << 20)
        patch.setitem(timing._MATRIX_SIZE, "cpu", 64)
        yield


class Stock(TorchOurs):
    """A stock kernel that is here at once: SGLang takes seconds to import."""

    kind = "stock"


@pytest.fixture
def no_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = partial(Stock, policy="query")
    monkeypatch.setattr(
        kernel, "find_providers", lambda host: ({"stock": stock}, {"other": "not here"})
    )


@pytest.mark.slow
def test_a_quick_run_against_sglang(tmp_path: Path) -> None:
    options = ("--quick", "--workload", "^fixed|uneven", "--dtype", "float32", "--json")
    result = bench(tmp_path / "new", *options, *SMALL)
    assert result.exit_code == 0, result.output
    data = read_result(tmp_path / "new" / "kernel.json", "bench-kernel")
    assert json.loads(result.stdout) == data
    assert data["options"]["quick"] is True
    assert data["not_run"] == data["failed"] == {}
    assert data["environment"]["threads"] == 1
    assert data["absent"]["flashinfer"] == "needs a GPU"
    assert "flashinfer: needs a GPU" in result.stderr
    names = [case["name"] for case in data["cases"]]
    assert names == ["uneven/24-requests/4:2:16", "fixed/8x512+32/4:2:16"]
    for case in data["cases"]:
        assert_case(case)
        policies = (f"native/{policy}" for policy in ("pat", "node", "chunk", "query"))
        assert set(case["providers"]) == {"sglang-torch-native", *policies, "torch/pat"}
    assert data["cases"][1]["tokens"] == {"ideal": 512 + 8 * 32, "logical": 8 * 544}
    assert data["cases"][1]["providers"]["native/node"]["packs"] == 9
    pictures = sorted(tmp_path.glob("new/*.svg"))
    assert len(pictures) == len(plots.PLOTS["bench-kernel"])
    for path in pictures:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    page = (tmp_path / "new" / "report.html").read_text()
    assert names[0] in page
    assert page.count("data:image/svg+xml") == len(pictures)


def assert_case(case: dict[str, Any]) -> None:
    assert case["failed"] == {}
    assert case["floor"]["us"] == max(case["floor"].values())
    token_bytes = case["heads"]["kv"] * (case["heads"]["dim"] + case["heads"]["v_dim"]) * 4
    assert case["bytes"] == {name: n * token_bytes for name, n in case["tokens"].items()}
    for found in case["providers"].values():
        assert len(found["raw_ms"]) == 2
        assert found["over_floor"] == pytest.approx(found["kernel_us"] / case["floor"]["us"])
        ratio = found["bytes_read"] / case["bytes"]["logical"]
        assert found["kv_read_ratio"] == pytest.approx(ratio)
        assert found["max_abs_error"] < 1e-4
        parts = [found[f"{part}_ms"] for part in ("plan", "copy", "forward", "merge")]
        assert all(part is None or part > 0 for part in parts)
        assert found["kind"] == "ours" or found["kv_read_ratio"] == 1


@pytest.mark.usefixtures("no_sglang")
def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    options = (*FEW, "--policy", "node", "--seed", "7", "--max-tokens", "100")
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "measure_case", interrupted)
        stopped = bench(tmp_path, *options)
    assert stopped.exit_code == 130
    assert f"interrupted; --resume --out {tmp_path} goes on" in stopped.stderr
    refused = bench(tmp_path, "--resume", "--seed", "8")
    assert refused.exit_code == 2
    assert "--seed with --resume: the run in" in refused.stderr
    resumed = bench(tmp_path, "--resume", "--no-plots", "--seed", "7", *TREES)
    assert resumed.exit_code == 0, resumed.output
    data = read_result(tmp_path / "kernel.json")
    assert data["seed"] == 7
    assert data["not_run"] == {LARGER: "128 KV tokens, over --max-tokens 100"}
    (case,) = data["cases"]
    assert case["name"] == SMALLER
    assert list(case["providers"]) == ["stock", "native/pat", "native/node", "torch/pat"]

    path = tmp_path / "kernel.json"
    for key, value, what in (
        ("environment", {"commit": "1234567"}, "its commit is '1234567', here it is "),
        ("options", {"no such": 1}, "options: KernelOptions.__init__() got an unexpected"),
    ):
        path.write_text(json.dumps(data | {key: data[key] | value}))
        before = path.read_text()
        refused = bench(tmp_path, "--resume")
        assert refused.exit_code == 2
        assert refused.stderr.startswith(f"sglang-prefix: {path} cannot be resumed: {what}")
        assert refused.stderr.count("\n") == 1
        assert path.read_text() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tree", "1,8_512"], "--tree is '1,8_512'; legal: nodes of each level"),
        (["--trace", "/nowhere.jsonl"], "'--trace': /nowhere.jsonl: No such file"),
        (["--policy", "best"], "--policy is 'best'; legal: pat, node, chunk, query"),
        (["--dtype", "int8"], "'int8' is not one of 'bfloat16', 'float16', 'float32'"),
        (["--heads", "8:3"], "--heads is '8:3'; legal: QO:KV"),
        (["--workload", "nothing-like-it"], "matches no case; legal: a file (chain, chunk, "),
        (["--workload", "("], "--workload is '(', no regular expression: missing )"),
        (["--tree", "1,2_3,4", "--page-size", "16"], "--page-size 16 does not divide the 3 tokens"),
        (["--resume"], "kernel.json cannot be read: No such file"),
        (
            ["--out", "/dev/null/below", *TREES],
            "'--out': /dev/null/below: Not a dir",
        ),
        (["--quick"], "plots need matplotlib: pip install 'sglang-prefix[bench]'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "has_matplotlib", lambda: "--quick" not in options)
    result = bench(tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_sglang")
@pytest.mark.parametrize(
    ("blocked", "what"), [("kernel-steps.svg", "plots"), ("report.html", "the page")]
)
def test_what_cannot_be_written_beside_the_result_is_one_line(
    blocked: str, what: str, tmp_path: Path
) -> None:
    # Whoever runs the tests may not replace a folder by a file; root may write anywhere else.
    (tmp_path / blocked).mkdir()
    done = bench(tmp_path, *TREES, *SMALL, "--policy", "pat")
    assert done.exit_code == 1
    message = f"sglang-prefix: {what} cannot be written to {tmp_path}: Is a directory\n"
    assert done.stderr == message
    assert len(read_result(tmp_path / "kernel.json")["cases"]) == 2
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


class Wrong(TorchOurs):
    """Right in every head but one."""

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = super().run(k, v)
        out[0, 0] *= 1.1
        return out

    def run_layers(self) -> None:
        raise AssertionError("a provider with a wrong output was timed")


class Levels(Stock):
    """A kernel of another project that cannot run every batch."""

    kind = "peer"

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__(inputs, "node")
        if len(inputs.batch.levels() or ()) < 2:
            raise NotRunError("nothing is shared")


def measured(tree: str, **makers: Any) -> dict[str, Any]:
    (case,) = kernel_cases(KernelOptions(trees=[tree], heads=["4:2:16"], dtype="float32"))
    return kernel.measure_case(case, makers, timing.clock_for(CPU), LIMITS, seed=0, rounds=1)


def test_a_wrong_output_is_caught_and_not_timed() -> None:
    right, wrong = (partial(kind, policy="pat") for kind in (TorchOurs, Wrong))
    case = measured("1,4_64,16", right=right, wrong=wrong, levels=Levels)
    assert list(case["providers"]) == ["right", "levels"]
    assert case["failed"]["wrong"].startswith("MismatchError: off by 0.")
    assert case["providers"]["levels"]["bytes_read"] == case["bytes"]["ideal"]
    case = measured("8_16", right=right, levels=Levels)
    assert case["absent"] == {"levels": "nothing is shared"}


@pytest.mark.usefixtures("no_sglang")
def test_ours_being_wrong_ends_the_command_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "TorchOurs", Wrong)
    monkeypatch.setattr(kernel, "why_torch", lambda *given: "no compiler")
    policies = ("--policy", "node", "--policy", "query")
    result = bench(tmp_path, "--tree", "2_8", *SMALL, *policies, "--no-plots")
    assert result.exit_code == 1
    assert "tree/2_8/4:2:16: torch/node: MismatchError: off by" in result.stderr
    assert "failed" in result.stdout
    assert "native: no compiler" in result.stdout


class OneCall(Stock):
    """Timed once per step."""

    parts_alone = ()


class DisturbedClock(timing.Clock):
    """By it a step takes a second; one in ``every`` waits for a core, and takes an hour."""

    every, steps, lost = 3, 0, 0.0

    def seconds_of(self, replay: timing.Work) -> float:
        replay()
        self.steps += 1
        is_lost = self.steps % self.every == 0
        self.lost += 3599.0 * is_lost
        return 3600.0 if is_lost else 1.0

    def waited_seconds(self) -> float:
        return self.lost


@pytest.mark.parametrize(("every", "seconds", "left_out"), [(3, 1, 2), (2, 1, 3), (1, 3600, 0)])
def test_steps_that_lost_a_core_count_only_where_there_are_no_others(
    every: int, seconds: float, left_out: int
) -> None:
    (case,) = kernel_cases(KernelOptions(trees=["2_8"], heads=["4:2:16"], dtype="float32"))
    clock = DisturbedClock(CPU)
    clock.every = every
    makers = {"one": partial(OneCall, policy="pat")}
    found = kernel.measure_case(case, makers, clock, LIMITS, seed=0, rounds=6)
    one = found["providers"]["one"]
    assert one["kernel_us"] == seconds * 1e6
    assert len(one["raw_ms"]) == len(one["waited_ms"]) == 6
    assert one["disturbed"] == left_out
    assert one["over_floor"] == pytest.approx(one["kernel_us"] / found["floor"]["us"])
    assert found["floor"]["flop_us"] == found["flop"] / LIMITS["flop_per_s_float32"] * 1e6


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="this Linux counts no waiting for cores"
)
def test_waiting_for_a_core_is_seen() -> None:
    clock, cores = timing.clock_for(CPU), os.sched_getaffinity(0)
    before, end = clock.waited_seconds(), time.monotonic() + 60
    spin = f"import os; os.sched_setaffinity(0, [{min(cores)}])\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as other:
        try:
            os.sched_setaffinity(0, [min(cores)])
            while clock.waited_seconds() - before < 0.05 and time.monotonic() < end:
                pass
        finally:
            os.sched_setaffinity(0, cores)
            other.kill()
    assert time.monotonic() < end


def test_the_peak_of_a_type_without_products_is_that_of_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = {torch.float32: 100.0, torch.bfloat16: 2.0, torch.float16: 250.0}
    monkeypatch.setattr(timing.Clock, "_rate", lambda self, dtype, size=0: rates[dtype])
    limits = timing.clock_for(CPU).limits(*rates)
    peaks = {name: limits[f"flop_per_s_{name}"] for name in ("float32", "bfloat16", "float16")}
    assert peaks == {"float32": 100.0, "bfloat16": 100.0, "float16": 250.0}
    assert limits["flop_per_s"] == 250.0


def test_a_missing_sglang_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefix_patches.stock_backend", None)
    sglang._torch_native.cache_clear()
    makers, absent = find_providers("cpu")
    assert makers == {}
    assert "stock_backend" in absent["sglang-torch-native"]


@pytest.mark.parametrize(
    ("run", "merge", "forward_ms"),
    [(3.0, 1.0, 2.0), (1.0, 3.0, None), (1.0, 1.0, None), (1.0, None, 1.0)],
)
def test_forward_is_what_is_left_of_the_run(
    run: float, merge: Any, forward_ms: float | None
) -> None:
    assert kernel._forward_ms([run] * 3, merge and [merge] * 3) == forward_ms


DRY_RUNS = """
import os
os.environ["TRITON_INTERPRET"] = "1"
from dataclasses import asdict
from pathlib import Path
import sglang_prefix.bench.engine
import sglang_prefix.cli.main
from sglang_prefix.bench.cases import KernelOptions
from sglang_prefix.bench.kernel import KernelRun
from sglang_prefix.bench.report import print_section, section_of
from sglang_prefix.bench.tune import TuneRun
options = KernelOptions(workloads=["gpu", "^fixed"], policies=["pat"], dry=True)
given = {"command": [], "seed": 0, "dry": True}
for resume in (False, True):
    run = KernelRun(Path(sys.argv[1]), options=asdict(options), resume=resume, **given)
    run.prepare()
    run.run(1e9, print, print)
print_section(section_of(run.data))
run = TuneRun(Path(sys.argv[1]), options={}, **given)
run.prepare()
run.run(0, print, print)
"""


@pytest.mark.slow
def test_a_gpu_host_needs_neither_pydantic_nor_sglang(tmp_path: Path) -> None:
    status, printed = run_bare(DRY_RUNS, tmp_path)
    assert status == 0, printed
    data = read_result(tmp_path / "kernel.json")
    names = [case["name"] for case in data["cases"]]
    assert names == ["fixed/8x512+32/8:1:16", "fixed/8x512+32/8:1:16/page16"]
    assert data["absent"]["sglang-triton"].startswith("sglang.kernels")
    found = data["cases"][0]["providers"]["triton/pat"]
    assert min(found[f"{part}_ms"] for part in ("plan", "copy", "forward", "append")) > 0
    assert found["merge_ms"] is None  # it is launched with the forward pass
    assert (found["mode"], found["merge"]) == ("auto", "auto")
    assert len(read_result(tmp_path / "tune.json")["not_run"]) == 3


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_dry_run_has_every_field(tmp_path: Path) -> None:
    done = bench(tmp_path, "--dry", "--budget-s", "1700", "--no-plots")
    assert done.exit_code == 0, done.output
    data = read_result(tmp_path / "kernel.json")
    assert data["dry"] is True
    assert data["failed"] == data["not_run"] == {}
    assert {case["group"] for case in data["cases"]} > {"rollouts", "unrelated", "chain", "trees"}
    for case in data["cases"]:
        assert case["failed"] == {}
        found = case["providers"].values()
        if case["group"] == "chain":
            assert len(found) == 12
            assert all(one["kind"] == "chain" for one in found)
            continue
        assert sum(one["kind"] == "ours" for one in found) >= 7
        assert "sglang-triton" in case["providers"]
    assert "the times mean nothing" in (tmp_path / "report.html").read_text()
    assert {target["status"] for target in data["targets"].values()} > {"not measured"}
