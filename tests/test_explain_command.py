"""`sglang-prefix explain` as users run it."""

from __future__ import annotations

import json
import re
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import pytest
from typer.testing import CliRunner, Result

from sglang_prefix.cli.main import app
from sglang_prefix.explain import sources
from sglang_prefix.explain.sources import Setting, plan_of_prompts
from sglang_prefix.packing import AttentionShape
from sglang_prefix.tiny_model import TinyModelConfig, build_tiny_model
from tests.readers import plan_document
from tests.replaced_values import replace_value

DOCS = (Path(__file__).parents[1] / "docs" / "explain.md").read_text()
HTTP = b"HTTP/1.0 200 OK\r\n\r\n"
CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}"
SMALL = AttentionShape(4, 2, 8, 8, 4, 4)


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


class TestCommand:
    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            ("schema", 7, "schema 7; legal: 3, 4"),
            ("neighbours", None, "damaged: neighbours: "),
            ("neighbours common", [9000, 9, 9], "its requests do not fit together"),
            ("neighbours seq_lens", [9, 9, "x", 9], "seq_lens.2: Input should be a valid integer"),
            ("query_lens", [1, 0, 1, 1], "damaged: query_lens.1: Input should be greater than or"),
            ("query_lens", [1, 1, 1], "damaged: query_lens has shape (3,); legal: [4]"),
            ("query_lens", [7004, 1, 1, 1], "query_lens[0]=7004; legal: 1 to 7003, the tokens of"),
            ("plans 0 policy", "PAT", "plans.0.policy: String should match pattern '^(pat|node"),
            ("plans 0 shape", {}, "'plans.0.shape.num_qo_heads' is missing"),
            ("plans 0 shape num_kv_heads", 3, "a multiple of num_kv_heads=3"),
        ],
    )
    def test_a_damaged_file_is_one_clear_line(
        self, tmp_path: Path, path: str, value: object, message: str
    ) -> None:
        file = tmp_path / "plan.json"
        keys = tuple(int(key) if key.isdigit() else key for key in path.split())
        file.write_text(json.dumps(replace_value(plan_document("cpu"), keys, value)))
        line = failed("--plan", file)
        assert str(file) in line
        assert message in line

    @pytest.mark.parametrize("query_lens", [(), ("--query-lens", "5")], ids=["decode", "queries"])
    @pytest.mark.parametrize("device", ["cpu", "h200"])
    def test_json_can_be_read_again(
        self, tmp_path: Path, device: str, query_lens: tuple[str, ...]
    ) -> None:
        """As it was written, and out of an answer of a server."""
        first, second, answer = (tmp_path / f"{name}.json" for name in ("first", "second", "info"))
        tree = "--tree", "1,8,64_512,512,256", *query_lens
        made = run(*tree, "--device", device, "--json", first)
        assert made.exit_code == 0, made.output
        saved = json.loads(first.read_text())
        states = [{}, {"sglang_prefix": [{"last_plan": saved}]}]
        answer.write_text(json.dumps({"internal_states": states}))
        for file in (first, answer):
            again = run("--plan", file, "--json", second)
            assert again.exit_code == 0, again.output
            assert json.loads(second.read_text()) == saved
            assert again.stdout == made.stdout

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
        found = plan_of_prompts(as_list, str(model), Setting(SMALL, "cpu")).neighbours
        from transformers import AutoTokenizer

        ids = [AutoTokenizer.from_pretrained(model).encode(text) for text in texts]
        common = next(i for i, three in enumerate(zip(*ids, strict=False)) if len({*three}) > 1)
        assert min(found.common) == common
        assert found.seq_lens == [len(row) + 1 for row in ids]
        done = run("--prompts", as_list, "--tokenizer", model, "--query-lens", "4,1,6")
        assert f"first tokens behind 3 prompts in {as_list}" in done.stdout
        assert "3 requests, 11 query tokens, " in done.stdout
        record = plan_of_prompts(as_list, str(model), Setting(SMALL, "cpu"), "4,1,6")
        lens = [len(row) + n for row, n in zip(ids, (4, 1, 6), strict=True)]
        assert record.neighbours.seq_lens == lens
        assert min(record.neighbours.common) == common
        line = failed("--prompts", as_list, "--tokenizer", model, "--query-lens", "4,1")
        assert "--query-lens has 2 numbers; legal: 1 for all requests, or 3, as many as" in line

    def test_pictures_are_written_whole_or_not_at_all(self, tmp_path: Path) -> None:
        svg, html = tmp_path / "a.svg", tmp_path / "folder" / "a.html"
        in_the_way = tmp_path / "picture.svg"
        in_the_way.mkdir()
        done = run("--tree", "1,8_512,256", "--svg", svg, "--html", html)
        assert done.exit_code == 0, done.output
        ET.parse(svg)
        assert html.read_text().startswith("<!DOCTYPE html>")
        assert f"picture: {svg}" in done.stdout
        done = run("--tree", "1,8_512,256", "--svg", in_the_way)
        assert done.exit_code == 2
        assert f"'--svg': {in_the_way}: Is a directory; legal: a file" in done.stderr
        assert {*tmp_path.rglob("*.*")} == {svg, html, in_the_way}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("", "given: nothing; legal: one of --tree, --prompts, --base-url, --plan"),
            ("--tree 1_2 --plan /dev/null", "given: --tree and --plan; legal: one of"),
            ("--tree 1,8_512", "legal: nodes of each level"),
            ("--tree 1,8_512,-3", "legal: nodes of each level"),
            ("--tree 1_2 --heads 6,4,8", "--heads is 6,4,8; legal: QO,KV,DIM"),
            ("--tree 1_2 --heads 8,2", "--heads is 8,2; legal"),
            ("--tree 1_2 --dtype x", "'--dtype': 'x' is not one of 'float32', 'bf"),
            ("--tree 1_2 --policy PAT", "'pat', 'node', 'chunk', 'query'"),
            ("--tree 1_2 --device tpu", "'cpu', 'h200', 'cuda'"),
            ("--tree 1_2 --heads 4,4,2000 --device h200", "v_head_dim 2,000"),
            ("--tree 1_2 --stock-backend nope", "'--stock-backend': 'nope' is not one of 'fa3', "),
            ("--tree 1_2 --api-key x", "--api-key goes with --base-url"),
            ("--tree 1_2 --page-size 0", "'--page-size': Input should be greater"),
            (
                "--tree 1,2_5,4 --query-lens 0",
                "--query-lens is 0; legal: N for all requests, or N1",
            ),
            ("--tree 1,2_5,4 --query-lens=-1", "--query-lens is -1; legal: N for all requests, or"),
            ("--tree 1,2_5,4 --query-lens 1,x", "--query-lens is 1,x; legal: N for all requests"),
            ("--tree 1,2_5,4 --query-lens 1,2,3", "--query-lens has 3 numbers; legal: 1 for all "),
            ("--tree 1,2_5,4 --query-lens 1,10", "--query-lens: query_lens[1]=10; legal: 1 to 9, "),
            ("--tree 1,2_5,4000000 --query-lens 200000", "too large: 400,000 partial results; leg"),
            ("--plan /dev/null --query-lens 2", "--query-lens: a plan that was made has its own"),
            ("--tree 1_2 --nonsense", "No such option: --nonsense"),
            ("--tree 1_2 --tokenizer x", "--tokenizer goes with --prompts"),
            ("--prompts /dev/null", "--prompts needs --tokenizer"),
            ("--prompts /nowhere --tokenizer x", "'--prompts': /nowhere: No such file"),
            ("--plan /nowhere", "'--plan': /nowhere: No such file or directory; legal: a file"),
            ("--plan /dev/null --heads 8,2,64", "--heads: a plan that was made has its own"),
            ("--tree 1_2 --watch", "--watch does not go with --tree; legal: --base-url, --api-key"),
            ("--base-url http://h:1 --watch --json", "--watch does not go with --json; legal: --b"),
            ("--base-url http://h:1 --watch --svg a.svg", "--watch does not go with --svg; legal"),
            ("--base-url http://h:1 --interval 3", "--interval goes with --watch alone"),
            (
                "--base-url http://h:1 --watch --interval 0.1",
                "'--interval': Input should be greater than or equal to 0.2; legal: 0.2 to 60",
            ),
            ("--base-url http://127.0.0.1:9 --watch", "http://127.0.0.1:9/server_info does not an"),
            ("--base-url http://127.0.0.1:9", "no server answers at http://127.0.0.1:9"),
            (
                "--base-url nonsense",
                "'--base-url': nonsense is no address; legal: http://HOST:PORT",
            ),
            (
                "--base-url http://HOST:PORT",
                "http://HOST:PORT is no address; legal: http://HOST:PORT",
            ),
        ],
    )
    def test_mistakes_are_one_clear_line(self, arguments: str, message: str) -> None:
        assert message in failed(*arguments.split())

    @pytest.mark.parametrize(
        "text", ["", "[]", '["a", 3]', '["a", ""]', "[1", "\n \n", "[" * 100_000]
    )
    def test_a_file_without_prompts(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "prompts"
        file.write_text(text)
        assert str(file) in failed("--prompts", file, "--tokenizer", "x")

    def test_prompts_that_would_make_too_large_a_table(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One of 16 KiB would make 16 KiB wide rows of all others."""
        file = tmp_path / "prompts"
        file.write_text("\n".join(["a" * (1 << 14), *"b" * (1 << 12)]))
        tokenizer = SimpleNamespace(encode=lambda text: [*text.encode()])
        monkeypatch.setattr(sources, "load_tokenizer", lambda name: tokenizer)
        message = failed("--prompts", file, "--tokenizer", "x")
        assert "4,097 prompts of up to 16,384 tokens; legal: up to 33,554,432" in message

    @pytest.mark.parametrize("said", [b"SSH-2.0", b"", HTTP, HTTP + b"[" * 100_000, CUT])
    def test_something_else_listens_there(self, said: bytes) -> None:
        """No HTTP, nothing, an answer without JSON, nested too deep, and cut off."""

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(said)

        with socket.create_server(("127.0.0.1", 0)) as listening:
            thread = threading.Thread(target=answer, daemon=True)
            thread.start()
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            assert f"{url}/server_info" in failed("--base-url", url)
            thread.join(timeout=10)

    def test_the_output_in_the_docs_is_real(self) -> None:
        """The command and what stands below it, letter by letter."""
        found = re.search(r"```bash\nsglang-prefix explain (.+)\n```\n\n```\n(.+?)```", DOCS, re.S)
        assert found is not None
        printed = run(*found[1].split(), columns=100).stdout
        assert [line.rstrip() for line in printed.splitlines()] == found[2].splitlines()
