"""`sglang-prefix explain` as users run it: its files, its mistakes, its documentation."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from sglang_prefix.explain.page import html_page
from sglang_prefix.explain.record import PlanRecord, find_plan, read_record
from sglang_prefix.explain.segments import explain
from sglang_prefix.explain.sources import plan_of_prompts, plan_of_tree
from sglang_prefix.explain.text import print_explanation
from sglang_prefix.tiny_model import TinyModelConfig, build_tiny_model
from tests.explanations import LLAMA, run, setting

DOCS = (Path(__file__).parents[1] / "docs" / "explain.md").read_text()


_HTTP = b"HTTP/1.0 200 OK\r\n\r\n"
_CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}"


@contextlib.contextmanager
def _listener(said: bytes) -> Iterator[str]:
    """A port that gives one answer to whatever it is asked."""

    def answer() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(said)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(timeout=10)


def _paths(data: Any) -> Iterator[tuple[Any, ...]]:
    """The place of everything in a record, lists of numbers taken as one."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield (key,)
        if isinstance(value, dict) or (value and isinstance(value, list) and key == "plans"):
            yield from ((key, *path) for path in _paths(value))


class TestRecord:
    @pytest.mark.parametrize("device", ["cpu", "h200"])
    def test_json_can_be_read_again(self, tmp_path: Path, device: str) -> None:
        first, second = tmp_path / "first.json", tmp_path / "second.json"
        made = run("--tree", "1,8,64_512,512,256", "--device", device, "--json", first)
        assert made.exit_code == 0, made.output
        again = run("--plan", first, "--json", second)
        assert again.exit_code == 0, again.output
        assert json.loads(first.read_text()) == json.loads(second.read_text())
        assert again.stdout == made.stdout
        assert "nodes 1-8: 512 tokens each, 8 readers each" in made.stdout

    def test_a_saved_answer_of_a_server_will_do(self, tmp_path: Path) -> None:
        record = plan_of_tree("1,8_512,256", setting())
        answer = {"internal_states": [{}, {"sglang_prefix": [{"last_plan": record.as_dict()}]}]}
        file = tmp_path / "server_info.json"
        file.write_text(json.dumps(answer))
        assert read_record(file).plans[0].plan.same_as(record.plans[0].plan)

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({}, "does not run the attention backend prefix"),
            ({"sglang_prefix": [{"plans": 3}]}, "SGLANG_PREFIX_KEEP_PLAN=1"),
            ({"sglang_prefix": [{"last_plan": None}]}, "has not planned a decode batch yet"),
            ({"sglang_prefix": [{"last_plan": {"left_out": "too large"}}]}, "too large"),
            ({"sglang_prefix": [1]}, "damaged: sglang_prefix is no list of counters"),
            ({"sglang_prefix": None}, "damaged: sglang_prefix is no list of counters"),
            ({"sglang_prefix": {"last_plan": {}}}, "damaged: sglang_prefix is no list"),
            ({"sglang_prefix": [{"last_plan": 5}]}, "damaged: last_plan is no plan"),
            ({"sglang_prefix": [{"last_plan": "x"}]}, "damaged: last_plan is no plan"),
        ],
    )
    def test_a_server_without_a_plan(self, state: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            find_plan({"internal_states": [state]})

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("schema",), 7, "schema 7; legal: 1"),
            (("forest",), None, "damaged"),
            (("forest", "order"), [0, 0, 1, 2], "its forest does not fit together"),
            (("forest", "seq_lens"), [9, 9, 9], "its forest does not fit together"),
            (("forest", "seq_lens"), [9, 9, "x", 9], "a list of whole numbers"),
            (("plans",), [], "it has no plans"),
            (("plans", 0, "policy"), "PAT", "'PAT'; legal: pat"),
            (("plans", 0, "tail_start"), [5000, 5000, 5000, 4999], "do not cover"),
            (("plans", 0, "num_splits"), [1, 1, 1, 1, 0], "do not cover"),
            (("plans", 0, "shape"), {}, "damaged"),
            (("page_size",), "one", "'one' is no positive whole number"),
        ],
    )
    def test_a_damaged_file_is_one_clear_line(
        self, tmp_path: Path, path: tuple[Any, ...], value: object, message: str
    ) -> None:
        data: Any = plan_of_tree("1,2,4_5000,2000,3", setting()).as_dict()
        file, inner = tmp_path / "plan.json", data
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        file.write_text(json.dumps(data))
        failed = run("--plan", file)
        assert failed.exit_code == 2
        (line,) = failed.stderr.splitlines()
        assert str(file) in line
        assert message in line

    @pytest.mark.parametrize("value", [None, -1, 0, "x", [], {}, [[1]], [-1], 1e99, True])
    def test_whatever_is_wrong_is_refused_or_shown(self, value: object) -> None:
        """Any one value of a record replaced: no other error than the one that commands print."""
        num_refused, whole = 0, plan_of_tree("1,2,4_5000,2000,3", setting()).as_dict()
        for path in _paths(whole):
            data = copy.deepcopy(whole)
            inner: Any = data
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            try:
                explanation = explain(PlanRecord.from_dict(data))
                print_explanation(explanation, Console(file=io.StringIO()))
                html_page(explanation)
            except ValueError:
                num_refused += 1
        assert num_refused > 20

    def test_sharing_that_the_forest_does_not_have_is_refused(self) -> None:
        data = plan_of_tree("2,4_5000,3", setting(LLAMA)).as_dict()
        data["plans"][0]["queries"] = [0, 2, 1, 3]
        with pytest.raises(ValueError, match="claims sharing that the forest does not have"):
            explain(PlanRecord.from_dict(data))


