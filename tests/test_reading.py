"""What is read back, of files and of servers: any value anywhere is taken, or refused in one line.

And in little memory: what a file or a server claims is bounded before it becomes a loop or a table.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sglang_prefix import api_key
from sglang_prefix.api_key import ApiKey, ask, ask_json
from sglang_prefix.bench.results import ResultError, check_result
from sglang_prefix.bench.serving.stream import Answer, add_chunk
from sglang_prefix.bench.serving.workloads import REGISTRY, load_workloads
from sglang_prefix.bench.workloads.traces import read_trace
from sglang_prefix.cli.main import app
from sglang_prefix.explain.record import PlanRecord
from sglang_prefix.explain.segments import explain
from sglang_prefix.explain.sources import Setting, plan_of_tree
from sglang_prefix.packing import AttentionShape
from tests.readers import DOCUMENTS, REFUSALS, plan_document, read
from tests.replaced_values import replace_value, replaced_values
from tests.report_files import MADE_UP, kernel_result

Path_ = tuple[str | int, ...]


@pytest.mark.parametrize("kind", DOCUMENTS)
@given(data=st.data())
def test_any_value_anywhere_is_taken_or_refused_in_one_line(
    tmp_path: Path, kind: str, data: st.DataObject
) -> None:
    changed = data.draw(replaced_values(DOCUMENTS[kind]))
    try:
        read(kind, changed, tmp_path)
    except REFUSALS as error:
        (line,) = str(error).splitlines()
        assert line


def test_what_is_taken_takes_little_memory() -> None:
    """Sizes that are too large, everywhere in every document, in a process that lacks memory."""
    command = [sys.executable, "-m", "tests.readers"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(DOCUMENTS) - 2


# -- commands --------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> list[str]:
    """What a command that refuses, with status 2, says on standard error alone."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    return done.stderr.splitlines()


NUMBERS = ("num_qo_heads", "max_block_rows", "num_sms", "read_bytes_per_us", "min_split_tokens")
# A tile of one token whose items cost nothing, so that splits are as many as there are programs.
TILE = {"rows": 1 << 20, "tokens": 1, "sm_share": 1 / 64, "item_us": 0.0, "token_us": 1.0}
DAMAGED: list[tuple[Path_, Any]] = [
    (("source",), "\ud800"),
    (("notes",), ["\ud800"]),
    (("answer", "gate"), "\ud800"),
    (("answer", "reason"), "\ud800"),
    (("plans", 0, "device", "name"), "\ud800"),
    (("source",), "a\x1b[31m"),
    *((("plans", 0, "device", "tiles", 0, name), 0) for name in ("rows", "sm_share", "tokens")),
    (("plans", 0, "device", "tiles", 0, "item_us"), -1.0),
    (("plans", 0, "device", "tiles", 0, "lone_bytes_per_us"), 0.0),
    (("plans", 0, "device", "read_bytes_per_us"), 0.0),
    (("plans", 0, "device", "tiles"), [TILE | {"lone_bytes_per_us": 1.0}] * 9),
    *((("plans", 0, "shape" if "heads" in name else "device", name), 10**30) for name in NUMBERS),
    (("plans", 0, "shape", "v_head_dim"), 2**31),
    # As many splits as tokens: what a plan's own numbers of splits once claimed.
    (("neighbours", "seq_lens"), [2**31 - 1] * (1 << 14)),
]


@pytest.mark.parametrize(("path", "value"), DAMAGED)
def test_a_damaged_plan_is_one_message(tmp_path: Path, path: Path_, value: Any) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(replace_value(plan_document("h200"), path, value)))
    (line,) = run("explain", "--plan", file)
    assert line.startswith(f"sglang-prefix: {file}: ")


@pytest.mark.parametrize("value", [2**62, 2**31, 10**8])
def test_splits_are_planned_and_not_read(value: int) -> None:
    """Older files had them; a number of splits was the length of a loop."""
    document = plan_document("h200")
    changed = replace_value(document, ("plans", 0, "num_splits"), [value])
    assert explain(PlanRecord.from_dict(changed)).as_dict() == document | {
        "explanation": explain(PlanRecord.from_dict(document)).as_dict()["explanation"]
    }


LLAMA = AttentionShape(32, 8, 128, 128, 2, 2)
MANY = {
    **{"num_sms": 1 << 12, "min_split_tokens": 1, "max_block_rows": 1 << 20},
    **{"read_bytes_per_us": 1e9, "tiles": [TILE | {"lone_bytes_per_us": 1e9}]},
}
LARGE: list[tuple[str, str, dict[str, Any], str]] = [
    ("1,20000_9,9", "pat", {}, "at most 16384 items"),
    ("1,8000_2000000000,9", "query", {}, "KV tokens of all requests; legal: up to"),
    ("1,8_2000000000,9", "chunk", {}, "requests in packs; legal: up to 262,144"),
    ("1,64_9000000,9", "pat", MANY, "partial results;"),
]


