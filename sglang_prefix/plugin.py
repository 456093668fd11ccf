"""SGLang's way in: the plugin entry point and the factory of the backend `prefix`.

SGLang calls `register` in every process of a server, also in those that never touch attention,
and turns a failure there into a log line. So `register` only makes the name known; everything
that costs time or can fail waits for `create_prefix_backend`, which runs in the processes that
really use the backend and whose exception ends the server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_prefix.config import BACKEND_NAME, PrefixConfig, wrap_requested

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.model_runner import ModelRunner

    from prefix_patches.resolution import StockChoice

__all__ = ["create_prefix_backend", "register"]


def register() -> None:
    """Make `prefix` a legal value of SGLang's attention backend flags. May be called again.

    With ``SGLANG_PREFIX=1`` no flag is needed: whatever backend SGLang chooses is ours over it.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    from prefix_patches.resolution import resolve_without

    resolve_without(BACKEND_NAME, _named_stock, _check_choice)
    # The factory goes first: a name that can be chosen but not built would be the worse half.
    register_attention_backend(BACKEND_NAME)(create_prefix_backend)
    if BACKEND_NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([BACKEND_NAME])
    if wrap_requested():
        from prefix_patches.stock_backend import wrap_factories

        wrap_factories(BACKEND_NAME, create_prefix_backend)


def _named_stock() -> str | None:
    from prefix_patches.stock_backend import check_stock_name

    named = PrefixConfig.from_env().stock_backend
    if named is not None:  # before SGLang's rules meet a name that nobody knows
        check_stock_name(named, BACKEND_NAME)
    return named


def _check_choice(choice: StockChoice) -> None:
    from sglang_prefix.backend.stock_rules import check_model

    check_model(choice.architecture, choice.decode, uses_mla=choice.uses_mla)


def create_prefix_backend(runner: ModelRunner, wrapped: str | None = None) -> AttentionBackend:
    """Build the backend for one model runner.

    Args:
        runner: SGLang's model runner, as handed over by its attention registry.
        wrapped: the stock backend that SGLang was about to build; None where our name was given.

    Raises:
        RuntimeError: SGLang is outside the supported range; `backend/create.py` raises for
            anything else that is missing.
    """
    from prefix_patches.versions import check_sglang_version

    # Before our backend is imported: on a foreign release that import may fail obscurely.
    check_sglang_version()

    from sglang_prefix.backend.create import create_backend

    return create_backend(runner, wrapped)
