"""Steps recorded as a graph would keep them, replayed under other plans of the same batch size."""

from __future__ import annotations

import pytest
import torch

from prefix_kernels.executor import AttentionParams
from prefix_kernels.plan import AttentionShape
from prefix_kernels.plan_buffers import PlanCapacity
from prefix_kernels.triton_executor import TritonExecutor
from tests.attention import (
    KERNEL_TOLERANCES,
    SPLITS,
    TRITON,
    WHOLE,
    AttentionCase,
    assert_close,
    build_executor,
    load,
    make_case,
    poison_partials,
)
from tests.forests import Batch, Fork, build_batch, random_batch
from tests.replay import Recording, record

pytestmark = pytest.mark.usefixtures("nan_memory")

ROWS, NUM_KV_HEADS, GROUP, DIM, NUM_SLOTS = 7, 2, 3, 16, 3000
CAPACITY = PlanCapacity(ROWS, 1 << 14, 1 << 14, 1 << 9)
FAR = 1 << 20  # no length and no slot


class Server:
    """The static buffers of a captured step, and nothing that depends on a plan."""

    def __init__(self, way: str) -> None:
        num_heads = NUM_KV_HEADS * GROUP
        shape = AttentionShape(num_heads, NUM_KV_HEADS, DIM, DIM, 4, 4)
        executor = build_executor(shape, way, capacity=CAPACITY)
        assert isinstance(executor, TritonExecutor)
        self.executor = executor
        self.q = torch.zeros(ROWS, num_heads, DIM)
        self.k_cache = torch.zeros(NUM_SLOTS, NUM_KV_HEADS, DIM)
        self.v_cache = torch.zeros_like(self.k_cache)
        self.seq_lens = torch.ones(ROWS, dtype=torch.int64)
        self.new_slots = torch.zeros(ROWS, dtype=torch.int64)
        self.out, self.lse = torch.zeros_like(self.q), torch.zeros(ROWS, num_heads)

    def step(self) -> None:
        """What is captured: the append of this step's slots, then a layer."""
        self.executor.append(self.seq_lens, self.new_slots)
        params = AttentionParams(DIM**-0.5)
        self.executor.run(self.q, self.k_cache, self.v_cache, self.out, self.lse, params)

    def load(self, case: AttentionCase, policy: str) -> None:
        """Plan a batch into the buffers; the table that its slots came from is then lost."""
        table = case.req_to_token.clone()
        profile = SPLITS if policy == "node" else WHOLE
        load(case, "", policy, profile, executor=self.executor, padded_batch_size=ROWS)
        case.req_to_token.fill_(FAR)
        case.req_to_token = table

    def fill(self, case: AttentionCase) -> None:
        """The static inputs of one step. All else that it may read, or must write, is poison."""
        for tensor in (self.out, self.lse, self.q, self.k_cache, self.v_cache):
            tensor.fill_(torch.nan)
        poison_partials(self.executor)
        size = len(case.seq_lens)
        self.q[:size] = case.q
        self.k_cache[: len(case.k_cache)] = case.k_cache
        self.v_cache[: len(case.v_cache)] = case.v_cache
        for static, values in ((self.seq_lens, case.seq_lens), (self.new_slots, case.newest_slots)):
            static.fill_(FAR)
            static[:size] = values

    def check(self, case: AttentionCase) -> None:
        """Compare the outputs of a replay; padding rows are zeros."""
        size = len(case.seq_lens)
        assert_close((self.out[:size], self.lse[:size]), case.oracle(), KERNEL_TOLERANCES)
        assert (self.out[size:] == 0).all()
        assert (self.lse[size:] == -torch.inf).all()


def case_of(batch: Batch) -> AttentionCase:
    return make_case(batch, num_kv_heads=NUM_KV_HEADS, group=GROUP, head_dim=DIM)


@pytest.fixture(params=TRITON)
def server(request: pytest.FixtureRequest) -> Server:
    return Server(request.param)


@pytest.fixture
def recording(server: Server) -> Recording:
    """Recorded, as a graph is, under a batch of no interest: single tokens, nothing shared."""
    case = case_of(build_batch([Fork(b, 0, 1) for b in range(ROWS)]))
    server.load(case, "query")
    server.fill(case)
    return record(server.step)


def cases() -> list[tuple[AttentionCase, str]]:
    """Batches of up to ROWS requests that share in other ways, or not at all."""
    one_prefix = [Fork(0, 0, 90), *(Fork(0, 80, 3 + b) for b in range(ROWS - 1))]
    alone = [Fork(b, 0, 7 + 11 * b) for b in range(ROWS - 1)]
    same = [Fork(0, 0, 64), *(Fork(0, 64, 0) for _ in range(ROWS - 1))]
    found = [
        (build_batch(one_prefix, growth=6), "node"),
        (random_batch(21, num_requests=ROWS, max_tokens=70, growth=6), "node"),
        (random_batch(22, num_requests=4, max_tokens=60, growth=6), "pat"),
        (build_batch(alone, growth=6, order="scattered"), "query"),
        (build_batch([Fork(0, 0, 130)], growth=6), "pat"),
        (build_batch(same, growth=6), "node"),
    ]
    return [(case_of(batch), policy) for batch, policy in found]


def test_one_recording_serves_every_forest(server: Server, recording: Recording) -> None:
    """Other forests, fewer requests, grown tails, padding rows, repeated replays."""
    for case, policy in cases():
        server.load(case, policy)
        bits = []
        for _ in range(2):
            server.fill(case)
            recording.replay()
            server.check(case)
            bits.append(server.out.clone())
        assert torch.equal(*bits)
        case.grow()
        server.fill(case)
        recording.replay()
        server.check(case)


def test_a_replay_after_an_aborted_one(server: Server, recording: Recording) -> None:
    case = case_of(random_batch(23, num_requests=ROWS, max_tokens=60, growth=6))
    server.load(case, "node")
    for launches in range(1, len(recording.launches)):
        server.fill(case)
        server.q.fill_(1.0)
        recording.replay(upto=launches)
        server.fill(case)
        recording.replay()
        server.check(case)


def test_the_recording_holds_for_every_plan(server: Server, recording: Recording) -> None:
    """The same kernels, grids and addresses, whatever is loaded."""
    for case, policy in cases():
        server.load(case, policy)
        server.fill(case)
        again = record(server.step)
        assert again.addresses() == recording.addresses()
        assert [one[:2] for one in again.launches] == [one[:2] for one in recording.launches]


def test_control_the_plan_is_not_loaded(server: Server, recording: Recording) -> None:
    for case, _ in cases():
        server.fill(case)
        # Lengths that the old plan can take, so that nothing is read out of bounds.
        server.seq_lens.fill_(1)
        server.new_slots[len(case.seq_lens) :] = 1
        recording.replay()
        with pytest.raises(AssertionError):
            server.check(case)