@pytest.mark.parametrize(("tree", "policy", "device", "told"), LARGE)
def test_a_batch_that_is_too_large_is_not_planned(
    tree: str, policy: str, device: dict[str, Any], told: str
) -> None:
    """Each number is legal; their products would be memory."""
    record = plan_of_tree("1,2_9,9", Setting(LLAMA, "h200")).as_dict()
    nodes, lengths = ([int(n) for n in part.split(",")] for part in tree.split("_"))
    batch = nodes[-1]
    record["neighbours"] = {
        "seq_lens": [sum(lengths)] * batch,
        "order": list(range(batch)),
        "common": [lengths[0]] * (batch - 1),
    }
    plan = record["plans"][0]
    plan |= {"policy": policy, "device": plan["device"] | device}
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=told):
            explain(PlanRecord.from_dict(record))
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_damaged_result_is_one_message(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(replace_value(kernel_result(), ("cases", 0, "batch"), 10**30)))
    (line,) = run("report", file, "--out", tmp_path / "page.html", "--no-plots")
    assert line.startswith(f"sglang-prefix: {file} ")
    assert not (tmp_path / "page.html").exists()


# -- files -----------------------------------------------------------------------------------------


def test_a_trace_may_not_expand_without_end(tmp_path: Path) -> None:
    """Of lines, and in one."""
    packed = tmp_path / "trace.jsonl.gz"
    for text in (b"\n", b" "):
        packed.write_bytes(gzip.compress(text * (40 << 20), compresslevel=1))
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="has more than 32 MiB of text, or 262,144 lines"):
                read_trace(packed)
            assert tracemalloc.get_traced_memory()[1] < 150 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    ("index", "changes", "told"),
    [
        (3, {"prompts": 10**5, "samples": 10}, "1,000,000 answers in all; legal: up to 65,536"),
        (3, {"prompts": 10**4, "samples": 1, "prompt_tokens": 10**5}, "1,000,000,000 tokens"),
        (4, {"documents": 10**3, "questions": 10**3}, "1,000,000 answers in all"),
        (4, {"documents": 10**3, "document_tokens": 10**5}, "3,200,640,000 tokens in all"),
        (5, {"documents": 10**3, "sections": 10**3}, "answers in all"),
        (1, {"num-prompts": 10**4, "random-input-len": 10**6}, "10,000,000,000 tokens in all"),
        (1, {"num-prompts": "1000000000"}, "num-prompts"),
        (2, {"requests": 60_000, "max_prompt_tokens": 10**6}, "60,000,000,000 tokens in all"),
    ],
)
def test_products_of_a_workload_are_bounded(
    tmp_path: Path, index: int, changes: dict[str, Any], told: str
) -> None:
    document = json.loads(REGISTRY.read_text())
    document["workloads"][index]["full"] |= changes
    file = tmp_path / "workloads.json"
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=told) as refusal:
        load_workloads(file, quick=False)
    assert str(file) in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bench-kernel", {"rounds": 10**30}),
        ("bench-kernel", {"dtype": "int8"}),
        ("bench-host", {"requests": [10**9]}),
        ("bench-engine", {"long_output": 10**9}),
    ],
)
def test_options_that_a_resumed_run_takes_up_are_bounded(
    kind: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ResultError, match="file: options: "):
        check_result("file", MADE_UP[kind]() | {"options": options})


