"""The SGLang attention backend ``prefix``: our decode, a stock backend for everything else."""

from __future__ import annotations

import logging
from statistics import median
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention

from prefix_patches.install import install
from prefix_patches.kv_pool import applies_kv_scales, write_kv
from prefix_patches.observability import append_with, report_with
from prefix_patches.schedule_context import ensure_schedule_context
from prefix_patches.stock_backend import build_stock, default_stock_name, prefill_name
from sglang_prefix.backend.counters import BackendCounters
from sglang_prefix.backend.decode_planner import DecodePlanner, is_idle
from sglang_prefix.backend.delegation import DelegatingBackend
from sglang_prefix.backend.fallback import (
    REASONS,
    captures_decode,
    has_dp_attention,
    has_tensor_parallelism,
    server_reason,
)
from sglang_prefix.backend.layers import (
    ServedLayers,
    attention_layers,
    find_delegated,
    serve_layers,
)
from sglang_prefix.backend.log_startup import log_startup
from sglang_prefix.backend.metrics import metrics_of
from sglang_prefix.backend.stock_rules import check_cpu_prefill, check_stock_rules
from sglang_prefix.backend.warm_up import warm_up
from sglang_prefix.config import PrefixConfig
from sglang_prefix.gate import make_gate
from sglang_prefix.plugin import BACKEND_NAME
from sglang_prefix.runner import PlanRunner

__all__ = ["PrefixAttnBackend", "create_backend"]

PACKED, STOCK = "packed", "stock"  # labels of decode graphs

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
    logger.info("prefix attention: settings %s", config)
    install()
    check_cpu_prefill(model_runner, BACKEND_NAME)
    stock_name = config.stock_backend or default_stock_name(model_runner, BACKEND_NAME)
    check_stock_rules(stock_name, model_runner)
    stock = build_stock(model_runner, stock_name, BACKEND_NAME)
    return PrefixAttnBackend(model_runner, stock, stock_name, config)


