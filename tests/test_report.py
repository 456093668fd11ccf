"""`sglang-prefix report`: what the page says of result files."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sglang_prefix.bench.report.sources import CPU, KINDS, Source, find_sources
from sglang_prefix.cli.main import app
from tests import report_files

RESULTS = Path(__file__).parents[1] / "docs" / "results"
COMMITTED = {source.name: source for source in find_sources([RESULTS])[0]}
CPU_FILES = {name: source.data for name, source in COMMITTED.items() if source.kind == CPU}


def run_report(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


class Page(HTMLParser):
    """Text of a page by table row, the rows that are marked as losses, and its list items."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.losing: list[str] = []
        self.items: list[str] = []
        self.summary = ""
        self._into: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "tr":
            self.rows.append([])
            self._loses = "losing" in (found.get("class") or "").split()
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._into = "cell"
        elif tag == "li":
            self.items.append("")
            self._into = "item"
        elif found.get("id") == "summary":
            self._into = "summary"

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr" and self._loses:
            self.losing.append(self.rows[-1][0])
        if tag in ("td", "th", "li", "p"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into == "cell":
            self.rows[-1][-1] += data
        elif self._into == "item":
            self.items[-1] += data
        elif self._into == "summary":
            self.summary += data

    def named(self, name: str) -> list[list[str]]:
        """Rows of that name."""
        return [row for row in self.rows if row and row[0] == name]


def made(tmp_path: Path, *results: dict[str, Any]) -> Page:
    """The page of result files, without plots."""
    folder = tmp_path / "results"
    folder.mkdir()
    for number, result in enumerate(results):
        (folder / f"{number}.json").write_text(json.dumps(result), encoding="utf-8")
    done = run_report(folder, "--out", tmp_path / "page.html", "--no-plots")
    assert done.exit_code == 0, done.output
    return Page((tmp_path / "page.html").read_text(encoding="utf-8"))


def words(text: str) -> str:
    return " ".join(text.split())


class TestKernel:
    def test_wins_and_losses_are_counted(self, tmp_path: Path) -> None:
        page = made(tmp_path, report_files.kernel_result())
        assert "faster in 3 of 4 cells; slower in 1." in words(page.summary)
        # Of two cells with a peer, and four with the policy that shares nothing.
        assert "slower or worse in 2 of 6 comparisons" in words(page.summary)
        verdicts = [words(item) for item in page.items]
        assert any(
            "in 3 of 4 cells" in v and "slower in 1: unrelated-8 0.80x" in v for v in verdicts
        )
        assert any(
            "in 1 of 2 cells" in v and "slower in 1: pat-tree-03 0.88x" in v for v in verdicts
        )

    def test_losing_rows_are_marked_and_no_others(self, tmp_path: Path) -> None:
        page = made(tmp_path, report_files.kernel_result())
        # Ours in use against stock and the peer; then every contender of ours against stock.
        assert page.losing == ["pat-tree-03", "unrelated-8", "unrelated-8", "unrelated-8"]

    def test_one_way_of_ours_is_judged_in_all_cells(self, tmp_path: Path) -> None:
        result = report_files.kernel_result()
        other = copy.deepcopy(result["cells"][0]["contenders"]["pat"])
        # Faster, but not measured everywhere.
        result["cells"][0]["contenders"]["pat-fused"] = other | {"ms": 0.5}
        page = made(tmp_path, result)
        assert page.named("pat-tree-01")[0][1] == "4.00x"

    def test_absent_baselines_and_cells_not_run_are_named(self, tmp_path: Path) -> None:
        page = made(tmp_path, report_files.kernel_result())
        assert "Absent baselines: flashinfer-cascade: needs a GPU." in page.items
        assert page.named("chunk-4096")[0][1] == "not run: interrupted"
        assert page.named("flashinfer-cascade") == [["flashinfer-cascade", "absent: needs a GPU"]]

    def test_contenders_over_all_cells(self, tmp_path: Path) -> None:
        page = made(tmp_path, report_files.kernel_result())
        heading = next(row for row in page.rows if "worst cell" in row)
        (row,) = page.named("pat")
        shown = dict(zip(heading, row, strict=True))
        assert shown["speed-up"] == "2.49x"
        assert (shown["worst"], shown["worst cell"]) == ("0.80x", "unrelated-8")
        assert (shown["faster in"], shown["slower in"], shown["not measured"]) == ("3", "1", "0")
        assert dict(zip(heading, page.named("hydragen")[0], strict=True))["not measured"] == "2"

    def test_what_failed_is_seen(self, tmp_path: Path) -> None:
        result = report_files.kernel_result()
        del result["cells"][0]["contenders"]["pat"]
        result["cells"][0]["failed"] = {"pat": "off by 1"}
        page = made(tmp_path, result)
        assert "pat-tree-01: pat failed: off by 1." in page.items
        assert page.losing[0] == "pat-tree-01"
        assert "in 2 of 3 cells; slower in 1. Not compared: 2." in words(page.summary)
        assert any("pat-tree-01 (ours failed: off by 1)" in words(item) for item in page.items)

    def test_without_a_stock_backend_nothing_is_counted(self, tmp_path: Path) -> None:
        result = report_files.kernel_result()
        for cell in result["cells"]:
            del cell["contenders"]["torch_native"]
            cell["best_stock"] = None
        page = made(tmp_path, result)
        assert "Nothing was compared with stock SGLang." in page.summary
        assert "Not compared: 5." in words(page.summary)

    def test_what_was_not_run_is_counted(self, tmp_path: Path) -> None:
        result = report_files.kernel_result()
        page = made(tmp_path, result)
        assert "slower in 1. Not compared: 1." in words(page.summary)
        assert any("chunk-4096 (not run: interrupted)" in words(item) for item in page.items)
        for path in (tmp_path / "results").iterdir():
            path.unlink()
        (tmp_path / "results").rmdir()
        page = made(tmp_path, result | {"cells": []})
        assert "Not compared: 1." in words(page.summary)

    def test_the_first_line_names_the_stock_kernels(self, tmp_path: Path) -> None:
        result = report_files.kernel_result()
        contenders = result["cells"][0]["contenders"]
        contenders["triton"] = contenders["torch_native"] | {"ms": 7.0}
        # Never the fastest, so never compared with.
        contenders["slow"] = contenders["torch_native"] | {"ms": 70.0}
        page = made(tmp_path, result)
        said = "Against stock SGLang (torch_native, triton), ours is faster in 3 of 4 cells"
        assert said in words(page.summary)

    def test_how_the_parts_were_timed_is_said(self, tmp_path: Path) -> None:
        made(tmp_path, report_files.kernel_result())
        text = (tmp_path / "page.html").read_text()
        assert text.count("on the CPU timed alone after the step") == 2

    def test_every_number_of_the_file_is_shown(self, tmp_path: Path) -> None:
        result = report_files.kernel_result()
        page = made(tmp_path, result)
        heading = next(row for row in page.rows if "fastest to slowest" in row)
        shown = {
            (row[0], row[1]): dict(zip(heading, row, strict=True))
            for row in page.rows
            if len(row) == len(heading)
        }
        for cell in result["cells"]:
            for name, found in cell["contenders"].items():
                row = shown[cell["name"], name]
                assert float(row["ms"]) == found["ms"]
                assert float(row["KV read"]) == pytest.approx(found["kv_read_ratio"], abs=5e-4)
                assert float(row["speed-up"][:-1]) == pytest.approx(found["speedup"], rel=0.01)


class TestServing:
    def test_wins_losses_and_what_is_no_comparison(self, tmp_path: Path) -> None:
        page = made(tmp_path, report_files.serving_result())
        assert "faster in 2 of 2 cells; slower in none. Not compared: 2." in words(page.summary)
        assert "slower or worse in 1 of 6 comparisons" in words(page.summary)
        assert page.losing == ["forks"]
        assert page.named("random")[0][-1] == "not a comparison: our backend packed no step"
        assert page.named("trace")[0][1] == "not run"
        assert any("worse in 1: forks 0.80x" in words(item) for item in page.items)

    def test_absent_workloads_have_a_row(self, tmp_path: Path) -> None:
        absent = {"traces": "no --trace FILE was given"}
        page = made(tmp_path, report_files.serving_result() | {"absent": absent})
        assert "Workloads not run: traces: no --trace FILE was given." in page.items
        assert not any("baseline" in item for item in page.items)
        assert page.named("traces")[0][1] == "not run: no --trace FILE was given"
        assert "Not compared: 3." in words(page.summary)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--attention-backend", "torch_native"], " (torch_native)"),
            (["--attention-backend=triton"], " (triton)"),
            (["--model-path", "tiny"], ""),
        ],
    )
    def test_the_stock_backend_is_named(
        self, arguments: list[str], said: str, tmp_path: Path
    ) -> None:
        result = report_files.serving_result() | {"stock": {"server_args": arguments}}
        summary = words(made(tmp_path, result).summary)
        assert summary.startswith(f"Against stock SGLang{said}, ours is")

    def test_ratios_of_what_is_no_comparison_are_not_shown(self, tmp_path: Path) -> None:
        result = report_files.serving_result()
        result["cells"][2]["ratios"] = result["cells"][0]["ratios"]
        page = made(tmp_path, result)
        assert "in 2 of 2 cells" in words(page.summary)
        assert not any("2.50x" in cell for row in page.named("random") for cell in row)

    def test_unequal_tokens_are_seen(self, tmp_path: Path) -> None:
        result = report_files.serving_result()
        result["cells"][0] |= {
            "requests_equal": 31,
            "is_comparison": False,
            "why_not": "tokens differ",
        }
        page = made(tmp_path, result)
        assert "31 of 32" in page.named("rollouts-4x8")[0]
        marks = [found.get("class") or "" for tag, found in page.tags if tag == "td"]
        assert sum("losing" in mark and "bar" not in mark for mark in marks) == 1


