"""Verify passes of speculative decoding, on SGLang's own classes, without an engine.

In a real engine, with n-grams and with a draft model: test_engines.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from prefix_kernels.executor import PlanExecutor
from prefix_kernels.oracle import decode_attention_oracle
from prefix_patches.graph_labels import labelled
from prefix_patches.schedule_context import BATCH_ATTRIBUTE, ensure_schedule_context
from prefix_patches.speculation import are_chains
from sglang_prefix.backend.verification import Verification
from sglang_prefix.config import PrefixConfig
from tests.engine.bare_backend import HEAD_DIM, NUM_KV_HEADS, NUM_QO_HEADS, make_layer, make_runner
from tests.engine.server_args import model_folder
from tests.scheduling import make_forward_batch, make_request

SHARED, OWN = 150, 60  # tokens that rows of the table have in common, and further ones of each
DRAFTS = 4
WHOLE = "--attention-backend prefix "
TORCH = "--prefill-attention-backend torch_native --decode-attention-backend prefix "
NGRAM = "--speculative-algorithm NGRAM --speculative-ngram-max-bfs-breadth 1 "


class Verifies:
    """Six requests over real pools, of which no KV but theirs is a number, and two layers."""

    def __init__(self, *, drafts: int = DRAFTS, context_len: int = 512, **settings: Any) -> None:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        from sglang_prefix.backend.backend import PrefixAttnBackend

        self.layers = [make_layer(i) for i in range(2)]
        runner = make_runner(self.layers, context_len=context_len, flags=eagle(drafts))
        self.table, self.pool = runner.req_to_token_pool.req_to_token, runner.token_to_kv_pool
        slots = torch.randperm(1999)[: SHARED + 6 * OWN] + 1
        for row in range(6):
            own = slots[SHARED + row * OWN :][:OWN]
            self.table[row, : SHARED + OWN] = torch.cat((slots[:SHARED], own)).int()
        for layer in self.layers:
            for cache in self.caches(layer):
                cache[:] = torch.nan
                cache[slots] = torch.randn(len(slots), NUM_KV_HEADS, HEAD_DIM)
        self.stock = TorchNativeAttnBackend(runner)
        self.calls: list[int] = []  # queries that went to stock
        vars(self.stock)["forward"] = self.note
        vars(self.stock)["forward_extend"] = self.note
        config = PrefixConfig(verify=True, **settings)
        self.backend: Any = PrefixAttnBackend(runner, self.stock, "torch_native", config)

    def note(self, q: Any, *args: Any, **options: Any) -> Any:
        """The stock backend's, which cannot check drafts."""
        self.calls.append(len(q))
        return torch.zeros_like(q)

    def caches(self, layer: Any) -> tuple[Any, Any]:
        """K and V of a layer."""
        return self.pool.get_key_buffer(layer.layer_id), self.pool.get_value_buffer(layer.layer_id)

    def batch(self, lens: Sequence[int], *, drafts: int = DRAFTS, topk: int = 1) -> Any:
        """A pass over drafts behind ``lens`` tokens of each request."""
        new = [self.table[row, n : n + drafts] for row, n in enumerate(lens)]
        batch = make_forward_batch("TARGET_VERIFY", range(len(lens)), lens, torch.cat(new).tolist())
        batch.spec_info = eagle_input(drafts, topk)
        return batch

    def run(self, batch: Any) -> Any:
        """Run a pass, and compare what is packed with the oracle; its counters."""
        drafts, before = batch.spec_info.draft_token_num, len(self.calls)
        self.backend._schedule.pop(self.backend._schedule.push(batch))
        self.backend.init_forward_metadata(batch)
        for layer in self.layers:
            count = len(batch.out_cache_loc)
            q = torch.randn(count, NUM_QO_HEADS * HEAD_DIM)
            k, v = torch.randn(2, count, NUM_KV_HEADS, HEAD_DIM)
            found = self.backend.forward(q, k, v, layer, batch)
            if len(self.calls) > before:
                continue
            rows = batch.req_pool_indices.repeat_interleave(drafts)
            lens = batch.seq_lens.repeat_interleave(drafts) + 1 + torch.arange(count) % drafts
            caches, scale = self.caches(layer), layer.scaling
            queries = q.view(count, NUM_QO_HEADS, HEAD_DIM)
            expected, _ = decode_attention_oracle(
                queries, *caches, self.table, rows, lens, sm_scale=scale
            )
            torch.testing.assert_close(found, expected.flatten(1).float(), rtol=1e-5, atol=1e-5)
        return self.backend._report()["verify"]


