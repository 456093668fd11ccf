"""Options, hypothesis profiles and fixtures that all tests share.

Imports pytest, hypothesis, torch and Triton, and nothing else: the GPU tests run on hosts that have
no more.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# Workers share the cores with engines; threads that wait for a core spin meanwhile.
torch.set_num_threads(1)

# Every run looks elsewhere, says its seed, and prints a blob that reproduces a failing example; but
# under CI=true Hypothesis looks at the same examples each time. Deadlines would time the machine,
# not the code.
for _name, _examples in (("default", 25), ("extended", 100)):
    settings.register_profile(
        _name,
        max_examples=_examples,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Let `make test-all` ask for the tests that `make test` leaves out."""
    parser.addoption(
        "--extended", action="store_true", help="also tests marked extended; 100 examples, not 25"
    )
    if not pluginmanager.hasplugin("timeout"):
        # pyproject.toml sets it, and unknown settings are errors.
        parser.addini("timeout", "of pytest-timeout, which is not installed here")


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its seed
def pytest_configure(config: pytest.Config) -> None:
    """Choose the profile and the seed, and whether Triton compiles or interprets."""
    settings.load_profile("extended" if config.getoption("--extended") else "default")
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = random.getrandbits(32)
    if not _wants_gpu(config) or config.getoption("--dry", False):
        _interpret_triton()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out extended tests and GPU tests unless they are asked for, and say how many."""
    unwanted = set() if config.getoption("--extended") else {"extended"}
    unwanted |= set() if _wants_gpu(config) else {"gpu"}
    left_out = {item for item in items if unwanted & {mark.name for mark in item.iter_markers()}}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say how to repeat this run."""
    terminalreporter.write_line(f"seed: --hypothesis-seed={config.option.hypothesis_seed}")


def _wants_gpu(config: pytest.Config) -> bool:
    """Whether this is a run of the GPU tests: ``-m gpu``."""
    return bool(config.getoption("-m") == "gpu")


def _interpret_triton() -> None:
    """Interpret our kernels, and Triton's own library that they call, in this process.

    Triton decides when a kernel is defined. Programs that tests start are not interpreted.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    del os.environ["TRITON_INTERPRET"]
    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch hands out uninitialised holds NaN, as freed memory on a device may."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return empty

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
