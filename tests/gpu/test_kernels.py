"""Every variant of the kernels against the float64 oracle, eagerly and by replayed graphs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.checks import (
    Errors,
    GraphServer,
    Note,
    assert_same_bits,
    check,
    note_error,
    planned,
    run,
)
from tests.gpu.conftest import Setting
from tests.gpu.variants import GRAPHS, MORE_GRAPHS, Modes, Variant, small_variants, variants

pytestmark = pytest.mark.gpu

HEADLINE = 6  # variants before the graphs
TOOLS = ("memcheck", "racecheck")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tiny variants in a dry run, and fewer graphs."""
    dry = metafunc.config.getoption("--dry", False)
    if "graph" in metafunc.fixturenames:
        graphs = GRAPHS if dry else GRAPHS | MORE_GRAPHS
        metafunc.parametrize("graph", [*graphs.values()], ids=[*graphs])
    if "variant" in metafunc.fixturenames:
        found = variants(dry=dry)
        first = metafunc.function is test_variants
        found = found[:HEADLINE] if first else found[HEADLINE:]
        metafunc.parametrize("variant", found, ids=[variant.name for variant in found])


def test_variants(variant: Variant, setting: Setting, record_property: Note) -> None:
    check(variant, setting, record_property)


def test_graph(
    graph: tuple[Modes, dict[str, Any]], setting: Setting, record_property: Note
) -> None:
    """A step is captured under single tokens, and serves other forests by replays."""
    modes, options = graph
    server = GraphServer(modes, setting, **options)
    errors: Errors = {}
    with setting.verdict():
        for name, inputs, plan in server.served:
            server.load(plan, inputs)
            errors[name] = 0.0
            for step in range(3):
                server.fill(inputs)
                server.replay()
                note_error(errors, name, step, inputs, server.outputs)
                if step == 0:
                    assert_same_bits(server.replay, server.outputs, 2 if setting.dry else 100)
                if step < 2:
                    inputs.grow(step)
    record_property("errors", errors)


def test_further_variants(variant: Variant, setting: Setting, record_property: Note) -> None:
    check(variant, setting, record_property)


def test_every_mode_once(setting: Setting) -> None:
    """A small run of every kernel, which the sanitizers watch; only that outputs are finite.

    On an fp8 cache as well.
    """
    if setting.control:
        pytest.skip("compares nothing, so a control cannot reach it")
    small = small_variants(dry=setting.dry)
    runs = [(one, run) for one in small for run in one.runs(few=False)]
    for variant, (policy, modes, fixed) in runs:
        inputs = variant.inputs(setting.device, seed=0)
        attention = planned(variant, inputs, policy, modes, fixed, breaks=False)
        inputs.grow(0)
        attention.executor.append(inputs.seq_lens, inputs.newest_slots())
        outputs = inputs.outputs()
        run(attention, inputs, outputs)
        assert outputs.out.isfinite().all(), modes


@pytest.mark.watched
@pytest.mark.parametrize("tool", TOOLS, ids=[f"sanitizer/{tool}" for tool in TOOLS])
def test_sanitizer(
    tool: str, setting: Setting, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """The test above, watched by a tool of compute-sanitizer."""
    limit_s = pytestconfig.getoption("--sanitizer-s")
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
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"not done after {limit_s:g} s")
    tail = (done.stdout + done.stderr)[-2000:]
    if "not supported" in tail:
        pytest.skip(tail)
    assert done.returncode == 0, tail
