"""What Triton compiles a kernel for: launches with equal keys share a binary."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["launch_key"]


def launch_key(kernel: Any, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The key of a launch, by the rules of Triton's specialisation.

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