def eagle(drafts: int = DRAFTS, topk: int = 1, backends: str = WHOLE) -> str:
    """Flags of a server that drafts with a model."""
    return (
        f"{backends}--speculative-algorithm STANDALONE --speculative-draft-model-path "
        f"{model_folder()} --speculative-num-steps {drafts - 1} --speculative-eagle-topk {topk} "
        f"--speculative-num-draft-tokens {drafts}"
    )


def eagle_input(drafts: int = DRAFTS, topk: int = 1) -> Any:
    """What SGLang's EAGLE worker, and that of a draft model of its own, hands over."""
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    links = dict.fromkeys(
        ("retrieve_index", "retrieve_next_token", "retrieve_next_sibling", "retrieve_cum_len")
    )
    return EagleVerifyInput(
        draft_token=None,
        custom_mask=None,
        positions=None,
        **links,
        spec_steps=drafts - 1,
        topk=topk,
        draft_token_num=drafts,
        capture_hidden_mode=CaptureHiddenMode.FULL,
        seq_lens_sum=None,
        seq_lens_cpu=None,
    )


def ngram_input(drafts: int) -> Any:
    """What SGLang's n-gram worker hands over."""
    from sglang.srt.speculative.ngram_info import NgramVerifyInput

    return NgramVerifyInput(draft_token_num=drafts, custom_mask=torch.empty(0))


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_chains_of_drafts_are_packed(executor: str) -> None:
    verifies = Verifies(executor=executor, policy="node", gate="always")
    for lens in ([SHARED] * 6, [SHARED + 9, SHARED + 1, 40], [SHARED + OWN - DRAFTS] * 2, [1]):
        before = verifies.backend._report()["verify"]["packed_steps"]
        counted = verifies.run(verifies.batch(lens))
        assert counted["packed_steps"] == before + 1
    assert counted["kv_tokens_read"] < 0.5 * counted["kv_tokens_logical"]
    assert verifies.calls == []
    assert counted["fallback_steps"] == counted["stock_steps"] == 0
    assert verifies.backend.needs_cpu_seq_lens


