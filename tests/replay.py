"""Launches without a GPU: what a CUDA graph keeps of a step, and what Triton compiles a kernel for.

A recording holds no tensor and no plan, so a replay sees exactly what a replayed graph would see:
whatever stands at the recorded addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from prefix_kernels.launch import recorded

__all__ = ["Address", "Recording", "launch_key", "record", "thaw"]


@dataclass(frozen=True, slots=True)
class Address:
    """A tensor argument, reduced to where it lies."""

    pointer: int
    num_bytes: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Address:
        storage = tensor.untyped_storage()
        num_bytes = storage.nbytes() - tensor.storage_offset() * tensor.itemsize
        return cls(tensor.data_ptr(), int(num_bytes), tensor.dtype)

    def tensor(self) -> torch.Tensor:
        """The memory at this address, whoever owns it."""
        memory = (ctypes.c_char * self.num_bytes).from_address(self.pointer)
        return torch.frombuffer(memory, dtype=torch.uint8).view(self.dtype)


@dataclass(slots=True)
class Recording:
    """The launches of a step in their order."""

    launches: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = field(default_factory=list)

    def add(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """Keep a launch, its tensors by address only."""
        frozen = {
            name: Address.of(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        self.launches.append((kernel, grid, frozen))

    def replay(self, upto: int | None = None) -> None:
        """Launch everything again, or the first ``upto`` launches, as an aborted replay does."""
        for kernel, grid, arguments in self.launches[:upto]:
            kernel[grid](**thaw(arguments))

    def addresses(self) -> set[int]:
        """Everything that the launches point at."""
        return {
            value.pointer
            for _, _, arguments in self.launches
            for value in arguments.values()
            if isinstance(value, Address)
        }


def thaw(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a recorded launch, with the memory at its addresses."""
    return {
        name: value.tensor() if isinstance(value, Address) else value
        for name, value in arguments.items()
    }


def record(step: Callable[[], object]) -> Recording:
    """Run ``step`` and keep what it launched."""
    recording = Recording()
    with recorded(recording.add):
        step()
    return recording


def launch_key(kernel: Any, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The key of a launch by the rules of Triton's specialisation: equal keys share a binary.

    Types of everything; of pointers and integers also whether 16 divides them, and whether an
    integer is 1, unless the kernel says not to; constants and compile options by value.
    """
    options = kernel.kwargs
    plain = options["do_not_specialize"] or ()
    unaligned = options["do_not_specialize_on_alignment"] or ()
    key: list[Any] = [kernel.__name__]
    for name, value in sorted(arguments.items()):
        if name.isupper() or name not in kernel.arg_names:
            key.append((name, value))
        elif isinstance(value, torch.Tensor):
            aligned = name not in unaligned and value.data_ptr() % 16 == 0
            key.append((name, value.dtype, aligned))
        elif isinstance(value, int) and name not in plain:
            key.append((name, "int", value == 1, value % 16 == 0, value.bit_length() > 31))
        else:
            key.append((name, type(value)))
    return tuple(key)
