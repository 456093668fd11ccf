"""Host memory through which plans cross to the device while the CPU is a step ahead."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Staging"]

# Under overlap scheduling a plan may be copied while the one before is still on its way.
_NUM_BUFFERS = 3


class Staging:
    """Pinned buffers used in turn, each free again once its copy has been made.

    A copy from pageable memory would make the CPU wait for the stream; one pinned buffer alone
    could be written while its last copy is still under way. On the CPU there is nothing to stage.

    Args:
        size: int32 values per buffer.
        device: where copies go.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._next = 0
        self._buffers: list[torch.Tensor] = []
        if device.type == "cuda":
            with torch.inference_mode(False):
                self._buffers = [
                    torch.empty(size, dtype=torch.int32, pin_memory=True)
                    for _ in range(_NUM_BUFFERS)
                ]
            self._copied = [torch.cuda.Event() for _ in self._buffers]

    def copy(self, values: NDArray[np.int32], target: torch.Tensor) -> None:
        """Copy ``values`` [n] to the start of ``target`` [>= n], in order on the current stream."""
        source = torch.from_numpy(values)
        if not self._buffers:
            target[: len(values)].copy_(source)
            return
        staged, copied = self._buffers[self._next], self._copied[self._next]
        self._next = (self._next + 1) % _NUM_BUFFERS
        copied.synchronize()  # three plans ago: done, but for a device that is far behind
        staged[: len(values)].copy_(source)
        target[: len(values)].copy_(staged[: len(values)], non_blocking=True)
        copied.record()
