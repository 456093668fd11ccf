"""SGLang's resolution of its arguments, run as if our name had not been given.

SGLang has rules that go by the names of attention backends: a model brings its own backend where
none is named, lists say what a model runs on, page sizes and draft backends follow. None of them
knows our name. So it is taken out of the flags before the first rule and put back behind the last:
what SGLang has chosen meanwhile is the stock backend that it would run without us, and that is what
we delegate to.

The way in is SGLang's own: plugins may wrap named steps of the resolution
(``arg_groups/resolution_hooks.py``, 0.5.20 to 0.5.23). Before 0.5.20 there is none. The rules then
meet our name, and `stock_backend.default_stock_name` asks SGLang for the default of its hardware.
When a step or a function of it is gone, registration fails, and SGLang refuses our name as unknown.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefix_patches.attributes import ServerArgs
from prefix_patches.patch import optional_module

__all__ = ["StockChoice", "resolve_without", "stock_choice"]

# Steps of the resolution. Before the first nothing reads the names of attention backends; behind
# the last only the fused kernels of AMD and NVIDIA do, and those must see that we decode.
_FIRST, _LAST = "handle_model_source_paths", "handle_model_capability_adjustments"
# What our declarations are filed under in SGLang's list of them.
_SOURCE = "sglang-prefix"
# Of a `ServerArgs`: its choice. It travels to the schedulers with SGLang's own bookkeeping.
_CHOICE_ATTRIBUTE = "_sglang_prefix_stock_choice"


@dataclass(frozen=True, slots=True)
class StockChoice:
    """What SGLang runs a model on without us.

    Attributes:
        prefill, decode: names of attention backends.
        architecture: the model's, as its configuration names it.
        uses_mla: whether it has multi-head latent attention.
    """

    prefill: str
    decode: str
    architecture: str
    uses_mla: bool


def stock_choice(server_args: ServerArgs) -> StockChoice | None:
    """What SGLang has chosen for these arguments; None where nobody asked it (before 0.5.20)."""
    found: StockChoice | None = getattr(server_args, _CHOICE_ATTRIBUTE, None)
    return found


@functools.cache
def resolve_without(
    own_name: str, named_stock: Callable[[], str | None], check: Callable[[StockChoice], None]
) -> None:
    """Have SGLang resolve arguments that choose ``own_name`` for decode without that name.

    Args:
        own_name: our name.
        named_stock: the stock backend that the user named to us; it stands in for our name.
        check: called with the outcome; what it raises ends the start.

    Arguments that choose it for prefill alone end the start with a ValueError.

    Raises:
        ValueError: this SGLang has hooks, but not for the steps that we need.
    """
    hooks = optional_module("sglang.srt.arg_groups.resolution_hooks")
    if hooks is None:
        return
    from sglang.srt.arg_groups.overrides import attention_backends_of, declare_resolution

    @hooks.register_resolution_hook(_FIRST)  # type: ignore[untyped-decorator]
    def hide(server_args: ServerArgs, previous: Callable[[ServerArgs], None]) -> None:
        # The record keeps what the operator typed; resolution reads declarations over it.
        prefill, decode = attention_backends_of(server_args)
        if prefill == own_name != decode:
            raise ValueError(
                f"{own_name} is named for prefill, and decode is left to {decode}, so nothing "
                f"could be packed. Name it for decode: --decode-attention-backend {own_name}"
            )
        if decode == own_name:
            typed = {
                "attention_backend": server_args.attention_backend,
                "prefill_attention_backend": server_args.prefill_attention_backend,
                "decode_attention_backend": server_args.decode_attention_backend,
            }
            ours = [flag for flag, name in typed.items() if name == own_name]
            declare_resolution(server_args, _SOURCE, **dict.fromkeys(ours, named_stock()))
        previous(server_args)

    @hooks.register_resolution_hook(_LAST)  # type: ignore[untyped-decorator]
    def show(server_args: ServerArgs, previous: Callable[[ServerArgs], None]) -> None:
        previous(server_args)
        prefill, decode = attention_backends_of(server_args)
        if decode == own_name:
            choice = _choice_of(server_args)
            check(choice)
            setattr(server_args, _CHOICE_ATTRIBUTE, choice)
            declared = _declarations(server_args, choice, own_name, whole=prefill == own_name)
            declare_resolution(server_args, _SOURCE, **declared)


def _choice_of(server_args: ServerArgs) -> StockChoice:
    from sglang.srt.arg_groups.overrides import (
        attention_backends_of,
        model_config_of,
        resolved_view,
        use_mla_backend,
    )

    prefill, decode = attention_backends_of(resolved_view(server_args))
    (architecture, *_) = model_config_of(server_args).hf_config.architectures
    return StockChoice(prefill, decode, architecture, use_mla_backend(server_args))


def _declarations(
    server_args: ServerArgs, choice: StockChoice, own_name: str, *, whole: bool
) -> dict[str, Any]:
    """The flags with our name in them again, and with the draft model on the stock backend."""
    from sglang.srt.arg_groups.overrides import resolved_view

    alike = choice.prefill == choice.decode
    declared: dict[str, Any] = {"decode_attention_backend": own_name}
    if whole and alike:
        declared |= {"attention_backend": own_name, "prefill_attention_backend": None}
    elif whole:
        declared["prefill_attention_backend"] = choice.prefill
    # SGLang makes draft backends by name, this one where none is given, and knows none for ours.
    view = resolved_view(server_args)
    if view.speculative_algorithm and not view.speculative_draft_attention_backend and alike:
        declared["speculative_draft_attention_backend"] = choice.decode
    return declared
