"""What `bench serving --engine` makes of its measurements; real engines are in tests/engine."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sglang_prefix.bench.engine import write_plugin
from sglang_prefix.bench.serving import sync_guard
from sglang_prefix.bench.serving.compare import compare_logprobs, decode_times, median_interval
from sglang_prefix.bench.serving.engine_calls import full_batch
from sglang_prefix.bench.serving.loads import (
    LLAMA_8B,
    OURS,
    Load,
    engine_arguments,
    measurements,
    prompts,
)
from sglang_prefix.bench.serving.targets import NOT_PACKED, evaluate
from sglang_prefix.tiny_model import build_once

ROOT = Path(__file__).parents[1]
STOCK = ["fa3", "flashinfer", "triton"]


def test_the_order_is_fixed_and_the_most_valuable_come_first() -> None:
    names = [one.name for one in measurements(STOCK)]
    assert len(set(names)) == len(names)
    assert names[:2] == ["pair/rollouts-64x8k", "pair/unrelated"]
    assert names[6:8] == ["alone-prefix/rollouts-64x1k-out8192", "alone-fa3/rollouts-64x1k-out8192"]
    groups = itertools.groupby(measurements(STOCK), lambda one: one.group)
    backends = [(group, {one.backends for one in same}) for group, same in groups]
    # Engines are started once each.
    assert len(dict(backends)) == len(backends)
    assert all(len(some) == 1 for _, some in backends)
    assert dict(backends)["pair"] == {(OURS, "fa3")}
    # Without fa3, the next one takes its place.
    assert measurements(STOCK[1:])[0].backends == (OURS, "flashinfer")


def test_two_engines_share_80_gb_and_hold_their_loads() -> None:
    tokens = engine_arguments(Path("m"), OURS, "pair", dry=False)["max_total_tokens"]
    shape = LLAMA_8B
    head_dim = shape.hidden_size // shape.num_heads
    kv_bytes = tokens * shape.num_layers * 2 * shape.num_kv_heads * head_dim * 2
    assert 2 * (14.5e9 + kv_bytes) < 0.8 * 80e9
    loads = [one.load for one in measurements(STOCK) if one.group == "pair"]
    for load in loads:
        prompts_tokens = sum(nodes * length for nodes, length in load.levels)
        assert prompts_tokens + load.num_requests * load.output_tokens <= tokens, load.name


def test_prompts_form_the_tree_and_are_the_same_everywhere() -> None:
    load = Load("agents", 6, ((1, 5), (2, 3), (6, 2)), 1)
    ids = prompts(load, 100, 1)
    assert {len(prompt) for prompt in ids} == {10}
    assert len({tuple(prompt[:5]) for prompt in ids}) == 1
    assert len({tuple(prompt[:8]) for prompt in ids}) == 2
    assert len(set(map(tuple, ids))) == 6
    assert ids == prompts(load, 100, 1)
    assert ids != prompts(load, 100, 2)


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


def test_a_measurement_has_who_served_it() -> None:
    found = decode_times({"step_us": [1.0, 2.0, 6.0], "counters": COUNTERS}, ours=True)
    assert (found["tpot_us"], found["median_step_us"]) == (3.0, 2.0)
    assert found["packed_share"] == 0.95
    assert found["packed"]
    assert found["host_us_per_step"] == pytest.approx(40)
    few = {**COUNTERS, "stock_steps": 50}
    assert not decode_times({"step_us": [1.0], "counters": few}, ours=True)["packed"]
    with pytest.raises(ValueError, match="at no time did all requests decode"):
        decode_times({"step_us": []}, ours=False)


# -- targets ---------------------------------------------------------------------------------------


def decoded(load: str, *, packed: bool = True, host_us: float = 20, **tpot: float) -> Any:
    """A case as a result file has it."""
    measured: dict[str, Any] = {backend: {"tpot_us": us} for backend, us in tpot.items()}
    measured.get(OURS, {}).update(packed=packed, host_us_per_step=host_us)
    return {"name": load, "measured": measured, "load": {"name": load, "output_tokens": 512}}


def alternated(high: float, coverage: float) -> Any:
    """A case of engines in turn, by the upper end of its interval."""
    interval = {"low": 0.99, "high": high, "coverage": coverage}
    return {"name": "unrelated", "ratios": [1.0] * 10, "ratio": 1.0, "ratio_interval": interval}


def alone(backend: str, tokens: int, **arguments: int) -> Any:
    """A case of one engine, by the size of its KV pool."""
    described = {"max_total_num_tokens": tokens, "arguments": arguments}
    return {"name": backend, "engines": {backend: described}}


def churned(status: str) -> Any:
    """A case under the guard."""
    return {"name": "c", "kind": "churn", "guarded_steps": 500, "status": status}


BOTH = decoded("rollouts-64x8k", prefix=40, fa3=100)
LONG = "rollouts-64x1k-out512"
SPILLED = decoded("rollouts-64x32k", packed=False, prefix=10, fa3=100)
CLAMPED = alone(OURS, 5, max_total_tokens=5)


@pytest.mark.parametrize(
    ("cases", "target", "status", "value"),
    [
        ([BOTH], "64 x 8k", "met", 0.4),
        ([BOTH], "64 x 32k", "not measured", None),
        # The best stock backend counts.
        ([BOTH, decoded("rollouts-64x8k", triton=200)], "64 x 8k", "met", 0.4),
        ([BOTH, decoded("rollouts-64x8k", triton=80)], "64 x 8k", "missed", 0.5),
        # A batch that was not packed meets nothing.
        ([SPILLED], "64 x 32k", NOT_PACKED, 0.1),
        # The two sides may lie in two cases.
        ([decoded(LONG, prefix=99)], "64 x 1k, long", "not measured", None),
        ([decoded(LONG, prefix=99), decoded(LONG, fa3=100)], "64 x 1k, long", "met", 0.99),
        # Unrelated requests need enough rounds.
        ([alternated(1.019, 0.97)], "unrelated", "met", 1.0),
        ([alternated(1.021, 0.97)], "unrelated", "missed", 1.0),
        ([alternated(1.0, 0.93)], "unrelated", "not measured", 1.0),
        ([BOTH], "host time", "met", 20),
        ([BOTH, decoded(LONG, host_us=51, prefix=1)], "host time", "missed", 51),
        # Pools are compared of engines that were alone and were not told their size.
        ([alone(OURS, 995), alone("fa3", 1000), CLAMPED], "kv pool", "met", 0.995),
        ([alone(OURS, 980), alone("fa3", 1000), CLAMPED], "kv pool", "missed", 0.98),
        # A guard that saw no GPU proves nothing.
        ([churned("n/a")], "no device sync", "not measured", None),
        ([churned("passed")], "no device sync", "met", 500),
        ([churned("failed")], "no device sync", "missed", 500),
    ],
)
def test_targets(cases: list[Any], target: str, status: str, value: float | None) -> None:
    found = evaluate(cases)[target]
    assert (found["status"], found["value"]) == (status, value)
    if value is not None and target.startswith("64 x 1k"):
        assert "512 tokens out" in found["meaning"]


# -- engines and their model -----------------------------------------------------------------------


def test_this_sglang_knows_every_argument() -> None:
    from sglang.srt.server_args import ServerArgs

    known = inspect.signature(ServerArgs).parameters
    groups = {one.group for one in measurements(STOCK)}
    given = {name for g in groups for name in engine_arguments(Path(), "fa3", g, dry=False)}
    assert given <= set(known)
    # Pools are compared of engines that SGLang sizes itself.
    assert "max_total_tokens" not in engine_arguments(Path(), "fa3", "alone-fa3", dry=False)


def test_every_layer_of_a_wide_model_puts_out_values_of_one_size(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    shape = replace(LLAMA_8B, num_layers=1, num_heads=4, num_kv_heads=1, hidden_size=512)
    build_once(tmp_path / "model", replace(shape, intermediate_size=1024))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    spread = {name.split(".")[-2]: w.float().std().item() for name, w in weights.items()}
    inputs = {"q_proj": 512, "k_proj": 512, "v_proj": 512, "down_proj": 1024, "lm_head": 512}
    for name, count in inputs.items():
        gain = 1.25 if name in ("q_proj", "k_proj") else 1.0
        expected = 0.08 * (256 / count) ** 0.5 * gain
        assert spread[name] == pytest.approx(expected, rel=0.05), name
    assert spread["embed_tokens"] == pytest.approx(0.08, rel=0.05)


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


# -- the guard against waiting for the device ------------------------------------------------------


@pytest.fixture(scope="module")
def batches() -> dict[str, Any]:
    """A forward batch of SGLang's per mode; made before a host seems to have a GPU."""
    from tests.scheduling import make_forward_batch

    return {mode: make_forward_batch(mode, (1,), (1,), (0,)) for mode in ("DECODE", "EXTEND")}


