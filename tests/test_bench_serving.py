"""`bench serving` without SGLang: traces, workloads, conclusions, its file, what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sglang_prefix import tiny_model
from sglang_prefix.bench import run as bench_run
from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.serving import run as serving_run
from sglang_prefix.bench.serving.compare import aggregate, compare, new_case
from sglang_prefix.bench.serving.drivers import Answer, summarize
from sglang_prefix.bench.serving.run import Run
from sglang_prefix.bench.serving.servers import ServerError
from sglang_prefix.bench.serving.workloads import Trace, Workload, load_workloads, scale_trace
from sglang_prefix.bench.workloads.traces import TraceRequest
from sglang_prefix.cli.main import app
from tests.serving_runs import (
    ROLLOUTS,
    FakeClient,
    a_run,
    fake_servers,
    fakes,  # noqa: F401
    go,
    measure,
    plan,
)

pytest.importorskip("matplotlib", reason="the command needs matplotlib for its plots")

# -- traces and workloads -------------------------------------------------------------------------


SHAPE = Trace(
    requests=9,
    block_tokens=16,
    max_prompt_tokens=99,
    max_output_tokens=99,
    speed=1.0,
    max_concurrency=9,
)


def prompts_of(*requests: tuple[int, tuple[int, ...]], seed: int = 3, **changes: Any) -> Any:
    """Prompts of requests, from their lengths and block ids."""
    trace = [TraceRequest(0, length, 64, ids) for length, ids in requests]
    shape: Any = {**SHAPE, **changes}
    rows = scale_trace(trace, range(1000, 2000), shape, seed)
    assert [row.output_len for row in rows] == [2] * len(trace)
    return [row.prompt for row in rows]


def test_requests_that_begin_with_the_same_ids_begin_with_the_same_tokens() -> None:
    whole = (1100, (0, 7, 9))
    a, b, c = prompts_of(whole, (1100, (0, 7, 8)), (1100, (1, 7, 9)))
    assert len(a) == round(1100 * 16 / 512)
    assert set(a) <= set(range(1000, 2000))
    assert a[:32] == b[:32]
    assert a[32:] != b[32:]
    assert c[:16] != b[:16]
    assert c[16:] == a[16:]
    # Long prompts lose their end, and another seed draws other tokens.
    assert prompts_of(whole, max_prompt_tokens=20) == [a[:20]]
    assert prompts_of(whole, seed=4) != [a]


def test_the_registry_has_every_group_in_both_sizes() -> None:
    for quick in (False, True):
        groups = {workload.group for workload in load_workloads(quick=quick)}
        assert groups == {"shared-prefix", "random", "trace", "rollouts", "forks"}
    (one,) = load_workloads(quick=True, names=["trace"], overrides={"requests": 3})
    assert one.parameters["requests"] == 3


# -- conclusions -----------------------------------------------------------------------------------

ANSWERS = ["1 2 3", "4 5 6"]


def compared(
    prefix: dict[str, Any], min_equal: float = 1.0, texts: list[str] | None = None, **answers: Any
) -> dict[str, Any]:
    """A case whose sides have the same answers, but for ``answers`` and ``texts`` of ours."""
    case = new_case(Workload("rollouts", "rollouts", "rollouts", ROLLOUTS))
    said = {"fingerprint": "f", "tokens": ANSWERS}
    ours = prefix | {"texts": texts or ["a", "b"]}
    case["sides"] = {
        "stock": aggregate({**said, "runs": [a_run(2.0)]}),
        "prefix": aggregate({**said, "runs": [ours], **answers}),
    }
    compare(case, repeats=1, min_equal=min_equal)
    return case


def test_a_comparison_has_ratios_of_prefix_over_stock() -> None:
    case = compared(a_run(packed=19, stock=1))
    assert case["is_comparison"]
    assert case["why_not"] is None
    assert case["ratios"] == {"ttft": 0.5, "tpot": 0.5, "itl": 0.5, "throughput": 2.0}
    assert case["requests_equal"] == case["requests"] == 2
    assert case["tokens_compared"] == case["tokens_equal"] == 6
    side = case["sides"]["prefix"]
    assert side["steps"] == {"packed": 19, "stock": 1, "fallback": 0}
    assert side["packed_share"] == 0.95
    assert side["kv_read_ratio"] == 0.25
    assert side["reasons"] == {"gate-no-gain": 1}


def test_a_run_that_was_not_packed_is_no_comparison() -> None:
    case = compared(a_run(packed=8, stock=2))
    assert not case["is_comparison"]
    assert case["why_not"] == "only 80% of the decode steps were packed (gate-no-gain)"
    assert set(case["ratios"].values()) == {None}
    assert case["unpacked_ratios"]["tpot"] == 0.5
    assert not compared(a_run(packed=0))["is_comparison"]  # nothing decoded is not all packed


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"tokens": ["1 2 3", "4 5 7"]},
            "tokens differ in 1 of 2 answers (83% of tokens agree)",
        ),
        ({"tokens": ["1 9 3", "4 5 6"]}, "differ in 1 of 2 answers (67% of tokens agree)"),
        ({"tokens": ["1 2 3", "4 5 6 7"]}, "differ in 1 of 2 answers (100% of tokens agree)"),
        ({"tokens": ["1 2 3"]}, "1 answers for 2 requests"),
        ({"fingerprint": "g"}, "did not get the same requests"),
        ({"texts": ["a", "c"]}, "answers of the timed runs differ in 1 of 2 requests"),
    ],
)
def test_sides_with_other_answers_are_no_comparison(changes: dict[str, Any], told: str) -> None:
    case = compared(a_run(packed=20), **changes)
    assert not case["is_comparison"]
    assert case["why_not"].endswith(told)
    assert set(case["ratios"].values()) == {None}
    assert case["unpacked_ratios"] is None


def test_where_rounding_differs_a_share_of_the_tokens_is_enough() -> None:
    tokens = ["1 2 9", "4 9 9"]
    assert compared(a_run(packed=20), 0.5, tokens=tokens)["is_comparison"]
    assert compared(a_run(packed=20), 0.5, tokens=tokens)["requests_equal"] == 0
    assert not compared(a_run(packed=20), 0.6, tokens=tokens)["is_comparison"]


def test_the_median_run_counts() -> None:
    runs = [a_run(scale, packed=10) for scale in (1.0, 9.0, 2.0)]
    side = aggregate({"runs": runs})
    assert side["ttft_ms"] == {"median": 20.0, "p99": 40.0}
    assert side["output_tokens_per_s"] == 50
    assert side["steps"]["packed"] == 30
    assert side["raw"]["runs"] == runs


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


# -- the run and its file --------------------------------------------------------------------------


@pytest.mark.usefixtures("fakes")
def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path: Path) -> None:
    whole = go(plan(tmp_path / "whole", repeats=2))
    assert [case["is_comparison"] for case in whole["cases"]] == [True, True]
    assert whole["not_run"] == {}
    FakeClient.begin(fails_at=5)
    with pytest.raises(ServerError, match="prefix, a: gone"):
        go(plan(tmp_path / "part", repeats=2))
    part = read_result(tmp_path / "part" / "serving.json")
    assert list(part["not_run"]) == ["a", "b"]
    assert [case["is_comparison"] for case in part["cases"]] == [False, False]
    assert part["cases"][0]["why_not"] == "not run to its end: prefix"
    assert len(part["cases"][0]["sides"]["prefix"]["raw"]["runs"]) == 1
    FakeClient.begin()
    resumed = go(plan(tmp_path / "part", repeats=2), resume=True)
    assert FakeClient.measured == ("prefix a", "prefix b", "prefix b")
    assert [case["ratios"] for case in resumed["cases"]] == [c["ratios"] for c in whole["cases"]]
    assert go(plan(tmp_path / "part", repeats=2), resume=True) == resumed  # nothing is left


def test_servers_in_turn_or_taking_turns(tmp_path: Path) -> None:
    def order(**changes: Any) -> list[str]:
        found = plan(tmp_path, repeats=2, **changes).steps()
        return [f"{side[0]}{workload.name}{number}" for side, workload, number in found]

    assert order() == ["sa0", "sa1", "sb0", "sb1", "pa0", "pa1", "pb0", "pb1"]
    both = order(stock_url="http://a", prefix_url="http://b")
    assert both == ["sa0", "pa0", "pa1", "sa1", "sb0", "pb0", "pb1", "sb1"]


@pytest.mark.usefixtures("fakes")
def test_a_new_run_replaces_the_file_once_its_servers_answer(tmp_path: Path) -> None:
    old = go(plan(tmp_path))
    run = Run(plan(tmp_path, seed=1, stock_url="u"))
    for error in (ServerError, KeyboardInterrupt):
        with patch.object(serving_run, "describe", side_effect=error), pytest.raises(error):
            measure(run)
    assert read_result(tmp_path / "serving.json") == old
    with (
        patch.object(serving_run, "ChildProcess", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        measure(run)
    new = read_result(tmp_path / "serving.json", "bench-serving")
    assert (new["seed"], list(new["not_run"])) == (1, ["a", "b"])


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model_path": "n"}, "model"),
        ({"tokenizer": "t"}, "tokenizer"),
        ({"stock_url": "u"}, "urls"),
        ({"workload": ["a"]}, "workloads"),
        ({"repeats": 2}, "repeats"),
        ({"seed": 1}, "seed"),
        ({"server_args": ["-x"]}, "server_args"),
        *(({}, name) for name in ("device", "cpu", "gpu", "threads", "commit", "versions")),
    ],
)
def test_a_run_is_not_resumed_as_another(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    there = dict(go(plan(tmp_path))["environment"])
    if not change:
        there[name] = {"sglang": "0"} if name == "versions" else "other"
    again = plan(tmp_path, **change)
    with (
        patch.object(bench_run, "environment", lambda device: there),
        pytest.raises(ValueError, match=rf"serving\.json cannot be resumed: its {name} is "),
    ):
        go(again, resume=True)
    assert go(again)["not_run"] == {}  # a new run replaces the old one


@pytest.fixture(scope="module")
def finished() -> Iterator[str]:
    """The file of a whole run."""
    with TemporaryDirectory() as folder, fake_servers():
        go(plan(Path(folder)))
        yield Path(folder, "serving.json").read_text()


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.floats(allow_nan=True), st.text(max_size=2)
) | st.sampled_from([[], {}, [[1]], {"median": "fast"}])


def replace_somewhere(data: st.DataObject, value: Any) -> None:
    """Replace one value, at any depth, or take it away."""
    while True:
        keys = range(len(value)) if isinstance(value, list) else sorted(value)
        key = data.draw(st.sampled_from(list(keys)))
        inner = value[key]
        if not isinstance(inner, list | dict) or not inner or data.draw(st.booleans()):
            break
        value = inner
    if data.draw(st.booleans()):
        value[key] = data.draw(ANYTHING)
    else:
        del value[key]


@given(data=st.data())
def test_a_changed_file_is_named_or_measured_again(finished: str, data: st.DataObject) -> None:
    changed = json.loads(finished)
    replace_somewhere(data, changed)
    with TemporaryDirectory() as folder, fake_servers():
        path = Path(folder, "serving.json")
        path.write_text(json.dumps(changed))
        try:
            run = Run(plan(Path(folder)), resume=True)
            measure(run)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert [case["name"] for case in run.data["cases"]] == ["a", "b"]
            assert run.data["not_run"] == {}


# -- what the command writes -----------------------------------------------------------------------


@pytest.mark.usefixtures("fakes")
def test_the_command_writes_plots_and_a_page_or_says_why_not(tmp_path: Path) -> None:
    def bench(*options: str) -> Any:
        command = ["bench", "serving", "--out", str(tmp_path), "--model-path", "m", "--quick"]
        return CliRunner().invoke(app, [*command, "--workload", "rollouts", *options])

    result = bench("--no-report")
    assert result.exit_code == 0, result.output
    assert "0.50x" in result.output or "2.00x" in result.output
    assert (tmp_path / "serving_times.svg").exists()
    assert not (tmp_path / "report.html").exists()
    assert read_result(tmp_path / "serving.json")["wall_s"] > 0
    assert bench("--resume").exit_code == 0
    assert "rollouts" in (tmp_path / "report.html").read_text()

    (tmp_path / "kernel.json").write_text("{")
    result = bench("--resume")
    assert result.exit_code == 1
    assert str(tmp_path / "kernel.json") in result.output.strip().splitlines()[-1]

    (tmp_path / "serving_times.svg").unlink()
    (tmp_path / "serving_times.svg").mkdir()
    result = bench("--resume")
    assert result.exit_code == 1
    assert f"plots cannot be written to {tmp_path}: Is a directory" in result.output
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_model_is_whole_or_not_there(tmp_path: Path) -> None:
    folder, config = tmp_path / "models" / "tiny", tiny_model.TinyModelConfig(num_layers=1)
    with (
        patch.object(tiny_model, "_write_tokenizer", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        tiny_model.build_once(folder, config)
    assert list(folder.parent.iterdir()) == []
    tiny_model.build_once(folder, config)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    tiny_model.build_once(folder, config)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="does not hold the model that is needed: remove it"):
        tiny_model.build_once(folder, tiny_model.TinyModelConfig(num_layers=2))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not a whole model, it lacks model\.safetensors"):
        tiny_model.build_once(folder, config)


def test_bench_modules_import_without_sglang() -> None:
    names = ("compare", "engine_run", "plan", "run", "servers", "workloads")
    imports = "; ".join(f"import sglang_prefix.bench.serving.{name}" for name in names)
    code = (
        f"{imports}; import sys; print([n for n in ('sglang', 'matplotlib') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