# -- servers ---------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@contextlib.contextmanager
def a_server(send: Callable[[socket.socket], object]) -> Iterator[str]:
    """The URL of one that says this to whoever asks."""

    def answer() -> None:
        with contextlib.suppress(OSError):  # the client, or the test, has ended
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                send(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def endless(head: bytes, body: bytes, pause_s: float = 0) -> Callable[[socket.socket], None]:
    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(body)
            time.sleep(pause_s)

    return send


@pytest.mark.parametrize(
    ("send", "told"),
    [
        (endless(OK + b"\r\n", b" " * (1 << 20)), "larger than 1 MiB"),
        (endless(CHUNKED, b"64\r\n" + b" " * 100 + b"\r\n"), "larger than 1 MiB"),
        (endless(OK, b"a: b\r\n" * 1000), "got more than 100 headers"),
        (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "no whole answer within 1 s"),
        (endless(OK + b"\r\n", b" ", 0.05), "no whole answer within 1 s"),
        (endless(OK, b"a", 0.05), "no whole answer within 1 s"),
        (lambda c: c.sendall(OK + b"Content-Encoding: gzip\r\n\r\nx"), "compressed, unasked"),
        (lambda c: c.sendall(b"HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n"), "redirects to /x"),
        (lambda c: c.sendall(OK + b"\r\n" + b"[" * 100_000), "nested too deep"),
        (lambda c: c.sendall(OK + b"\r\n[NaN]"), "NaN is no number"),
        (lambda c: c.sendall(OK + b"\r\n\xff"), "decode"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_server_may_not_answer_without_end(
    monkeypatch: pytest.MonkeyPatch, send: Callable[[socket.socket], object], told: str
) -> None:
    monkeypatch.setattr(api_key, "MAX_READ_BYTES", 1 << 20)
    with a_server(send) as url, pytest.raises(requests.RequestException, match=told):
        ask_json(url, ApiKey(), timeout_s=1 if "within" in told else 20)


def test_a_server_is_read_to_its_end() -> None:
    text = b'{"a": 1}'
    for call, found in ((ask, text), (ask_json, {"a": 1})):
        with a_server(lambda c: c.sendall(OK + b"Connection: close\r\n\r\n" + text)) as url:
            assert call(url, ApiKey(), timeout_s=10) == found


def chunk(count: int, index: int = 0, text: str = "a", ids: int | None = None) -> bytes:
    ids = count if ids is None else ids
    meta = {"completion_tokens": count}
    return json.dumps(
        {"index": index, "text": text, "output_ids": [7] * ids, "meta_info": meta}
    ).encode()


@pytest.mark.parametrize(
    "lines",
    [
        [chunk(1, index=2)],
        [chunk(5)],
        [chunk(2), chunk(1)],
        [chunk(1)] * 9,
        [chunk(1, ids=5)],
        [chunk(1, text="a" * 5000)],
        [b'{"error": {"message": "out of\\nmemory"}}'],
        [b'{"text": "a"}'],
        [b"\xff"],
    ],
)
def test_a_stream_may_not_hold_more_than_was_asked_for(lines: list[bytes]) -> None:
    answers = [Answer(0.0), Answer(0.0)]
    for whole in ([chunk(1), chunk(4, ids=4), chunk(4)], [chunk(2, index=1)]):
        found = [Answer(0.0), Answer(0.0)]
        for line in whole:
            add_chunk(found, line, {"max_new_tokens": 4})
        assert max(len(answer.ids) for answer in found) in (4, 2)
    for line in lines[:-1]:
        with contextlib.suppress(RuntimeError):
            add_chunk(answers, line, {"max_new_tokens": 4})
    with pytest.raises(RuntimeError, match=r"the server (failed|answers with more)") as error:
        add_chunk(answers, lines[-1], {"max_new_tokens": 4})
    assert len(str(error.value).splitlines()) == 1


# -- where commands write --------------------------------------------------------------------------


def test_what_stands_where_a_command_writes_is_not_replaced(tmp_path: Path) -> None:
    """A link is followed, and a full device is one message."""
    real, link = tmp_path / "real.html", tmp_path / "link.html"
    real.write_text("before")
    link.symlink_to("real.html")
    tree = ("explain", "--tree", "1,2_9,9", "--device", "cpu")
    done = CliRunner().invoke(app, [*tree, "--html", str(link)])
    assert done.exit_code == 0, done.output
    assert link.is_symlink()
    assert real.read_text().startswith("<!DOCTYPE html>")
    node = Path("/dev/full").lstat().st_rdev
    done = CliRunner().invoke(app, [*tree, "--html", "/dev/full"])
    assert done.exit_code == 1
    assert done.stderr == "sglang-prefix: cannot write /dev/full: No space left on device\n"
    assert Path("/dev/full").lstat().st_rdev == node


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "--tree=1,2_3,4", "--json"]])
def test_a_full_standard_output_is_one_line(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "sglang_prefix.cli.main", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "sglang-prefix: cannot write: No space left on device"
    assert "Traceback" not in done.stderr


def test_a_plan_that_cannot_be_read_is_named() -> None:
    done = CliRunner().invoke(app, ["explain", "--plan", "/proc/self/mem"])
    assert done.exit_code == 1
    assert done.stderr == "sglang-prefix: cannot read /proc/self/mem: Input/output error\n"


def test_a_report_may_go_to_standard_output(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(kernel_result()))
    command = [sys.executable, "-m", "sglang_prefix.cli.main", "report", str(file), "--no-plots"]
    done = subprocess.run([*command, "--out", "/dev/stdout"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"<!doctype html>")
    assert Path("/dev/stdout").is_symlink()
