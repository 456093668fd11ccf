"""Steps recorded as a graph would keep them, replayed under other plans of the same size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from prefix_kernels.plan_buffers import PlanCapacity
from prefix_kernels.tiles import TileShape
from prefix_kernels.triton_executor import LAUNCH_MODES, MERGE_MODES, TritonExecutor
from sglang_prefix.packing import AttentionShape
from sglang_prefix.packing.planner import PackPlanner
from tests.attention import KERNEL_TOLERANCES, AttentionCase, assert_close, make_case
from tests.forests import Batch, Fork, build_batch, random_batch
from tests.plan_runs import SPLITS, WHOLE, grow
from tests.replay import Recording, record

pytestmark = pytest.mark.usefixtures("nan_memory")

ROWS, NUM_KV_HEADS, GROUP, DIM, NUM_SLOTS = 7, 2, 3, 16, 3000
SHAPE = AttentionShape(NUM_KV_HEADS * GROUP, NUM_KV_HEADS, DIM, DIM, 4, 4)
CAPACITY = PlanCapacity(ROWS, 1 << 14, 1 << 14, 1 << 9)


@dataclass
class Server:
    """The static buffers of a captured step, and nothing that depends on a plan."""

    executor: TritonExecutor
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    seq_lens: torch.Tensor
    new_slots: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def start(cls, mode: str, merge: str) -> Server:
        executor = TritonExecutor(
            NUM_KV_HEADS * GROUP,
            NUM_KV_HEADS,
            TileShape(DIM, DIM, 4, 4),
            torch.device("cpu"),
            mode=mode,
            merge=merge,
            capacity=CAPACITY,
        )
        heads = (ROWS, NUM_KV_HEADS * GROUP)
        cache = torch.full((NUM_SLOTS, NUM_KV_HEADS, DIM), torch.nan)
        return cls(
            executor,
            torch.zeros(*heads, DIM),
            cache,
            cache.clone(),
            torch.ones(ROWS, dtype=torch.int64),
            torch.zeros(ROWS, dtype=torch.int64),
            torch.zeros(*heads, DIM),
            torch.zeros(heads),
        )

    def step(self) -> None:
        """What is captured: the append of this step's slots, then a layer."""
        self.executor.append(self.seq_lens, self.new_slots)
        self.executor.run(
            self.q,
            self.k_cache,
            self.v_cache,
            self.out,
            self.lse,
            sm_scale=DIM**-0.5,
            logit_cap=0.0,
            k_scale=1.0,
            v_scale=1.0,
        )

    def poison(self) -> None:
        """Everything that a step may not have read or left unwritten."""
        buffers = self.executor.buffers
        for tensor in (self.out, self.lse, buffers.partial_out, buffers.partial_lse, self.q):
            tensor.fill_(torch.nan)
        self.k_cache.fill_(torch.nan)
        self.v_cache.fill_(torch.nan)
        self.seq_lens.fill_(1 << 20)
        self.new_slots.fill_(1 << 20)

    def load(self, batch: Batch, case: AttentionCase, policy: str, *, skip: bool = False) -> None:
        """Plan a batch into the buffers; the table that its slots came from is then lost."""
        profile = SPLITS if policy == "node" else WHOLE
        plan = PackPlanner(SHAPE, profile, policy=policy, reserved_tail_slots=8).plan(
            batch.forest()
        )
        table = case.req_to_token.clone()
        if not skip:
            self.executor.load(plan, table, case.req_pool_indices, num_rows=ROWS)
        table.fill_(1 << 20)

    def serve(self, case: AttentionCase, new_slots: torch.Tensor, recording: Recording) -> None:
        """Fill the static inputs of one step and replay it."""
        self.poison()
        size = len(case.seq_lens)
        self.q[:size] = case.q
        self.k_cache[: len(case.k_cache)] = case.k_cache
        self.v_cache[: len(case.v_cache)] = case.v_cache
        self.seq_lens[:size] = case.seq_lens
        self.new_slots[:size] = new_slots
        recording.replay()

    def assert_right(self, case: AttentionCase) -> None:
        size = len(case.seq_lens)
        assert_close((self.out[:size], self.lse[:size]), case.oracle(), KERNEL_TOLERANCES)
        assert (self.out[size:] == 0).all()
        assert (self.lse[size:] == -torch.inf).all()


@pytest.fixture(params=[(m, g) for m in LAUNCH_MODES for g in MERGE_MODES], ids="-".join)
def server(request: pytest.FixtureRequest) -> Server:
    return Server.start(*request.param)