def test_drafts_are_never_shared_whatever_the_rows_say() -> None:
    """Rows that are equal up to the end; but the drafts of two requests are two tokens."""
    verifies = Verifies(policy="node")
    lens = [SHARED - DRAFTS // 2] * 3
    counted = verifies.run(verifies.batch(lens))
    (group,) = verifies.backend._planner.groups
    plan = group.executor.plan
    assert plan.num_shared_packs == 1
    assert plan.pack_end[0] == lens[0]
    assert counted["packed_steps"] == 1


def test_trees_and_passes_without_their_drafts_are_stocks() -> None:
    verifies = Verifies()
    plain = verifies.batch([SHARED] * 2)
    for spec_info, reason in (
        (eagle_input(topk=2), "speculative-tree"),
        (SimpleNamespace(draft_token_num=DRAFTS, topk=1), "speculative-tree"),
        (ngram_input(DRAFTS), "no-request-info"),
    ):
        before = verifies.backend._report()["verify"]["fallback_reasons"].get(reason, 0)
        plain.spec_info = spec_info
        counted = verifies.run(plain)
        assert counted["fallback_reasons"][reason] == before + 1
    assert verifies.calls == [2 * DRAFTS] * 6
    assert counted["packed_steps"] == 0


def test_drafts_past_the_context_or_of_another_number_are_stocks() -> None:
    verifies = Verifies()
    width = verifies.table.shape[1]
    for lens, slots in (([SHARED, width - DRAFTS + 1], None), ([SHARED] * 2, 2 * DRAFTS - 1)):
        batch = verifies.batch([SHARED] * 2)
        batch.seq_lens_cpu = batch.seq_lens = torch.tensor(lens)
        batch.out_cache_loc = batch.out_cache_loc[:slots]
        counted = verifies.run(batch)
    assert counted["fallback_reasons"] == {"query-lengths": 2}
    # As far as the context reaches they are ours.
    batch = verifies.batch([SHARED] * 2)
    batch.seq_lens_cpu = batch.seq_lens = torch.tensor([SHARED, width - DRAFTS])
    verifies.backend.init_forward_metadata(batch)
    assert verifies.backend._step.reason is None


def test_a_call_with_the_drafts_of_another_batch_goes_to_stock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verifies = Verifies()
    verifies.backend.init_forward_metadata(verifies.batch([SHARED] * 2))
    monkeypatch.setattr(PlanExecutor, "run", lambda *_: pytest.fail("ran"))
    other, layer = verifies.batch([SHARED] * 3), verifies.layers[0]
    q, kv = torch.zeros(12, NUM_QO_HEADS * HEAD_DIM), torch.zeros(12, NUM_KV_HEADS, HEAD_DIM)
    verifies.backend.forward(q, kv, kv, layer, other)
    assert verifies.calls == [12]
    assert verifies.backend._report()["verify"]["fallback_reasons"] == {"other-batch": 1}


def test_a_failure_goes_to_stock_and_is_raised_under_verify(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("raised on purpose by a test")

    monkeypatch.setattr(PlanExecutor, "run", fail)
    verifies = Verifies()
    with pytest.raises(RuntimeError, match="on purpose"):
        verifies.run(verifies.batch([SHARED] * 2))
    verifies.backend._verify = False
    assert verifies.run(verifies.batch([SHARED] * 2))["fallback_reasons"] == {"error": 1}
    assert verifies.calls == [2 * DRAFTS] * 2


def test_ranks_with_batches_of_their_own_check_drafts_on_stock() -> None:
    ranks = " --tp-size 2 --dp-size 2 --enable-dp-attention"
    flags = eagle().replace("STANDALONE", "EAGLE") + ranks
    stock: Any = None  # which of n-grams alone is asked
    found = Verification(make_runner(device="cuda", flags=flags), stock, serves=True)
    assert (found.drafts, found.passed_by_reason) == (0, "speculative-ranks")


def test_lengths_are_copied_for_passes_that_may_be_packed_alone() -> None:
    assert Verifies().backend.needs_cpu_seq_lens
    stock = Verifies(gate="never")
    vars(stock.stock)["needs_cpu_seq_lens"] = False
    assert not stock.backend.needs_cpu_seq_lens


def started(flags: str, **settings: Any) -> Any:
    """Our backend of a server with those flags, over SGLang's torch_native."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from sglang_prefix.backend.backend import PrefixAttnBackend

    runner = make_runner([make_layer(0)], flags=flags)
    stock = TorchNativeAttnBackend(runner)
    return PrefixAttnBackend(runner, stock, "torch_native", PrefixConfig(**settings))


@pytest.mark.parametrize(
    ("flags", "drafts", "reason", "hint"),
    [
        (eagle(), DRAFTS, None, None),
        (eagle(2), 2, None, None),
        (eagle(backends=TORCH), 0, "speculative-verify", "--speculative-attention-mode decode"),
        (f"{eagle(backends=TORCH)} --speculative-attention-mode decode", DRAFTS, None, None),
        (eagle(topk=2), 0, "speculative-tree", "--speculative-eagle-topk 1"),
        (f"{WHOLE}{NGRAM}--speculative-num-draft-tokens 2", 2, None, None),
        (f"{TORCH}{NGRAM}", 0, "speculative-verify", "checked by torch_native"),
        (
            f"{WHOLE}--speculative-algorithm NGRAM",
            0,
            "speculative-tree",
            "--speculative-ngram-max-bfs-breadth 1",
        ),
        (WHOLE, 0, None, None),
    ],
)
def test_the_flags_say_which_passes_come_here_and_the_start_says_what_would_bring_them(
    flags: str,
    drafts: int,
    reason: str | None,
    hint: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        backend = started(flags)
    assert backend._verification.drafts == drafts
    (start,) = (line for line in caplog.messages if "1 of 1 layers" in line)
    assert (hint in start) if hint else start.endswith("graph labels none")
    batch = make_forward_batch("TARGET_VERIFY", [0], [5], [6] * max(drafts, 1))
    backend._schedule.pop(backend._schedule.push(batch))
    if reason is not None:
        assert backend._report()["verify"]["fallback_reasons"] == {reason: 1}


def test_drafts_that_may_be_no_chain_are_refused_where_stock_checks_none() -> None:
    """SGLang's torch_native would end the server at the first match that is short."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    runner = make_runner([make_layer(0)], flags=f"{WHOLE}{NGRAM}--speculative-num-draft-tokens 5")
    stock = TorchNativeAttnBackend(runner)
    with pytest.raises(ValueError, match=r"--speculative-num-draft-tokens 5: .*; legal: 2$"):
        Verification(runner, stock, serves=True)
    assert Verification(runner, stock, serves=False).drafts == 5  # stock's own server
    vars(stock)["forward_extend"] = lambda: None
    assert Verification(runner, stock, serves=True).drafts == 5


@pytest.mark.parametrize("flags", [eagle(topk=2), eagle(backends=TORCH)])
def test_a_server_whose_every_pass_is_another_backends_takes_nothing(
    flags: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        backend = started(flags, extends="never")
    assert backend._planner is None
    (start,) = (line for line in caplog.messages if "0 of 1 layers" in line)
    assert "inactive: " in start
    assert backend._verification.hint in start


# Tokens, and which of those before it each draft attends to.
CHAIN = ([7, 8, 9, 8], [[], [0], [0, 1], [0, 1, 2]])
NO_MATCH = ([7, 0, 0, 0], [[], [0], [0], [0]])
SHORT = ([7, 8, 0, 0], [[], [0], [0], [0]])
SHORT_ZERO = ([7, 0, 9, 0], [[], [0], [0, 1], [0]])
FORK = ([7, 8, 9, 8], [[], [0], [0], [0, 1]])


@pytest.mark.parametrize(
    ("requests", "greedy", "sampled"),
    [
        ([CHAIN], True, True),
        ([CHAIN, CHAIN], True, True),
        # What fills up is the same token behind the same one: only the first can be accepted.
        ([NO_MATCH], True, False),
        ([CHAIN, SHORT_ZERO], True, False),
        ([CHAIN, SHORT], False, False),
        ([FORK, CHAIN], False, False),
    ],
)
def test_drafts_of_n_grams_are_chains_by_their_mask(
    requests: list[Any], greedy: bool, sampled: bool
) -> None:
    tokens = np.array([request[0] for request in requests]).ravel()
    mask = np.zeros((len(requests), DRAFTS, DRAFTS), dtype=np.uint8)
    for b, (_, above) in enumerate(requests):
        for i, seen in enumerate(above):
            mask[b, i, [*seen, i]] = 1
    batch: Any = SimpleNamespace(_sglang_prefix_drafts=(tokens, mask.ravel()))
    assert are_chains(ngram_input(DRAFTS), batch, greedy=True) is greedy
    assert are_chains(ngram_input(DRAFTS), batch) is sampled
    assert are_chains(ngram_input(DRAFTS), SimpleNamespace()) is None


def test_the_mask_of_sglangs_own_tables_is_noted_on_the_batch() -> None:
    from sglang.srt.speculative.ngram_worker import NGRAMWorker

    from prefix_patches import speculation

    speculation.install()
    known = [*range(30, 50)]
    corpus = SimpleNamespace(
        synchronize=lambda: None,
        batch_get=lambda ids, tokens, lens: (np.array([49, 1, 2, 3]), np.tri(4).ravel()),
    )
    worker: Any = SimpleNamespace(
        draft_token_num=4,
        enable_overlap=False,
        max_trie_depth=18,
        ngram_corpus=corpus,
        _efficient_concat_last_n=lambda *args: NGRAMWorker._efficient_concat_last_n(None, *args),
    )
    batch: Any = SimpleNamespace(reqs=[make_request(1, known)], grammar_needs_sync=lambda: False)
    NGRAMWorker._prepare_draft_tokens(worker, batch)
    assert are_chains(ngram_input(4), batch) is True


def test_a_pass_that_is_no_chain_ends_the_plan_of_those_that_are() -> None:
    """It writes slots that the plan does not hear of."""
    verifies = Verifies()
    forgotten: list[int] = []
    planner = verifies.backend._planner
    planner.invalidate = lambda: forgotten.append(1)
    batch = verifies.batch([SHARED] * 2)
    verifies.run(batch)
    assert forgotten == []
    batch.spec_info = eagle_input(topk=2)
    verifies.run(batch)
    assert forgotten


def test_a_verify_pass_that_is_loaded_before_its_forward_pass_knows_its_requests() -> None:
    """As those of EAGLE are, outside of ``ModelRunner.forward``."""
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

    seen: list[Any] = []

    class Runner(DecodeCudaGraphRunner):
        def load_batch(self, forward_batch: Any, pp_proxy_tensors: Any = None) -> None:
            seen.append(self.model_runner._sglang_prefix_schedule_context.batch)

    model_runner = make_runner([make_layer(0)])
    schedule = ensure_schedule_context(model_runner)
    runner: Any = object.__new__(labelled(Runner))
    runner.model_runner = model_runner
    batch = make_forward_batch("TARGET_VERIFY", [0], [5], [6])
    scheduled = object()
    setattr(batch, BATCH_ATTRIBUTE, scheduled)
    epoch = schedule.epoch
    runner.load_batch(batch)
    assert seen == [scheduled]
    assert (schedule.batch, schedule.epoch) == (None, epoch)
