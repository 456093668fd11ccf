"""The SGLang attention backend ``prefix``: our decode, a stock backend for everything else."""

from __future__ import annotations

import logging
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from prefix_kernels.executor import AttentionParams
from prefix_patches.attributes import AttentionLayer, ForwardBatch, ModelRunner, ReplayView
from prefix_patches.kv_pool import applies_kv_scales, write_kv
from prefix_patches.observability import append_with, report_with
from prefix_patches.schedule_context import ensure_schedule_context
from prefix_patches.stock_backend import prefill_name
from sglang_prefix.backend.counters import BackendCounters
from sglang_prefix.backend.decode_batch import DecodeBatch
from sglang_prefix.backend.decode_planner import DecodePlanner, LayerGroup
from sglang_prefix.backend.delegation import DelegatingBackend
from sglang_prefix.backend.fallback import (
    REASONS,
    batch_reason,
    captures_decode,
    has_tensor_parallelism,
    server_reason,
)
from sglang_prefix.backend.graph_labels import GraphLabels
from sglang_prefix.backend.layers import find_layers
from sglang_prefix.backend.metrics import metrics_of
from sglang_prefix.backend.step_state import (
    NO_STEP,
    OTHER_GRAPH,
    PACKED,
    PACKED_REPLAY,
    StepState,
)
from sglang_prefix.backend.warm_up import warm_up
from sglang_prefix.config import BACKEND_NAME, PrefixConfig
from sglang_prefix.gate import make_gate

if TYPE_CHECKING:
    from sglang_prefix.explain.last_plan import LastPlan

__all__ = ["PrefixAttnBackend"]

logger = logging.getLogger(__name__)