@pytest.mark.parametrize("source", COMMITTED.values(), ids=COMMITTED)
def test_committed_results_are_shown_with_all_their_cells(source: Source, tmp_path: Path) -> None:
    page = made(tmp_path, source.data)
    if source.kind != CPU:
        cells = source.data["cells"]
        names = [cell["name"] if isinstance(cell, dict) else cell for cell in cells]
        assert all(page.named(name) for name in names)
    assert len(page.rows) > 10


@pytest.mark.parametrize("result", CPU_FILES.values(), ids=CPU_FILES)
def test_committed_cpu_results(result: dict[str, Any], tmp_path: Path) -> None:
    page = made(tmp_path, result)
    times = [case["median_ms"] for case in result["attention"]]
    for baseline in ("stock", "query"):
        won = sum(ms["pat"] < ms[baseline] for ms in times)
        assert any(f"in {won} of {len(times)} cells" in words(item) for item in page.items)
    lost = sum(ms["pat"] > min(ms["stock"], ms["query"]) for ms in times)
    assert len(page.losing) == lost
    # The oldest files have no times of the engine, or none with the device elsewhere.
    in_engines = [
        stage for key in ("engine", "host") for stage in result.get(key, [{"us": ()}])[0]["us"]
    ]
    for stage in [*result["planning"][0]["median_us"], *in_engines]:
        assert len(page.named(stage)) == 1


