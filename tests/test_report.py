"""`sglang-prefix report` and the terminal's tables: what they say of result files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner, Result

from sglang_prefix.bench import plots
from sglang_prefix.bench.report import Source, find_sources, print_section, section_of
from sglang_prefix.bench.report.section import Section
from sglang_prefix.bench.results import KINDS, ResultError, check_result
from sglang_prefix.bench.tables import Table, to_markdown, to_rich
from sglang_prefix.cli.main import app
from tests.report_files import (
    MADE_UP,
    engine_result,
    host_result,
    kernel_result,
    serving_result,
    tune_result,
)
from tests.report_files import (
    check_result as check_file,
)

COMMITTED = {s.name: s for s in find_sources([Path(__file__).parents[1] / "docs" / "results"])[0]}


def run_report(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def page_of(folder: Path, *results: dict[str, Any]) -> str:
    """The page of result files, without plots."""
    for number, result in enumerate(results):
        (folder / f"{number}.json").write_text(json.dumps(result), encoding="utf-8")
    done = run_report(folder, "--out", folder / "page.html", "--no-plots")
    assert done.exit_code == 0, done.output
    return (folder / "page.html").read_text(encoding="utf-8")


def summary_of(page: str) -> str:
    """The first lines of a page, without their markup."""
    found = re.search(r'<p id="summary">(.*?)</p>', page, re.DOTALL)
    assert found
    return " ".join(re.sub(r"<[^>]*>", "", found[1]).split())


class Tags(HTMLParser):
    """All elements of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def table_of(section: Section, title: str) -> Table:
    (table,) = (table for table in section.tables if title in table.title)
    return table


def rows_of(section: Section, title: str) -> dict[str, dict[str, str]]:
    """Rows of a table by name: the texts of their cells by column, a message as "message"."""
    table, found = table_of(section, title), {}
    for row in table.rows:
        texts = {c.title: cell.text for c, cell in zip(table.columns, row.cells, strict=False)}
        if row.tone == "absent":
            texts["message"] = row.cells[-1].text
        found[row.cells[0].text] = texts
    return found


def losing(section: Section, title: str) -> list[str]:
    return [row.cells[0].text for row in table_of(section, title).rows if row.tone == "losing"]


