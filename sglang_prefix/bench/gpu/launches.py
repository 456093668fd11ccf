"""What the steps of `bench gpu` launch, so that it can be compiled ahead: see `kernel_cache`.

Called in a process that records launches and makes none, on tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from prefix_kernels.server_launches import ServedLayers, launch_all
from sglang_prefix.bench.tune import TileWork, pack_shapes

__all__ = ["WORKS", "launch_batches", "launch_tiles"]

# Of `gpu-minutes.json`; the first of them in the other steps, too.
_HEADS = ((32, 8), (8, 1))
# Of `bench tune`, which does the most valuable first: as many as there is time for.
_PACK_SHAPES = 4
# Packs as on 132 multiprocessors, short since nothing is computed.
_SIZE = (396, 64)


def launch_batches(arch: str) -> None:
    """Launches of batches, as a server makes them."""
    launch_all([ServedLayers(*heads, 128, 128, "bf16", "bf16") for heads in _HEADS], arch)


def launch_tiles(arch: str) -> None:
    """Every tile of the pack shapes that come first."""
    for pack in pack_shapes()[:_PACK_SHAPES]:
        work = TileWork(pack, torch.device("cpu"), 0, dry=False, size=_SIZE)
        for tile in work.tiles:
            work.forward(tile)()


def launch_checks(arch: str) -> None:
    """Launches of the steps that compare kernels with the oracle."""
    import_module("tests.gpu.launches").launch_checks()


WORKS: tuple[Callable[[str], None], ...] = (launch_checks, launch_batches, launch_tiles)
