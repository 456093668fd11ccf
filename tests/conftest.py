"""Shared fixtures: the hypothesis profile, and memory that shows when it is read unwritten."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton decides when a kernel is defined whether it is compiled or interpreted. Ours, and Triton's
# own library that they call, are interpreted in this process; programs that tests start are not.
os.environ["TRITON_INTERPRET"] = "1"
import triton

del os.environ["TRITON_INTERPRET"]
triton.knobs.propagate_env = False
triton.knobs.runtime.interpret = True

# Workers share the cores with engines; threads that wait for a core spin meanwhile.
torch.set_num_threads(1)

# A failing example is printed with the blob that reproduces it; nothing is derandomised, so every
# run looks elsewhere. Deadlines would time the machine, not the code.
settings.register_profile(
    "sglang-prefix",
    max_examples=100,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("sglang-prefix")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make test-all` ask for what repeats, on another variant, what other tests show."""
    parser.addoption("--extended", action="store_true", help="also run tests marked extended")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave extended tests out, and say how many, unless they are asked for."""
    if config.getoption("--extended"):
        return
    left_out = [item for item in items if item.get_closest_marker("extended")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


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
