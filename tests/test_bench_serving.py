"""`bench serving` without SGLang: traces, workloads, conclusions, its files, what it writes."""

from __future__ import annotations

import gzip
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
from sglang_prefix.bench.serving.client import ClientError
from sglang_prefix.bench.serving.compare import aggregate, compare, new_case
from sglang_prefix.bench.serving.drivers import Answer, summarize
from sglang_prefix.bench.serving.plan import choose_model, steps
from sglang_prefix.bench.serving.run import Run
from sglang_prefix.bench.serving.servers import ServerError
from sglang_prefix.bench.serving.workloads import load_workloads, scale_trace
from sglang_prefix.bench.workloads.traces import read_trace
from sglang_prefix.cli.main import app
from tests.serving_runs import (
    ROLLOUTS,
    WORKLOAD,
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

LINE: dict[str, Any] = {
    "timestamp": 3000,
    "input_length": 1100,
    "output_length": 64,
    "hash_ids": [0, 7, 9],
}
TOKENS = list(range(1000, 2000))


def rows_of(path: Path, *changes: dict[str, Any], **options: int) -> Any:
    path.write_text("\n".join(json.dumps(LINE | change) for change in changes) + "\n")
    chosen = {"block_tokens": 16, "max_prompt_tokens": 99, "max_output_tokens": 99, "seed": 3}
    return scale_trace(read_trace(path), TOKENS, **(chosen | options))


def test_requests_that_begin_with_the_same_ids_begin_with_the_same_tokens(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    changes: list[dict[str, Any]] = [{}, {"timestamp": 0, "hash_ids": [0, 7, 8]}]
    a, b, c = rows_of(path, *changes, {"hash_ids": [1, 7, 9], "output_length": 512 * 20})
    assert [row.timestamp for row in (a, b, c)] == [0, 3000, 3000]  # in the order of their times
    assert len(a.prompt) == round(1100 * 16 / 512)
    assert [row.output_len for row in (a, b, c)] == [2, 2, 99]
    assert a.prompt[:32] == b.prompt[:32]
    assert a.prompt[32:] != b.prompt[32:]
    assert c.prompt[:16] != b.prompt[:16]
    assert c.prompt[16:] == b.prompt[16:]
    assert set(a.prompt) <= set(TOKENS)
    # Long prompts lose their end, and another seed draws other tokens.
    (whole,), (other,) = rows_of(path, {}), rows_of(path, {}, seed=4)
    (cut,) = rows_of(path, {}, max_prompt_tokens=20)
    assert cut.prompt == whole.prompt[:20]
    assert other.prompt != whole.prompt


def test_the_registry_has_every_group_in_both_sizes() -> None:
    for quick in (False, True):
        groups = {workload.group for workload in load_workloads(quick=quick)}
        assert groups == {"shared-prefix", "random", "trace", "rollouts", "forks"}
    (one,) = load_workloads(quick=True, names=["trace"], overrides={"trace": {"requests": 3}})
    assert one.parameters["requests"] == 3


ENTRY = {"name": "r", "group": "rollouts", "driver": "rollouts", "about": "", "full": ROLLOUTS}


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([], "no workloads"),
        ([ENTRY, ENTRY], "two of one name"),
        ([ENTRY | {"driver": "wrk"}], "driver is 'wrk'; legal: bench_serving, trace"),
        ([ENTRY | {"group": "other"}], "group is 'other'; legal: shared-prefix"),
        ([ENTRY | {"full": ROLLOUTS | {"samples": 0}}], "samples is 0; legal: a whole number"),
        ([ENTRY | {"full": {"samples": 2}}], "its parameters must be prompts, samples"),
        ([{"name": "r"}], "is not a file of workloads"),
    ],
)
def test_a_malformed_workload_file_is_named(
    tmp_path: Path, entries: list[dict[str, Any]], told: str
) -> None:
    path = tmp_path / "workloads.json"
    path.write_text(json.dumps({"workloads": entries}))
    with pytest.raises(ValueError, match=told) as error:
        load_workloads(path, quick=False)
    assert str(path) in str(error.value)


# -- the command's arguments -----------------------------------------------------------------------


