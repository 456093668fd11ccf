"""Launches without a GPU: what a graph keeps of a tensor, and what Triton compiles a kernel for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from prefix_kernels.launch import recorded

__all__ = ["Address", "launch_key", "record", "thaw"]

Launch = tuple[Any, tuple[int, ...], dict[str, Any]]


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


def record(step: Callable[[], object]) -> list[Launch]:
    """Kernel, grid and arguments of what ``step`` launches, its tensors by address only."""
    launches: list[Launch] = []

    def add(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        frozen = {
            name: Address.of(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        launches.append((kernel, grid, frozen))

    with recorded(add):
        step()
    return launches


def thaw(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a recorded launch, with the memory at its addresses."""
    return {
        name: value.tensor() if isinstance(value, Address) else value
        for name, value in arguments.items()
    }


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
