"""What `make gpu-serve` makes of its measurements; the engines are in tests/engine."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.serve_cells import OURS, Load, cells, prompts
from benchmarks.gpu.serve_engine import engine_arguments
from benchmarks.gpu.serve_measure import compare_logprobs, median_interval, summarise
from benchmarks.gpu.serve_model import TINY, weight_std, write_model, write_plugin
from benchmarks.gpu.serve_targets import NOT_PACKED, evaluate
from benchmarks.gpu.serve_worker import full_batch

ROOT = Path(__file__).parents[1]
STOCK = ["fa3", "flashinfer", "triton"]


def test_the_order_is_fixed_and_the_most_valuable_come_first() -> None:
    names = [cell.name for cell in cells(STOCK)]
    assert len(set(names)) == len(names)
    assert names[:2] == ["pair/rollouts-64x8k", "pair/unrelated"]
    assert names[6:8] == ["alone-prefix/rollouts-64x1k-out8192", "alone-fa3/rollouts-64x1k-out8192"]
    for group, same in itertools.groupby(cells(STOCK), lambda cell: cell.group):
        (backends, *others) = {cell.backends for cell in same}
        assert not others, group
        assert "fa3" in backends or group != "pair"
    # Without fa3, the next one takes its place.
    assert cells(STOCK[1:])[0].backends == (OURS, "flashinfer")
    # Engines are started once each.
    groups = [group for group, _ in itertools.groupby(cell.group for cell in cells(STOCK))]
    assert len(groups) == len(set(groups))


def test_prompts_form_the_tree_and_are_the_same_everywhere() -> None:
    load = Load("agents", 6, ((1, 5), (2, 3), (6, 2)), 1)
    ids = prompts(load, 100, 1)
    assert {len(prompt) for prompt in ids} == {load.prompt_tokens} == {10}
    assert len({tuple(prompt[:5]) for prompt in ids}) == 1
    assert len({tuple(prompt[:8]) for prompt in ids}) == 2
    assert len(set(map(tuple, ids))) == 6
    assert ids == prompts(load, 100, 1)
    assert ids != prompts(load, 100, 2)
    assert load.shares
    assert not Load("unrelated", 6, ((6, 5),), 1).shares


def test_only_steps_with_all_requests_count() -> None:
    times = [(float(second), second + 1) for second in range(10)]
    # The one that is timed was the last to join, so only the end is cut: others are done at 7.
    assert full_batch(times, [7.0, 9.0]) == [1e6] * 7
    # Another one was done two seconds later, so it joined two seconds later too.
    assert full_batch(times, [11.0, 9.0]) == [1e6] * 7
    assert full_batch(times, [11.0, 6.0, 9.0]) == [1e6] * 4
    # Never all at once.
    assert full_batch(times, [1.0, 15.0, 9.0]) == []
    # Tokens that come together share the time.
    assert full_batch([(0.0, 1), (1.0, 2), (3.0, 4)], [9.0]) == [1e6] * 3


@pytest.mark.parametrize(
    ("count", "inside", "coverage"), [(5, 0, 0.9375), (6, 0, 0.96875), (10, 1, 0.978515625)]
)
def test_the_interval_is_as_narrow_as_95_percent_allow(
    count: int, inside: int, coverage: float
) -> None:
    found = median_interval([float(value) for value in reversed(range(count))])
    assert found == {"low": inside, "high": count - 1 - inside, "coverage": coverage}


def answer(*tokens: tuple[str, float, dict[str, float]]) -> list[dict[str, float]]:
    return [{token: value} | others for token, value, others in tokens]


def test_answers_are_compared_until_they_part() -> None:
    first = answer(("5", -9, {}), ("7", -1, {"8": -2}), ("7", -1, {"8": -1.5}), ("1", 0, {}))
    other = answer(("5", -1, {}), ("7", -1.1, {"9": -2}), ("8", -1.2, {"7": -1.3}), ("1", 9, {}))
    found = compare_logprobs([first, first], [other, first])
    # Prefill's token is not compared, nor what comes after the one that differs.
    assert (found["positions"], found["values"], found["requests_equal"]) == (2 + 3, 3 + 5, 1)
    assert found["max"] == pytest.approx(0.3)
    assert found["mean"] == pytest.approx((0.1 + 0.3 + 0.3) / 8)


COUNTERS = {
    "packed_steps": 95,
    "stock_steps": 5,
    "fallback_steps": 0,
    "stock_reasons": {"gate-no-gain": 5},
    "fallback_reasons": {},
    "plan_seconds": 0.001,
    "reused_plan_seconds": 0.003,
}


def test_a_measurement_says_who_served_it() -> None:
    found = summarise({"step_us": [1.0, 2.0, 6.0], "counters": COUNTERS}, ours=True)
    assert (found["tpot_us"], found["median_step_us"]) == (3.0, 2.0)
    assert found["packed_share"] == 0.95
    assert found["packed"]
    assert found["host_us_per_step"] == pytest.approx(40)
    few = {**COUNTERS, "stock_steps": 50}
    assert not summarise({"step_us": [1.0], "counters": few}, ours=True)["packed"]
    with pytest.raises(ValueError, match="at no time did all requests decode"):
        summarise({"step_us": []}, ours=False)


def measured(name: str, cell: str = "pair", packed: bool = True, **tpot: float) -> dict[str, Any]:
    """A cell as a result file has it."""
    ours = {
        "packed": packed,
        "packed_share": 0.5 + 0.5 * packed,
        "not_packed_because": {},
        "host_us_per_step": 20.0,
    }
    found = {
        backend: {"tpot_us": us} | (ours if backend == OURS else {}) for backend, us in tpot.items()
    }
    return {
        f"{cell}/{name}": {
            "status": "done",
            "kind": "decode",
            "measured": found,
            "load": {"name": name, "output_tokens": 512},
            "engines": {},
        }
    }


def test_targets_take_the_best_stock_backend() -> None:
    both = measured("rollouts-64x8k", prefix=40, fa3=100)
    assert evaluate(both)["64 x 8k"]["status"] == "met"
    assert evaluate(both)["64 x 32k"]["status"] == "not measured"
    slower = evaluate(both | measured("rollouts-64x8k", "alone-triton", triton=200))["64 x 8k"]
    assert (slower["value"], slower["best_stock"]) == (0.4, "fa3")
    faster = evaluate(both | measured("rollouts-64x8k", "alone-triton", triton=80))["64 x 8k"]
    assert (faster["status"], faster["value"], faster["best_stock"]) == ("missed", 0.5, "triton")


def test_a_batch_that_was_not_packed_meets_nothing() -> None:
    cell = measured("rollouts-64x32k", packed=False, prefix=10, fa3=100)
    assert evaluate(cell)["64 x 32k"]["status"] == NOT_PACKED


def test_the_two_sides_of_a_comparison_may_stand_in_two_cells() -> None:
    ours = measured("rollouts-64x1k-out512", "alone-prefix", prefix=99)
    assert evaluate(ours)["64 x 1k, long"]["status"] == "not measured"
    theirs = measured("rollouts-64x1k-out512", "alone-fa3", fa3=100)
    found = evaluate(ours | theirs)["64 x 1k, long"]
    assert (found["status"], found["value"]) == ("met", 0.99)
    assert "512 tokens out" in found["meaning"]


@pytest.mark.parametrize(
    ("high", "coverage", "status"),
    [(1.019, 0.97, "met"), (1.021, 0.97, "missed"), (1.0, 0.93, "not measured")],
)
def test_unrelated_requests_need_enough_rounds(high: float, coverage: float, status: str) -> None:
    interval = {"low": 0.99, "high": high, "coverage": coverage}
    cell = {
        "status": "done",
        "kind": "alternate",
        "ratios": [1.0] * 10,
        "ratio": 1.0,
        "ratio_interval": interval,
        "extra_us": 3.0,
        "extra_us_interval": interval,
        "stock": "fa3",
        "rounds": [{OURS: {"host_us_per_step": 51.0}}],
    }
    targets = evaluate({"pair/unrelated": cell})
    assert targets["unrelated"]["status"] == status
    assert targets["host time"]["status"] == "missed"


def test_pools_are_compared_of_engines_that_were_alone() -> None:
    def alone(backend: str, tokens: int, **arguments: int) -> dict[str, Any]:
        described = {"max_total_num_tokens": tokens, "arguments": arguments}
        return {"status": "done", "engines": {backend: described}}

    pair = {"status": "done", "engines": {}}
    clamped = alone(OURS, 5, max_total_tokens=5)
    found = evaluate({"a": pair, "b": alone(OURS, 995), "c": alone("fa3", 1000), "d": clamped})
    assert found["kv pool"]["status"] == "met"
    assert found["kv pool"]["value"] == 0.995
    found = evaluate({"b": alone(OURS, 980), "c": alone("fa3", 1000)})
    assert found["kv pool"]["status"] == "missed"


def test_a_guard_that_saw_no_gpu_proves_nothing() -> None:
    cell = {"status": "n/a", "kind": "churn", "guarded_steps": 500}
    assert evaluate({"c": cell})["no device sync"]["status"] == "not measured"
    assert evaluate({"c": {**cell, "status": "passed"}})["no device sync"]["status"] == "met"
    assert evaluate({"c": {**cell, "status": "failed"}})["no device sync"]["status"] == "missed"


@pytest.mark.parametrize("dry", [False, True])
def test_this_sglang_knows_every_argument(dry: bool) -> None:
    from sglang.srt.server_args import ServerArgs

    known = inspect.signature(ServerArgs).parameters
    groups = {cell.group for cell in cells(STOCK)}
    given = {name for g in groups for name in engine_arguments(Path(), "fa3", g, dry=dry)}
    assert given <= set(known)
    # Pools are compared of engines that SGLang sizes itself.
    assert "max_total_tokens" not in engine_arguments(Path(), "fa3", "alone-fa3", dry=False)


def test_the_model_is_written_once_and_spread_like_the_tiny_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert write_model(tmp_path / "model", TINY, torch.device("cpu"))
    assert not write_model(tmp_path / "model", TINY, torch.device("cpu"))
    assert write_model(tmp_path / "model", TINY, torch.device("cpu"), seed=1)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    weights: dict[str, torch.Tensor] = {}
    for file in set(index["weight_map"].values()):
        weights |= load_file(tmp_path / "model" / file)
    assert set(weights) == set(index["weight_map"])
    assert len(weights) == 3 + 9 * TINY.num_layers
    assert weight_std("lm_head.weight", 256) == 0.08  # that of `TinyModelConfig`
    for name, weight in weights.items():
        if weight.ndim == 2:
            expected = weight_std(name, weight.shape[1])
            assert weight.std().item() == pytest.approx(expected, rel=0.05), name


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    with pytest.raises(ValueError, match="holds something else; legal: a folder that is new"):
        write_model(tmp_path, TINY, torch.device("cpu"))
    assert kept.read_text() == "mine"


def test_sglang_finds_the_plugin_where_nothing_is_installed(tmp_path: Path) -> None:
    """All packages of this environment but ours, and no .pth file is read."""
    site, plugin = tmp_path / "site", tmp_path / "plugin"
    site.mkdir()
    for package in Path(torch.__file__).parents[1].iterdir():
        if "sglang_prefix" not in package.name:
            (site / package.name).symlink_to(package)
    info = write_plugin(plugin)
    program = """
from importlib.metadata import entry_points
found = entry_points(group="sglang.srt.plugins", name="prefix")
print([str(point.dist._path) for point in found])
if found:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES
    load_plugins()
    print("prefix" in ATTENTION_BACKEND_CHOICES)
"""
    source = tmp_path / "source"  # without what an editable install leaves beside it
    source.mkdir()
    (source / "sglang_prefix").symlink_to(ROOT / "sglang_prefix")
    roots = [source, ROOT / "kernels", ROOT / "patches", ROOT / "patches" / "sgl_kernel_cpu", site]
    outputs = []
    for folders in ([plugin, *roots], roots):
        path = os.pathsep.join(map(str, folders))
        run = subprocess.run(
            [sys.executable, "-S", "-c", program],
            env={**os.environ, "PYTHONPATH": path, "SGLANG_USE_CPU_ENGINE": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout.splitlines())
    assert outputs == [[str([str(info)]), "True"], ["[]"]]
