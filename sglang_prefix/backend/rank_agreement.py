"""How ranks with batches of their own agree on the graph that all of them replay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from prefix_patches.attributes import ScheduleBatch
from sglang_prefix.backend.decode_batch import DecodeBatch
from sglang_prefix.gate import pays

__all__ = ["Predict", "RankAgreement", "Vote"]

logger = logging.getLogger(__name__)

# What a rank predicts for a step that it cannot pack: 18 minutes.
_NEVER_NS = 1 << 40

Predict = Callable[[DecodeBatch], tuple[float, float] | None]


class Vote(NamedTuple):
    """What a rank says of its step, as whole numbers: zeros where it decodes nothing.

    Attributes:
        packed_ns, stock_ns: predicted for its attention, all layers.
        packs: whether the last step that ranks agreed on was packed.
    """

    packed_ns: int
    stock_ns: int
    packs: int


class RankAgreement:
    """Packs a step of DP attention if that makes the attention of the slowest rank faster.

    Ranks meet in every layer, since all of them compute its MLP or its experts together. So the
    rank whose attention takes longest decides how long the layer takes, and a majority decides
    nothing. A rank that cannot pack its batch keeps all others from it. Ranks that decode nothing
    have no say; they replay what the others agreed on.

    The answer depends on the votes of the step alone, which are the same numbers on every rank. So
    does the hysteresis: what ranks remember goes into their votes.

    Args:
        predict: of a decode batch that has been scheduled, microseconds of its attention packed,
            and stock; None where it cannot be packed.
    """

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self._packs = False
        self._failed = False

    def vote(self, scheduled: ScheduleBatch | None) -> Vote:
        """The vote of this rank on the step of a batch, None for no batch."""
        if scheduled is None or not scheduled.forward_mode.is_decode():
            return Vote(0, 0, self._packs)
        try:
            predicted = self._predict(DecodeBatch.scheduled(scheduled))
            votes = [min(round(1e3 * us), _NEVER_NS) for us in predicted or ()]
        except Exception:  # others wait for this vote, whatever happens
            message = "prefix attention: a vote failed; the step is stock's"
            logger.error(message, exc_info=not self._failed)  # the traceback once
            self._failed = True
            votes = []
        packed_ns, stock_ns = votes or (_NEVER_NS, 0)
        return Vote(packed_ns, stock_ns, self._packs)

    def agree(self, votes: Sequence[Sequence[int]]) -> bool:
        """Whether all ranks pack the step; the same on every rank."""
        packed, stock, packs = (max(column) for column in zip(*votes, strict=True))
        if packed or stock:  # somebody decodes
            self._packs = pays(packed, stock, packs=bool(packs))
        return self._packs
