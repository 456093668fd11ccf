"""Under which labels decode graphs are captured, and which of two graphs a step replays."""

from __future__ import annotations

import logging

from prefix_patches.attributes import ForwardBatch, ModelRunner, ReplayView
from prefix_patches.rank_agreement import install as join_exchange
from prefix_patches.schedule_context import ScheduleContext
from sglang_prefix.backend.fallback import (
    has_dp_attention,
    has_tensor_parallelism,
    ranks_must_agree,
)
from sglang_prefix.backend.rank_agreement import Predict, RankAgreement
from sglang_prefix.backend.workspace import Workspace

__all__ = ["PACKED", "STOCK", "GraphLabels"]

PACKED, STOCK = "packed", "stock"

logger = logging.getLogger(__name__)


class GraphLabels:
    """Labels of a model runner's decode graphs, one graph per batch size and label.

    "packed" graphs hold our kernels, "stock" graphs do not, and each step replays one of the two.
    All ranks of a tensor-parallel group must replay the same label. The attention in which the
    graphs differ is each rank's own, and both hold the same collectives in the same order, but a
    collective in a graph reads its peers' memory at addresses that were exchanged for that very
    graph when it was captured: SGLang's custom all-reduce does (``register_graph_buffers``), which
    also gathers the tokens of DP attention in 0.5.23, and so does NCCL with registered buffers. A
    rank that replays the other graph has written somewhere else.

    Ranks decide by the same numbers of the host, so they choose the same. With DP attention they
    have batches of their own, and agree before the step (:class:`RankAgreement`).

    Args:
        schedule: where SGLang's graph runner reads the labels. It has none until :meth:`use`.

    Attributes:
        agrees: whether ranks agree on a label before each step.
    """

    def __init__(self, schedule: ScheduleContext) -> None:
        self._schedule = schedule
        self._has_dp_attention = False
        self.agrees = False
        self._captured_size = 0
        self._is_parallel = False

    @property
    def ranks_must_agree(self) -> bool:
        """Whether all ranks of a tensor-parallel group must choose the same of two graphs."""
        return self._is_parallel and len(self.names) > 1

    @property
    def agreed(self) -> bool:
        """Whether ranks agreed to pack the step under way, where they agree.

        A pass that no exchange preceded, a warm-up, is stock's on every rank.
        """
        return self._schedule.agreed_label == PACKED

    @property
    def names(self) -> tuple[str, ...]:
        """Labels that graphs are captured under; none where no graph holds our kernels."""
        return self._schedule.graph_labels

    @property
    def without_stock(self) -> bool:
        """Whether graphs exist and none of them holds a stock kernel."""
        return self.names == (PACKED,)

    @property
    def captures_packed(self) -> bool:
        """Whether the graph being captured is to hold our kernels."""
        return self._schedule.graph_label == PACKED

    def use(
        self, model_runner: ModelRunner, gate: str, predict: Predict, *, spare_stock: bool = False
    ) -> None:
        """Capture decode graphs with our kernels, and also without if the gate may choose stock.

        Args:
            model_runner: whose graphs.
            gate: the setting.
            predict: as of :class:`RankAgreement`.
            spare_stock: capture them without our kernels, too, whatever the gate is.
        """
        both = gate == "auto" or spare_stock
        self._schedule.graph_labels = (PACKED, STOCK) if both else (PACKED,)
        self._is_parallel = has_tensor_parallelism(model_runner)
        # Ranks with batches of their own, each of which may outgrow its workspace.
        self._has_dp_attention = has_dp_attention(model_runner)
        self.agrees = ranks_must_agree(model_runner, gate)
        if self.agrees:
            join_exchange()
            agreement = RankAgreement(predict)
            self._schedule.vote = agreement.vote
            self._schedule.agree = lambda votes: PACKED if agreement.agree(votes) else STOCK

    def withdraw(self) -> None:
        """Capture no graph with our kernels after all. Not where ranks must choose alike."""
        self._schedule.graph_labels = ()

    def begin_captures(self, workspace: Workspace | None, max_batch_size: int) -> None:
        """Begin to capture graphs of up to ``max_batch_size`` requests.

        A batch that outgrows the workspace needs a graph too, so stock is captured as well where
        that can happen.

        Raises:
            ValueError: it can happen, and there is no other graph to go to.
        """
        self._captured_size = 0
        if workspace is None or not self.without_stock:
            return
        held = workspace.sure_batch_size
        if held >= max_batch_size:
            return
        ways_out = "SGLANG_PREFIX_WORKSPACE_MIB, --cuda-graph-max-bs-decode or --context-length"
        sure = f"the workspace is sure to hold {held} requests of {max_batch_size}"
        if self._has_dp_attention:
            raise ValueError(f"{sure}, and ranks must replay one graph; change {ways_out}")
        self._schedule.graph_labels = (PACKED, STOCK)
        logger.warning("prefix attention: %s, so stock is captured too; see %s", sure, ways_out)

    def note_stock_capture(self, forward_batch: ForwardBatch | ReplayView) -> bool:
        """Note that stock kernels are about to be captured; False if stock is ready for that.

        It prepares once for both labels: FlashInfer's makes new buffers each time, and would forget
        those that the graph of the other label reads. Graphs of prefill have no labels, and each
        is of as many requests.
        """
        if forward_batch.forward_mode.name not in self._schedule.graph_modes:
            return True
        size = forward_batch.batch_size
        is_ready = len(self.names) > 1 and self._captured_size == size
        self._captured_size = size
        return not is_ready

    def choose(self, *, packed: bool) -> None:
        """Choose the graph that this step replays."""
        self._schedule.graph_label = PACKED if packed else STOCK
