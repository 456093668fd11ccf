"""Every variant of the kernels against the float64 oracle, eagerly and by replayed graphs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from prefix_kernels.plan import PackPlan
from sglang_prefix.bench.graphs import capture
from sglang_prefix.bench.packed_attention import PackedAttention
from sglang_prefix.bench.workloads.inputs import AttentionInputs, MismatchError, Outputs
from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import Tree, random_tree, shared_then_private
from sglang_prefix.packing import GPU_PROFILE, DeviceProfile
from tests.gpu.conftest import Setting
from tests.gpu.variants import ALL_MODES, EAGER, Modes, Variant, variants

pytestmark = pytest.mark.gpu

HEADLINE = 6  # variants before the graphs
TOOLS = ("memcheck", "racecheck")
SANITIZER_S = 150
GROWTH = 4
FAR_AWAY = 1 << 20  # a slot and a length that no pool here has

Errors = dict[str, float]
Note = Callable[[str, Any], None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tiny variants in a dry run."""
    if "variant" in metafunc.fixturenames:
        found = variants(dry=metafunc.config.getoption("--dry", False))
        first = metafunc.function is test_variants
        found = found[:HEADLINE] if first else found[HEADLINE:]
        metafunc.parametrize("variant", found, ids=[variant.name for variant in found])


def test_variants(variant: Variant, setting: Setting, record_property: Note) -> None:
    check(variant, setting, record_property)


@pytest.mark.parametrize("modes", ALL_MODES, ids=[f"graph/{a}/{b}" for a, b in ALL_MODES])
def test_graph(modes: Modes, setting: Setting, record_property: Note) -> None:
    """A step is captured under single tokens, and serves other forests by replays."""
    size = 3 if setting.dry else 24
    first = lay_out(shared_then_private(size, 0, 1), setting, size)
    options: dict[str, Any] = {"mode": modes[0], "merge": modes[1], "reserved_tail_slots": GROWTH}
    shape = first.heads.shape(first.q.dtype, first.k.dtype)
    attention = PackedAttention(shape, setting.device, **options)
    served: list[tuple[str, AttentionInputs, PackPlan]] = []
    for name, tree, policy, profile in forests_to_serve(setting, size):
        inputs = lay_out(tree, setting, size, number=len(served))
        planner = PackedAttention(shape, setting.device, policy=policy, profile=profile, **options)
        served.append((name, inputs, planner.plan(inputs.batch.forest())))
    # Fixed for all of them; the slots that this reads mean nothing yet.
    context = max(inputs.req_to_token.shape[1] for _, inputs, _ in served)
    table = torch.zeros(size, context, dtype=torch.int32, device=setting.device)
    rows = torch.arange(size, device=setting.device)
    attention.fix_capacity([plan for *_, plan in served], table, rows, padded_batch_size=size)
    server = _Server(attention, first, max(inputs.batch.num_slots for _, inputs, _ in served))
    server.load(attention.plan(first.batch.forest()), first)
    server.fill(first)
    replay = capture(server.step, setting.device)
    attention.breaks = setting.control
    errors: Errors = {}
    with setting.verdict():
        for name, inputs, plan in served:
            server.load(plan, inputs)
            errors[name] = 0.0
            for step in range(3):
                server.fill(inputs)
                replay()
                note_error(errors, name, step, inputs, server.outputs)
                if step == 0:
                    assert_same_bits(replay, server.outputs, 2 if setting.dry else 100)
                if step < 2:
                    inputs.grow(step)
    record_property("errors", errors)


def test_further_variants(variant: Variant, setting: Setting, record_property: Note) -> None:
    check(variant, setting, record_property)