class Backend:
    """As ours is to SGLang; notes the mode of every call, waits where that is forbidden."""

    def __init__(self, is_stock: bool = False) -> None:
        self.modes: list[Any] = []
        self.waits = False
        self.stock = self if is_stock else Backend(is_stock=True)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.init_forward_metadata_out_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        mode = mode_now()
        self.modes.append(mode)
        if self.waits and mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.stock is not self:
            self.stock.init_forward_metadata_out_graph(forward_batch, in_capture)


def mode_now() -> Any:
    """What the guard has set; the real one gives numbers."""
    return torch.cuda.get_sync_debug_mode()


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend under the guard, on a host that seems to have a GPU."""
    now: list[Any] = ["default"]

    def control(self: Any) -> None:
        self._seen |= {"on_gpu": True, "control": True}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: now.__setitem__(0, mode))
    monkeypatch.setattr(sync_guard.Guard, "_try_control", control)
    monkeypatch.setenv(sync_guard.SYNC_FILE, str(tmp_path / "sync.json"))
    module: Any = ModuleType("backend")
    module.PrefixAttnBackend = type("Guarded", (Backend,), {})
    sync_guard.patch(module)
    backend: Backend = module.PrefixAttnBackend()
    return backend


@pytest.mark.parametrize(
    ("forward_mode", "in_capture", "mode"),
    [("DECODE", False, "error"), ("DECODE", True, "default"), ("EXTEND", False, "default")],
)
def test_decode_is_guarded_captures_prefill_and_stock_are_not(
    batches: dict[str, Any],
    guarded: Backend,
    tmp_path: Path,
    forward_mode: str,
    in_capture: bool,
    mode: str,
) -> None:
    batch = batches[forward_mode]
    guarded.init_forward_metadata_out_graph(batch, in_capture)
    guarded.init_forward_metadata_out_graph(batch, in_capture=in_capture)
    assert (guarded.modes, guarded.stock.modes) == ([mode] * 2, ["default"] * 2)
    assert mode_now() == "default"
    seen = {"steps": 2, "on_gpu": True, "control": True, "raised": []}
    file = tmp_path / "sync.json"
    assert json.loads(file.read_text()) == seen if mode == "error" else not file.exists()


def test_control_a_wait_is_told_of_and_goes_on(
    batches: dict[str, Any], guarded: Backend, tmp_path: Path
) -> None:
    guarded.waits = True
    with pytest.raises(RuntimeError, match="synchronizing"):
        guarded.init_forward_metadata_out_graph(batches["DECODE"])
    assert mode_now() == "default"
    seen = json.loads((tmp_path / "sync.json").read_text())
    assert seen["raised"] == ["RuntimeError: called a synchronizing CUDA operation"]
