"""Workloads of the bench commands: the registry, PAT's notation, traces; and result files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_prefix.bench.cells import KernelOptions, kernel_cells
from sglang_prefix.bench.results import environment, read_result, write_result
from sglang_prefix.bench.workloads.registry import Heads, load_registry, registry_names
from sglang_prefix.bench.workloads.traces import TraceRequest, read_trace, trace_batches
from sglang_prefix.bench.workloads.trees import TreeBatch, pat_tree
from tests import forests

TRACE = Path(__file__).parents[2] / "shared" / "data" / "mooncake_conversation_trace.jsonl.gz"
LINE = {"timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": [0, 1]}


def test_the_registry_holds_what_its_files_say() -> None:
    assert set(registry_names()) >= {"trees", "unrelated", "chunk", "uneven", "rollouts", "quick"}
    for name in registry_names():
        file = load_registry(name)
        names = [batch.name for batch in file.batches]
        assert len(set(names)) == len(names) > 0
        assert file.about
        assert file.source
        for batch in file.batches:
            assert (batch.tree is None) != (batch.uneven is None)
            assert batch.make_tree().length.min() > 0
    pat = [b.tree for name in ("trees", "unrelated") for b in load_registry(name).batches]
    assert pat == list(forests.PAT_TREES)
    with pytest.raises(ValueError, match="'nowhere' is unknown; legal: 'chunk', "):
        load_registry("nowhere")


def test_the_first_heads_of_every_batch_come_first() -> None:
    cells = kernel_cells(KernelOptions(workloads=("trees", "chunk")))
    assert [cell.name for cell in cells[17:20]] == [
        "trees/18_8,16,32,256_512,512,256,32/32:8",
        "chunk/16x1024+64/32:32",
        "chunk/32x1024+64/32:32",
    ]
    assert len(cells) == 18 * 4 + 9
    quick = kernel_cells(KernelOptions(quick=True))
    assert {c.group for c in quick} >= {"trees", "rollouts", "chunk", "uneven", "unrelated"}
    only = kernel_cells(KernelOptions(workloads=("^unrelated/.*/16:8",)))
    assert [cell.heads for cell in only] == [Heads(16, 8)] * 2


def test_heads_are_read_and_refused() -> None:
    assert Heads.parse("32:8") == Heads(32, 8)
    assert str(Heads.parse("4:2:16")) == "4:2:16"
    for text in ("", "8", "8:3", "8:0", "8:2:0", "8:2:64:64", "a:b", "-8:2", "8:2 "):
        with pytest.raises(ValueError, match=r"heads .*; legal: QO:KV or QO:KV:DIM"):
            Heads.parse(text)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("1,8", "0 '_' instead of one"),
        ("1_2_3", "2 '_' instead of one"),
        ("1,8_512", "2 levels of nodes but 1 of tokens"),
        ("1,x_512,1", r"nodes of level 2 \(character 3\) are 'x'"),
        ("1,8_512,", r"tokens of level 2 \(character 9\) are ''"),
        ("1,8_512,0", r"tokens of level 2 \(character 9\) are '0'"),
        ("-1_5", r"nodes of level 1 \(character 1\) are '-1'"),
        ("99999999_5", "nodes of level 1"),
        ("1_٣", "tokens of level 1"),
        ("8,1_5,5", "level 2 has 1 nodes below 8"),
    ],
)
def test_malformed_trees_are_refused_with_the_place(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"tree '.*': {what}.*; legal: .*1,8,512_512,512,256"):
        pat_tree(text)


def test_page_sizes_must_divide_what_is_shared() -> None:
    options = KernelOptions(trees=("1,2_48,5",), page_size=16)
    assert kernel_cells(options)[0].name == "tree/1,2_48,5/32:8/page16"
    with pytest.raises(ValueError, match="page size 32 does not divide the 48 tokens"):
        kernel_cells(KernelOptions(trees=("1,2_48,5",), page_size=32))


# Traces.


def write_trace(path: Path, lines: list[Any]) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_equal_first_blocks_are_shared(name: str, tmp_path: Path) -> None:
    other = LINE | {"timestamp": 100, "hash_ids": [0, 2]}
    alone = LINE | {"timestamp": 100, "hash_ids": [7, 1]}
    late = LINE | {"timestamp": 900}
    path = write_trace(tmp_path / name, [late, other, "", alone, LINE])
    (batch,) = trace_batches(read_trace(path), 1, 10_000)
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
    ("line", "what"),
    [
        ("{", "line 2: Expecting property name.* at column 2; legal: JSON"),
        ("3", "line 2: no JSON object"),
        (LINE | {"hash_ids": "x"}, "line 2: hash_ids is x; legal: a list of whole numbers"),
        (LINE | {"hash_ids": [1, True]}, "line 2: hash_ids is"),
        (LINE | {"hash_ids": [1]}, "line 2: hash_ids has 1 ids; legal: 2, one per 512"),
        (LINE | {"input_length": 0}, "line 2: input_length is 0; legal: a whole number from 1"),
        ({"timestamp": 1}, "line 2: input_length is None"),
        (LINE | {"timestamp": 0.5}, "line 2: timestamp is 0.5"),
    ],
)
def test_malformed_traces_are_refused_with_the_line(line: Any, what: str, tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace.jsonl", [LINE, line])
    with pytest.raises(ValueError, match=f"trace .*trace.jsonl, {what}"):
        read_trace(path)


def test_unreadable_traces_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(json.dumps(LINE).encode())[:-9])
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "binary.jsonl"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, what in (
        (tmp_path / "nowhere", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (broken, "cannot be read: Compressed file ended"),
        (empty, "holds no request"),
        (binary, "is not text"),
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


# Result files.

RESULT: dict[str, Any] = {"schema": 1, "kind": "bench-kernel", "cells": [{"name": "a"}]}


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kernel.json"
    write_result(path, RESULT)
    assert read_result(path) == RESULT
    for bad in (RESULT | {"x": float("nan")}, RESULT | {"x": object()}):
        with pytest.raises((TypeError, ValueError)):
            write_result(path, bad)
    assert read_result(path, "bench-kernel") == RESULT
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{", "is not a result file: Expecting property name.* at line 1, column 2"),
        (b"\xff\xff", "is not a result file: it is not text"),
        (b"[]", "it holds no JSON object"),
        (b"{}", "schema is None; legal: 1"),
        (b'{"schema": 1, "kind": "x"}', "kind is 'x'; legal: 'bench-serving'"),
        (b'{"schema": 1, "kind": "bench-kernel"}', "kind is 'bench-kernel'; legal: 'bench-serv"),
        (b'{"schema": 1, "kind": "bench-serving"}', '"cells" is not a list'),
        (b'{"schema": 1, "kind": "bench-serving", "cells": [{}]}', '"cells" is not a list'),
    ],
)
def test_other_files_are_refused(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.json.*{what}"):
        read_result(path, "bench-serving")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.json cannot be read: No such file"):
        read_result(tmp_path / "x.json")


def test_the_environment_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Callable[..., Any]] = environment()
    assert set(found) == {"device", "cpu", "threads", "gpu", "python", "versions", "commit"}
    assert json.loads(json.dumps(found)) == found
    # An installed package lies in no checkout; whose commit would it be?
    monkeypatch.setattr("sglang_prefix.bench.results._ROOT", Path("/nowhere"))
    assert environment()["commit"] is None
