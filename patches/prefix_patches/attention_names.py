"""SGLang's attention registry and default choice: which stock backend to delegate to.

Why: with ``--attention-backend prefix`` SGLang picks no stock backend itself, and a user's batch
must run on the one that it would have picked. Releases and symbols:

* ``ATTENTION_BACKENDS`` in ``layers/attention/attention_registry.py``, all releases;
* ``get_default_attn_backend(server_args, use_mla, model_config)`` in
  ``arg_groups/model_override_base.py`` from 0.5.19, the method
  ``ServerArgs._get_default_attn_backend(use_mla, model_config)`` in 0.5.17 and 0.5.18.

When they are gone: the backend factory refuses to start.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from prefix_patches.resolved_args import resolved_args

__all__ = ["build_stock", "default_stock_name", "missing", "prefill_name"]

_REGISTRY = "sglang.srt.layers.attention.attention_registry"
_DEFAULTS = "sglang.srt.arg_groups.model_override_base"


def missing() -> list[str]:
    """What is not as we need it."""
    try:
        registry = import_module(_REGISTRY)
    except ImportError as error:
        return [f"{_REGISTRY} ({error})"]
    if not isinstance(getattr(registry, "ATTENTION_BACKENDS", None), dict):
        return [f"{_REGISTRY}.ATTENTION_BACKENDS (not a dict)"]
    return []


def default_stock_name(model_runner: Any, own_name: str) -> str:
    """The stock backend that SGLang would have used for this runner's decode.

    That is what the user named with ``--attention-backend``, if it is not us, else the default of
    the architecture; on the CPU ``intel_amx`` where there is AMX and ``torch_native`` elsewhere.
    """
    server_args = resolved_args(model_runner)
    if server_args.attention_backend not in (None, own_name):
        return str(server_args.attention_backend)
    if model_runner.device == "cpu":
        from sglang.srt.utils import cpu_has_amx_support

        return "intel_amx" if cpu_has_amx_support() else "torch_native"
    defaults = _optional(_DEFAULTS)
    if hasattr(defaults, "get_default_attn_backend"):
        return str(
            defaults.get_default_attn_backend(
                model_runner.server_args, model_runner.use_mla_backend, model_runner.model_config
            )
        )
    return str(
        model_runner.server_args._get_default_attn_backend(
            model_runner.use_mla_backend, model_runner.model_config
        )
    )


def prefill_name(model_runner: Any, own_name: str) -> str | None:
    """The backend that serves prefill where the user named one, else None for our delegate."""
    args = resolved_args(model_runner)
    named = getattr(args, "prefill_attention_backend", None)
    return None if named in (None, own_name) else str(named)


def build_stock(model_runner: Any, name: str, own_name: str) -> Any:
    """Build the stock backend ``name`` for a runner.

    Raises:
        ValueError: SGLang has no such backend, or it is ours.
    """
    backends = import_module(_REGISTRY).ATTENTION_BACKENDS
    legal = sorted(set(backends) - {own_name})
    if name not in legal:
        raise ValueError(
            f"SGLANG_PREFIX_STOCK_BACKEND={name!r} is not a stock attention backend of this "
            f"SGLang; legal: {', '.join(legal)}"
        )
    return backends[name](model_runner)


def _optional(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        return None
