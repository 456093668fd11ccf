"""The measurement of CPU profiles: the fit, on made-up times; a dry run; the table it becomes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prefix_kernels.plan import AttentionShape
from sglang_prefix.bench.cpu_profile import fit_profile, write_profiles
from sglang_prefix.bench.results import read_result, write_result
from sglang_prefix.cli.main import app
from sglang_prefix.packing import CPU_PROFILE, CPU_PROFILES, CostModel, DeviceProfile
from sglang_prefix.packing.cost import FITTED, PROFILES_FILE, load_cpu_profiles

ROOT = Path(__file__).parents[1]
BYTES_PER_S = 20e9
MADE_UP_COSTS = {
    "pack_bytes": 90_000,
    "query_cost": 3.0,
    "element_cost": 2.0,
    "lone_row_cost": 1.1,
    "pack_row_cost": 0.25,
}


def profile(*options: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", "profile", *map(str, options)])


def predicted(device: DeviceProfile, call_us: float) -> list[dict[str, Any]]:
    """Cases whose times are what the cost model says, and a constant."""
    cases = []
    for (qo, kv, dim), itemsize in product(((32, 8, 128), (8, 8, 64)), (2, 4)):
        costs = CostModel(AttentionShape(qo, kv, dim, dim, itemsize, itemsize), device)
        packs = []
        for requests, tokens in product((1, 2, 8), (64, 256)):
            num_packs = 3 if requests > 1 else 0
            lone = {"lone_requests": 24, "lone_tokens": tokens if requests == 1 else 8}
            per_token = costs.pack_token_bytes + requests * costs.query_token_bytes
            pack = device.pack_bytes + tokens * per_token + requests * costs.query_bytes
            moved = num_packs * pack + 24 * lone["lone_tokens"] * costs.lone_token_bytes
            us = moved / BYTES_PER_S * 1e6 + call_us
            packs.append(
                {"requests": requests, "tokens": tokens, "packs": num_packs, "us": us} | lone
            )
        heads = {"qo": qo, "kv": kv, "dim": dim}
        cases.append({"heads": heads, "itemsize": itemsize, "packs": packs})
    return cases


def device_with(**costs: Any) -> DeviceProfile:
    return DeviceProfile("cpu", 1 << 20, 0.0, int(costs.pop("pack_bytes")), 1 << 20, **costs)


def test_the_fit_finds_what_times_were_made_of() -> None:
    cases = predicted(device_with(**MADE_UP_COSTS), call_us=50.0)
    found = fit_profile(cases, BYTES_PER_S)
    assert found.pop("error") < 1e-6
    assert found == pytest.approx(MADE_UP_COSTS)


def test_what_costs_nothing_is_not_negative() -> None:
    costs = MADE_UP_COSTS | {"element_cost": 0.0, "lone_row_cost": 0.0}
    cases = predicted(device_with(**costs), call_us=50.0)
    # Reads slower than they are believed to be: what is left for elements is less than nothing.
    found = fit_profile(cases, BYTES_PER_S / 1.5)
    assert (found["element_cost"], min(found.values())) == (0.0, 0.0)
    assert found["pack_row_cost"] > 0


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result file of a dry run."""
    folder = tmp_path_factory.mktemp("dry")
    done = profile("--dry", "--out", folder)
    assert done.exit_code == 0, done.output
    assert "the times mean nothing" in done.stdout
    return folder / "profile.json"


def test_a_dry_run_measures_both_executors_and_becomes_a_table(dry: Path, tmp_path: Path) -> None:
    data = read_result(dry, "bench-profile")
    assert [case["executor"] for case in data["cases"]] == list(CPU_PROFILES)
    table = tmp_path / "table.json"
    assert profile("--write-table", dry, "--table", table).exit_code == 0
    written = load_cpu_profiles(table)
    for executor, device in written.items():
        for name in FITTED:
            assert getattr(device, name) == max(
                name == "pack_bytes", data["profiles"][executor][name]
            )
    assert json.loads(table.read_text())["result_file"] == str(dry)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, "is a dry run's: name another --table than"),
        ({"dry": False}, "must stand in the repository"),
        ({"kind": "bench-host", "cases": []}, "kind is 'bench-host'; legal: 'bench-profile'"),
    ],
)
def test_what_the_installed_table_is_not_made_of(
    changes: dict[str, Any], complaint: str, dry: Path, tmp_path: Path
) -> None:
    before = PROFILES_FILE.read_text()
    write_result(tmp_path / "profile.json", read_result(dry) | changes)
    done = profile("--write-table", tmp_path / "profile.json")
    assert (done.exit_code, done.stdout) == (2, "")
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert PROFILES_FILE.read_text() == before


@pytest.mark.parametrize("missing", ["not_run", "failed", "profiles"])
def test_part_of_a_run_leaves_the_table_alone(missing: str, dry: Path, tmp_path: Path) -> None:
    data, table = read_result(dry), tmp_path / "table.json"
    if missing == "profiles":
        data["profiles"].pop("torch")
    else:
        data[missing] = {"torch/4:2:16/float32": "not enough was left of the budget of 9 s"}
    write_result(tmp_path / "profile.json", data)
    with pytest.raises(
        ValueError, match=r"lacks torch|no table of CPU profiles: KeyError\('torch'\)"
    ):
        write_profiles(tmp_path / "profile.json", table)
    assert not list(tmp_path.glob("table*"))


@pytest.mark.parametrize("value", [-1.0, "1", None, True, 1e12, [1]])
def test_a_damaged_table_is_one_error(value: Any, tmp_path: Path) -> None:
    table = json.loads(PROFILES_FILE.read_text())
    table["profiles"]["torch"]["query_cost"] = value
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"no table of CPU profiles: .*query_cost of torch is"):
        load_cpu_profiles(file)


def test_the_installed_profiles_are_those_of_the_committed_measurement() -> None:
    table = json.loads(PROFILES_FILE.read_text())
    data = read_result(ROOT / table["result_file"], "bench-profile")
    for executor, fitted in table["profiles"].items():
        assert fitted.items() <= data["profiles"][executor].items()
        cases = [case for case in data["cases"] if case["executor"] == executor]
        assert fit_profile(cases, data["limits"]["read_bytes_per_s"]) == data["profiles"][executor]
    assert CPU_PROFILE is CPU_PROFILES["native"]
