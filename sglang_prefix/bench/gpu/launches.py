"""What the steps of `bench gpu` launch, so that it can be compiled ahead: see `kernel_cache`.

Called in a process that records launches and makes none, on tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from unittest.mock import patch

import torch

from prefix_kernels import triton_executor
from prefix_kernels.launches import AUTO
from prefix_kernels.server_launches import ServedLayers, launch_all
from sglang_prefix.bench.gpu.layer import launch_layer
from sglang_prefix.bench.settings import SETTINGS
from sglang_prefix.bench.tune import TileWork, pack_shapes

__all__ = ["WORKS", "launch_batches", "launch_one_layer", "launch_settings", "launch_tiles"]

# Of `gpu-minutes.json`; the first of them in the other steps, too.
_LAYERS = (
    ServedLayers(32, 8, 128, 128, "bf16", "bf16"),
    ServedLayers(8, 1, 128, 128, "bf16", "bf16"),
    ServedLayers(16, 1, 576, 512, "bf16", "bf16", v_in_k=True),
)
# Of `bench tune`, which does the most valuable first: as many as there is time for.
_PACK_SHAPES = 4
# Packs as on 132 multiprocessors, short since nothing is computed.
_SIZE = (396, 64)


def launch_batches(arch: str) -> None:
    """Launches of batches, as a server makes them."""
    launch_all(_LAYERS, arch)


def launch_one_layer(arch: str) -> None:
    """The layer of the first step and of the counters."""
    launch_layer()


def launch_settings(arch: str) -> None:
    """Launches that other settings of the executor lead to; other plans lead to none."""
    with _on_arch(arch):
        for setting in SETTINGS.values():
            options = {"mode": AUTO, "merge": AUTO, **setting}
            options.pop("profile", None)
            modes, merges = [options.pop("mode")], [options.pop("merge")]
            if options:
                launch_all(_LAYERS[:1], arch, modes=modes, merges=merges, **options)


@contextmanager
def _on_arch(arch: str) -> Iterator[None]:
    """Executors on the CPU launch what one on a device of the architecture would."""
    major = int(arch.removeprefix("sm_")) // 10
    with patch.object(triton_executor, "_major_of", lambda device: major):
        yield


def launch_tiles(arch: str) -> None:
    """Every tile of the pack shapes that come first."""
    for pack in pack_shapes()[:_PACK_SHAPES]:
        work = TileWork(pack, torch.device("cpu"), 0, dry=False, size=_SIZE)
        for tile in work.tiles:
            work.forward(tile)()


def launch_checks(arch: str) -> None:
    """Launches of the steps that compare kernels with the oracle."""
    with _on_arch(arch):
        import_module("tests.gpu.launches").launch_checks()


WORKS: tuple[Callable[[str], None], ...] = (
    launch_one_layer,
    launch_checks,
    launch_batches,
    launch_settings,
    launch_tiles,
)