def bench(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", "serving", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--workload", "nothing"], "--workload is nothing; legal: shared-prefix, random"),
        (["--workload", "trace"], "needs --trace FILE"),
        (["--", "--port", "1"], "server argument --port is set by this command; use --port before"),
        (["--", "--attention-backend=prefix"], "would be on both sides"),
        (["--", "--load-format", "dummy"], "equal tokens would prove nothing"),
        (["--workload-file", "/nowhere.json"], "/nowhere.json cannot be read"),
        (
            ["--stock-url", "http://h:1", "--prefix-url", "http://h:2", "--", "-x"],
            "both run already",
        ),
        (["--dry"], "--dry: only with --engine"),
        (["--engine", "--quick"], "--quick: only without --engine"),
        (["--engine", "--", "-x"], "arguments of servers: only without --engine"),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    tmp_path: Path, arguments: list[str], told: str
) -> None:
    result = bench("--out", tmp_path / "o", *arguments)
    assert result.exit_code in (1, 2)
    (line,) = result.output.strip().splitlines()
    assert told in line


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no request"),
        (b"timestamp,input_length\n", "line 1"),
        (json.dumps(LINE | {"hash_ids": [0, 1]}).encode(), "hash_ids"),
        (gzip.compress(json.dumps(LINE).encode())[:-9], "is not text"),
    ],
    ids=range(4),
)
def test_a_malformed_trace_is_named_in_one_line(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(content)
    result = bench("--out", tmp_path / "out", "--trace", path)
    assert result.exit_code == 1
    (line,) = result.output.strip().splitlines()
    assert str(path) in line
    assert told in line
    assert not (tmp_path / "out").exists()


# -- conclusions -----------------------------------------------------------------------------------


def said(*tokens: list[int], fingerprint: str = "f", texts: int = 1) -> dict[str, Any]:
    hashes = [str(one) for one in tokens]
    return {"fingerprint": fingerprint, "tokens": list(tokens), "texts": [hashes] * texts}


def compared(
    prefix: dict[str, Any], answers: dict[str, Any] | None = None, min_equal: float = 1.0
) -> dict[str, Any]:
    case = new_case(WORKLOAD)
    case["sides"] = {"stock": aggregate([a_run(2.0)]), "prefix": aggregate([prefix])}
    stock = said([1, 2, 3], [4, 5, 6])
    outputs = {"stock": stock, "prefix": answers or stock}
    compare(case, outputs, repeats=1, min_equal=min_equal)
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
def test_sides_with_other_answers_are_no_comparison(answers: dict[str, Any], told: str) -> None:
    case = compared(a_run(packed=20), answers)
    assert not case["is_comparison"]
    assert case["why_not"].endswith(told)
    assert set(case["ratios"].values()) == {None}
    assert case["unpacked_ratios"] is None


def test_where_rounding_differs_a_share_of_the_tokens_is_enough() -> None:
    answers = said([1, 2, 9], [4, 9, 9])
    assert compared(a_run(packed=20), answers, min_equal=0.5)["is_comparison"]
    assert compared(a_run(packed=20), answers, min_equal=0.5)["requests_equal"] == 0
    assert not compared(a_run(packed=20), answers, min_equal=0.6)["is_comparison"]


def test_the_median_run_counts() -> None:
    side = aggregate([a_run(scale, packed=10) for scale in (1.0, 9.0, 2.0)])
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


# -- the run and its files -------------------------------------------------------------------------


@pytest.mark.usefixtures("fakes")
def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path: Path) -> None:
    whole = go(plan(tmp_path / "whole", repeats=2))
    assert [case["is_comparison"] for case in whole["cases"]] == [True, True]
    assert whole["not_run"] == {}
    FakeClient.begin(fails_at=5)
    with pytest.raises(ClientError, match="prefix, a: gone"):
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
        found = steps(plan(tmp_path, repeats=2, **changes))
        return [f"{side[0]}{workload.name}{number}" for side, workload, number in found]

    assert order() == ["sa0", "sa1", "sb0", "sb1", "pa0", "pa1", "pb0", "pb1"]
    both = {"stock": "http://a", "prefix": "http://b"}
    assert order(urls=both) == ["sa0", "pa0", "pa1", "sa1", "sb0", "pb0", "pb1", "sb1"]


@pytest.mark.usefixtures("fakes")
def test_a_new_run_replaces_the_file_once_its_servers_answer(tmp_path: Path) -> None:
    old = go(plan(tmp_path))
    run = Run(plan(tmp_path, seed=1, urls={"stock": "u", "prefix": None}))
    with (
        patch.object(serving_run, "describe", side_effect=ServerError("dead")),
        pytest.raises(ServerError, match="dead"),
    ):
        measure(run)
    with (
        patch.object(serving_run, "describe", side_effect=KeyboardInterrupt),
        pytest.raises(ServerError, match="interrupted; nothing was measured"),
    ):
        measure(run)
    assert read_result(tmp_path / "serving.json") == old
    with (
        patch.object(Run, "_client", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        measure(run)
    new = read_result(tmp_path / "serving.json", "bench-serving")
    assert (new["seed"], list(new["not_run"])) == (1, ["a", "b"])
    assert json.loads((tmp_path / "serving-tokens.json").read_text()) == {}


OTHER: dict[str, dict[str, Any]] = {
    "options": {
        "seed": 1,
        "repeats": 2,
        "model": "n",
        "tokenizer": "t",
        "urls": {"stock": "u", "prefix": None},
        "workloads": [WORKLOAD],
        "server_args": {"stock": ["-x"], "prefix": []},
    },
    "environment": {
        **dict.fromkeys(("device", "cpu", "gpu", "threads", "commit"), "other"),
        "versions": {"sglang": "0"},
    },
}


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, values in OTHER.items() for name in values]
)
def test_a_run_is_not_resumed_as_another(tmp_path: Path, kind: str, name: str) -> None:
    here = go(plan(tmp_path))["environment"]
    change = {name: OTHER[kind][name]}
    there = here | change if kind == "environment" else here
    again = plan(tmp_path, **(change if kind == "options" else {}))
    with (
        patch.object(bench_run, "environment", lambda device: there),
        pytest.raises(ValueError, match=rf"serving\.json cannot be resumed: its {name} is "),
    ):
        go(again, resume=True)
    assert go(again)["not_run"] == {}  # a new run replaces the old one


