"""Which verify passes of speculative decoding are packed: chains of drafts that come to us."""

from __future__ import annotations

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from prefix_patches.attributes import ForwardBatch, ModelRunner, ReplayView, ScheduleBatch
from prefix_patches.speculation import are_chains, can_verify, install, speculation_of
from sglang_prefix.backend.decode_batch import DecodeBatch
from sglang_prefix.backend.fallback import captures_decode, has_dp_attention

__all__ = ["Verification"]

_TOPK, _MODE = "--speculative-eagle-topk", "--speculative-attention-mode decode"


class Verification:
    """What a server's flags say of its verify passes, and what a pass says itself.

    Args:
        model_runner: SGLang's.
        stock: the backend that gets what is not packed.
        serves: whether anything is packed on this server.

    Raises:
        ValueError: passes that are no chains would end the server.

    Attributes:
        is_on_cpu: whether the server has no GPU.
        is_all_there_is: whether the target model decodes in such passes alone.
        drafts: tokens of each request that a verify pass of ours checks, at most; 0 where none is
            to be packed.
        passed_by_reason: why those that are not are the stock backend's.
        hint: what the line about the start says of them; None where nothing is to be said.
    """

    def __init__(self, model_runner: ModelRunner, stock: AttentionBackend, *, serves: bool) -> None:
        self.is_on_cpu = str(model_runner.device) == "cpu"
        self.drafts, self.passed_by_reason = 0, "speculative-verify"
        self.hint: str | None = None
        found = speculation_of(model_runner)
        self.is_all_there_is = found is not None
        if found is None:
            return
        if not found.is_known or found.breadth != 1:
            flag = "--speculative-ngram-max-bfs-breadth" if found.is_ngram else _TOPK
            self.passed_by_reason = "speculative-tree"
            self.hint = f"drafts are checked by the stock backend: {flag} 1 packs"
            if not found.is_known:
                self.hint = "drafts of this kind are checked by the stock backend"
        elif not found.comes_here:
            self.hint = f"drafts are checked by {found.prefill_name}: {_MODE} packs"
        elif has_dp_attention(model_runner) and captures_decode(model_runner):
            self.passed_by_reason = "speculative-ranks"
            self.hint = "drafts are checked by the stock backend: ranks agree on decode alone"
        else:
            self.drafts = found.drafts
            if found.is_ngram and serves:
                # Two tokens are always a chain.
                if found.drafts > 2 and not can_verify(stock):
                    raise ValueError(
                        f"--speculative-num-draft-tokens {found.drafts}: n-grams so long are not "
                        "always a chain, and the stock backend torch_native checks no drafts; "
                        "legal: 2"
                    )
                install()

    def batch_of(
        self,
        forward_batch: ForwardBatch | ReplayView,
        schedule_batch: ScheduleBatch | None,
        in_graph: bool,
    ) -> DecodeBatch | None:
        """A verify pass of ours; None for passes that are none."""
        if not self.drafts or not forward_batch.forward_mode.is_target_verify():
            return None
        # An idle rank's has none; its graph is of the server's number.
        drafts = getattr(forward_batch.spec_info, "draft_token_num", self.drafts)
        return DecodeBatch(forward_batch, schedule_batch, in_graph, drafts)

    def reason(self, batch: DecodeBatch) -> str | None:
        """Why a verify pass is left to the stock backend, whatever it shares; None to plan it."""
        scheduled = batch.schedule_batch
        chains = are_chains(batch.forward_batch.spec_info, scheduled, greedy=self.is_on_cpu)
        if not chains:
            return "speculative-tree" if chains is False else "no-request-info"
        rows = batch.num_requests * batch.drafts, batch.num_rows
        if batch.drafts < 1 or len(batch.new_slots) not in rows:
            return "query-lengths"
        return None
