"""The SGLang attention backend ``prefix``: our decode, a stock backend for everything else."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention

import prefix_patches
from prefix_patches.attention_names import build_stock, default_stock_name, prefill_name
from prefix_patches.handover import ensure_handover
from prefix_patches.kv_write import applies_kv_scales, write_kv
from prefix_patches.scheduler_internal_state import report_with
from sglang_prefix.batch_planner import BatchPlanner, ShapeRunner
from sglang_prefix.config import PrefixConfig
from sglang_prefix.counters import BackendCounters
from sglang_prefix.fallback import REASONS, layer_reason, server_reason
from sglang_prefix.packing import AttentionShape
from sglang_prefix.planner import PackPlanner, profile_for
from sglang_prefix.plugin import BACKEND_NAME
from sglang_prefix.runner import PlanRunner, choose_executor
from sglang_prefix.stock_rules import check_cpu_prefill, check_stock_rules

__all__ = ["PrefixAttnBackend", "create_backend"]

logger = logging.getLogger(__name__)

# What SGLang sets on the halves of two-batch overlap (0.5.17 to 0.5.23).
_HALF_OF = "tbo_parent_token_range"


def create_backend(model_runner: Any) -> PrefixAttnBackend:
    """Build the backend for one model runner: settings, patches, stock backend, ours.

    Raises:
        RuntimeError: SGLang is not supported or lacks something that we need.
        ValueError: a setting is not legal, or does not fit the stock backend.
    """
    config = PrefixConfig.from_env()
    prefix_patches.install()
    check_cpu_prefill(model_runner, BACKEND_NAME)
    stock_name = config.stock_backend or default_stock_name(model_runner, BACKEND_NAME)
    check_stock_rules(stock_name, model_runner)
    stock = build_stock(model_runner, stock_name, BACKEND_NAME)
    return PrefixAttnBackend(model_runner, stock, stock_name, config)


class PrefixAttnBackend(AttentionBackend):
    """Owns a stock backend and takes plain decode of full-attention layers off it.

    Which layers are taken is decided here, once. Everything that is not defined below, methods
    and attributes alike, is the stock backend's.

    Args:
        model_runner: SGLang's model runner; its pools and its model exist, its graphs do not.
        stock: the backend to delegate to.
        stock_name: its name, for messages.
        config: settings.
    """

    def __init__(
        self, model_runner: Any, stock: AttentionBackend, stock_name: str, config: PrefixConfig
    ) -> None:
        self.stock = stock
        self.counters = BackendCounters()
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        layers = [m for m in model_runner.model.modules() if isinstance(m, RadixAttention)]
        kv_dtype = self.token_to_kv_pool.dtype
        stock_names = {stock_name, prefill_name(model_runner, BACKEND_NAME) or stock_name}
        reasons = {
            layer.layer_id: layer_reason(
                layer,
                stock_names,
                kv_is_8_bit=applies_kv_scales(self.token_to_kv_pool),
                same_dtype=kv_dtype == model_runner.dtype,
            )
            for layer in layers
        }
        self.counters.delegated_layers = {k: reason for k, reason in reasons.items() if reason}
        self._server_reason = server_reason(model_runner, config.gate)
        # The layers that we take. A layer that is not among them, for whatever reason, is stock's.
        self._runner_of: dict[RadixAttention, PlanRunner] = {}
        self._batches: BatchPlanner | None = None
        self._packed = False  # this step runs under a plan
        self._stock_is_ready = False  # the stock backend has this step's metadata
        self._fell_back = False  # this step has been counted as one that the stock backend served
        self._failed = False  # a failure has been logged with its traceback
        self._verify = config.verify
        if self._server_reason is None:
            self._build_runners(model_runner, layers, config)
        ensure_handover(model_runner)
        report_with(self.counters.as_dict)
        taken = 0 if self._server_reason else len(layers) - len(self.counters.delegated_layers)
        logger.info(
            "prefix attention: %d of %d layers, executor %s, stock backend %s, gate %s, "
            "policy %s%s",
            taken,
            len(layers),
            "/".join(sorted({r.executor_name for r in self._runner_of.values()})) or "none",
            stock_name,
            config.gate,
            config.policy,
            f", inactive: {self._server_reason}" if self._server_reason else "",
        )
        for reason in sorted(set(self.counters.delegated_layers.values())):
            ids = [k for k, found in self.counters.delegated_layers.items() if found == reason]
            logger.info("prefix attention: layers %s are stock's (%s)", ids, REASONS[reason])

    def __getattr__(self, name: str) -> Any:
        # Reached for names that neither we nor SGLang's base class define.
        if name.startswith("__") or "stock" not in vars(self):
            raise AttributeError(name)
        return getattr(self.stock, name)

    @property
    def forward_metadata(self) -> Any:
        """The stock backend's metadata; SGLang also assigns it."""
        return self.stock.forward_metadata

    @forward_metadata.setter
    def forward_metadata(self, value: Any) -> None:
        self.stock.forward_metadata = value

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Eager entry point: decide who serves the batch, and prepare it."""
        self._begin_step(forward_batch)
        # A model with delegated layers needs the stock metadata in every step.
        if not self._packed or self.counters.delegated_layers:
            self._prepare_stock(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Graph capture and replay: always the stock backend, so no plan is ever captured."""
        self._packed = False
        self._stock_is_ready = True
        if forward_batch.forward_mode.is_decode() and not in_capture:
            self.counters.fall_back(self._server_reason or "cuda-graph")
        self.stock.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Attention of one layer: ours for decode, the stock backend's for every other mode."""
        if forward_batch.forward_mode.is_decode():
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return self.stock.forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Decode one layer; see :class:`AttentionBackend`. Writes KV exactly once per call."""
        runner = self._runner_for(q, layer, kwargs)
        if runner is None:
            self._prepare_stock(forward_batch)
            return self.stock.forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if save_kv_cache and k is not None and v is not None:
            write_kv(self.token_to_kv_pool, layer, forward_batch, k, v)
        try:
            return self._run(runner, q, layer)
        except Exception:
            if self._verify:
                raise
            self._log_failure(f"layer {layer.layer_id}")
            self._give_up_step("error")
            self._prepare_stock(forward_batch)
            # k and v have been written, and perhaps scaled in place: not a second time.
            return self.stock.forward(q, k, v, layer, forward_batch, False, **kwargs)

    def _build_runners(
        self, model_runner: Any, layers: Iterable[RadixAttention], config: PrefixConfig
    ) -> None:
        device = self.req_to_token_pool.req_to_token.device
        kv_dtype = self.token_to_kv_pool.dtype
        shapes: dict[AttentionShape, ShapeRunner] = {}
        for layer in layers:
            if layer.layer_id in self.counters.delegated_layers:
                continue
            shape = _shape_of(layer, model_runner.dtype, kv_dtype)
            if shape not in shapes:
                executor = choose_executor(config.executor, device, model_runner.dtype, kv_dtype)
                runner = PlanRunner(shape, device, executor, check_slots=config.verify)
                profile = profile_for(runner.executor_name)
                shapes[shape] = ShapeRunner(
                    PackPlanner(shape, profile, policy=config.policy), runner
                )
            self._runner_of[layer] = shapes[shape].runner
        if not shapes:
            self._server_reason = "no-layer"
            return
        self._batches = BatchPlanner(
            ensure_handover(model_runner),
            self.req_to_token_pool.req_to_token,
            model_runner.page_size,
            list(shapes.values()),
            self.counters,
            verify=config.verify,
        )

    def _begin_step(self, forward_batch: Any) -> None:
        self._packed = self._stock_is_ready = self._fell_back = False
        if not forward_batch.forward_mode.is_decode():
            return
        reason = self._server_reason or self._plan(forward_batch)
        if reason is None:
            self._packed = True
            self.counters.packed_steps += 1
        else:
            self._fell_back = True
            self.counters.fall_back(reason)

    def _plan(self, forward_batch: Any) -> str | None:
        assert self._batches is not None
        if getattr(forward_batch, "spec_info", None) is not None:
            return "speculative"
        # The halves come to backends of their own, with the schedule batch of the whole.
        if any(getattr(forward_batch, name, None) for name in ("tbo_children", _HALF_OF)):
            return "two-batch-overlap"
        try:
            return self._batches.prepare(forward_batch)
        except Exception:
            self._batches.forget()
            if self._verify:
                raise
            self._log_failure("planning")
            return "error"

    def _runner_for(
        self, q: torch.Tensor, layer: RadixAttention, kwargs: dict[str, Any]
    ) -> PlanRunner | None:
        runner = self._runner_of.get(layer)
        if runner is None or not self._packed:
            return None
        unknown = [name for name, value in kwargs.items() if value is not None]
        if unknown:
            # The model will pass it at every step: the layer is stock's from now on.
            del self._runner_of[layer]
            self.counters.delegated_layers[layer.layer_id] = "unknown-argument"
            if not self._runner_of:
                self._server_reason = "no-layer"
            self._give_up_step("unknown-argument", ", ".join(unknown))
            return None
        if q.numel() != len(runner.seq_lens) * layer.tp_q_head_num * layer.qk_head_dim:
            self._give_up_step("other-batch")
            return None
        return runner

    def _give_up_step(self, reason: str, detail: str = "") -> None:
        """Leave the rest of this step to the stock backend, and count it there."""
        self._packed = False
        if self._batches is not None:
            self._batches.forget()
        if not self._fell_back:
            self._fell_back = True
            self.counters.packed_steps -= 1
            if self._batches is not None:
                self._batches.uncount_step()
            self.counters.fall_back(reason, detail)

    def _log_failure(self, what: str) -> None:
        """Log the exception at hand, with its traceback the first time only."""
        logger.error("prefix attention: %s failed", what, exc_info=not self._failed)
        self._failed = True

    def _prepare_stock(self, forward_batch: Any) -> None:
        if not self._stock_is_ready:
            self._stock_is_ready = True
            self.stock.init_forward_metadata(forward_batch)

    def _run(self, runner: PlanRunner, q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = q.new_empty(q.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        scaled = applies_kv_scales(self.token_to_kv_pool)
        runner.run(
            q,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            out,
            sm_scale=layer.scaling,
            logit_cap=layer.logit_cap or 0.0,
            k_scale=layer.k_scale if scaled and layer.k_scale is not None else 1.0,
            v_scale=layer.v_scale if scaled and layer.v_scale is not None else 1.0,
        )
        return out.view(q.shape[0], -1)


def _shape_of(layer: RadixAttention, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> AttentionShape:
    return AttentionShape(
        layer.tp_q_head_num,
        layer.tp_k_head_num,
        layer.qk_head_dim,
        layer.v_head_dim,
        q_dtype.itemsize,
        kv_dtype.itemsize,
    )


class _StockAttribute:
    """Hands an attribute of the base class over to the stock backend.

    Not a data descriptor: what SGLang assigns on our backend stays on our backend.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, backend: PrefixAttnBackend | None, owner: type) -> Any:
        return self if backend is None else getattr(backend.stock, self._name)


# SGLang's base class answers for what a backend does not define. Ours asks the stock backend
# instead, so that a release's new hooks reach it without a change here.
for _name in set(vars(AttentionBackend)) - set(vars(PrefixAttnBackend)):
    if not _name.startswith(("__", "_abc")):
        setattr(PrefixAttnBackend, _name, _StockAttribute(_name))