class PrefixAttnBackend(DelegatingBackend):
    """Owns a stock backend and takes plain decode of full-attention layers off it.

    Which layers are taken is decided here, once. A decode step then goes this way:

    1. One of three entry points turns SGLang's batch into a :class:`DecodeBatch`, has the planner
       prepare it, and notes in a :class:`StepState` who serves the step:

       =============================================  =============================================
       ``init_forward_metadata``                      eager: packed if no reason speaks against it
       ``init_forward_metadata_out_graph``, capture   packed if the label says so; does not count
       ``init_forward_metadata_out_graph``, replay    as eager, and the label is chosen by it
       =============================================  =============================================

    2. The stock backend prepares the step, if it has a part in it.
    3. ``forward_decode`` runs each layer: KV is written, and the executor runs the plan. In a graph
       it has been captured with the label, and whatever changes from step to step stands in device
       buffers of fixed addresses, which are filled before the replay.
    4. When the next step begins, or somebody asks for the counters, the step is counted.

    Args:
        model_runner: SGLang's model runner; its pools and its model exist, its graphs do not.
        stock: the backend to delegate to.
        stock_name: its name, for messages.
        config: settings.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        stock: AttentionBackend,
        stock_name: str,
        config: PrefixConfig,
    ) -> None:
        super().__init__(stock)
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self._schedule = ensure_schedule_context(model_runner)
        self._labels = GraphLabels(self._schedule)
        self._server_reason = server_reason(model_runner, config.gate)
        self._layers = find_layers(
            model_runner,
            {stock_name, prefill_name(model_runner, BACKEND_NAME) or stock_name},
            config,
            serve=self._server_reason is None,
        )
        self.counters = BackendCounters(delegated_layers=self._layers.delegated)
        self._metrics = metrics_of(model_runner, self._layers.executor_text)
        self._last_plan = _last_plan_of(config)
        self._verify = config.verify
        self._planner: DecodePlanner | None = None
        self._step = NO_STEP
        self._stock_is_ready = False  # the stock backend has prepared this step
        self._failed = False  # a failure has been logged with its traceback
        report_with(self._report)
        self._schedule.on_passed_by = self._count_passed_by
        if self._server_reason is None:
            self._serve(model_runner, stock_name, config)
            append_with(self._log_text)
        self._layers.log_startup(config, stock_name, self._labels.names, self._server_reason)

    def _serve(self, model_runner: ModelRunner, stock_name: str, config: PrefixConfig) -> None:
        if not self._layers.groups:
            self._server_reason = "no-layer" if self._layers.num_layers else "no-attention"
            return
        if captures_decode(model_runner):
            if self._layers.executor_names != ["triton"]:
                self._stay_out("cuda-graph")
                return
            self._labels.use(model_runner, config.gate, self._predict)
        req_to_token = self.req_to_token_pool.req_to_token
        self._planner = DecodePlanner(
            self._schedule,
            req_to_token,
            model_runner.page_size,
            self._layers.groups,
            self.counters,
            gate=make_gate(
                config.gate, req_to_token.device, stock_name, self._layers.executor_names
            ),
            ranks_agree=self._labels.agrees,
            verify=config.verify,
            on_plan=self._last_plan.note if self._last_plan else None,
        )
        if self._layers.workspace is not None:
            try:
                done = warm_up(self._planner, self._layers.group_of, self._run, model_runner.dtype)
            except Exception:
                if has_tensor_parallelism(model_runner):  # others may not have failed
                    raise
                self._log_failure("the first run of the kernels")
                self._stay_out("kernels")
                return
            logger.info("prefix attention: %s", done)

    def _stay_out(self, reason: str) -> None:
        """Serve no layer after all."""
        self._server_reason, self._planner = reason, None
        self._layers = replace(self._layers, group_of={}, groups=[])
        self._labels.withdraw()

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Eager entry point: decide who serves the batch, and prepare it."""
        self._end_step()
        self._step, self._stock_is_ready = NO_STEP, False
        if forward_batch.forward_mode.is_decode():
            batch = DecodeBatch(forward_batch, self._schedule.batch)
            reason = self._plan(batch)
            self._step = StepState(reason=reason, counts=True) if reason else PACKED
        if self._needs_stock():
            self._prepare_stock(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Buffers for graphs of up to ``max_bs`` requests: ours exist, so this only checks them.

        Raises:
            ValueError: a batch could outgrow the workspace, and there is no other graph to go to.
        """
        self.stock.init_cuda_graph_state(max_bs, max_num_tokens)
        self._labels.begin_captures(self._layers.workspace, max_bs)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch | ReplayView, in_capture: bool = False
    ) -> None:
        """Outside the graph, before it is captured or replayed: choose the graph, fill buffers."""
        self._end_step()
        self._step, self._stock_is_ready = NO_STEP, False
        if forward_batch.forward_mode.is_decode():
            batch = DecodeBatch(forward_batch, self._schedule.batch, in_graph=True)
            self._step = self._begin_capture(batch) if in_capture else self._begin_replay(batch)
        else:
            self._step = OTHER_GRAPH
        if self._needs_stock():
            self._prepare_stock(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Inside the graph, before the model: tails grow by this step's slots."""
        if self._step.packed and self._planner is not None:
            self._planner.append(DecodeBatch(forward_batch, None, in_graph=True))
        if self._needs_stock():
            self.stock.init_forward_metadata_in_graph(forward_batch)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
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
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Decode one layer; see :class:`AttentionBackend`. Writes KV exactly once per call."""
        group = self._group_for(q, layer, kwargs)
        if group is None:
            self._prepare_stock(forward_batch)
            return self.stock.forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if save_kv_cache and k is not None and v is not None:
            write_kv(self.token_to_kv_pool, layer, forward_batch, k, v)
        try:
            return self._run(group, q, layer)
        except Exception:
            if self._verify or self._step.in_graph:
                raise
            self._log_failure(f"layer {layer.layer_id}")
            self._give_up_step("error")
            self._prepare_stock(forward_batch)
            # k and v have been written, and perhaps scaled in place: not a second time.
            return self.stock.forward(q, k, v, layer, forward_batch, False, **kwargs)

    def _predict(self, batch: DecodeBatch) -> tuple[float, float] | None:
        """Plan a batch that has been scheduled; the gate's predictions, None if it is stock's."""
        self._end_step()
        if self._planner is None or self._server_reason or batch_reason(batch.forward_batch):
            return None
        return self._planner.decide_ahead(batch)

    def _plan(self, batch: DecodeBatch, *, packed: bool | None = None) -> str | None:
        """Prepare a batch, as ranks agreed; why it is the stock backend's, None if it is packed."""
        reason = self._server_reason or batch_reason(batch.forward_batch)
        if reason is None and batch.in_graph and not self._labels.names:
            # After a switch of PD roles SGLang captures what it was started not to capture.
            reason = "late-graph"
        if reason is None:
            assert self._planner is not None
            try:
                reason = self._planner.prepare(batch, packed=packed)
            except Exception:
                self._planner.forget()
                alone = batch.in_graph and packed is None and self._labels.ranks_must_agree
                if self._verify or alone:
                    raise
                self._log_failure("planning")
                reason = "error"
        if reason is not None:
            self.counters.say(reason)
        return reason

    def _begin_capture(self, batch: DecodeBatch) -> StepState:
        """Capture our kernels under their label, unless no plan of this size would ever fit."""
        planner = self._planner
        if planner is None or self._server_reason or not self._labels.captures_packed:
            return OTHER_GRAPH
        if not planner.fits(batch):
            return OTHER_GRAPH
        planner.prepare_private(batch)
        return StepState(packed=True, in_graph=True)

    def _begin_replay(self, batch: DecodeBatch) -> StepState:
        """Plan the batch, and choose the graph that serves it."""
        agreed = self._labels.agreed
        if agreed and self._planner is not None:
            # As on every other rank: workspaces are of one size, and batches are padded to one.
            # Where they are not, SGLang itself lets ranks replay graphs of different sizes.
            agreed = self._planner.fits(batch)
        counts = not batch.is_idle
        reason = self._plan(batch, packed=agreed) if counts else None
        if counts and reason is None:
            self._labels.choose(packed=True)
            return PACKED_REPLAY
        packed = self._labels.without_stock or bool(agreed)
        if packed:
            assert self._planner is not None
            self._planner.prepare_private(batch)
        self._labels.choose(packed=packed)
        return StepState(packed, reason, in_graph=True, counts=counts)

    def _end_step(self) -> None:
        """Count the step under way, once: packed, or under the reason why it was not."""
        step = self._step
        if not step.counts:
            return
        self._step = NO_STEP
        if step.reason is not None:
            self.counters.count_stock_step(step.reason)
        elif self._planner is not None:
            self._planner.count_step()
        if self._metrics is not None:
            self._metrics.update(self.counters)

    def _count_passed_by(self, reason: str) -> None:
        """Count a pass that generates tokens on the stock backend and is no decode step."""
        self._end_step()
        self.counters.say(reason)
        self._step = StepState(reason=reason, counts=True)
        self._end_step()

    def _give_up_step(self, reason: str) -> None:
        """Leave the rest of this step to the stock backend, and count it there."""
        if self._planner is not None:
            self._planner.invalidate()
        if self._step.reason is None:
            self._step = self._step._replace(packed=False, reason=reason)
            self.counters.say(reason)

    def _group_for(
        self, q: torch.Tensor, layer: AttentionLayer, kwargs: dict[str, Any]
    ) -> LayerGroup | None:
        """What runs a layer in this step; None if the stock backend does."""
        group = self._layers.group_of.get(layer)
        unknown = [name for name, value in kwargs.items() if value is not None]
        if group is not None and unknown:
            self._delegate(layer, unknown)
        if group is None or unknown or not self._step.packed:
            return None
        size = group.executor.padded_batch_size
        if q.numel() != size * layer.tp_q_head_num * layer.qk_head_dim:
            if self._step.in_graph:
                raise RuntimeError(f"a graph of {size} requests got {len(q)} queries")
            self._give_up_step("other-batch")
            return None
        return group

    def _delegate(self, layer: AttentionLayer, unknown: list[str]) -> None:
        """Leave a layer to the stock backend for good: the model will pass this at every step.

        Found out in the first decode step, or in a warm-up before the first graph is captured.
        """
        del self._layers.group_of[layer]
        self._layers.delegated[layer.layer_id] = "unknown-argument"
        logger.warning(
            "prefix attention: layer %d is stock's (%s: %s)",
            layer.layer_id,
            REASONS["unknown-argument"],
            ", ".join(unknown),
        )
        if not self._layers.group_of:
            self._server_reason = "no-layer"

    def _run(self, group: LayerGroup, q: torch.Tensor, layer: AttentionLayer) -> torch.Tensor:
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = q.new_empty(q.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        scaled = applies_kv_scales(self.token_to_kv_pool)
        group.executor.run(
            q,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            out,
            None,
            AttentionParams(
                layer.scaling,
                layer.logit_cap or 0.0,
                layer.k_scale if scaled and layer.k_scale is not None else 1.0,
                layer.v_scale if scaled and layer.v_scale is not None else 1.0,
            ),
        )
        return out.view(q.shape[0], -1)

    def _needs_stock(self) -> bool:
        """Whether the stock backend has a part in this step."""
        return not self._step.packed or bool(self._layers.delegated)

    def _prepare_stock(
        self, forward_batch: ForwardBatch | ReplayView, *, in_capture: bool | None = None
    ) -> None:
        """Let the stock backend prepare the step, once, in the way that the step began.

        Args:
            forward_batch: the batch.
            in_capture: whether a graph is captured; None if a layer asks, which in a graph it only
                does before the capture itself, in a warm-up.
        """
        if self._stock_is_ready:
            return
        self._stock_is_ready = True
        if not self._step.in_graph:
            self.stock.init_forward_metadata(forward_batch)
        elif in_capture is False:
            self.stock.init_forward_metadata_out_graph(forward_batch)
        elif self._labels.note_stock_capture(forward_batch.batch_size):
            self.stock.init_forward_metadata_out_graph(forward_batch, in_capture=True)

    def _log_failure(self, what: str) -> None:
        """Log the exception at hand, with its traceback the first time only."""
        logger.error("prefix attention: %s failed", what, exc_info=not self._failed)
        self._failed = True

    def _log_text(self) -> str:
        """What is appended to SGLang's line about decode batches."""
        self._end_step()
        return self.counters.log_text()

    def _report(self) -> dict[str, Any]:
        """All counters as plain values, for who asks the server; metrics then are up to date."""
        self._end_step()
        if self._metrics is not None:
            self._metrics.update(self.counters, now=True)
        seconds = self._schedule.seconds
        report = self.counters.as_dict() | {
            "hook_us": 1e6 * median(seconds) if seconds else None,
            "executor": self._layers.executor_text,
        }
        if self._last_plan is not None:
            report["last_plan"] = self._last_plan.as_dict()
        return report


def _last_plan_of(config: PrefixConfig) -> LastPlan | None:
    """Where the newest plan is kept, if the settings ask for that."""
    if not config.keep_plan:
        return None
    from sglang_prefix.explain.last_plan import LastPlan

    return LastPlan(config)