def test_some_committed_cpu_result_has_host_times() -> None:
    assert any("host" in result for result in CPU_FILES.values())


class TestGpu:
    def test_wins_losses_and_targets(self, tmp_path: Path) -> None:
        page = made(tmp_path, report_files.gpu_bench_result(dry=False))
        said = "(sglang-triton), ours is faster in 1 of 2 cells; slower in 1. Not compared: 1."
        assert said in words(page.summary)
        assert page.losing == ["nothing shared", "alone"]
        assert page.named("left") == [["left", "not run"]]
        assert "Absent baselines: fasttree: no module." in page.items

    def test_a_dry_run_counts_nowhere(self, tmp_path: Path) -> None:
        page = made(tmp_path, report_files.gpu_bench_result(dry=True))
        assert "Nothing was compared" in page.summary
        assert page.losing == []
        assert any("mean nothing" in item for item in page.items)

    def test_a_server_that_did_not_pack_is_no_comparison(self, tmp_path: Path) -> None:
        page = made(tmp_path, report_files.gpu_serve_result())
        assert "in 1 of 2 cells; slower in 1. Not compared: 1." in words(page.summary)
        (row,) = page.named("few")
        assert row[-1].startswith("not a comparison: ours did not pack")

    def test_the_fastest_tile_is_beside_that_of_the_formula(self, tmp_path: Path) -> None:
        page = made(tmp_path, report_files.gpu_tune_result())
        tile = ["dim128/rows16", "16x64", "3.00", "32x64", "2.00", "1.50x"]
        assert page.named("dim128/rows16") == [tile]

    def test_failed_checks_are_marked(self, tmp_path: Path) -> None:
        page = made(tmp_path, report_files.gpu_check_result())
        assert page.losing == ["graph/fused"]
        assert ["graph/fused", "failed: off by 1"] in page.rows


