"""`sglang-prefix explain` as users run it: its files, its mistakes, its documentation."""

from __future__ import annotations

import contextlib
import copy
import functools
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
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner, Result

from sglang_prefix.cli.main import app
from sglang_prefix.explain.picture import html_page
from sglang_prefix.explain.record import PlanRecord, find_plan
from sglang_prefix.explain.segments import explain
from sglang_prefix.explain.sources import Setting, plan_of_prompts, plan_of_tree
from sglang_prefix.explain.text import print_explanation
from sglang_prefix.packing import AttentionShape
from sglang_prefix.tiny_model import TinyModelConfig, build_tiny_model

DOCS = (Path(__file__).parents[1] / "docs" / "explain.md").read_text()
HTTP = b"HTTP/1.0 200 OK\r\n\r\n"
CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}"

# What JSON can hold, of every kind.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9) | st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.sampled_from(["", "x", "pat", "streams"]),
    st.lists(st.integers(-1, 9) | st.integers(0, 1 << 40), max_size=6),
    st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=2),
    st.dictionaries(st.sampled_from(["", "name"]), st.integers(), max_size=1),
)


def run(*arguments: str | Path, columns: int = 160) -> Result:
    environment = {"COLUMNS": str(columns)}
    return CliRunner().invoke(app, ["explain", *map(str, arguments)], env=environment)


def failed(*arguments: str | Path) -> str:
    """The one line that a mistake gets."""
    done = run(*arguments)
    assert done.exit_code in (1, 2)
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    return line


@functools.cache
def record(device: str) -> dict[str, Any]:
    """Three nodes and four requests."""
    shape = AttentionShape(4, 2, 8, 8, 4, 4)
    return plan_of_tree("1,2,4_5000,2000,3", Setting(shape, device)).as_dict()