@pytest.fixture
def recording(server: Server) -> Recording:
    """Recorded, as a graph is, under a batch of no interest: single tokens, nothing shared."""
    batch = build_batch([Fork(b, 0, 1) for b in range(ROWS)])
    case = make_case(batch, num_kv_heads=NUM_KV_HEADS, group=GROUP, head_dim=DIM)
    server.load(batch, case, "query")
    server.seq_lens.copy_(case.seq_lens)
    server.new_slots.copy_(case.req_to_token[case.req_pool_indices, 0])
    return record(server.step)


def forests() -> Iterator[tuple[str, Batch, str]]:
    """Batches of up to ROWS requests that share in other ways, or not at all."""
    everyone = [Fork(0, 0, 90), *(Fork(0, 80, 3 + b) for b in range(ROWS - 1))]
    yield "one prefix", build_batch(everyone, growth=6), "node"
    yield "uneven", random_batch(21, num_requests=ROWS, max_tokens=70, growth=6), "node"
    yield "fewer", random_batch(22, num_requests=4, max_tokens=60, growth=6), "pat"
    alone = [Fork(b, 0, 7 + 11 * b) for b in range(ROWS - 1)]
    yield "nothing shared", build_batch(alone, growth=6, order="scattered"), "query"
    yield "one request", build_batch([Fork(0, 0, 130)], growth=6), "pat"
    same = [Fork(0, 0, 64), *(Fork(0, 64, 0) for _ in range(ROWS - 1))]
    yield "identical rows", build_batch(same, growth=6), "node"


def test_one_recording_serves_every_forest(server: Server, recording: Recording) -> None:
    """Other forests, fewer requests, grown tails, padding rows, repeated replays."""
    for name, batch, policy in forests():
        case = make_case(batch, num_kv_heads=NUM_KV_HEADS, group=GROUP, head_dim=DIM)
        server.load(batch, case, policy)
        newest = case.req_to_token[case.req_pool_indices, case.seq_lens - 1]
        server.serve(case, newest, recording)
        server.assert_right(case)
        bits = server.out.clone()
        server.serve(case, newest, recording)
        assert torch.equal(server.out, bits), name
        for _ in range(2):
            _, slots = grow(batch, case, np.ones(len(case.seq_lens), dtype=np.int64))
            server.serve(case, slots, recording)
            server.assert_right(case)


def test_a_replay_after_an_aborted_one(server: Server, recording: Recording) -> None:
    batch = random_batch(23, num_requests=ROWS, max_tokens=60, growth=6)
    case = make_case(batch, num_kv_heads=NUM_KV_HEADS, group=GROUP, head_dim=DIM)
    server.load(batch, case, "node")
    newest = case.req_to_token[case.req_pool_indices, case.seq_lens - 1]
    for launches in range(1, len(recording.launches)):
        server.poison()
        server.q.fill_(1.0)
        server.k_cache[: len(case.k_cache)] = case.k_cache
        server.v_cache[: len(case.v_cache)] = case.v_cache
        server.seq_lens[:ROWS] = case.seq_lens
        server.new_slots[:ROWS] = newest
        recording.replay(upto=launches)
        server.serve(case, newest, recording)
        server.assert_right(case)


def test_the_recording_points_at_the_same_addresses_whatever_is_loaded(
    server: Server, recording: Recording
) -> None:
    for _, batch, policy in forests():
        case = make_case(batch, num_kv_heads=NUM_KV_HEADS, group=GROUP, head_dim=DIM)
        server.load(batch, case, policy)
        server.seq_lens[: len(case.seq_lens)] = case.seq_lens
        again = record(server.step)
        assert again.addresses() == recording.addresses()
        assert [(k, grid) for k, grid, _ in again.launches] == [
            (k, grid) for k, grid, _ in recording.launches
        ]


def test_control_the_plan_copy_is_skipped(server: Server, recording: Recording) -> None:
    wrong = 0
    for _, batch, policy in forests():
        case = make_case(batch, num_kv_heads=NUM_KV_HEADS, group=GROUP, head_dim=DIM)
        server.load(batch, case, policy, skip=True)
        # Lengths that the old plan can take, so that nothing is read out of bounds.
        lens = torch.ones(ROWS, dtype=torch.int64)
        newest = case.req_to_token[case.req_pool_indices, case.seq_lens - 1]
        server.poison()
        size = len(case.seq_lens)
        server.q[:size] = case.q
        server.k_cache[: len(case.k_cache)] = case.k_cache
        server.v_cache[: len(case.v_cache)] = case.v_cache
        server.seq_lens.copy_(lens)
        server.new_slots.fill_(1)
        server.new_slots[:size] = newest
        recording.replay()
        try:
            server.assert_right(case)
        except AssertionError:
            wrong += 1
    assert wrong == len(list(forests()))