class TestPage:
    def test_many_cells_are_not_all_named_at_the_top(self, tmp_path: Path) -> None:
        result = report_files.kernel_result()
        loser, alone = result["cells"][3], copy.deepcopy(result["cells"][3])
        del alone["contenders"]["torch_native"]
        for cell in (loser, alone):
            del cell["contenders"]["query"]
        result["cells"] = [
            *({**loser, "name": f"loser-{n}"} for n in range(9)),
            *({**alone, "name": f"alone-{n}"} for n in range(9)),
        ]
        page = made(tmp_path, result)
        summary = page.rows[1][2]
        assert "slower in 9" in summary
        assert summary.count("loser-") == 6
        assert "and 3 more." in summary
        (verdict,) = [words(item) for item in page.items if "faster than" in item]
        assert verdict.count("loser-") == 9
        left = "chunk-4096 (not run: interrupted)"
        assert verdict.endswith(f"Not compared: 9 cells (no stock baseline); {left}.")

    def test_kinds_are_in_order_and_the_newest_is_first(self, tmp_path: Path) -> None:
        older = report_files.kernel_result() | {"created": "2025-01-01T00:00:00+00:00"}
        cpu = next(iter(CPU_FILES.values()))
        for name, result in (
            ("a", cpu),
            ("b", older),
            ("c", report_files.serving_result()),
            ("d", report_files.kernel_result()),
        ):
            (tmp_path / f"{name}.json").write_text(json.dumps(result))
        found = [(source.kind, source.name) for source in find_sources([tmp_path])[0]]
        assert [name for _, name in found] == ["d.json", "b.json", "c.json", "a.json"]
        assert [KINDS.index(kind) for kind, _ in found] == sorted(
            KINDS.index(kind) for kind, _ in found
        )

    def test_folders_and_files_together_show_each_file_once(self, tmp_path: Path) -> None:
        (tmp_path / "deep").mkdir()
        path = tmp_path / "deep" / "kernel.json"
        path.write_text(json.dumps(report_files.kernel_result()))
        assert [s.name for s in find_sources([tmp_path, path])[0]] == ["deep/kernel.json"]

    def test_what_lies_beside_results_is_left_out_and_named(self, tmp_path: Path) -> None:
        model = tmp_path / "tiny-model"
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "llama"}')
        (tmp_path / "tokens.json").write_text("[1, 2]")
        (tmp_path / "kernel.json").write_text(json.dumps(report_files.kernel_result()))
        done = run_report(tmp_path, "--out", tmp_path / "page.html", "--no-plots")
        assert done.exit_code == 0, done.output
        assert "left out, no result files: tiny-model/config.json, tokens.json" in done.output
        assert "1 result file; written to" in done.output

    def test_nothing_is_loaded_from_elsewhere(self, tmp_path: Path) -> None:
        page = made(tmp_path, report_files.kernel_result(), report_files.serving_result())
        assert not {"link", "img", "iframe", "object", "embed", "base"} & {t for t, _ in page.tags}
        for tag, found in page.tags:
            assert not {"src", "srcset", "action", "data", "background"} & found.keys(), tag
            assert (found.get("href") or "#").startswith("#"), tag
        text = (tmp_path / "page.html").read_text()
        assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org)", text)

    def test_strings_of_files_are_text(self, tmp_path: Path) -> None:
        evil = '<script>alert(1)</script><b onclick="x">\'&amp;'
        kernel, serving = report_files.kernel_result(), report_files.serving_result()
        kernel["cells"][0] |= {"name": evil, "group": evil, "dtype": evil}
        kernel["cells"][1]["contenders"][evil] = kernel["cells"][1]["contenders"].pop("pat")
        kernel |= {"absent": {evil: evil}, "not_run": [evil + "2"], "command": [evil]}
        kernel["environment"] |= {"cpu": evil, "versions": {evil: evil}}
        serving["cells"][2] |= {"name": evil, "why_not": evil}
        serving["cells"][0]["sides"]["prefix"]["reasons"] = {evil: 1}
        serving |= {"model": evil, "stock": {"server_args": [evil]}}
        page = made(tmp_path, kernel, serving)
        assert [tag for tag, _ in page.tags].count("script") == 1
        assert not any("onclick" in found for _, found in page.tags)
        assert page.named(evil)
        assert page.named(evil + "2")

    def test_the_title_is_the_users(self, tmp_path: Path) -> None:
        (tmp_path / "kernel.json").write_text(json.dumps(report_files.kernel_result()))
        out = tmp_path / "page.html"
        done = run_report(tmp_path, "--out", out, "--no-plots", "--title", "a < b")
        assert done.exit_code == 0, done.output
        assert "<title>a &lt; b</title>" in out.read_text()
