"""`sglang-prefix report`: what it refuses, in one line, with no page written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sglang_prefix.bench.report import drawings
from sglang_prefix.cli.main import app
from tests import report_files

Change = Callable[[dict[str, Any]], object]


def run_report(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def kernel_text(change: Change) -> bytes:
    result = report_files.kernel_result()
    change(result)
    return json.dumps(result).encode()


def contender(result: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = result["cells"][0]["contenders"]["pat"]
    return found


WHOLE = json.dumps(report_files.kernel_result()).encode()
BAD = {
    "empty": (b"", "is empty"),
    "blank": (b" \n", "is empty"),
    "half-written": (WHOLE[: len(WHOLE) // 2], "not JSON: EOF while parsing"),
    "binary": (b"\xff\xfe\x00{", "not JSON"),
    "deep": (b"[" * 100_000, "not JSON: recursion limit exceeded"),
    "another kind": (kernel_text(lambda r: r.update(kind="x")), "its kind is 'x'; legal: bench-"),
    "kind of no text": (kernel_text(lambda r: r.update(kind=["a"])), "its kind is ['a']; legal:"),
    "schema": (kernel_text(lambda r: r.update(schema=2)), "schema is 2; legal: 1"),
    "no cells": (kernel_text(lambda r: r.pop("cells")), "cells: Field required"),
    "cells of another kind": (kernel_text(lambda r: r.update(cells={})), "cells: Input should be"),
    "no time": (
        kernel_text(lambda r: contender(r).pop("ms")),
        "cells[0].contenders.pat.ms: Field required",
    ),
    "time of zero": (
        kernel_text(lambda r: contender(r).update(ms=0)),
        "cells[0].contenders.pat.ms: Input should be greater than 0",
    ),
    "time in words": (
        kernel_text(lambda r: contender(r).update(ms="3")),
        "cells[0].contenders.pat.ms: Input should be a valid number",
    ),
    "not a number": (kernel_text(lambda r: contender(r).update(ms=float("nan"))), "not JSON"),
    "two of a name": (
        kernel_text(lambda r: r["cells"][1].update(name="pat-tree-01")),
        "two cells are named 'pat-tree-01'",
    ),
    "serving without sides": (
        json.dumps(report_files.serving_result()).replace('"sides"', '"side"').encode(),
        "cells[0].sides: Field required (and 2 more)",
    ),
    "timed without a time": (
        json.dumps(report_files.gpu_bench_result(dry=False)).replace("total_us", "total").encode(),
        "is not a whole gpu-bench file: KeyError: 'total_us'",
    ),
}


class TestBadInput:
    @pytest.mark.parametrize(("content", "complaint"), BAD.values(), ids=BAD)
    def test_a_bad_file_is_named_and_nothing_is_written(
        self, content: bytes, complaint: str, tmp_path: Path
    ) -> None:
        good, bad, out = tmp_path / "a.json", tmp_path / "bad.json", tmp_path / "page.html"
        good.write_text(json.dumps(report_files.kernel_result()))
        bad.write_bytes(content)
        out.write_text("the page of before")
        done = run_report(tmp_path, "--out", out, "--no-plots")
        assert done.exit_code == 1, done.output
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"sglang-prefix: {bad}")
        assert complaint in done.stderr
        assert out.read_text() == "the page of before"
        assert {path.name for path in tmp_path.iterdir()} == {"a.json", "bad.json", "page.html"}

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            ('{"name": "package"}', "its kind is None; legal: bench-kernel, bench-serving, "),
            ("[]", "holds no JSON object"),
        ],
    )
    def test_a_foreign_file_alone(self, content: str, complaint: str, tmp_path: Path) -> None:
        """In a folder it is left out, so the folder has no results; by its name it is refused."""
        foreign, out = tmp_path / "foreign.json", tmp_path / "page.html"
        foreign.write_text(content)
        folder = run_report(tmp_path, "--out", out)
        said = f"{tmp_path}: no result file (*.json) in this folder; these are none: foreign.json"
        assert folder.stderr == f"sglang-prefix: {said}\n"
        named = run_report(foreign, "--out", out)
        assert named.stderr.startswith(f"sglang-prefix: {foreign} is not a result file: ")
        assert complaint in named.stderr
        assert {folder.exit_code, named.exit_code} == {1}
        assert not out.exists()

    @pytest.mark.parametrize(
        ("arguments", "status", "complaint"),
        [
            (["empty", "--out", "page.html"], 1, "empty: no result file (*.json) in this folder"),
            (["nowhere", "--out", "page.html"], 1, "nowhere: no such file or folder"),
            (["good", "--out", "empty"], 2, "--out is empty, a folder; legal: a file to write"),
            (["good", "--out", "no/page.html"], 2, "there is no folder no"),
            (["good", "--out", "good/a.json"], 2, "one of the result files; legal: another file"),
        ],
    )
    def test_impossible_arguments(
        self,
        arguments: list[str],
        status: int,
        complaint: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for folder in ("empty", "good"):
            Path(folder).mkdir()
        content = json.dumps(report_files.kernel_result())
        Path("good/a.json").write_text(content)
        done = run_report(*arguments, "--no-plots")
        assert done.exit_code == status, done.output
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert complaint in done.stderr
        assert Path("good/a.json").read_text() == content
        assert not Path("page.html").exists()

    def test_without_out(self, tmp_path: Path) -> None:
        done = run_report(tmp_path)
        assert done.exit_code == 2
        assert "--out" in done.stderr

    def test_plots_without_matplotlib(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(drawings, "has_matplotlib", lambda: False)
        out = tmp_path / "page.html"
        (tmp_path / "kernel.json").write_text(json.dumps(report_files.kernel_result()))
        done = run_report(tmp_path, "--out", out)
        assert done.exit_code == 1
        advice = "pip install 'sglang-prefix[bench]', or --no-plots"
        assert done.stderr == f"sglang-prefix: plots need matplotlib: {advice}\n"
        assert not out.exists()
        assert run_report(tmp_path, "--out", out, "--no-plots").exit_code == 0