class TestKernel:
    def test_verdicts(self) -> None:
        stock, peer, query = section_of(kernel_result()).verdicts
        assert len(stock.won) == 3
        assert stock.lost == {"unrelated-8": 0.8}
        assert stock.stock == ["torch_native"]
        assert stock.missing == ["chunk-4096 (not run: interrupted)"]
        assert (len(peer.won), list(peer.lost)) == (1, ["pat-tree-03"])
        assert peer.not_compared["unrelated-8"] == "hydragen was not measured"
        assert (len(query.won), list(query.lost)) == (3, ["unrelated-8"])

    def test_losing_rows_are_marked_and_no_others(self) -> None:
        section = section_of(kernel_result())
        assert losing(section, "against the fastest") == ["pat-tree-03", "unrelated-8"]
        assert losing(section, "Every") == ["unrelated-8"] * 2
        assert losing(section, "Providers") == []

    def test_one_provider_of_ours_is_judged_in_all_cases(self) -> None:
        result = kernel_result()
        found = result["cases"][0]["providers"]
        # Faster, but not measured everywhere; then faster everywhere, but not fit for a graph.
        found["pat-fused"] = found["pat"] | {"ms": 0.5}
        for case in result["cases"]:
            case["providers"]["fitted"] = case["providers"]["pat"] | {"ms": 0.1, "fixed": False}
        row = rows_of(section_of(result), "pat against")["pat-tree-01"]
        assert row["speed-up"] == "4.00x"

    def test_what_is_absent_or_was_not_run_is_named(self) -> None:
        section = section_of(kernel_result())
        assert "Absent baselines: flashinfer-cascade: needs a GPU." in section.warnings
        assert "Not run: chunk-4096 (interrupted)." in section.warnings
        row = rows_of(section, "against the fastest")["chunk-4096"]
        assert row["message"] == "not run: interrupted"
        row = rows_of(section, "Providers")["flashinfer-cascade"]
        assert row["message"] == "absent: needs a GPU"

    def test_providers_over_all_cases(self) -> None:
        rows = rows_of(section_of(kernel_result()), "Providers")
        assert rows["pat"] | {"kind": "ours"} == {
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
        assert "pat-tree-01: pat failed: off by 1." in section.warnings
        assert "pat-tree-02: fa3 absent: page size 1 [of it]." in section.warnings
        assert losing(section, "against the fastest")[0] == "pat-tree-01"
        verdict = section.verdicts[0]
        assert verdict.not_compared["pat-tree-01"] == "ours failed: off by 1"
        assert (len(verdict.won), len(verdict.lost)) == (2, 1)
        assert rows_of(section, "all providers")["pat-tree-01"]["pat (ours)"] == "failed"

    def test_without_a_stock_backend_nothing_is_counted(self, tmp_path: Path) -> None:
        result = kernel_result()
        for case in result["cases"]:
            del case["providers"]["torch_native"]
            case["best_stock"] = None
        page = page_of(tmp_path, result)
        assert summary_of(page).startswith(
            "Nothing was compared with stock SGLang. Not compared: 5"
        )

    def test_the_stock_kernels_are_those_that_ours_was_compared_with(self) -> None:
        result = kernel_result()
        found = result["cases"][0]["providers"]
        # The latter is never the fastest.
        found |= {
            n: found["torch_native"] | {"ms": ms} for n, ms in (("triton", 7.0), ("no", 70.0))
        }
        assert section_of(result).verdicts[0].stock == ["torch_native", "triton"]

    def test_every_number_of_the_file_is_shown(self) -> None:
        result = kernel_result()
        table = table_of(section_of(result), "Every")
        titles = [column.title for column in table.columns]
        shown = {
            (row.cells[0].text, row.cells[1].text): dict(zip(titles, row.cells, strict=True))
            for row in table.rows
        }
        for case in result["cases"]:
            for name, found in case["providers"].items():
                row = shown[case["name"], name]
                assert row["ms"].sort == found["ms"]
                assert row["KV read"].sort == found["kv_read_ratio"]
                assert row["speed-up"].sort == pytest.approx(found["speedup"])
                assert row["plan ms"].sort == found["plan_ms"]
        assert "timed alone after the step" in table.hints["merge ms"]

    def test_targets_and_chains_of_a_gpu_run(self) -> None:
        result = kernel_result()
        chain = result["cases"][0] | {"name": "chain", "providers": {}}
        chain["providers"]["streams/launch/3"] = kernel_result()["cases"][0]["providers"]["pat"] | {
            "kind": "chain"
        }
        result["cases"].append(chain)
        result["cases"][0]["target"] = 15.0
        section = section_of(result)
        assert losing(section, "Targets") == ["nothing shared"]
        assert rows_of(section, "Price of launches")["chain"]["us per layer"] == "2,000"
        rows = rows_of(section, "against the fastest")
        assert "chain" not in rows
        assert rows["pat-tree-01"]["target"] == "15x missed"

    def test_a_dry_run_counts_nowhere(self) -> None:
        section = section_of(kernel_result() | {"dry": True})
        assert section.verdicts == []
        assert "mean nothing" in section.warnings[0]
        assert not any(row.tone == "losing" for table in section.tables for row in table.rows)


class TestServing:
    def test_wins_losses_and_what_is_no_comparison(self) -> None:
        section = section_of(serving_result() | {"absent": {"traces": "no --trace FILE"}})
        tpot, ttft, *_ = section.verdicts
        assert (len(tpot.won), tpot.lost, ttft.lost) == (2, {}, {"forks": 0.8})
        assert len(tpot.not_compared) == 3
        assert "Workloads not run: traces: no --trace FILE." in section.warnings
        rows = rows_of(section, "Prefix server")
        assert losing(section, "Prefix server") == ["forks"]
        assert rows["random"]["message"] == "not a comparison: our backend packed no step"
        assert rows["random"]["answers equal"] == "32 of 32"
        assert rows["traces"]["message"] == "not run: no --trace FILE"

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

    def test_what_is_no_comparison_has_no_gains_but_the_price_of_the_backend(self) -> None:
        result = serving_result()
        result["cases"][2] |= {"ratios": {"tpot": 0.25}, "unpacked_ratios": {"tpot": 1.5}}
        section = section_of(result)
        assert "random" not in section.verdicts[0].gains
        message = rows_of(section, "Prefix server")["random"]["message"]
        assert "costs when it does not pack, prefix / stock: tpot 1.50x" in message
        assert "4.00x" not in message

    def test_unequal_tokens_and_a_busy_host_are_seen(self) -> None:
        result = serving_result()
        differs = {"requests_equal": 31, "is_comparison": False, "why_not": "tokens differ"}
        result["cases"][0] |= differs
        result["cases"][1]["sides"]["stock"]["raw"]["runs"][0]["load_per_cpu"] = 7.25
        section = section_of(result)
        cell = table_of(section, "Prefix server").rows[0].cells[3]
        assert (cell.text, cell.tone) == ("31 of 32", "losing")
        assert any("Up to 7.2 processes per CPU" in warning for warning in section.warnings)


class TestOtherKinds:
    def test_engines(self) -> None:
        section = section_of(engine_result())
        (verdict,) = section.verdicts
        assert (verdict.gains, list(verdict.not_compared)) == (
            {"many": 2.0, "pair/unrelated": 0.8},
            ["few"],
        )
        message = rows_of(section, "Decoding")["few"]["message"]
        assert message.startswith("not a comparison: ours did not pack")
        assert losing(section, "in turn") == ["pair/unrelated", "pair/logprobs"]

    def test_tiles(self) -> None:
        (row,) = table_of(section_of(tune_result()), "Tiles").rows
        said = ["dim128/rows16", "16x64", "3.00", "32x64", "2.00", "1.50x"]
        assert [cell.text for cell in row.cells] == said

    def test_checks(self) -> None:
        section = section_of(check_file())
        assert losing(section, "Not run or failed") == ["graph/fused"]
        assert rows_of(section, "Checks")["dim128"]["largest error"] == "0.0010"

    def test_host_times(self) -> None:
        row = rows_of(section_of(host_result()), "Host time of planning")["forest"]
        assert row == {"stage": "forest", "64 requests": "32.0", "256 requests": "128"}


class TestTables:
    def test_what_all_rows_share_is_said_once(self) -> None:
        text = to_markdown(table_of(section_of(kernel_result()), "against"))
        assert "In every row: fastest stock torch_native, heads 1/1/1, dtype float32" in text
        assert "dtype |" not in text
        assert "chunk-4096: not run: interrupted." in text
        assert "| pat-tree-01 | 4.00x |" in text

    def test_a_terminal_shows_the_first_columns_that_fit(self) -> None:
        result = kernel_result()
        result["cases"][3]["name"] = "[red]x[/]|\x1b[1m"
        console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(to_rich(table_of(section_of(result), "against"), 100))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= 100
        assert "[red]x[/]|" in text
        assert "0.80x slower" in text
        assert "No room here for:" in text
        assert "chunk-4096" not in text

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_terminal_has_the_tables_of_the_page(self, kind: str, tmp_path: Path) -> None:
        section = section_of(MADE_UP[kind]())
        console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        print_section(section, console)
        text, page = console.export_text(), page_of(tmp_path, MADE_UP[kind]())
        for table in section.tables:
            assert table.title in page
            assert table.is_detail or table.title in text
        assert all(" ".join(warning.split()) in text for warning in section.warnings)


class TestPlots:
    def test_losses_have_another_colour(self) -> None:
        bars = plots.speedup_figure(kernel_result()).axes[0].patches
        assert len({bar.get_facecolor() for bar in bars[:3]}) == 1
        assert bars[3].get_facecolor() != bars[0].get_facecolor()

    def test_the_split_says_how_it_was_found(self) -> None:
        figure = plots.time_split_figure(kernel_result())
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels[2:] == ["forward (run less merge)", "merge (timed alone after the step)"]

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
    section, cases = section_of(source.data), source.data["cases"]
    if source.kind == "bench-host":
        stages = [stage for case in cases for stage in case["us"]]
        page = page_of(tmp_path, source.data)
        assert all(page.count(f">{stage}<") == 1 for stage in stages)
        assert {case["group"] for case in cases} == {"planning", "engine", "host"}
        return
    names = {case["name"] for case in cases} | {*source.data["not_run"]}
    assert names == {*rows_of(section, "against the fastest")}
    ours = [{p["policy"]: p["ms"] for p in case["providers"].values()} for case in cases]
    stock, query = section.verdicts
    assert len(stock.won) == sum(ms["pat"] < ms[None] for ms in ours)
    assert len(query.won) == sum(ms["pat"] < ms["query"] for ms in ours)
    assert len(losing(section, "against")) >= sum(ms["pat"] > ms["query"] for ms in ours)


class TestPage:
    def test_the_summary_counts_all_files(self, tmp_path: Path) -> None:
        page = page_of(tmp_path, kernel_result(), serving_result())
        said = summary_of(page)
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

    def test_kinds_are_in_order_and_the_newest_is_first(self, tmp_path: Path) -> None:
        older = kernel_result() | {"created": "2025-01-01T00:00:00+00:00"}
        results = {"a": tune_result(), "b": older, "c": serving_result(), "d": kernel_result()}
        for name, result in results.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(result))
        found, _ = find_sources([tmp_path, tmp_path / "a.json"])
        assert [source.name for source in found] == ["d.json", "b.json", "c.json", "a.json"]

    def test_what_lies_beside_results_is_left_out_and_named(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
        (tmp_path / "tokens.json").write_text("[1, 2]")
        (tmp_path / "kernel.json").write_text(json.dumps(kernel_result()))
        title = "a < b"
        done = run_report(tmp_path, "--out", tmp_path / "page.html", "--no-plots", "--title", title)
        assert done.exit_code == 0, done.output
        assert "left out, no result files: model/config.json, tokens.json" in done.output
        assert "1 result file; written to" in done.output
        assert "<title>a &lt; b</title>" in (tmp_path / "page.html").read_text()

    def test_nothing_is_loaded_and_all_strings_are_text(self, tmp_path: Path) -> None:
        results = [evil(MADE_UP[kind]()) for kind in KINDS]
        page = page_of(tmp_path, *results)
        tags = Tags(page).found
        assert page.count("&lt;script&gt;alert") > 200
        names = [tag for tag, _ in tags]
        assert names.count("script") == 1
        assert not {"link", "img", "iframe", "object", "embed", "base"} & {*names}
        for tag, found in tags:
            assert not {"src", "srcset", "action", "data", "background"} & found.keys(), tag
            assert not any(name.startswith("on") for name in found), tag
            assert (found.get("href") or "#").startswith("#"), tag
        assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org)", page)


