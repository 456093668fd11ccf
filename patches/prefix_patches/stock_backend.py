"""SGLang's own attention backends: which one to delegate to, with which settings, and one alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from prefix_patches.attributes import ModelRunner, ServerArgs
from prefix_patches.patch import RELEASES, Touch, optional_module
from prefix_patches.resolution import stock_choice

__all__ = [
    "TOUCHED",
    "build_stock",
    "check_stock_name",
    "default_stock_name",
    "prefill_name",
    "resolved_args",
    "runs_dp_attention",
    "torch_native_attention",
    "wrap_factories",
]

_REGISTRY = "sglang.srt.layers.attention.attention_registry"
_OVERRIDES = "sglang.srt.arg_groups.model_override_base"
_RESOLUTION = "sglang.srt.arg_groups.overrides"

TOUCHED = (
    Touch(
        f"{_REGISTRY}:ATTENTION_BACKENDS",
        why="with `--attention-backend prefix` SGLang builds no stock backend itself; with "
        "SGLANG_PREFIX=1 it builds ours instead of it",
        releases=f"{RELEASES}, a dict from names to factories",
        kind=dict,
    ),
    Touch(
        f"{_RESOLUTION}:resolved_view",
        why="settings as they were typed are not those that SGLang runs with",
        releases=f"{RELEASES}; defined in `model_override_base.py` from 0.5.19 on",
        parameters=("server_args",),
    ),
)


def resolved_args(model_runner: ModelRunner) -> ServerArgs:
    """The runner's settings, with everything that SGLang resolved on top of them.

    ``model_runner.server_args`` holds what the operator typed; what SGLang decided on top of it
    (deterministic inference implied by another flag, graphs switched off, a model's own attention
    backend) comes from ``resolved_view``.
    """
    resolved: ServerArgs = import_module(_RESOLUTION).resolved_view(model_runner.server_args)
    return resolved


def runs_dp_attention(args: ServerArgs) -> bool:
    """Whether ranks decode batches of their own, by resolved settings."""
    if not hasattr(args, "attn_dp_size"):  # before 0.5.22
        return args.enable_dp_attention
    # A process that joins such a server later is a rank of it, in a group of its own.
    return args.attn_dp_size > 1 or args.ep_join_mode == "scale"


def default_stock_name(model_runner: ModelRunner, own_name: str) -> str:
    """The stock backend that SGLang would have used for this runner's decode.

    From 0.5.20 on that is what it has chosen without our name (`resolution.py`). Before, it is what
    the user named with ``--attention-backend``, if it is not us, else the default of the
    architecture; on the CPU ``intel_amx`` where there is AMX and ``torch_native`` elsewhere.
    The default comes from ``get_default_attn_backend(server_args, use_mla, model_config)`` in
    ``arg_groups/model_override_base.py`` from 0.5.19 on, from the method
    ``ServerArgs._get_default_attn_backend(use_mla, model_config)`` in 0.5.17 and 0.5.18. When both
    are gone, the backend factory fails.
    """
    if (choice := stock_choice(model_runner.server_args)) is not None:
        return choice.decode
    server_args = resolved_args(model_runner)
    if server_args.attention_backend not in (None, own_name):
        return str(server_args.attention_backend)
    if model_runner.device == "cpu":
        from sglang.srt.utils import cpu_has_amx_support

        return "intel_amx" if cpu_has_amx_support() else "torch_native"
    args, model = model_runner.server_args, model_runner.model_config
    choose = getattr(optional_module(_OVERRIDES), "get_default_attn_backend", None)
    if choose is not None:
        return str(choose(args, model_runner.use_mla_backend, model))
    return str(args._get_default_attn_backend(model_runner.use_mla_backend, model))


def prefill_name(model_runner: ModelRunner, own_name: str) -> str | None:
    """The backend that serves prefill beside ours; None if our delegate does."""
    args = resolved_args(model_runner)
    named = args.prefill_attention_backend or args.attention_backend
    return None if named in (None, own_name) else str(named)


def check_stock_name(name: str, own_name: str) -> None:
    """See to it that a stock backend of this SGLang bears the name.

    Raises:
        ValueError: SGLang has no such backend, or it is ours.
    """
    legal = sorted(set(import_module(_REGISTRY).ATTENTION_BACKENDS) - {own_name})
    if name not in legal:
        raise ValueError(
            f"SGLANG_PREFIX_STOCK_BACKEND={name!r} is not a stock attention backend of this "
            f"SGLang; legal: {', '.join(legal)}"
        )


def build_stock(model_runner: ModelRunner, name: str, own_name: str) -> Any:
    """Build the stock backend ``name`` for a runner.

    Raises:
        ValueError: see :func:`check_stock_name`.
    """
    check_stock_name(name, own_name)
    # From 0.5.18 on runners bear the names while their backends are built, and stock backends and
    # what wraps ours (hybrid models on Blackwell) look for names that they know. SGLang puts its
    # own back when all are built.
    if getattr(model_runner, "prefill_attention_backend_str", None) == own_name:
        model_runner.prefill_attention_backend_str = name
    if getattr(model_runner, "decode_attention_backend_str", None) == own_name:
        model_runner.decode_attention_backend_str = name
    factory = import_module(_REGISTRY).ATTENTION_BACKENDS[name]
    if isinstance(factory, _Wrapping):
        factory = factory.factory
    return factory(model_runner)


def wrap_factories(own_name: str, create: Callable[[ModelRunner, str], Any]) -> None:
    """Have SGLang build our backend wherever it would build a stock one for decode. Idempotent.

    SGLang knows nothing of it: every rule of its that goes by a backend's name finds the stock
    backend's. A runner that decodes with another backend than it prefills with has both built;
    only the former is ours. Draft models keep their own. Backends that are registered later than
    this is called are not wrapped.

    Args:
        own_name: our name, which is never wrapped.
        create: makes a backend from a runner and the name of the stock backend.
    """
    registry = import_module(_REGISTRY).ATTENTION_BACKENDS
    for name, factory in registry.items():
        if name != own_name and not isinstance(factory, _Wrapping):
            registry[name] = _Wrapping(name, factory, create)


@dataclass(frozen=True, slots=True)
class _Wrapping:
    """What stands in the place of a factory of SGLang's."""

    name: str
    factory: Callable[[ModelRunner], Any]
    create: Callable[[ModelRunner, str], Any]

    def __call__(self, model_runner: ModelRunner) -> Any:
        """Build ours over it, or it alone where it does not decode for the target model."""
        args = resolved_args(model_runner)
        decodes = self.name == (args.decode_attention_backend or args.attention_backend)
        if model_runner.is_draft_worker or not decodes:
            return self.factory(model_runner)
        return self.create(model_runner, self.name)