@pytest.fixture(scope="module")
def finished() -> Iterator[dict[str, str]]:
    """The files of a whole run, by name."""
    with TemporaryDirectory() as folder, fake_servers():
        go(plan(Path(folder)))
        yield {name: Path(folder, name).read_text() for name in FILES}


FILES = ("serving.json", "serving-tokens.json")
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


@given(data=st.data(), file=st.sampled_from(FILES))
def test_a_changed_file_is_named_or_measured_again(
    finished: dict[str, str], data: st.DataObject, file: str
) -> None:
    changed = json.loads(finished[file])
    replace_somewhere(data, changed)
    with TemporaryDirectory() as folder, fake_servers():
        for name, text in finished.items():
            Path(folder, name).write_text(text if name != file else json.dumps(changed))
        try:
            found = go(plan(Path(folder)), resume=True)
        except ValueError as error:
            assert str(Path(folder, file)) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert [case["name"] for case in found["cases"]] == ["a", "b"]
            assert found["not_run"] == {}


@pytest.mark.usefixtures("fakes")
def test_answers_that_are_lacking_are_named(tmp_path: Path) -> None:
    go(plan(tmp_path))
    path = tmp_path / "serving-tokens.json"
    tokens = json.loads(path.read_text())
    del tokens["a"]["prefix"]
    path.write_text(json.dumps(tokens))
    with pytest.raises(ValueError, match=r"tokens\.json lacks the answers of prefix to a"):
        go(plan(tmp_path), resume=True)
    path.unlink()
    with pytest.raises(ValueError, match=r"tokens\.json cannot be read"):
        go(plan(tmp_path), resume=True)


# -- what the command writes -----------------------------------------------------------------------


@pytest.mark.usefixtures("fakes")
def test_the_command_writes_plots_and_a_page_or_says_why_not(tmp_path: Path) -> None:
    given = ("--out", tmp_path, "--model-path", "m", "--quick", "--workload", "rollouts")
    result = bench(*given, "--no-report")
    assert result.exit_code == 0, result.output
    assert "0.50x" in result.output or "2.00x" in result.output
    assert (tmp_path / "serving_times.svg").exists()
    assert not (tmp_path / "report.html").exists()
    assert read_result(tmp_path / "serving.json")["wall_s"] > 0
    assert bench(*given, "--resume").exit_code == 0
    assert "rollouts" in (tmp_path / "report.html").read_text()

    (tmp_path / "kernel.json").write_text("{")
    result = bench(*given, "--resume")
    assert result.exit_code == 1
    assert str(tmp_path / "kernel.json") in result.output.strip().splitlines()[-1]

    (tmp_path / "serving_times.svg").unlink()
    (tmp_path / "serving_times.svg").mkdir()
    result = bench(*given, "--resume")
    assert result.exit_code == 1
    assert f"plots cannot be written to {tmp_path}: Is a directory" in result.output
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_model_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_servers: dict[str, str | None] = {"stock": None, "prefix": None}

    def build(folder: Path, config: Any) -> None:
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        if len(names) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(tiny_model, "build_tiny_model", build)
    names = ["config.json"]
    with pytest.raises(KeyboardInterrupt):
        choose_model(tmp_path, no_servers)
    assert list(tmp_path.iterdir()) == []
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert choose_model(tmp_path, no_servers) == str(tmp_path / "tiny-model")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-model"]
    (tmp_path / "tiny-model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not a whole model, it lacks model\.safetensors"):
        choose_model(tmp_path, no_servers)


def test_bench_modules_import_without_sglang() -> None:
    names = ("client", "compare", "engine_run", "plan", "run", "servers", "workloads")
    imports = "; ".join(f"import sglang_prefix.bench.serving.{name}" for name in names)
    code = (
        f"{imports}; import sys; print([n for n in ('sglang', 'matplotlib') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
