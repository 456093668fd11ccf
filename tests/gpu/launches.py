"""What the checks launch, without their comparisons: to be recorded, and compiled ahead."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.gpu.checks import GraphServer, planned, run
from tests.gpu.conftest import Setting
from tests.gpu.variants import GRAPHS, MORE_GRAPHS, small_variants, variants

__all__ = ["launch_checks"]


def launch_checks() -> None:
    """Launch every variant, the steps that are captured, and what the sanitizers watch.

    Batches are drawn at random, so a run may need a kernel that this one does not.
    """
    setting = Setting(torch.device("cpu"), 0, dry=False, control=False)
    for variant in (*variants(), *small_variants()):
        # Slots far away take much memory and no other kernel.
        near = replace(variant, first_slot=min(variant.first_slot, 1000))
        inputs = near.inputs(setting.device, setting.seed)
        for policy, modes, fixed in near.runs(few=False):
            attention = planned(near, inputs, policy, modes, fixed, breaks=False)
            if near.steps:
                attention.executor.append(inputs.seq_lens, inputs.newest_slots())
            run(attention, inputs, inputs.outputs())
    for modes, options in (GRAPHS | MORE_GRAPHS).values():
        GraphServer(modes, setting, **options)