def torch_native_attention() -> Callable[..., None]:
    """SGLang's attention on a CPU, alone, which benchmarks compare with layer by layer.

    They are ``_run_sdpa_forward_decode`` and ``_run_sdpa_forward_extend`` of
    ``TorchNativeAttnBackend`` of 0.5.17 to 0.5.23, methods that use nothing of their instance,
    which needs a model to build. When they are gone, the import or the first call fails, and
    benchmarks name the stock side as absent. Imports SGLang, which takes seconds.

    Returns:
        ``(q, out, k, v, req_to_token, req_pool_indices, seq_lens, scaling, query_lens)``: q and out
        are [R, Hq, D], k and v [slots, Hkv, D], the query tokens of each request [B], None for one
        each, the rest as SGLang has them.
    """
    with warnings.catch_warnings():  # of quantisation kernels that a CPU does not have
        warnings.simplefilter("ignore")
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    backend = object.__new__(TorchNativeAttnBackend)
    decode, extend = backend._run_sdpa_forward_decode, backend._run_sdpa_forward_extend

    def attend(
        q: torch.Tensor,
        out: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        scaling: float,
        query_lens: torch.Tensor | None,
    ) -> None:
        table = (req_to_token, req_pool_indices, seq_lens)
        options: dict[str, Any] = {"scaling": scaling, "enable_gqa": q.shape[1] != k.shape[1]}
        if query_lens is None:
            decode(q, out, k, v, *table, None, **options)
        else:
            cached = seq_lens - query_lens
            extend(q, out, k, v, *table, cached, query_lens, causal=True, **options)

    return attend