def test_every_mode_once(setting: Setting) -> None:
    """A small run of every kernel, which the sanitizers watch; only that outputs are finite."""
    if setting.control:
        pytest.skip("compares nothing, so a control cannot reach it")
    on_gpu = setting.device.type == "cuda"
    requests, tokens = (20, 200) if on_gpu else (3, 8)
    dim, dtype = (64, torch.bfloat16) if on_gpu else (16, torch.float16)
    small = Variant("small", dim=dim, v_dim=dim, dtype=dtype, modes=ALL_MODES, steps=1)
    variant = replace(small, requests=requests, tokens=tokens)
    for policy, modes, fixed in variant.runs(few=False):
        inputs = variant.inputs(setting.device, seed=0)
        attention = planned(variant, inputs, policy, modes, fixed, breaks=False)
        inputs.grow(0)
        attention.executor.append(inputs.seq_lens, inputs.newest_slots())
        outputs = inputs.outputs()
        run(attention, inputs, outputs)
        assert outputs.out.isfinite().all(), modes


@pytest.mark.expected_s(SANITIZER_S)
@pytest.mark.parametrize("tool", TOOLS, ids=[f"sanitizer/{tool}" for tool in TOOLS])
def test_sanitizer(tool: str, setting: Setting, tmp_path: Path) -> None:
    """The test above, watched by a tool of compute-sanitizer."""
    if setting.device.type != "cuda":
        pytest.skip("no GPU: compute-sanitizer has nothing to watch")
    binary = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(binary).exists():
        pytest.skip("compute-sanitizer is not installed")
    pytest_options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "--out"]
    test = f"{Path(__file__)}::{test_every_mode_once.__name__}"
    command = [binary, "--tool", tool, "--error-exitcode", "9", sys.executable]
    command += [*pytest_options, str(tmp_path / "check.json"), test]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            # Without its cache every tensor is an allocation of its own, with bounds that are
            # watched.
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            timeout=SANITIZER_S,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"not done after {SANITIZER_S} s")
    tail = (done.stdout + done.stderr)[-2000:]
    if "not supported" in tail:
        pytest.skip(tail)
    assert done.returncode == 0, tail


def check(variant: Variant, setting: Setting, record_property: Note) -> None:
    """Run a variant in all its modes, launches fitted to the plan and fixed as for a graph."""
    errors: Errors = {}
    inputs = variant.inputs(setting.device, setting.seed)
    with setting.verdict():
        for policy, modes, fixed in variant.runs(few=setting.dry):
            name = "/".join((policy, *modes)) + ("/fixed" if fixed else "")
            if variant.steps and errors:  # the run before has grown them
                inputs = variant.inputs(setting.device, setting.seed)
            attention = planned(variant, inputs, policy, modes, fixed, breaks=setting.control)
            outputs, errors[name] = inputs.outputs(), 0.0
            for step in range(variant.steps + 1):
                if step:
                    inputs.grow(step - 1)
                    attention.executor.append(inputs.seq_lens, inputs.newest_slots())
                run(attention, inputs, outputs)
                note_error(errors, name, step, inputs, outputs)
            again = partial(run, attention, inputs, outputs)
            assert_same_bits(again, outputs, variant.repeats)
    record_property("errors", errors)


def note_error(
    errors: Errors, name: str, step: int, inputs: AttentionInputs, outputs: Outputs
) -> None:
    """Compare with the oracle; the largest error of all steps is kept."""
    try:
        errors[name] = max(errors[name], inputs.compare(outputs))
    except MismatchError as error:
        raise MismatchError(f"{name}, step {step}: {error}") from None


def run(attention: PackedAttention, inputs: AttentionInputs, outputs: Outputs) -> None:
    """Launch a layer over poison."""
    outputs.poison()
    attention.poison_partials()
    inputs.run(attention.executor, outputs)


def planned(
    variant: Variant,
    inputs: AttentionInputs,
    policy: str,
    modes: Modes,
    fixed: bool,
    *,
    breaks: bool,
) -> PackedAttention:
    """Attention with the plan of the inputs in use."""
    attention = PackedAttention(
        inputs.heads.shape(inputs.q.dtype, inputs.k.dtype),
        inputs.q.device,
        policy=policy,
        mode=modes[0],
        merge=modes[1],
        profile=variant.profile,
        reserved_tail_slots=16,
    )
    plan = attention.plan(inputs.batch.forest())
    tables, size = (inputs.req_to_token, inputs.req_pool_indices), len(inputs.q)
    if fixed:
        attention.fix_capacity([plan], *tables, padded_batch_size=size)
    attention.breaks = breaks
    attention.load(plan, *tables, padded_batch_size=size)
    return attention


