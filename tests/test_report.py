"""`sglang-prefix report` and the terminal's tables: what they say of result files."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from sglang_prefix.bench import plots
from sglang_prefix.bench.report import Source, find_sources, print_section, section_of
from sglang_prefix.bench.report.section import Section
from sglang_prefix.bench.results import KINDS
from sglang_prefix.bench.tables import Table, is_losing, number_text
from sglang_prefix.cli.main import app
from tests.report_files import MADE_UP, engine_result, kernel_result, serving_result, tune_result

COMMITTED = {s.name: s for s in find_sources([Path(__file__).parents[1] / "docs" / "results"])[0]}
EVIL = '<script>alert(1)</script><b onclick="x">\'&amp;'


def run_report(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def page_of(folder: Path, *results: dict[str, Any]) -> str:
    """The page of result files, without plots."""
    for number, result in enumerate(results):
        (folder / f"{number}.json").write_text(json.dumps(result), encoding="utf-8")
    done = run_report(folder, "--out", folder / "page.html", "--no-plots")
    assert done.exit_code == 0, done.output
    return (folder / "page.html").read_text(encoding="utf-8")


def table_of(section: Section, title: str) -> Table:
    (table,) = (table for table in section.tables if title in table.title)
    return table


def rows_of(section: Section, title: str) -> dict[str, dict[str, str]]:
    """Rows of a table by name: the texts of their cells by column."""
    table = table_of(section, title)
    heads = [column.title for column in table.columns]
    texts = [[cell.text for cell in row] for row in table.rows]
    return {row[0]: dict(zip(heads, row, strict=True)) for row in texts}


def losing(section: Section, title: str) -> list[str]:
    return [row[0].text for row in table_of(section, title).rows if is_losing(row)]


def left_out(section: Section) -> dict[str, str]:
    """What has no numbers, and why."""
    return {name: row["why it has no number"] for name, row in rows_of(section, "Not").items()}


class TestKernel:
    def test_wins_losses_and_what_is_left_out(self) -> None:
        section = section_of(kernel_result())
        stock, peer, query = section.verdicts
        assert (len(stock.won), stock.lost) == (3, {"unrelated-8": 0.8})
        assert stock.stock == ["torch_native"]
        assert stock.not_compared == {"chunk-4096": "not run: interrupted"}
        assert (len(peer.won), list(peer.lost)) == (1, ["pat-tree-03"])
        assert peer.not_compared["unrelated-8"] == "hydragen was not measured"
        assert (len(query.won), list(query.lost)) == (3, ["unrelated-8"])
        assert losing(section, "against the fastest") == ["pat-tree-03", "unrelated-8"]
        assert losing(section, "Every") == ["unrelated-8"] * 2
        assert "Absent baselines: flashinfer-cascade: needs a GPU." in section.warnings
        assert "Not run: chunk-4096 (interrupted)." in section.warnings
        left = {"flashinfer-cascade": "absent: needs a GPU", "chunk-4096": "not run: interrupted"}
        assert left_out(section) == left

    def test_one_provider_of_ours_is_judged_in_all_cases(self) -> None:
        result = kernel_result()
        found = result["cases"][0]["providers"]
        # Faster, but not measured everywhere.
        found["pat-fused"] = found["pat"] | {"ms": 0.5}
        # Of these the latter is never the fastest.
        found["triton"] = found["torch_native"] | {"ms": 7.0}
        found["flex"] = found["torch_native"] | {"ms": 70.0}
        section = section_of(result)
        assert rows_of(section, "pat against")["pat-tree-01"]["speed-up"] == "3.50x"
        assert section.verdicts[0].stock == ["torch_native", "triton"]

    def test_peers_are_the_baseline_where_there_is_no_stock(self) -> None:
        result = kernel_result()
        for case in result["cases"]:
            del case["providers"]["torch_native"]
        result["cases"][0]["providers"]["pat"] |= {"over_floor": 2.5, "disturbed": 1}
        section = section_of(result)
        assert section.verdicts[0].baseline == "hydragen, kernels alone"
        rows = rows_of(section, "pat against hydragen")
        assert rows["pat-tree-01"]["over hydragen"] == "1.50x"
        assert rows["pat-tree-01"]["hydragen us"] == "3,000"
        assert rows["pat-tree-01"]["over floor"] == "2.50"
        (column,) = (c for c in table_of(section, "against").columns if c.title == "over floor")
        assert not column.is_detail
        assert rows_of(section, "Providers")["pat"]["faster in"] == "1"
        every = table_of(section, "Every measurement")
        at = [column.title for column in every.columns].index("disturbed")
        assert next(row[at].text for row in every.rows if row[1].text == "pat") == "1"

    def test_providers_over_all_cases(self) -> None:
        rows = rows_of(section_of(kernel_result()), "Providers")
        assert rows["pat"] == {
            **{"provider": "pat", "kind": "ours", "speed-up": "2.49x", "worst": "0.80x"},
            **{"worst case": "unrelated-8", "faster in": "3", "slower in": "1"},
            "not measured": "0",
        }
        assert rows["hydragen"]["not measured"] == "2"

    def test_what_failed_is_seen(self) -> None:
        result = kernel_result()
        del result["cases"][0]["providers"]["pat"]
        result["cases"][0]["failed"] = {"pat": "off by 1"}
        result["cases"][1]["absent"] = {"fa3": "page size 1 [of it]"}
        section = section_of(result)
        assert "pat failed: pat-tree-01 (off by 1)." in section.warnings
        assert "fa3 absent: pat-tree-02 (page size 1 [of it])." in section.warnings
        assert losing(section, "against the fastest")[0] == "pat-tree-01"
        assert rows_of(section, "against")["pat-tree-01"]["ours ms"] == "failed"
        assert section.verdicts[0].not_compared["pat-tree-01"] == "ours failed: off by 1"

    def test_every_number_of_the_file_is_shown(self) -> None:
        result = kernel_result()
        table = table_of(section_of(result), "Every measurement")
        titles = [column.title for column in table.columns]
        rows = [dict(zip(titles, (cell.sort for cell in row), strict=True)) for row in table.rows]
        found = [item for case in result["cases"] for item in case["providers"].values()]
        keys = {"ms": "ms", "KV read": "kv_read_ratio", "plan ms": "plan_ms"}
        for row, provider in zip(rows, found, strict=True):
            assert {title: row[title] for title in keys} == {
                t: provider[k] for t, k in keys.items()
            }
            assert row["speed-up"] == pytest.approx(provider["speedup"])

    def test_targets_and_chains_of_a_gpu_run(self) -> None:
        result = kernel_result()
        found = {"streams/launch/3": result["cases"][0]["providers"]["pat"] | {"kind": "chain"}}
        result["cases"].append(result["cases"][0] | {"name": "chain", "providers": found})
        section = section_of(result)
        assert losing(section, "Targets") == ["nothing shared"]
        assert rows_of(section, "Every")["chain"]["kernel us"] == "2,000"
        assert "chain" not in rows_of(section, "against the fastest")

    def test_a_dry_run_counts_nowhere(self) -> None:
        section = section_of(kernel_result() | {"dry": True})
        assert section.verdicts == []
        assert "mean nothing" in section.warnings[0]
        assert not any(is_losing(row) for table in section.tables for row in table.rows)


class TestServing:
    def test_wins_losses_and_what_is_no_comparison(self) -> None:
        result = serving_result() | {"absent": {"traces": "no --trace FILE"}}
        result["cases"][2] |= {"ratios": {"tpot": 0.25}, "unpacked_ratios": {"tpot": 1.5}}
        section = section_of(result)
        tpot, ttft, *_ = section.verdicts
        assert (len(tpot.won), tpot.lost, ttft.lost) == (2, {}, {"forks": 0.8})
        assert {*tpot.not_compared} == {"random", "trace", "traces"}
        assert "Workloads not run: traces: no --trace FILE." in section.warnings
        row = rows_of(section, "Prefix server")["random"]
        assert losing(section, "Prefix server") == ["forks"]
        assert (row["answers equal"], row["TPOT gain"]) == ("32 of 32", "-")
        left = left_out(section)
        assert left["random"].startswith("not a comparison: our backend packed no step")
        assert left["random"].endswith("the backend costs, prefix / stock: tpot 1.50x")
        assert left["traces"] == "absent: no --trace FILE"

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--attention-backend", "torch_native"], ["torch_native"]),
            (["--attention-backend=triton"], ["triton"]),
            (["--model-path", "tiny"], []),
            ([], []),  # servers that ran already
        ],
    )
    def test_the_stock_backend_is_named(self, arguments: list[str], said: list[str]) -> None:
        result = serving_result() | {"stock": {"server_args": arguments}}
        assert section_of(result).verdicts[0].stock == said

    def test_unequal_tokens_and_a_busy_host_are_seen(self) -> None:
        result = serving_result()
        differs = {"requests_equal": 31, "is_comparison": False, "why_not": "tokens differ"}
        result["cases"][0] |= differs
        result["cases"][1]["sides"]["stock"]["raw"]["runs"][0]["load_per_cpu"] = 7.25
        section = section_of(result)
        assert rows_of(section, "Prefix server")["rollouts-4x8"]["answers equal"] == "31 of 32"
        assert losing(section, "Prefix server") == ["rollouts-4x8", "forks"]
        assert any("Up to 7.2 processes per CPU" in warning for warning in section.warnings)


class TestOtherKinds:
    def test_engines(self) -> None:
        section = section_of(engine_result())
        (verdict,) = section.verdicts
        assert verdict.gains == {"many": 2.0, "pair/unrelated": 0.8}
        assert left_out(section) == {"few": "not a comparison: ours did not pack (gate: 9)"}
        assert losing(section, "in turn") == ["pair/unrelated", "pair/logprobs"]

    @pytest.mark.parametrize(
        ("kind", "title", "row"),
        [
            ("bench-tune", "Tiles", ["dim128/rows16", "16x64", "3.00", "32x64", "2.00", "1.50x"]),
            (
                "bench-profile",
                "Profiles",
                ["native", "90,000", "3.00", "2.00", "1.00", "0.500", "0.0700"],
            ),
            ("gpu-check", "Checks", ["dim128", "variants", "1", "0.00100"]),
            (
                "bench-gpu",
                "Steps",
                ["correct", "done", "4.00", "15.0", "0", "passed: 7; fastest: 16x64", "made-up"],
            ),
            ("bench-host", "Host time of planning", ["forest", "32.0", "128"]),
        ],
    )
    def test_one_row(self, kind: str, title: str, row: list[str]) -> None:
        section = section_of(MADE_UP[kind]())
        assert [*rows_of(section, title)[row[0]].values()] == row
        assert kind != "gpu-check" or losing(section, "Not") == ["graph/fused"]


class TestTerminal:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_has_the_tables_of_the_page(self, kind: str, tmp_path: Path) -> None:
        result = MADE_UP[kind]()
        result["cases"][-1]["name"] = "[b]x[/]"
        section, page = section_of(result), page_of(tmp_path, result)
        console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
        print_section(section, console)
        text = console.export_text()
        for table in section.tables:
            assert table.title in page
            assert table.is_detail or table.title in text
        assert all(" ".join(warning.split()) in text for warning in section.warnings)
        lines = [line.rstrip() for line in text.splitlines()]
        assert max(len(line) for line in lines if line not in section.warnings) <= 80
        if kind == "bench-kernel":
            assert "[b]x[/]" in text
            assert "slower" in text
            assert "layers" not in text

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0.0, "0.00"), (0.01234, "0.0123"), (0.25, "0.250"), (99.97, "100"), (12345.6, "12,346")],
    )
    def test_numbers_have_three_digits(self, value: float, text: str) -> None:
        assert number_text(value) == text


class TestPlots:
    def test_losses_have_another_colour(self) -> None:
        bars = plots.steps_figure(kernel_result()).axes[0].patches
        assert len({bar.get_facecolor() for bar in bars[:3]}) == 1
        assert bars[3].get_facecolor() != bars[0].get_facecolor()

    def test_the_split_says_how_it_was_found(self) -> None:
        figure = plots.steps_figure(kernel_result())
        labels = {text.get_text() for text in figure.legends[0].get_texts()}
        assert {"forward (run less merge)", "merge (timed alone after the step)"} <= labels

    @pytest.mark.parametrize("kind", plots.PLOTS)
    def test_all_are_written_even_of_nothing(self, kind: str, tmp_path: Path) -> None:
        whole = MADE_UP[kind]()
        # Between dollar signs matplotlib would see mathematics, and fail.
        whole["cases"][0]["name"] = "$\\frac{$"
        for result in (whole, whole | {"cases": []}):
            paths = plots.save_plots(result, tmp_path)
            assert [path.stem for path in paths] == list(plots.PLOTS[kind])
            assert all(path.stat().st_size > 5000 for path in paths)


@pytest.mark.parametrize("source", COMMITTED.values(), ids=COMMITTED)
def test_committed_results_are_shown_with_all_their_cases(source: Source, tmp_path: Path) -> None:
    page, cases = page_of(tmp_path, source.data), source.data["cases"]
    shown = [each for case in cases for each in case.get("us", [case["name"]])]
    assert all(f">{each}<" in page for each in shown)


class TestPage:
    def test_the_summary_counts_all_files(self, tmp_path: Path) -> None:
        page = page_of(tmp_path, kernel_result(), serving_result())
        summary = page.partition('<p id="summary">')[2].partition("</p>")[0]
        said = " ".join(re.sub(r"<[^>]*>", "", summary).split())
        start = "Against stock SGLang (torch_native), ours is faster in 5 of 6 cases; slower in 1."
        assert said.startswith(f"{start} Not compared: 3.")
        # Two of the peer, four of the policy that shares nothing, six of the other metrics.
        assert "slower or worse in 3 of 12 comparisons" in said
        assert "worse in 1</b>: forks" in page

    def test_many_cases_are_not_all_named_at_the_top(self, tmp_path: Path) -> None:
        result = kernel_result()
        loser = result["cases"][3]
        del loser["providers"]["query"]
        result["cases"] = [loser | {"name": f"loser-{n}"} for n in range(9)]
        page = page_of(tmp_path, result)
        top, verdicts = page.partition('<table id="files">')[2].split("</table>", 1)
        assert top.count("loser-") == 6
        assert "and 3 more." in top
        verdict = verdicts.partition('<ul class="verdicts">')[2].partition("</li>")[0]
        assert verdict.count("loser-") == 9

    def test_files_are_in_order_and_others_are_left_out_and_named(self, tmp_path: Path) -> None:
        older = kernel_result() | {"created": "2025-01-01T00:00:00+00:00"}
        results = {"a": tune_result(), "b": older, "c": serving_result(), "d": kernel_result()}
        for name, result in (results | {"tokens": [1, 2], "config": {"model": "llama"}}).items():
            (tmp_path / f"{name}.json").write_text(json.dumps(result))
        found, left = find_sources([tmp_path, tmp_path / "a.json"])
        assert [source.name for source in found] == ["d.json", "b.json", "c.json", "a.json"]
        assert left == ["config.json", "tokens.json"]
        out = tmp_path / "page.html"
        done = run_report(tmp_path, "--out", out, "--no-plots", "--title", "a < b")
        assert done.exit_code == 0, done.output
        assert "left out, no result files: config.json, tokens.json" in done.output
        assert "4 result files; written to" in done.output
        assert "<title>a &lt; b</title>" in out.read_text()

    def test_nothing_is_loaded_and_all_strings_are_text(self, tmp_path: Path) -> None:
        text = json.dumps([make() for make in MADE_UP.values()])
        # Names, reasons, what was measured on, and what a command was.
        for word in (
            "pat-tree-01",
            "rollouts-4x8",
            "interrupted",
            "made-up CPU",
            "results",
            "gate",
        ):
            text = text.replace(f'"{word}"', json.dumps(word + EVIL))
        page = page_of(tmp_path, *json.loads(text))
        assert page.count("&lt;script&gt;alert") > 40
        assert page.count("<script") == 1
        assert not re.search(r"<(link|img|iframe|object|embed|base)\b", page)
        tags = re.sub(r'"[^"]*"', '""', page)
        assert not re.search(r"<[^>]*\s(src|srcset|action|data|background|on\w+)=", tags)
        assert all(place.startswith("#") for place in re.findall(r'\shref="([^"]*)', page))
        assert not re.search(r"@import|url\(|https?://", page)


WHOLE = json.dumps(kernel_result())
ENGINE = json.dumps(engine_result())


class TestBadInput:
    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (WHOLE[: len(WHOLE) // 2], "is not a result file"),
            (WHOLE.replace('"ms"', '"m"'), "cases: 0.providers.torch_native.ms: Field required"),
            (
                ENGINE.replace("tpot_us", "tpot"),
                "not a whole bench-engine file: KeyError: 'tpot_us'",
            ),
        ],
        ids=["half-written", "no time", "timed without a time"],
    )
    def test_a_bad_file_is_named_and_nothing_is_written(
        self, content: str, complaint: str, tmp_path: Path
    ) -> None:
        bad, out = tmp_path / "bad.json", tmp_path / "page.html"
        (tmp_path / "a.json").write_text(WHOLE)
        bad.write_text(content)
        out.write_text("the page of before")
        done = run_report(tmp_path, "--out", out, "--no-plots")
        assert done.exit_code == 2, done.output
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"sglang-prefix: {bad}")
        assert complaint in done.stderr
        assert out.read_text() == "the page of before"
        assert {path.name for path in tmp_path.iterdir()} == {"a.json", "bad.json", "page.html"}

    @pytest.mark.parametrize(
        ("arguments", "status", "complaint"),
        [
            (["empty", "--out", "page.html"], 2, "empty: no result file (*.json) in this folder"),
            (["other", "--out", "page.html"], 2, "in this folder; these are none: package.json"),
            (["other/package.json", "--out", "page.html"], 2, "other/package.json: schema is None"),
            (["nowhere", "--out", "page.html"], 2, "nowhere: No such file or dir"),
            (
                ["good", "--out", "empty"],
                2,
                "'--out': empty: Is a directory; legal: a file",
            ),
            (["good", "--out", "no/page.html"], 2, "'--out': no/page.html: No such file"),
            (["good", "--out", "good/a.json"], 2, "one of the result files; legal: another file"),
            (["good"], 2, "--out"),
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
        for folder in ("empty", "good", "other"):
            Path(folder).mkdir()
        Path("good/a.json").write_text(WHOLE)
        Path("other/package.json").write_text('{"name": "package"}')
        done = run_report(*arguments, "--no-plots")
        assert done.exit_code == status, done.output
        assert complaint in done.stderr
        assert Path("good/a.json").read_text() == WHOLE
        assert not Path("page.html").exists()

    def test_plots_without_matplotlib(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
        out = tmp_path / "page.html"
        (tmp_path / "kernel.json").write_text(WHOLE)
        done = run_report(tmp_path, "--out", out)
        assert done.exit_code == 1
        advice = "pip install 'sglang-prefix[bench]', or --no-plots"
        assert done.stderr == f"sglang-prefix: plots need matplotlib: {advice}\n"
        assert not out.exists()
        assert run_report(tmp_path, "--out", out, "--no-plots").exit_code == 0
