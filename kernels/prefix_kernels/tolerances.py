"""How far results may be from the float64 oracle, by dtype of the output, with the reason."""

from __future__ import annotations

import torch

__all__ = ["KERNEL_TOLERANCES", "RELATIVE_TOLERANCES", "TOLERANCES"]

# (relative, absolute). Everything is computed in float32 from the same rounded inputs that the
# oracle sees, so float32 differs by summation order and by exp of scores that are off by some
# 1e-6; the 16-bit types by half a unit in the last place of the final rounding on top: 2**-11 and
# 2**-8. lse is float32 for all of them.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2**-11 + 1e-5, 1e-5),
    torch.bfloat16: (2**-8 + 1e-5, 1e-5),
}

# The kernels round softmax weights, each at most 1, to q's dtype before the second product: half a
# unit in the last place of every weight, against values of up to some 4.
KERNEL_TOLERANCES = {
    torch.float32: TOLERANCES[torch.float32],
    torch.float16: (2**-10, 4 * 2**-11),
    torch.bfloat16: (2**-7, 4 * 2**-8),
}

# Norm of the error of one head's output over the norm of that output: the check for long contexts,
# where outputs are small and an absolute tolerance says little. Rounding the weights and the
# output, each by up to half a unit in the last place, leaves a fifth of this or less.
RELATIVE_TOLERANCES = {torch.float32: 2e-5, torch.float16: 2.5e-3, torch.bfloat16: 1e-2}