class TestCommand:
    def test_prompts_and_a_tokenizer(self, tmp_path: Path) -> None:
        model = tmp_path / "model"
        build_tiny_model(model, TinyModelConfig(num_layers=1, hidden_size=16, num_heads=2))
        system = "You are a careful gardener. " * 40
        texts = [system + question for question in ("Why?", "When is it?", "Why not?")]
        as_list, as_lines = tmp_path / "prompts.json", tmp_path / "prompts.txt"
        as_list.write_text(json.dumps(texts))
        as_lines.write_text("\n".join(texts) + "\n\n")
        for file in (as_list, as_lines):
            done = run("--prompts", file, "--tokenizer", model)
            assert done.exit_code == 0, done.output
            assert f"first decode step of 3 prompts in {file}" in done.stdout
        record = plan_of_prompts(as_list, str(model), setting())
        from transformers import AutoTokenizer

        ids = [AutoTokenizer.from_pretrained(model).encode(text) for text in texts]
        common = next(i for i, three in enumerate(zip(*ids, strict=False)) if len({*three}) > 1)
        assert record.forest.node_stop[0] == common
        assert record.forest.seq_lens.tolist() == [len(row) + 1 for row in ids]

    def test_pictures_are_written(self, tmp_path: Path) -> None:
        svg, html = tmp_path / "a.svg", tmp_path / "folder" / "a.html"
        done = run("--tree", "1,8_512,256", "--svg", svg, "--html", html)
        assert done.exit_code == 0, done.output
        ET.parse(svg)
        assert html.read_text().startswith("<!DOCTYPE html>")
        assert {*tmp_path.rglob("*.*")} == {svg, html}
        assert f"picture: {svg}" in done.stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "given: nothing; legal: one of --tree, --prompts, --base-url, --plan"),
            (["--tree", "1_2", "--plan", "x"], "given: --tree and --plan; legal: one of"),
            (["--tree", "1,8_512"], "2 levels of nodes but 1 of tokens"),
            (["--tree", "1,8_512,-3"], "tokens of level 2"),
            (["--tree", "1,20000_5,5"], "20,000 requests; legal: up to 16,384"),
            (["--tree", "1_2", "--heads", "6,4,8"], "--heads is 6,4,8; legal: QO,KV,DIM"),
            (["--tree", "1_2", "--heads", "8,2"], "--heads is 8,2; legal"),
            (["--tree", "1_2", "--dtype", "int4"], "legal: float32, bfloat16, float16"),
            (["--tree", "1_2", "--policy", "PAT"], "legal: pat, node, chunk, query"),
            (["--tree", "1_2", "--device", "tpu"], "legal: cpu, h200, cuda"),
            (["--tree", "1_2", "--tokenizer", "x"], "--tokenizer goes with --prompts"),
            (["--prompts", "x"], "--prompts needs --tokenizer"),
            (["--prompts", "/nowhere", "--tokenizer", "x"], "cannot read /nowhere"),
            (["--plan", "/nowhere"], "cannot read /nowhere"),
            (["--plan", "x", "--heads", "8,2,64"], "--heads: a plan that was made has its own"),
            (["--base-url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
            (["--base-url", "nonsense"], "nonsense/server_info"),
            (["--base-url", "http://HOST:PORT"], "http://HOST:PORT/server_info: not an answer"),
        ],
    )
    def test_mistakes_are_one_clear_line(self, arguments: list[str], message: str) -> None:
        failed = run(*arguments)
        assert failed.exit_code in (1, 2)
        assert message in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
        assert not failed.stdout

    @pytest.mark.parametrize(
        "said",
        [b"SSH-2.0-OpenSSH_9.2\r\n", b"", _HTTP + b"[" * 100_000, _HTTP + b"no JSON", _CUT],
        ids=["not HTTP", "nothing", "too deep", "no JSON", "cut off"],
    )
    def test_something_else_listens_there(self, said: bytes) -> None:
        with _listener(said) as url:
            failed = run("--base-url", url)
        assert failed.exit_code == 2
        (line,) = failed.stderr.splitlines()
        assert f"{url}/server_info" in line

    @pytest.mark.parametrize("text", ["", "[]", '["a", 3]', '["a", ""]', "[1", "\n \n"])
    def test_a_file_without_prompts(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "prompts"
        file.write_text(text)
        failed = run("--prompts", file, "--tokenizer", "x")
        assert failed.exit_code == 2
        assert str(file) in failed.stderr

    def test_a_picture_that_cannot_be_written_leaves_nothing(self, tmp_path: Path) -> None:
        folder = tmp_path / "picture.svg"
        folder.mkdir()
        failed = run("--tree", "1,8_512,256", "--svg", folder)
        assert failed.exit_code == 1
        assert f"cannot write {folder}" in failed.stderr
        assert list(tmp_path.iterdir()) == [folder]


def test_the_output_in_the_docs_is_real() -> None:
    """The command and what stands below it, letter by letter."""
    found = re.search(r"```bash\nsglang-prefix explain (.+)\n```\n\n```\n(.+?)```", DOCS, re.S)
    assert found is not None
    printed = run(*found[1].split(), columns=100).stdout
    assert [line.rstrip() for line in printed.splitlines()] == found[2].splitlines()
