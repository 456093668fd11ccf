"""`bench serving` without servers: what it concludes, how it goes on, what it shows."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.serving.cells import judge, new_cell, sum_up
from sglang_prefix.bench.serving.drivers import Answer, summarize
from sglang_prefix.bench.serving.process import ClientError
from sglang_prefix.bench.serving.run import steps
from tests.serving_runs import WORKLOAD, FakeClient, a_run, fakes, go, plan  # noqa: F401

pytest.importorskip("matplotlib", reason="the plots need matplotlib")

# -- conclusions --------------------------------------------------------------------------------


def said(*tokens: list[int], fingerprint: str = "f", texts: int = 1) -> dict[str, Any]:
    hashes = [str(one) for one in tokens]
    return {"fingerprint": fingerprint, "tokens": list(tokens), "texts": [hashes] * texts}


def judged(
    prefix: dict[str, Any], answers: dict[str, Any] | None = None, min_equal: float = 1.0
) -> dict[str, Any]:
    cell = new_cell(WORKLOAD)
    cell["sides"] = {"stock": sum_up([a_run(2.0)]), "prefix": sum_up([prefix])}
    evidence = {"stock": said([1, 2, 3], [4, 5, 6])}
    evidence["prefix"] = answers or said([1, 2, 3], [4, 5, 6])
    judge(cell, evidence, repeats=1, min_equal=min_equal)
    return cell


def test_a_comparison_has_ratios_of_prefix_over_stock() -> None:
    cell = judged(a_run(packed=19, stock=1))
    assert cell["is_comparison"]
    assert cell["why_not"] is None
    assert cell["ratios"] == {"ttft": 0.5, "tpot": 0.5, "itl": 0.5, "throughput": 2.0}
    assert cell["requests_equal"] == cell["requests"] == 2
    assert cell["tokens_compared"] == cell["tokens_equal"] == 6
    side = cell["sides"]["prefix"]
    assert side["steps"] == {"packed": 19, "stock": 1, "fallback": 0}
    assert side["packed_share"] == 0.95
    assert side["kv_read_ratio"] == 0.25
    assert side["reasons"] == {"gate-no-gain": 1}


def test_a_run_that_was_not_packed_is_no_comparison() -> None:
    cell = judged(a_run(packed=8, stock=2))
    assert not cell["is_comparison"]
    assert cell["why_not"] == "only 80% of the decode steps were packed (gate-no-gain)"
    assert set(cell["ratios"].values()) == {None}
    assert cell["unpacked_ratios"]["tpot"] == 0.5
    assert not judged(a_run(packed=0))["is_comparison"]  # nothing decoded is not all packed


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (said([1, 2, 3], [4, 5, 7]), "tokens differ in 1 of 2 answers (83% of tokens agree)"),
        (said([1, 9, 3], [4, 5, 6]), "tokens differ in 1 of 2 answers (67% of tokens agree)"),
        (said([1, 2, 3]), "1 answers for 2 requests"),
        (said([1, 2, 3], [4, 5, 6], fingerprint="g"), "did not get the same requests"),
        (said([1, 2, 3], [4, 5, 6, 7]), "tokens differ in 1 of 2 answers (100% of tokens agree)"),
        (
            said([1, 2, 3], [4, 5, 6]) | {"texts": [["[1, 2, 3]", "other"]]},
            "answers of the timed runs differ in 1 of 2 requests",
        ),
    ],
)
def test_sides_that_do_not_say_the_same_are_no_comparison(
    answers: dict[str, Any], told: str
) -> None:
    cell = judged(a_run(packed=20), answers)
    assert not cell["is_comparison"]
    assert cell["why_not"].endswith(told)
    assert set(cell["ratios"].values()) == {None}
    assert cell["unpacked_ratios"] is None


def test_where_rounding_differs_a_share_of_the_tokens_is_enough() -> None:
    answers = said([1, 2, 9], [4, 9, 9])
    assert judged(a_run(packed=20), answers, min_equal=0.5)["is_comparison"]
    assert judged(a_run(packed=20), answers, min_equal=0.5)["requests_equal"] == 0
    assert not judged(a_run(packed=20), answers, min_equal=0.6)["is_comparison"]


def test_the_median_run_counts() -> None:
    side = sum_up([a_run(scale, packed=10) for scale in (1.0, 9.0, 2.0)])
    assert side["ttft_ms"] == {"median": 20.0, "p99": 40.0}
    assert side["output_tokens_per_s"] == 50
    assert side["steps"]["packed"] == 30
    assert len(side["raw"]["runs"]) == 3


def test_times_are_summed_up_as_bench_serving_does() -> None:
    # Two tokens at once share their time; a first chunk of two tokens has no time between them.
    one = Answer(began=1.0, chunks=[(1.5, 1), (1.7, 3), (1.8, 4)], text="one")
    other = Answer(began=1.0, chunks=[(2.0, 2), (2.4, 3)], text="other")
    found = summarize([one, other], 2.0)
    assert found["ttft_ms"]["median"] == pytest.approx(750)
    assert found["tpot_ms"] == pytest.approx({"median": 250, "p99": 100 + 0.99 * 300})
    assert found["itl_ms"]["median"] == pytest.approx(100)  # of 100, 100, 100 and 400
    assert found["output_tokens_per_s"] == 7 / 2
    assert found["texts"] == ["one", "other"]
    assert summarize([Answer(1.0, [(2.0, 1)])], 1.0)["tpot_ms"] is None


def test_flags_that_bench_serving_does_not_have_are_told() -> None:
    pytest.importorskip("sglang.benchmark.serving", reason="SGLang's bench_serving is needed")
    from prefix_patches import load_generator

    assert load_generator.parse(["--num-prompts", "7"]).num_prompts == 7
    with pytest.raises(ValueError, match="unrecognized arguments: --num-prompt-groups"):
        load_generator.parse(["--num-prompt-groups", "7"])


# -- the run, and going on with it ---------------------------------------------------------------


@pytest.mark.usefixtures("fakes")
def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path: Path) -> None:
    whole = go(plan(tmp_path / "whole", repeats=2))
    assert [cell["is_comparison"] for cell in whole["cells"]] == [True, True]
    assert whole["not_run"] == []
    FakeClient.begin(fails_at=5)
    with pytest.raises(ClientError, match="prefix, a: gone"):
        go(plan(tmp_path / "part", repeats=2))
    part = read_result(tmp_path / "part" / "serving.json")
    assert part["not_run"] == ["a", "b"]
    assert [cell["is_comparison"] for cell in part["cells"]] == [False, False]
    assert part["cells"][0]["why_not"] == "not run to its end: prefix"
    assert len(part["cells"][0]["sides"]["prefix"]["raw"]["runs"]) == 1
    FakeClient.begin()
    resumed = go(plan(tmp_path / "part", repeats=2), resume=True)
    assert FakeClient.measured == ("prefix a", "prefix b", "prefix b")
    assert [cell["ratios"] for cell in resumed["cells"]] == [c["ratios"] for c in whole["cells"]]
    assert go(plan(tmp_path / "part", repeats=2), resume=True) == resumed  # nothing is left


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "was made with another seed"),
        ({"repeats": 2}, "was made with another repeats"),
        ({"model": "n"}, "was made with another model"),
        ({"tokenizer": "t"}, "was made with another tokenizer"),
        ({"urls": {"stock": "u", "prefix": None}}, "was made with another server URLs"),
        ({"workloads": [WORKLOAD]}, "was made with another workload"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    go(plan(tmp_path))
    with pytest.raises(ValueError, match=told):
        go(plan(tmp_path, **change), resume=True)
    assert go(plan(tmp_path, **change))["not_run"] == []  # a new run takes the place of the old
    (tmp_path / "serving.json").write_text("{")
    with pytest.raises(ValueError, match=r"serving\.json is not a result file"):
        go(plan(tmp_path), resume=True)


def test_servers_in_turn_or_taking_turns(tmp_path: Path) -> None:
    def order(**changes: Any) -> list[str]:
        found = steps(plan(tmp_path, repeats=2, **changes))
        return [f"{side[0]}{workload.name}{number}" for side, workload, number in found]

    assert order() == ["sa0", "sa1", "sb0", "sb1", "pa0", "pa1", "pb0", "pb1"]
    both = {"stock": "http://a", "prefix": "http://b"}
    assert order(urls=both) == ["sa0", "pa0", "pa1", "sa1", "sb0", "pb0", "pb1", "sb1"]


# -- what is shown ------------------------------------------------------------------------------


@pytest.mark.usefixtures("fakes")
def test_table_notes_and_plots_show_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_prefix.bench.serving.plots import PLOTS
    from sglang_prefix.bench.serving.table import comparison_table, notes

    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    data = go(plan(tmp_path, absent={"trace": "no --trace FILE was given"}))
    loser, winner = data["cells"]
    unpacked = judged(a_run(packed=0, stock=5))
    loser |= {key: deepcopy(unpacked[key]) for key in unpacked if key != "name"}
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(data))
    text = console.export_text()
    assert text.count("prefix / stock") == 1
    assert text.count("no comparison") == 1
    assert "0.50x" in text
    told = "\n".join(notes(data))
    assert "a is no comparison: only 0% of the decode steps were packed (gate-no-gain)" in told
    assert "costs when it does not pack: TPOT 0.50x" in told
    assert "trace is absent: no --trace FILE was given" in told
    assert "processes per CPU" not in told
    winner["sides"]["stock"]["raw"]["runs"][0]["load_per_cpu"] = 7.25
    assert "up to 7.2 processes per CPU wanted to run" in "\n".join(notes(data))
    for name, plot in PLOTS.items():
        file = tmp_path / f"{name}.svg"
        plot(data).savefig(file, format="svg")
        assert file.stat().st_size > 5000
    assert winner["is_comparison"]


def test_bench_modules_import_without_sglang() -> None:
    names = ("run", "cells", "table", "plots", "trace", "workloads", "servers", "process")
    imports = "; ".join(f"import sglang_prefix.bench.serving_{name}" for name in names)
    code = f"{imports}; import sys; print('sglang' in sys.modules, 'matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
