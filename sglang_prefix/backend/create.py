"""Building the backend for a model runner, or leaving the runner to SGLang's own."""

from __future__ import annotations

import logging

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from prefix_patches.attributes import ModelRunner
from prefix_patches.install import check_attributes, install
from prefix_patches.stock_backend import build_stock, default_stock_name
from sglang_prefix.backend.backend import PrefixAttnBackend
from sglang_prefix.backend.stock_rules import check_cpu_prefill, check_stock_rules, why_refused
from sglang_prefix.config import BACKEND_NAME, PrefixConfig

__all__ = ["create_backend"]

logger = logging.getLogger(__name__)


def create_backend(model_runner: ModelRunner, wrapped: str | None = None) -> AttentionBackend:
    """Build the backend for one model runner: settings, patches, stock backend, ours.

    Args:
        model_runner: SGLang's.
        wrapped: the stock backend that SGLang was about to build, with ``SGLANG_PREFIX=1``; None
            where our name was given. A model of which nothing can be packed then gets that backend
            alone, since its name breaks nothing.

    Raises:
        RuntimeError: SGLang is not supported or lacks something that we need.
        ValueError: a setting is not legal, or does not fit the stock backend.
    """
    config = PrefixConfig.from_env()
    if wrapped is not None:
        if config.stock_backend is not None:
            raise ValueError(
                f"SGLANG_PREFIX_STOCK_BACKEND={config.stock_backend} stands for the name "
                f"{BACKEND_NAME}, which was not given. With SGLANG_PREFIX=1 name the backend to "
                "SGLang: --attention-backend"
            )
        (architecture, *_) = model_runner.model_config.hf_config.architectures
        if why := why_refused(architecture, wrapped):
            logger.info("prefix attention: %s is left to %s: it %s", architecture, wrapped, why)
            return build_stock(model_runner, wrapped, BACKEND_NAME)
    logger.info("prefix attention: settings %s", config)
    install()
    check_attributes(model_runner)
    stock_name = wrapped or config.stock_backend or default_stock_name(model_runner, BACKEND_NAME)
    if wrapped is None:  # else SGLang's own rules know the name
        check_cpu_prefill(model_runner, BACKEND_NAME)
        check_stock_rules(stock_name, model_runner)
    stock = build_stock(model_runner, stock_name, BACKEND_NAME)
    return PrefixAttnBackend(model_runner, stock, stock_name, config)
