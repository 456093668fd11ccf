"""Workloads of the bench commands: the registry, PAT's notation, traces, tensors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_prefix.bench.cases import KernelOptions, kernel_cases
from sglang_prefix.bench.workloads.inputs import AttentionInputs, MismatchError, OutputCheck
from sglang_prefix.bench.workloads.registry import Heads, KernelCase, load_registry, registry_names
from sglang_prefix.bench.workloads.traces import TraceRequest, read_trace, trace_batches
from sglang_prefix.bench.workloads.trees import TreeBatch, pat_tree
from tests import forests

TRACE = Path(__file__).parents[2] / "shared" / "data" / "mooncake_conversation_trace.jsonl.gz"
LINE = {"timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": [0, 1]}


def cases_of(*workloads: str, **options: Any) -> list[KernelCase]:
    return kernel_cases(KernelOptions(workloads=list(workloads), **options))


def test_the_registry_holds_what_its_files_say() -> None:
    assert set(registry_names()) >= {"trees", "unrelated", "chunk", "uneven", "rollouts", "quick"}
    for name in registry_names():
        cases = load_registry(name)
        assert len({case.name for case in cases}) == len(cases) > 0
        assert all(case.tree.length.min() > 0 for case in cases)
    published = [case for name in ("trees", "unrelated") for case in load_registry(name)]
    assert list(dict.fromkeys(case.notation for case in published)) == list(forests.PAT_TREES)
    for case in published[::4]:
        batch = TreeBatch.lay_out(case.tree, page_size=16)
        ratio = batch.seq_lens.sum() / batch.forest().unique_tokens
        assert ratio == pytest.approx(forests.PAT_TREES[str(case.notation)], abs=0.006)
    with pytest.raises(ValueError, match="'nowhere' is unknown; legal: 'chain', "):
        load_registry("nowhere")


def test_the_first_heads_of_every_batch_come_first() -> None:
    cases = cases_of("trees", "chunk")
    assert [case.name for case in cases[17:20]] == [
        "trees/18_8,16,32,256_512,512,256,32/32:8",
        "chunk/16x1024+64/32:32",
        "chunk/32x1024+64/32:32",
    ]
    assert len(cases) == 18 * 4 + 9
    quick = cases_of(quick=True)
    assert {c.group for c in quick} >= {"trees", "rollouts", "chunk", "uneven", "unrelated"}
    assert [case.heads for case in cases_of("^unrelated/.*/16:8")] == [Heads(16, 8)] * 2


def test_a_suite_has_an_order_of_its_own() -> None:
    cases = cases_of("gpu")
    assert [case.rank for case in cases] == list(range(len(cases)))
    groups = [case.group for case in cases][:23]
    assert groups == ["rollouts", *["unrelated"] * 2, "fixed", "chain", *["trees"] * 18]
    assert all("/32:8" in case.name for case in cases[:23] if case.group != "fixed")
    pages = [case.page_size for case in cases]
    assert pages == sorted(pages)
    assert pages.count(1) == pages.count(16) + 1  # a chain has no pages
    trees = [case for case in cases if case.group == "trees" and case.page_size == 1]
    assert len({case.heads for case in trees}) == 4
    assert len(trees) == 18 * 4
    assert all(case.is_of_suite for case in cases)
    small = cases_of(dry=True)
    assert {case.group for case in small} == {case.group for case in cases}
    assert all(case.tree.seq_lens.max() < 200 for case in small)
    paged = [*cases_of("gpu", "/page16"), *cases_of("trees", page_size=16)]
    assert {case.page_size for case in paged} == {16}
    assert paged[-1].name.endswith("/page16")


def test_the_cases_of_the_documented_cpu_table() -> None:
    cases = cases_of("cpu", dtype="float16")
    assert len(cases) == 12
    first, *_, last = cases
    assert first.name == "cpu/32x2048+128/32:8/bfloat16/consecutive"
    assert (first.dtype, first.scattered, first.target) == ("bfloat16", False, 15)
    assert (last.dtype, last.scattered, last.target) == ("float32", True, None)
    slots = TreeBatch.lay_out(first.tree, scattered=False)
    assert (np.diff(slots.table[0]) == 1).all()
    assert (np.diff(TreeBatch.lay_out(first.tree).table[0]) != 1).any()


def test_the_shapes_of_the_promises_over_peers() -> None:
    cases = cases_of("cpu-peers")
    assert len(cases) == 11 * 2 * 2 * 2
    assert {str(case.heads) for case in cases} == {"32:8", "9:3:64"}
    assert {(case.dtype, case.scattered) for case in cases} == {
        (dtype, scattered) for dtype in ("bfloat16", "float32") for scattered in (False, True)
    }
    published = {case.batch_name: case.notation for case in load_registry("trees")}
    trees = {case.batch_name: case.notation for case in cases if case.batch_name[2] == "_"}
    assert sorted(name[:2] for name in trees) == ["02", "06", "08", "09", "12", "18"]
    assert trees.items() <= published.items()


def test_several_query_tokens_stand_at_the_end_of_their_request() -> None:
    cases = cases_of("extends")
    assert {case.query_tokens for case in cases} == {1, 4, 8, 20, 32, 64, 256}
    for case in cases:
        assert (case.tree.seq_lens >= case.query_tokens).all()
        # What is shared is a prefix that is cached, so the tails hold the queries.
        *shared, tail = (case.notation or "").split("_")[1].split(",")
        assert not shared or case.query_tokens <= int(tail)


def test_heads_are_read_and_refused() -> None:
    assert Heads.parse("32:8") == Heads(32, 8)
    assert str(Heads.parse("4:2:16")) == "4:2:16"
    latent = Heads.parse("16:1:576:512")
    assert latent == Heads(16, 1, 576, 512, v_in_k=True)
    assert str(latent) == "16:1:576:512"
    assert latent.token_elements == 576
    for text in ("", "8", "8:3", "8:0", "8:2:0", "8:2:64:65", "8:2:64:0", "a:b", "-8:2", "8:2 "):
        with pytest.raises(ValueError, match=r"heads .*; legal: QO:KV or QO:KV:DIM"):
            Heads.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *("1,8", "1_2_3", "1,8_512", "1_5,5", "1,x_512,1", "1,8_512,", "_", "1,8_512,0", "0_5"),
        *("-1_5", "1_-5", "99999999_5", "1_99999999999", "1_٣", "1_ 5", "8,1_5,5"),
    ],
)
def test_malformed_trees_are_refused_with_what_is_legal(text: str) -> None:
    with pytest.raises(ValueError, match=r"--tree is '.*'; legal: nodes .*1,8,512_512,512,256"):
        pat_tree(text)


# Traces.


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_equal_first_blocks_are_shared(name: str, tmp_path: Path) -> None:
    other = LINE | {"timestamp": 100, "hash_ids": [0, 2]}
    alone = LINE | {"timestamp": 100, "hash_ids": [7, 1]}
    late = LINE | {"timestamp": 900}
    opener: Any = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wt") as file:
        file.write("\n".join(map(json.dumps, (late, other, alone, LINE))) + "\n\n")
    (batch,) = trace_batches(read_trace(tmp_path / name), 1, 10_000)
    assert batch.moment_ms == 450
    # The first has finished by then: nine tokens of 50 ms. Two are left, and share nothing.
    laid_out = TreeBatch.lay_out(batch.tree)
    assert laid_out.seq_lens.tolist() == [600 + 8, 600 + 8]
    assert laid_out.forest().unique_tokens == 2 * 608
    requests = [TraceRequest(0, 1100, 9, (0, 1, n)) for n in (2, 3, 4)]
    (batch,) = trace_batches(requests, 1, 1024 + 2 * 77)
    assert batch.left_out == 1
    assert TreeBatch.lay_out(batch.tree).forest().unique_tokens == 1024 + 2 * 77
    with pytest.raises(ValueError, match="none of the 3 requests at 0 ms fits into 100 tokens"):
        trace_batches(requests, 1, 100)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{", "line 2: it is not JSON: Expecting property name"),
        (b"3", "line 2: no JSON object"),
        (LINE | {"hash_ids": "x"}, "line 2: hash_ids is 'x'; legal: 2 whole numbers"),
        (LINE | {"hash_ids": [1, True]}, "line 2: hash_ids is"),
        (
            LINE | {"hash_ids": [1]},
            r"hash_ids is \[1\]; legal: 2 whole numbers, one per 512",
        ),
        (LINE | {"input_length": 0}, "line 2: input_length is 0; legal: a whole number from 1"),
        ({"timestamp": 1}, "line 2: input_length is None"),
        (LINE | {"timestamp": 0.5}, "line 2: timestamp is 0.5"),
        (b"\xff\xfe\x00", "is not text"),
    ],
)
def test_malformed_traces_are_refused_with_the_line(
    content: bytes | dict[str, Any], what: str, tmp_path: Path
) -> None:
    path = tmp_path / "trace.jsonl"
    line = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(json.dumps(LINE).encode() + b"\n" + line)
    with pytest.raises(ValueError, match=f"trace .*trace.jsonl.* {what}"):
        read_trace(path)


def test_unreadable_traces_are_refused(tmp_path: Path) -> None:
    broken, empty = tmp_path / "broken.jsonl.gz", tmp_path / "empty.jsonl"
    broken.write_bytes(gzip.compress(json.dumps(LINE).encode())[:-9])
    empty.write_text("\n")
    for path, what in (
        (tmp_path / "nowhere", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (broken, "cannot be read: Compressed file ended"),
        (empty, "holds no request"),
    ):
        with pytest.raises(ValueError, match=what):
            read_trace(path)


@pytest.mark.skipif(not TRACE.is_file(), reason=f"{TRACE} is not there")
def test_batches_of_the_mooncake_trace_fit() -> None:
    for batch in trace_batches(read_trace(TRACE), 3, 1 << 16):
        laid_out = TreeBatch.lay_out(batch.tree)
        assert laid_out.forest().unique_tokens <= 1 << 16
        assert laid_out.seq_lens.sum() > laid_out.forest().unique_tokens  # something is shared
        assert np.array_equal(laid_out.tree.leaf, np.unique(laid_out.tree.leaf))


# Tensors.


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn])
def test_inputs_grow_and_are_poisoned_where_nobody_may_read(kv_dtype: torch.dtype) -> None:
    w = AttentionInputs.lay_out(
        pat_tree("1,3_32,7"),
        Heads(4, 2, 16, 16),
        torch.device("cpu"),
        5,
        dtype=torch.float32,
        kv_dtype=kv_dtype,
        page_size=16,
        growth=2,
        first_slot=64,
        padded_batch_size=5,
        poison=True,
        options={"v_scale": 2.0},
    )
    own = w.req_to_token[:, :39].numpy()
    assert not np.intersect1d(own, w.batch.growth_slots).size
    for step in range(2):
        w.grow(step)
        assert np.array_equal(w.newest_slots(), w.batch.growth_slots[:, step])
        expected, lse = w.oracle()
        assert expected.isfinite().all()
    used = w.batch.used_slots()
    assert used.min() > 64
    rest = np.setdiff1d(np.arange(len(w.k[0])), used)
    assert w.k[0].float()[rest].isnan().all()
    assert w.q[3:].isnan().all()
    outputs = w.outputs()
    with pytest.raises(MismatchError, match="output"):
        w.compare(outputs)
    outputs.out[:3], outputs.lse[:3] = expected.float(), lse.float()
    with pytest.raises(MismatchError, match="a padding row is not zero"):
        w.compare(outputs)
    outputs.out[3:], outputs.lse[3:] = 0, -torch.inf
    assert w.compare(outputs) < 1e-6
    check = OutputCheck(w, 0)
    assert check(outputs.out[:3]) < 1e-5
    outputs.out[1, 2] *= 1.01
    with pytest.raises(MismatchError):
        w.compare(outputs)
    with pytest.raises(MismatchError):
        check(outputs.out[:3])
