"""Result files and the one loop that fills them, on cases that only sleep or fail; targets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_prefix.bench import run
from sglang_prefix.bench.comparison import our_provider
from sglang_prefix.bench.results import (
    ResultError,
    check_same,
    environment,
    new_result,
    read_result,
    same_environment,
    write_result,
)
from sglang_prefix.bench.run import Case, NotRunError, is_out_of_memory, run_cases
from sglang_prefix.bench.targets import evaluate
from tests.report_files import kernel_result

HERE = environment("cpu")
MEASURED = {"num_requests": 1, "us": {"stage": 1.0}}
TWICE = {"name": "a", "group": "", **MEASURED}


def result(**changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"requests": [1]}
    found = new_result("bench-host", command=["x"], options=options, seed=3, environment=HERE)
    return found | changes


def raising(error: BaseException) -> Any:
    def measure() -> Mapping[str, Any]:
        raise error

    return measure


def case(name: str, measure: Any = lambda: MEASURED, expected: float | None = None) -> Case:
    return Case(name, "group", measure, None if expected is None else lambda: expected)


def test_one_case_that_fails_leaves_the_others_their_time(tmp_path: Path) -> None:
    path, data = tmp_path / "new" / "host.json", result()
    memory = RuntimeError("DefaultCPUAllocator: not enough memory")
    cases = [
        case("late", expected=1e9),
        case("wrong", raising(ValueError("no\nsuch thing"))),
        case("n/a", raising(NotRunError("needs a GPU"))),
        case("memory", raising(memory)),
        case("good"),
    ]
    run_cases(path, data, cases, 60, order=["good", "late", "wrong", "n/a", "memory"])
    assert read_result(path) == data
    assert data["failed"] == {"wrong": "ValueError: no"}
    assert [found["name"] for found in data["cases"]] == ["good"]
    assert data["cases"][0]["wall_s"] >= 0
    assert data["not_run"]["late"] == "not enough was left of the budget of 60 s"
    assert data["not_run"]["n/a"] == "needs a GPU"
    assert data["not_run"]["memory"].startswith("out of memory: RuntimeError: DefaultCPU")
    # What failed or was measured is not tried again; what was not run is.
    again = [case(name) for name in ("late", "wrong", "n/a", "memory", "good")]
    run_cases(path, data, again, 60)
    assert [found["name"] for found in data["cases"]] == ["late", "n/a", "memory", "good"]
    assert list(data["failed"]) == ["wrong"]
    assert data["not_run"] == {}


def test_an_interruption_keeps_what_is_there(tmp_path: Path) -> None:
    path, data = tmp_path / "host.json", result()
    cases = [case("first"), case("second", raising(KeyboardInterrupt())), case("third")]
    with pytest.raises(KeyboardInterrupt):
        run_cases(path, data, cases, 60)
    found = read_result(path, "bench-host")
    check_same(path, found, same_environment(HERE) | {"dry": False})
    assert [one["name"] for one in found["cases"]] == ["first"]
    assert found["not_run"] == {"second": "interrupted", "third": "interrupted"}
    for key, value in (("seed", 4), ("options.requests", [2]), ("environment.gpu", "another")):
        with pytest.raises(ResultError, match=f"its {key.rpartition('.')[2]} is .*, here it is"):
            check_same(path, found, {key: value})
    # On another host much differs at once; the card is what is named.
    other = {**HERE, "cpu": "another", "gpu": "another card", "versions": {}}
    with pytest.raises(ResultError, match="its gpu is None, here it is 'another card'; legal: "):
        check_same(path, found, same_environment(other))


def test_nothing_runs_after_the_gpu_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_is_lost", lambda: True)
    data = result()
    run_cases(tmp_path / "a.json", data, [case("bad", raising(OSError())), case("next")], 60)
    assert list(data["failed"]) == ["bad"]
    assert data["not_run"]["next"].startswith("the GPU is lost")


def test_what_says_that_memory_does_not_suffice() -> None:
    assert is_out_of_memory(MemoryError("Unable to allocate 8.00 GiB"))
    for error in (RuntimeError("illegal memory access"), ValueError("out of memory")):
        assert not is_out_of_memory(error)


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "host.json"
    whole = result()
    write_result(path, whole)
    for bad in (result(wall_s=float("nan")), result(note=object())):
        with pytest.raises((TypeError, ValueError)):
            write_result(path, bad)
    assert read_result(path, "bench-host") == json.loads(json.dumps(whole))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "is not a result file: it is not JSON: Expecting property name.*"),
        (b"\xff\xff", "is not a result file: it is not UTF-8 text"),
        ("[]", "schema is None; legal: 2"),
        ('{"schema": 1, "kind": "bench-host"}', "schema is 1; legal: 2"),
        ('{"schema": 2, "kind": "bench-kernel"}', "kind is 'bench-kernel'; legal: 'bench-host'"),
        ('{"schema": 2, "kind": "bench-host"}', "is not a whole bench-host file: created: Field"),
        (json.dumps(result(wall_s=1)).replace(": 1,", ": NaN,"), "NaN is no number"),
        ("[" * 100_000, "is not a result file"),
        (json.dumps(result(cases=[{}])), "cases: 0.name: Field required"),
        (json.dumps(result(cases=[TWICE, TWICE])), "two cases are named 'a'"),
        (json.dumps(result(cases=[{"name": "a"}])), r"cases: 0.group: Field required \(and 2"),
    ],
)
def test_other_files_are_refused(content: str | bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ResultError, match=f"x.json.*({what})") as error:
        read_result(path, "bench-host")
    assert "\n" not in str(error.value)
    with pytest.raises(ResultError, match=r"y\.json cannot be read: No such file"):
        read_result(tmp_path / "y.json")


def test_the_environment_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"device", "cpu", "threads", "gpu", "python", "versions", "commit"} <= set(HERE)
    assert json.loads(json.dumps(HERE)) == HERE
    # An installed package lies in no checkout; whose commit would it be?
    monkeypatch.setattr("sglang_prefix.bench.results._ROOT", Path("/nowhere"))
    assert environment()["commit"] is None


# Targets, on made-up times.

KINDS = {"sglang-triton": "stock", "fa3": "stock", "fasttree": "peer", "vllm-cpu": "peer"}


def kernel_case(
    name: str,
    group: str,
    times: Mapping[str, float],
    *,
    kv: int = 8,
    batch: int = 64,
    mib: int = 300,
) -> dict[str, Any]:
    """A measured case; kernel times in us; ours plan for 32 us of a step, others for as long."""
    like: dict[str, Any] = kernel_result()["cases"][0]
    return like | {
        **{"name": name, "group": group, "heads": {"kv": kv}, "batch": batch},
        "bytes": {"ideal": mib << 20},
        # 300 MiB take 10 us.
        "bandwidth_gb_s": (300 << 20) / 10 / 1e3,
        "providers": {
            provider: {
                **like["providers"]["pat"],
                **{"kind": KINDS.get(provider, "ours"), "policy": provider.split("/")[0]},
                **{"ms": us / 1e3, "kernel_us": us, "plan_ms": 0.032, "copy_ms": None},
            }
            for provider, us in times.items()
        },
    }


def kernel_data(*cases: dict[str, Any], device: str = "cuda") -> dict[str, Any]:
    return kernel_result() | {"environment": {"device": device}, "cases": list(cases)}


def test_nothing_measured_means_no_target_met() -> None:
    targets = evaluate(kernel_data())
    assert len(targets) == 6
    assert {target["status"] for target in targets.values()} == {"not measured"}


def test_targets_are_read_off_the_cases() -> None:
    data = kernel_data(
        kernel_case("a", "trees", {"pat/s/l": 10, "pat/f/a": 9, "fa3": 40}),
        kernel_case("b", "trees", {"pat/s/l": 10, "pat/f/a": 30, "fa3": 50, "sglang-triton": 40}),
        kernel_case("c", "unrelated", {"pat/s/l": 13, "pat/f/a": 30, "fa3": 12, "fasttree": 14}),
        kernel_case("d", "fixed", {"pat/s/l": 8, "pat/f/a": 9, "fa3": 7}, kv=1, batch=8, mib=1),
    )
    assert our_provider(data) == "pat/s/l"
    targets = evaluate(data)
    assert targets["read bandwidth"]["status"] == "missed"
    assert targets["read bandwidth"]["value"] == pytest.approx(10 / 13)
    assert set(targets["read bandwidth"]["missed"]) == {"c"}
    assert targets["sharing trees"]["value"] == pytest.approx(41 / 11)
    assert targets["sharing trees"]["status"] == "met"
    assert targets["sharing trees"]["cases"] == 2
    assert targets["cascade"]["status"] == "not measured"
    assert targets["fasttree"]["status"] == "met"
    assert targets["nothing shared"]["status"] == "missed"
    assert targets["nothing shared"]["missed"] == {"c": pytest.approx(13 / 14)}
    assert targets["fixed cost"]["status"] == "met"
    assert targets["fixed cost"]["value"] == pytest.approx(1)


def test_a_cpu_has_the_targets_of_its_cases() -> None:
    found = kernel_case("a", "cpu", {"pat": 10, "fa3": 40}) | {"target": 4.5}
    targets = evaluate(kernel_data(found, device="cpu"))
    assert targets == {
        "a": {
            "value": pytest.approx(4),
            "status": "missed",
            "meaning": "fastest stock over ours, at least 4.5",
        }
    }


def peers_case(name: str, tree: str, times: Mapping[str, float], floor_us: float) -> dict[str, Any]:
    """A shape of the CPU's promises, plans left out: policies of ours and vLLM, in us."""
    found = kernel_case(name, "cpu-peers", times)
    for us, one in zip(times.values(), found["providers"].values(), strict=True):
        one |= {"plan_ms": None, "append_ms": None, "over_floor": us / floor_us, "packs": us}
    shared = "," in tree
    return found | {"tree": tree, "tokens": {"ideal": 1, "logical": 2 if shared else 1}}