def assert_same_bits(again: Callable[[], object], outputs: Outputs, repeats: int) -> None:
    """Every further run gives the very bits of the first."""
    before = outputs.clone()
    for number in range(repeats):
        outputs.poison()
        again()
        assert before.same_bits(outputs), f"run {number} differs from the first in some bit"


def lay_out(tree: Tree, setting: Setting, size: int, number: int = 0) -> AttentionInputs:
    """Inputs of a batch that is served under the capture."""
    return AttentionInputs.lay_out(
        tree,
        Heads(3, 1, 16, 16) if setting.dry else Heads(32, 8),
        setting.device,
        setting.seed + number,
        dtype=torch.float16 if setting.dry else torch.bfloat16,
        growth=GROWTH,
        padded_batch_size=size,
        poison=True,
    )


def forests_to_serve(setting: Setting, size: int) -> list[tuple[str, Tree, str, DeviceProfile]]:
    """Name, tree, policy and profile of each."""
    tokens = 12 if setting.dry else 900

    def uneven(number: int, requests: int) -> Tree:
        return random_tree(setting.seed + number, num_requests=requests, max_tokens=tokens)

    found = [
        ("one prefix", shared_then_private(size, tokens, 3), "node", EAGER),
        ("uneven", uneven(1, size), "node", EAGER),
        ("fewer requests", uneven(2, size // 2), "pat", GPU_PROFILE),
        ("nothing shared", shared_then_private(size - 1, 0, tokens), "query", GPU_PROFILE),
        ("one request", shared_then_private(1, 0, 2 * tokens), "pat", GPU_PROFILE),
        ("chunks", uneven(3, size), "chunk", GPU_PROFILE),
    ]
    return found[::2] if setting.dry else found


class _Server:
    """Static tensors, as an engine's graph knows them, and the step that is captured."""

    def __init__(self, attention: PackedAttention, like: AttentionInputs, num_slots: int) -> None:
        self._attention, self._params = attention, like.params
        self._q = torch.zeros_like(like.q)
        self._k, self._v = (
            torch.zeros(num_slots, *cache.shape[2:], dtype=cache.dtype, device=cache.device)
            for cache in (like.k, like.v)
        )
        self._lens, self._new_slots = (
            torch.ones(len(like.q), dtype=torch.int64, device=like.q.device) for _ in range(2)
        )
        self.outputs = like.outputs()

    def load(self, plan: PackPlan, inputs: AttentionInputs) -> None:
        """Take a plan into use; the rows change hands at once."""
        rows = inputs.req_to_token.clone()
        size = len(self._q)
        self._attention.load(plan, rows, inputs.req_pool_indices, padded_batch_size=size)
        rows.fill_(FAR_AWAY)

    def step(self) -> None:
        """This step's slots, then a layer."""
        executor = self._attention.executor
        executor.append(self._lens, self._new_slots)
        out = self.outputs
        executor.run(self._q, self._k, self._v, out.out, out.lse, self._params)

    def fill(self, inputs: AttentionInputs) -> None:
        """Set the static tensors for a step; all that it does not set is poison."""
        self.outputs.poison()
        self._attention.poison_partials()
        self._q.copy_(inputs.q)
        for tensor, values in ((self._k, inputs.k[0]), (self._v, inputs.v[0])):
            tensor.fill_(torch.nan)
            tensor[: len(values)] = values
        size = inputs.batch.batch_size
        for static, lens in (
            (self._lens, inputs.seq_lens),
            (self._new_slots, inputs.newest_slots()),
        ):
            static.fill_(FAR_AWAY)
            static[:size] = lens
