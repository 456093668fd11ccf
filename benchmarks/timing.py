"""Timing: candidates interleaved in one process, medians of many rounds."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

__all__ = ["environment", "interleaved", "medians"]


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int, warmups: int = 2
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round; each round runs all of them, in random order.

    What runs after one that touches much memory finds cold caches, so that must not always be the
    same.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warmups + rounds):
        for name in random.Random(number).sample(list(candidates), len(candidates)):
            run = candidates[name]
            began = time.perf_counter()
            run()
            if number >= warmups:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Median of each candidate's seconds."""
    return {name: median(values) for name, values in seconds.items()}


def environment() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    packages = ("torch", "sglang", "numpy", "sglang-prefix")
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
