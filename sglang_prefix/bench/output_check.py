"""The check that comes before every timing: an output against the float64 oracle."""

from __future__ import annotations

import numpy as np
import torch

from prefix_kernels.oracle import RELATIVE_TOLERANCES, decode_attention_oracle
from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["OutputCheck", "WrongOutputError", "relative_error"]

_CHECKED_REQUESTS = 8


class WrongOutputError(Exception):
    """An output is not what the oracle says."""


class OutputCheck:
    """Outputs of the first layer against the oracle, and all requests against each other.

    The oracle is slow, so it sees a few requests: the first, the last, the longest, the shortest
    and some drawn from the seed. The others are compared with the first output that the oracle
    accepted.

    Args:
        inputs: of the layer.
        seed: decides which requests the oracle sees.
    """

    def __init__(self, inputs: AttentionInputs, seed: int) -> None:
        size = inputs.batch.batch_size
        lens = inputs.batch.seq_lens
        drawn = np.random.default_rng(seed).permutation(size)[:_CHECKED_REQUESTS]
        some = np.unique([0, size - 1, int(lens.argmax()), int(lens.argmin()), *drawn])
        self._some = torch.from_numpy(some).to(inputs.q.device)
        self._expected, _ = decode_attention_oracle(
            inputs.q[self._some],
            inputs.k[0],
            inputs.v[0],
            inputs.req_to_token,
            inputs.rows[self._some],
            inputs.seq_lens[self._some],
            sm_scale=inputs.sm_scale,
        )
        self._all: torch.Tensor | None = None

    def __call__(self, out: torch.Tensor) -> float:
        """The largest relative error of a head of the checked requests.

        Args:
            out: [B, Hq, Dv].

        Raises:
            WrongOutputError: it is over the tolerance, or an output is not finite.
        """
        tolerance = RELATIVE_TOLERANCES[out.dtype]
        error = relative_error(out[self._some], self._expected)
        if not error <= tolerance:
            raise WrongOutputError(f"off by {error}, more than {tolerance}")
        if self._all is None:
            if not out.isfinite().all():
                raise WrongOutputError("a request's output is not finite")
            self._all = out.clone()
        among = relative_error(out, self._all.double())
        if not among <= 2 * tolerance:
            raise WrongOutputError(
                f"off by {among} from another candidate, more than {2 * tolerance}"
            )
        return error

    def max_abs_error(self, out: torch.Tensor) -> float:
        """The largest difference of an element from the oracle, over the checked requests."""
        return float((out[self._some].double() - self._expected).abs().max())


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest over [B, Hq] of the norm of the error over the norm of the output; NaN passes on."""
    error = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float("nan") if error.isnan().any() else float(error.max())
