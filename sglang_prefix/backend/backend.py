"""The SGLang attention backend ``prefix``: our decode, a stock backend for everything else."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from prefix_patches.attention_layers import attention_sinks
from prefix_patches.attributes import AttentionLayer, ForwardBatch, ModelRunner, ReplayView
from prefix_patches.kv_pool import write_kv
from prefix_patches.latent_attention import join_rope
from prefix_patches.observability import append_with, report_with
from prefix_patches.stock_backend import prefill_name
from sglang_prefix.backend.decode_planner import DecodePlanner, LayerGroup
from sglang_prefix.backend.extend_planner import EXTENDED_STOCK, LEAST_SAVED, ExtendPlanner
from sglang_prefix.backend.fallback import (
    REASONS,
    argument_reason,
    captures_decode,
    has_tensor_parallelism,
)
from sglang_prefix.backend.layers import run_layer
from sglang_prefix.backend.step_state import NO_STEP, OTHER_GRAPH
from sglang_prefix.backend.steps import SteppingBackend
from sglang_prefix.backend.warm_up import warm_up
from sglang_prefix.config import BACKEND_NAME, PrefixConfig
from sglang_prefix.gate import make_gate

__all__ = ["PrefixAttnBackend"]

logger = logging.getLogger(__name__)


class PrefixAttnBackend(SteppingBackend):
    """Owns a stock backend and takes decode of full-attention layers off it.

    Which layers are taken is decided here, once. A decode step, and a verify pass of speculative
    decoding, then goes this way:

    1. One of three entry points turns SGLang's batch into a :class:`DecodeBatch`, has the planner
       prepare it, and notes in a :class:`StepState` who serves the step (:class:`SteppingBackend`):

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
        self._stock_names = {stock_name, prefill_name(model_runner, BACKEND_NAME) or stock_name}
        super().__init__(model_runner, stock, sorted(self._stock_names), config)
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self._stock_is_ready = False  # the stock backend has prepared this step
        report_with(self._report)
        self._schedule.on_passed_by = self._count_passed_by
        if self._server_reason is None:
            self._serve(model_runner, stock_name, config)
            append_with(self._log_text)
        labels, hint = self._labels.names, self._verification.hint
        self._layers.log_startup(config, stock_name, labels, self._server_reason, hint)

    def _serve(self, model_runner: ModelRunner, stock_name: str, config: PrefixConfig) -> None:
        if not self._layers.groups:
            self._server_reason = "no-layer" if self._layers.num_layers else "no-attention"
            return
        if captures_decode(model_runner):
            if self._layers.executor_names != ["triton"]:
                self._stay_out("cuda-graph")
                return
            # A verify pass that turns out to be no chain needs a graph, too.
            spare_stock = self._verification.drafts > 0
            self._labels.use(model_runner, config.gate, self._predict, spare_stock=spare_stock)
            self._schedule.graph_modes = ("TARGET_VERIFY",) if spare_stock else ("DECODE",)
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
        self._extends = self._extend_planner(self._planner, stock_name, config)
        if self._layers.workspace is not None:
            # Of extends, two tokens of a request stand for any number.
            kinds = {self._verification.drafts} | ({2} if self._extends else set())
            try:
                for drafts in sorted(kinds):
                    done = warm_up(
                        self._planner,
                        self._layers.group_of,
                        attention_sinks(model_runner.model),
                        partial(run_layer, self.token_to_kv_pool),
                        model_runner.dtype,
                        drafts,
                    )
                    logger.info("prefix attention: %s", done)
            except Exception:
                if has_tensor_parallelism(model_runner):  # others may not have failed
                    raise
                self._log_failure("the first run of the kernels")
                self._stay_out("kernels")

    def _extend_planner(
        self, planner: DecodePlanner, stock_name: str, config: PrefixConfig
    ) -> ExtendPlanner | None:
        """What plans extends; None where they are all the stock backend's."""
        names, device = self._layers.executor_names, planner.req_to_token.device
        name = names[0] if len(names) == 1 else ""
        serves = config.extends != "never" and device.type == "cpu" and name in LEAST_SAVED
        serves &= stock_name in EXTENDED_STOCK
        from_paths = config.extends == "always" and names == ["triton"]
        if from_paths:  # latents are prefilled as heads with K and V, in other layers
            serves = not any(group.executor.shape.v_in_k for group in planner.groups)
        if not serves:
            return None
        return ExtendPlanner(
            planner,
            self._schedule,
            self.counters,
            least_saved=LEAST_SAVED.get(name, 0),
            from_paths=from_paths,
            gate=make_gate(config.gate, device, stock_name, names) if from_paths else None,
            verify=config.verify,
        )

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Eager entry point: decide who serves the batch, and prepare it."""
        self._end_step()
        self._step, self._stock_is_ready = NO_STEP, False
        batch = self._batch_of(forward_batch)
        if batch is not None:
            self._step = self._begin_eager(batch)
        elif self._extends is not None:
            self._step = self._extends.prepare(forward_batch) or NO_STEP
        if self._needs_stock():
            self._prepare_stock(forward_batch)

    @property
    def needs_cpu_seq_lens(self) -> bool:
        """Whether SGLang is to copy the lengths of verify passes to the CPU, where plans are made.

        Those of decode are there anyway.
        """
        plans_them = self._planner is not None and self._verification.drafts > 0
        return plans_them or self.stock.needs_cpu_seq_lens

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
        batch = self._batch_of(forward_batch, in_graph=True)
        if batch is None:
            self._step = OTHER_GRAPH
        else:
            self._step = self._begin_capture(batch) if in_capture else self._begin_replay(batch)
        if self._needs_stock():
            self._prepare_stock(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Inside the graph, before the model: tails grow by this step's slots."""
        batch = self._batch_of(forward_batch, in_graph=True)
        if self._step.packed and self._planner is not None and batch is not None:
            self._planner.append(batch)
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
        """Attention of one layer: ours for decode, and for other passes that were planned."""
        mode = forward_batch.forward_mode
        if mode.is_decode():
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if (self._extends is not None or self._step.kind == "verify") and not mode.is_idle():
            return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return self.stock.forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run a layer of an extend or a verify pass. Backends of several backends call this one."""
        if self._serves(forward_batch):
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if self._step.packed and self._step.kind != "decode":  # another pass was planned
            self._give_up_step("other-batch")
            self._prepare_stock(forward_batch)
        return self.stock.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def _serves(self, forward_batch: ForwardBatch) -> bool:
        """Whether a pass that is no decode step was planned."""
        if forward_batch.forward_mode.is_target_verify():
            return self._step.kind == "verify"
        return self._extends is not None and self._extends.serves(forward_batch)

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
        """Run a layer of a step or another pass that is planned; see :class:`AttentionBackend`.

        Writes KV exactly once per call.
        """
        whole_q, others = join_rope(q, layer, kwargs, joins=self._step.packed)
        group = self._group_for(whole_q, layer, others)
        if group is None:
            self._prepare_stock(forward_batch)
            return self.stock.forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if save_kv_cache and k is not None and v is not None:
            k_rope = kwargs.get("k_rope")
            write_kv(self.token_to_kv_pool, layer, forward_batch, k, v, k_rope)
        try:
            sinks = kwargs.get("sinks")
            return run_layer(self.token_to_kv_pool, group, whole_q, layer, sinks)
        except Exception:
            if self._verify or self._step.in_graph:
                raise
            self._log_failure(f"layer {layer.layer_id}")
            self._give_up_step("error")
            self._prepare_stock(forward_batch)
            # k and v have been written, and perhaps scaled in place: not a second time.
            return self.stock.forward(q, k, v, layer, forward_batch, False, **kwargs)

    def _group_for(
        self, q: torch.Tensor, layer: AttentionLayer, kwargs: dict[str, Any]
    ) -> LayerGroup | None:
        """What runs a layer in this step; None if the stock backend does."""
        group = self._layers.group_of.get(layer)
        if group is None:
            return None
        if reason := argument_reason(layer, kwargs, self._stock_names):
            self._delegate(layer, reason, kwargs)
            return None
        if not self._step.packed:
            return None
        size, shape = group.executor.padded_batch_size, group.executor.shape
        if q.numel() != size * shape.num_qo_heads * shape.head_dim:
            if self._step.in_graph:
                raise RuntimeError(f"a graph of {size} queries got {len(q)} queries")
            self._give_up_step("other-batch")
            return None
        return group

    def _delegate(self, layer: AttentionLayer, reason: str, kwargs: dict[str, Any]) -> None:
        """Leave a layer to the stock backend for good: the model will pass this at every step.

        Found out in the first decode step, or in a warm-up before the first graph is captured.
        """
        del self._layers.group_of[layer]
        self._layers.delegated[layer.layer_id] = reason
        logger.warning(
            "prefix attention: layer %d is stock's (%s: %s)",
            layer.layer_id,
            REASONS[reason],
            ", ".join(name for name, value in kwargs.items() if value is not None),
        )
        if not self._layers.group_of:
            self._server_reason, self._extends = "no-layer", None
            if self._step.kind == "extend":
                self._give_up_step("no-layer")

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
        elif self._labels.note_stock_capture(forward_batch):
            self.stock.init_forward_metadata_out_graph(forward_batch, in_capture=True)
