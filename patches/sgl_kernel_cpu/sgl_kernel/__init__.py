"""A stand-in for SGLang's compiled kernels on hosts without a GPU.

SGLang imports a handful of CPU functions from `sgl_kernel` at start-up that a plain dense model
never calls on the CPU. The published package only loads where CUDA is, so on other hosts those
imports alone would keep SGLang from starting. This module has exactly these names; each refuses
to be called. Anything else is absent, so that SGLang's optional imports stay optional.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from typing import NoReturn

__version__ = "0.0.0+stand.in"

# Tells this module from the real one, for `sglang-prefix exec` and `sglang-prefix doctor`.
IS_STAND_IN = True


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} was called, but this is sglang-prefix's stand-in for hosts where "
            f"the real sgl_kernel does not load: it has no kernels. This feature needs a host "
            f"with a GPU and the package sglang-kernel, or SGLang's own CPU build of it"
        )

    refuse.__name__ = refuse.__qualname__ = name
    return refuse


# Moving the KV cache.
copy_all_layer_kv_cache_cpu = _refusal("copy_all_layer_kv_cache_cpu")
assign_req_to_token_pool_cpu = _refusal("assign_req_to_token_pool_cpu")

# Speculative decoding.
assign_draft_cache_locs_contiguous_cpu = _refusal("assign_draft_cache_locs_contiguous_cpu")
assign_extend_cache_locs_cpu = _refusal("assign_extend_cache_locs_cpu")
build_tree_kernel_efficient_cpu = _refusal("build_tree_kernel_efficient_cpu")
fill_accept_out_cache_loc_cpu = _refusal("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _refusal("fill_bonus_tokens_cpu")
verify_tree_greedy_cpu = _refusal("verify_tree_greedy_cpu")


def __getattr__(name: str) -> NoReturn:
    message = (
        f"sgl_kernel has no {name!r}: this is sglang-prefix's stand-in for hosts where the real "
        f"sgl_kernel does not load"
    )
    # `from sgl_kernel import X` would turn an AttributeError into an ImportError without a reason;
    # `hasattr` needs the AttributeError.
    caller = sys._getframe(1)
    if caller.f_code.co_code[caller.f_lasti] == dis.opmap["IMPORT_FROM"]:
        raise ImportError(message, name="sgl_kernel")
    raise AttributeError(message)