def replaced(data: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    """A copy with one other value."""
    whole = copy.deepcopy(data)
    inner: Any = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return whole


def places(data: Any) -> Iterator[tuple[Any, ...]]:
    """The place of everything in a record, lists of numbers taken as one."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield (key,)
        if isinstance(value, dict) or (value and isinstance(value, list) and key == "plans"):
            yield from ((key, *path) for path in places(value))


class TestRecord:
    @pytest.mark.parametrize("device", ["cpu", "h200"])
    def test_json_can_be_read_again(self, tmp_path: Path, device: str) -> None:
        """As it was written, and out of an answer of a server."""
        first, second, answer = (tmp_path / f"{name}.json" for name in ("first", "second", "info"))
        made = run("--tree", "1,8,64_512,512,256", "--device", device, "--json", first)
        assert made.exit_code == 0, made.output
        assert "nodes 1-8: 512 tokens each, 8 readers each" in made.stdout
        saved = json.loads(first.read_text())
        states = [{}, {"sglang_prefix": [{"last_plan": saved}]}]
        answer.write_text(json.dumps({"internal_states": states}))
        for file in (first, answer):
            again = run("--plan", file, "--json", second)
            assert again.exit_code == 0, again.output
            assert json.loads(second.read_text()) == saved
            assert again.stdout == made.stdout

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({}, "does not run the attention backend prefix"),
            ({"sglang_prefix": [{"plans": 3}]}, "SGLANG_PREFIX_KEEP_PLAN=1"),
            ({"sglang_prefix": [{"last_plan": None}]}, "has not planned a decode batch yet"),
            ({"sglang_prefix": [{"last_plan": {"left_out": "too large"}}]}, "too large"),
            ({"sglang_prefix": [1]}, "damaged: sglang_prefix is no list of counters"),
            ({"sglang_prefix": {"last_plan": {}}}, "damaged: sglang_prefix is no list"),
            ({"sglang_prefix": [{"last_plan": 5}]}, "damaged: last_plan is no plan"),
        ],
    )
    def test_a_server_without_a_plan(self, state: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            find_plan({"internal_states": [state]})

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("schema",), 7, "schema 7; legal: 1"),
            (("forest",), None, "damaged: forest: "),
            (("forest", "order"), [0, 0, 1, 2], "its forest does not fit together"),
            (("forest", "seq_lens"), [9, 9, 9], "its forest does not fit together"),
            (("forest", "seq_lens"), [9, 9, "x", 9], "seq_lens: a list of whole numbers"),
            (("plans",), [], "it has no plans"),
            (("plans", 0, "policy"), "PAT", "plans.0.policy: 'PAT'; legal: pat"),
            (("plans", 0, "tail_start"), [5000, 5000, 5000, 4999], "do not cover"),
            (("plans", 0, "num_splits"), [1, 1, 1, 1, 0], "do not cover"),
            (("plans", 0, "num_splits"), [1 << 25, 1, 1, 1, 1], "do not cover"),
            (("plans", 0, "queries"), [-(1 << 63)] * 4, "queries: it has numbers of 2147483648"),
            (("plans", 0, "shape"), {}, "'plans.0.shape.num_qo_heads' is missing"),
            (("plans", 0, "shape", "num_kv_heads"), 3, "no multiple of its KV heads"),
            (("page_size",), "one", "page_size: Input should be a valid integer"),
            (("page_size",), 1 << 40, "page_size: Input should be less than"),
            (("answer", "stock_us"), float("nan"), "stock_us: Input should be a finite number"),
        ],
    )
    def test_a_damaged_file_is_one_clear_line(
        self, tmp_path: Path, path: tuple[Any, ...], value: object, message: str
    ) -> None:
        file = tmp_path / "plan.json"
        file.write_text(json.dumps(replaced(record("cpu"), path, value)))
        line = failed("--plan", file)
        assert str(file) in line
        assert message in line

    @given(value=VALUES, device=st.sampled_from(["cpu", "h200"]))
    def test_any_other_value_is_refused_or_shown(self, value: object, device: str) -> None:
        """At every place of a record: no other error than the one line that commands print."""
        for path in places(record(device)):
            try:
                explanation = explain(PlanRecord.from_dict(replaced(record(device), path, value)))
            except ValueError as error:
                said = str(error)
            else:
                said = "shown"
                print_explanation(explanation, Console(file=io.StringIO()))
                html_page(explanation)
            assert len(said.splitlines()) == 1

    def test_sharing_that_the_forest_does_not_have_is_refused(self) -> None:
        shape = AttentionShape(32, 8, 128, 128, 2, 2)
        data = plan_of_tree("2,4_5000,3", Setting(shape, "cpu")).as_dict()
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
        setting = Setting(AttentionShape(4, 2, 8, 8, 4, 4), "cpu")
        forest = plan_of_prompts(as_list, str(model), setting).forest
        from transformers import AutoTokenizer

        ids = [AutoTokenizer.from_pretrained(model).encode(text) for text in texts]
        common = next(i for i, three in enumerate(zip(*ids, strict=False)) if len({*three}) > 1)
        assert forest.node_stop[0] == common
        assert forest.seq_lens.tolist() == [len(row) + 1 for row in ids]

    def test_pictures_are_written_whole_or_not_at_all(self, tmp_path: Path) -> None:
        svg, html = tmp_path / "a.svg", tmp_path / "folder" / "a.html"
        done = run("--tree", "1,8_512,256", "--svg", svg, "--html", html)
        assert done.exit_code == 0, done.output
        ET.parse(svg)
        assert html.read_text().startswith("<!DOCTYPE html>")
        assert {*tmp_path.rglob("*.*")} == {svg, html}
        assert f"picture: {svg}" in done.stdout
        in_the_way = tmp_path / "picture.svg"
        in_the_way.mkdir()
        done = run("--tree", "1,8_512,256", "--svg", in_the_way)
        assert done.exit_code == 1
        assert f"cannot write {in_the_way}" in done.stderr
        assert {*tmp_path.rglob("*.*")} == {svg, html, in_the_way}

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
            (["--tree", "1_2", "--dtype", "x"], "'--dtype': 'x' is not one of 'float32', 'bf"),
            (["--tree", "1_2", "--policy", "PAT"], "'pat', 'node', 'chunk', 'query'"),
            (["--tree", "1_2", "--device", "tpu"], "'cpu', 'h200', 'cuda'"),
            (["--tree", "1_2", "--heads", "4,4,2000", "--device", "h200"], "v_head_dim 2,000"),
            (["--tree", "1_2", "--page-size", "0"], "'--page-size': Input should be greater"),
            (["--tree", "1_2", "--nonsense"], "No such option: --nonsense"),
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
        assert message in failed(*arguments)

    @pytest.mark.parametrize("text", ["", "[]", '["a", 3]', '["a", ""]', "[1", "\n \n"])
    def test_a_file_without_prompts(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "prompts"
        file.write_text(text)
        assert str(file) in failed("--prompts", file, "--tokenizer", "x")

    @pytest.mark.parametrize(
        "said",
        [b"SSH-2.0-OpenSSH_9.2\r\n", b"", HTTP + b"[" * 100_000, HTTP + b"no JSON", CUT],
        ids=["not HTTP", "nothing", "too deep", "no JSON", "cut off"],
    )
    def test_something_else_listens_there(self, said: bytes) -> None:
        with _listener(said) as url:
            assert f"{url}/server_info" in failed("--base-url", url)


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


def test_the_output_in_the_docs_is_real() -> None:
    """The command and what stands below it, letter by letter."""
    found = re.search(r"```bash\nsglang-prefix explain (.+)\n```\n\n```\n(.+?)```", DOCS, re.S)
    assert found is not None
    printed = run(*found[1].split(), columns=100).stdout
    assert [line.rstrip() for line in printed.splitlines()] == found[2].splitlines()