class PrefixAttnBackend(DelegatingBackend):
    """Owns a stock backend and takes plain decode of full-attention layers off it.

    Which layers are taken is decided here, once.

    Decode graphs are captured once per label of the schedule, "packed" with our kernels and
    "stock" without, and each step replays one of the two. Whatever changes from step to step
    stands in device buffers of fixed addresses, which are filled before the replay. All ranks of a
    tensor-parallel group must replay the same label: the all-reduce inside a graph reads what the
    other ranks' graphs wrote. They do, because they decide by the same numbers of the host.

    A step begins in one of three ways, each of which sets what the layers go by:

    ============================================  ============================================
    ``init_forward_metadata``                     eager: prepare, packed if no reason against it
    ``init_forward_metadata_out_graph``, capture  packed if the label says so; nothing is counted
    ``init_forward_metadata_out_graph``, replay   as eager, and choose the label
    ============================================  ============================================

    Args:
        model_runner: SGLang's model runner; its pools and its model exist, its graphs do not.
        stock: the backend to delegate to.
        stock_name: its name, for messages.
        config: settings.
    """

    def __init__(
        self, model_runner: Any, stock: AttentionBackend, stock_name: str, config: PrefixConfig
    ) -> None:
        super().__init__(stock)
        self.counters = BackendCounters.of(config)
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        stock_names = {stock_name, prefill_name(model_runner, BACKEND_NAME) or stock_name}
        self.counters.delegated_layers = find_delegated(model_runner, stock_names)
        self._server_reason = server_reason(model_runner, config.gate)
        # The layers that we take. A layer that is not among them, for whatever reason, is stock's.
        self._runner_of: dict[RadixAttention, PlanRunner] = {}
        self._batches: DecodePlanner | None = None
        self._schedule = ensure_schedule_context(model_runner)
        self._ranks_must_agree = False  # on the label of the graph to replay
        self._has_one_label = False  # graphs must not be captured under a second one
        self._stock_captured_for = 0  # batch size that the stock backend is ready to capture
        self._served: ServedLayers | None = None
        self._packed = False  # this step runs under a plan
        self._in_graph = False  # its kernels are a graph's
        self._stock_is_ready = False  # the stock backend has this step's metadata
        self._fell_back = False  # this step has been counted as one that the stock backend served
        self._failed = False  # a failure has been logged with its traceback
        self._verify = config.verify
        self._metrics = metrics_of(model_runner)
        report_with(self._report)
        if self._server_reason is None:
            self._serve(model_runner, stock_name, config)
            append_with(self.counters.log_text)
        log_startup(
            self._served,
            len(attention_layers(model_runner)),
            self.counters.delegated_layers,
            self._schedule.graph_labels,
            stock_name,
            config,
            self._server_reason,
        )

    def _serve(self, model_runner: Any, stock_name: str, config: PrefixConfig) -> None:
        served = serve_layers(model_runner, self.counters.delegated_layers, config)
        if not served.shapes:
            self._server_reason = "no-layer"
            return
        if captures_decode(model_runner):
            if served.executor_names != ["triton"]:
                self._server_reason = "cuda-graph"
                return
            labels = (PACKED, STOCK) if config.gate == "auto" else (PACKED,)
            # Ranks with batches of their own cannot agree on a label.
            self._has_one_label = has_dp_attention(model_runner)
            self._schedule.graph_labels = labels
            self._ranks_must_agree = len(labels) > 1 and has_tensor_parallelism(model_runner)
        self._served = served
        self._runner_of = served.runner_of
        self._batches = DecodePlanner(
            self._schedule,
            self.req_to_token_pool.req_to_token,
            model_runner.page_size,
            served.shapes,
            self.counters,
            gate=make_gate(config.gate, served.device, stock_name),
            verify=config.verify,
        )
        if served.workspace is not None:
            seconds = warm_up(self._batches, served, self._run, model_runner.dtype)
            logger.info("prefix attention: kernels compiled and run once in %.1f s", seconds)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Eager entry point: decide who serves the batch, and prepare it."""
        self._begin_step(forward_batch)
        if self._needs_stock():
            self._prepare_stock(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Buffers for graphs of up to ``max_bs`` requests: ours exist, so this only checks them.

        Raises:
            ValueError: a batch could outgrow the workspace, and there is no other graph to go to.
        """
        self.stock.init_cuda_graph_state(max_bs, max_num_tokens)
        self._stock_captured_for = 0
        workspace = self._served.workspace if self._served else None
        labels = self._schedule.graph_labels
        if workspace is None or workspace.sure_rows >= max_bs or labels != (PACKED,):
            return
        ways_out = "SGLANG_PREFIX_WORKSPACE_MIB, --cuda-graph-max-bs-decode or --context-length"
        sure = f"the workspace is sure to hold {workspace.sure_rows} requests of {max_bs}"
        if self._has_one_label:
            raise ValueError(f"{sure}, and ranks must replay one graph; change {ways_out}")
        # A batch that outgrows the workspace needs a graph, too.
        self._schedule.graph_labels = (PACKED, STOCK)
        logger.warning("prefix attention: %s, so stock is captured too; see %s", sure, ways_out)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Outside the graph, before it is captured or replayed: choose the graph, fill buffers."""
        self._packed = self._stock_is_ready = self._fell_back = False
        self._in_graph = True
        if forward_batch.forward_mode.is_decode():
            if in_capture:
                self._begin_capture(forward_batch)
            else:
                self._begin_replay(forward_batch)
        if self._needs_stock():
            self._prepare_stock(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Inside the graph, before the model: tails grow by this step's slots."""
        if self._packed and self._served is not None:
            for shape in self._served.shapes:
                shape.runner.append_in_graph(forward_batch.seq_lens, forward_batch.out_cache_loc)
        if self._needs_stock():
            self.stock.init_forward_metadata_in_graph(forward_batch)

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
            if self._verify or self._in_graph:
                raise
            self._log_failure(f"layer {layer.layer_id}")
            self._give_up_step("error")
            self._prepare_stock(forward_batch)
            # k and v have been written, and perhaps scaled in place: not a second time.
            return self.stock.forward(q, k, v, layer, forward_batch, False, **kwargs)

    def _needs_stock(self) -> bool:  # metadata in this step
        return not self._packed or bool(self.counters.delegated_layers)

    def _begin_step(self, forward_batch: Any) -> None:
        self._packed = self._stock_is_ready = self._fell_back = self._in_graph = False
        if forward_batch.forward_mode.is_decode():
            self._count(self._server_reason or self._plan(forward_batch))

    def _begin_capture(self, forward_batch: Any) -> None:
        """Capture our kernels under their label, unless no plan of this size would ever fit."""
        if self._schedule.graph_label != PACKED or self._server_reason or self._batches is None:
            return
        if self._batches.max_rows is None or forward_batch.batch_size <= self._batches.max_rows:
            self._batches.prepare_private(forward_batch)
            self._packed = True

    def _begin_replay(self, forward_batch: Any) -> None:
        if not is_idle(forward_batch):
            self._count(self._server_reason or self._plan(forward_batch, in_graph=True))
        if not self._packed and self._schedule.graph_labels == (PACKED,):
            # There is no stock graph: served by ours, with nothing taken to be shared.
            assert self._batches is not None
            self._batches.prepare_private(forward_batch)
            self._packed = True
        self._schedule.graph_label = PACKED if self._packed else STOCK

    def _count(self, reason: str | None) -> None:
        """Note who serves this decode step."""
        self._packed = reason is None
        if reason is None:
            self.counters.packed_steps += 1
        else:
            self._fell_back = True
            self.counters.fall_back(reason)
        if self._metrics:
            self._metrics.update(self.counters)

    def _report(self) -> dict[str, Any]:
        """All counters as plain values, for who asks the server; metrics then are up to date."""
        if self._metrics is not None:
            self._metrics.update(self.counters, now=True)
        seconds = self._schedule.seconds
        return self.counters.as_dict() | {"hook_us": 1e6 * median(seconds) if seconds else None}

    def _plan(self, forward_batch: Any, *, in_graph: bool = False) -> str | None:
        assert self._batches is not None
        if getattr(forward_batch, "spec_info", None) is not None:
            return "speculative"
        # The halves come to backends of their own, with the schedule batch of the whole.
        if getattr(forward_batch, "tbo_children", None) or getattr(forward_batch, _HALF_OF, None):
            return "two-batch-overlap"
        try:
            return self._batches.prepare(forward_batch, in_graph=in_graph)
        except Exception:
            self._batches.forget()
            if self._verify or (in_graph and self._ranks_must_agree):
                raise
            self._log_failure("planning")
            return "error"

    def _runner_for(
        self, q: torch.Tensor, layer: RadixAttention, kwargs: dict[str, Any]
    ) -> PlanRunner | None:
        runner = self._runner_of.get(layer)
        unknown = [name for name, value in kwargs.items() if value is not None]
        if runner is not None and unknown:
            self._delegate(layer, unknown)
        if runner is None or unknown or not self._packed:
            return None
        if q.numel() != runner.num_rows * layer.tp_q_head_num * layer.qk_head_dim:
            if self._in_graph:
                raise RuntimeError(f"a graph of {runner.num_rows} requests got {len(q)} queries")
            self._give_up_step("other-batch")
            return None
        return runner

    def _delegate(self, layer: RadixAttention, unknown: list[str]) -> None:
        """Leave a layer to the stock backend for good: the model will pass this at every step.

        Found out in the first decode step, or in a warm-up before the first graph is captured.
        """
        del self._runner_of[layer]
        self.counters.delegated_layers[layer.layer_id] = "unknown-argument"
        logger.warning(
            "prefix attention: layer %d is stock's (%s: %s)",
            layer.layer_id,
            REASONS["unknown-argument"],
            ", ".join(unknown),
        )
        if not self._runner_of:
            self._server_reason = "no-layer"

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

    def _prepare_stock(self, forward_batch: Any, *, in_capture: bool | None = None) -> None:
        """Let the stock backend prepare the step, once, in the way that the step began.

        Args:
            forward_batch: the batch.
            in_capture: whether a graph is captured; None if a layer asks, which in a graph it only
                does before the capture itself, in a warm-up.
        """
        if self._stock_is_ready:
            return
        self._stock_is_ready = True
        size = forward_batch.batch_size
        if not self._in_graph:
            self.stock.init_forward_metadata(forward_batch)
        elif in_capture is False:
            self.stock.init_forward_metadata_out_graph(forward_batch)
        elif len(self._schedule.graph_labels) < 2 or self._stock_captured_for != size:
            # Once for both labels: FlashInfer's makes new buffers each time, and would forget
            # those that the graph of the other label reads.
            self._stock_captured_for = size
            self.stock.init_forward_metadata_out_graph(forward_batch, in_capture=True)

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