def test_promises_over_the_peers_of_a_cpu() -> None:
    good = peers_case("good", "1,32_2048,128", {"pat": 3, "vllm-cpu": 10}, 2)
    alone = peers_case("alone", "8_1024", {"pat": 10.8, "vllm-cpu": 10}, 1)
    short = peers_case("short", "1,16_512,64", {"pat": 6, "vllm-cpu": 10}, 1)
    found = evaluate(kernel_data(good, alone, short, device="cpu"))
    assert {name: target["status"] for name, target in found.items()} == {
        "vllm-cpu, mean": "met",
        "vllm-cpu, every case": "met",
        "vllm-cpu, nothing shared": "met",
        "limit of the machine": "met",
    }
    assert found["vllm-cpu, mean"]["value"] == pytest.approx((0.3 * 1.08 * 0.6) ** (1 / 3))
    assert found["limit of the machine"]["cases"] == 1

    drafts = kernel_case("drafts", "extends", {"pat": 11, "vllm-cpu": 10})
    for one in drafts["providers"].values():
        one |= {"plan_ms": None, "append_ms": None}
    found = evaluate(kernel_data(good, drafts, device="cpu"))
    assert found["vllm-cpu, several query tokens"]["missed"] == {"drafts": pytest.approx(1.1)}
    assert found["vllm-cpu, every case"]["status"] == "met"

    policies = {"pat": 11, "node": 10, "chunk": 20, "query": 30}
    bad = peers_case("bad", "1,64_8192,64", {**policies, "vllm-cpu": 10}, 5)
    alone = peers_case("alone", "8_1024", {"pat": 12, "vllm-cpu": 10}, 1)
    other = peers_case("other", "1,16_512,64", {"node": 6, "vllm-cpu": 10}, 1)
    found = evaluate(kernel_data(bad, alone, other, device="cpu"))
    assert {target["status"] for target in found.values()} == {"missed"}
    assert found["vllm-cpu, every case"]["missed"] == {"bad": pytest.approx(1.1)}
    assert found["vllm-cpu, nothing shared"]["missed"] == {"alone": pytest.approx(1.2)}
    assert found["limit of the machine"]["missed"] == {"bad": pytest.approx(2.2)}
    assert found["best policy"]["missed"] == {"bad": pytest.approx(1.1)}
    for one in bad["providers"].values():
        one["packs"] = 1  # all policies come to one plan
    assert evaluate(kernel_data(bad, device="cpu"))["best policy"]["value"] == 1
