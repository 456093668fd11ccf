"""``resolved_view(server_args)``: the settings that SGLang really runs with.

Why: ``model_runner.server_args`` holds what the operator typed; what SGLang decided on top of it
(deterministic inference implied by another flag, graphs switched off, a model's own attention
backend) lies beside it. Releases: in ``arg_groups/overrides.py`` from 0.5.17 on, defined in
``arg_groups/model_override_base.py`` from 0.5.19 on. When it is gone: the typed settings are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["resolved_args"]

_HOMES = ("sglang.srt.arg_groups.overrides", "sglang.srt.arg_groups.model_override_base")


def resolved_args(model_runner: Any) -> Any:
    """The runner's settings, with everything that SGLang resolved on top of them."""
    for home in _HOMES:
        try:
            resolve = getattr(import_module(home), "resolved_view", None)
        except ImportError:
            continue
        if resolve is not None:
            return resolve(model_runner.server_args)
    return model_runner.server_args