EVIL = '<script>alert(1)</script><b onclick="x">\'&amp;'


def evil(result: dict[str, Any]) -> dict[str, Any]:
    """The result with every string that may be any string made an evil one."""
    for place, key in places(result):
        if isinstance(place[key], str):
            before, place[key] = place[key], f"{place[key]}{EVIL}"
            try:
                check_result("x", result)
            except ResultError:
                place[key] = before
    return result


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every object and list in parsed JSON with each of its keys and places."""
    if not isinstance(value, dict | list):
        return
    for key, item in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
        yield value, key
        yield from places(item)


ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "pat", "x y"]),
    lambda some: (
        st.lists(some, max_size=2) | st.dictionaries(st.text(max_size=2), some, max_size=2)
    ),
    max_leaves=3,
)
WHOLE = json.dumps(kernel_result())
TWICE = json.dumps(kernel_result()).replace("pat-tree-02", "pat-tree-01")
BAD = {
    "empty": ("", "is not a result file"),
    "half-written": (WHOLE[: len(WHOLE) // 2], "is not a result file"),
    "deep": ("[" * 100_000, "is not a result file"),
    "kind": (WHOLE.replace('"kind": "bench-kernel"', '"kind": ["a"]'), "kind is ['a']; legal:"),
    "schema": (WHOLE.replace('"schema": 2', '"schema": 1'), "schema is 1; legal: 2"),
    "no time": (WHOLE.replace('"ms"', '"m"'), "cases[0].providers.torch_native.ms: Field required"),
    "two of a name": (TWICE, "two cases are named 'pat-tree-01'"),
    "timed without a time": (
        json.dumps(engine_result()).replace("tpot_us", "tpot"),
        "is not a whole bench-engine file: KeyError: 'tpot_us'",
    ),
}


class TestBadInput:
    @pytest.mark.parametrize(("content", "complaint"), BAD.values(), ids=BAD)
    def test_a_bad_file_is_named_and_nothing_is_written(
        self, content: str, complaint: str, tmp_path: Path
    ) -> None:
        bad, out = tmp_path / "bad.json", tmp_path / "page.html"
        (tmp_path / "a.json").write_text(WHOLE)
        bad.write_text(content)
        out.write_text("the page of before")
        done = run_report(tmp_path, "--out", out, "--no-plots")
        assert done.exit_code == 1, done.output
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"sglang-prefix: {bad}")
        assert complaint in done.stderr
        assert out.read_text() == "the page of before"
        assert {path.name for path in tmp_path.iterdir()} == {"a.json", "bad.json", "page.html"}

    @given(kind=st.sampled_from(KINDS), value=ANY_VALUE, data=st.data())
    def test_any_value_anywhere_is_shown_or_refused_in_one_line(
        self, kind: str, value: Any, data: st.DataObject, tmp_path: Path
    ) -> None:
        result = MADE_UP[kind]()
        place, key = data.draw(st.sampled_from(list(places(result))))
        if data.draw(st.booleans()):
            place[key] = value
        else:
            del place[key]
        (tmp_path / "result.json").write_text(json.dumps(result))
        out = tmp_path / "page.html"
        done = run_report(tmp_path / "result.json", "--out", out, "--no-plots")
        assert done.exit_code in (0, 1), done.exception
        assert len(done.stderr.splitlines()) == done.exit_code, done.stderr
        if done.exit_code:
            assert done.stderr.startswith(f"sglang-prefix: {tmp_path / 'result.json'}")

    @pytest.mark.parametrize("content", ['{"name": "package"}', "[]"])
    def test_a_foreign_file_alone(self, content: str, tmp_path: Path) -> None:
        """In a folder it is left out, so the folder has no results; by its name it is refused."""
        foreign, out = tmp_path / "foreign.json", tmp_path / "page.html"
        foreign.write_text(content)
        folder = run_report(tmp_path, "--out", out)
        said = f"{tmp_path}: no result file (*.json) in this folder; these are none: foreign.json"
        assert folder.stderr == f"sglang-prefix: {said}\n"
        named = run_report(foreign, "--out", out)
        assert named.stderr.startswith(f"sglang-prefix: {foreign}")
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
        for folder in ("empty", "good"):
            Path(folder).mkdir()
        Path("good/a.json").write_text(WHOLE)
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
