"""Figures of compiled kernels: the committed ones hold, a file is compared, another Triton used."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prefix_kernels import compile_report
from prefix_kernels.compile_report import compile_variants, kernel_variants, triton_version
from prefix_kernels.kernel_report import KernelReport
from prefix_kernels.tiles import ROW_CLASSES
from sglang_prefix.cli.kernel_figures import compare_figures, read_figures
from sglang_prefix.cli.main import app
from sglang_prefix.packing.gpu import LATENT_LOOP_INSTRUCTIONS, LOOP_INSTRUCTIONS
from tests.readers import kernel_figures

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "docs" / "results" / "compiled"
MAIN = {"head_dims": [128, 576], "dtypes": [("bf16", "bf16")], "merges": ["launch"]}
LATENT_ROWS = {16, 32, 64}
NUM_TILES = len(ROW_CLASSES) + 2 + len(LATENT_ROWS) + 2  # with those of fused kernels
RENEW = "a kernel changed: look at it, then `make kernels-audit` renews the file"


@pytest.fixture(scope="module")
def main_reports() -> list[KernelReport]:
    """bf16 at head dim 128, and with v in k, on sm_90, by the environment's Triton.

    Of every row class.
    """
    variants = kernel_variants("sm_90", kv_lengths=[4096], **MAIN)  # type: ignore[arg-type]
    return list(compile_variants(variants, "sm_90", jobs=2))


@pytest.fixture
def committed() -> list[Any]:
    version = triton_version()
    found: list[Any] = read_figures(COMMITTED / f"sm_90-triton-{version}.json", version, "sm_90")[
        "variants"
    ]
    return found


def test_no_inner_loop_has_grown(main_reports: list[KernelReport], committed: list[Any]) -> None:
    rows = [report.as_dict() for report in main_reports]
    forward = [row for row in rows if row["kernel"].startswith("pack_forward")]
    for head_dim, classes in ((128, {*ROW_CLASSES}), (576, LATENT_ROWS)):
        found_rows = {row["tile"]["block_m"] for row in forward if row["head_dim"] == head_dim}
        assert found_rows == classes
    assert {row["kernel"] for row in rows} >= {"pack_forward_fused", "merge"}
    found = compare_figures(committed, rows)
    assert not found.added, RENEW
    assert found.num_compared == len(rows)
    assert [change for change in found.changes if change.is_loop_growth] == [], RENEW


@pytest.mark.parametrize(("factor", "is_caught"), [(0.94, True), (0.97, False)])
def test_control_growth_is_caught(
    factor: float, is_caught: bool, main_reports: list[KernelReport]
) -> None:
    """As if each loop had been shorter when the file was written."""
    rows = [report.as_dict() for report in main_reports]
    before = copy.deepcopy(rows)
    tiles = [tile for row in before for tile in row["tiles"]]
    for tile in tiles:
        tile["loop_instructions"] = int(tile["loop_instructions"] * factor)
    grown = [one for one in compare_figures(before, rows).changes if one.is_loop_growth]
    assert len(tiles) == NUM_TILES
    assert len(grown) == (len(tiles) if is_caught else 0)


def test_a_loop_is_one_iteration(main_reports: list[KernelReport]) -> None:
    """It multiplies each element of a tile once, and copies as much of KV as the tile has."""
    for report in main_reports:
        for tile in report.tiles:
            by_kind, warps = tile.loop_instructions_by_kind, report.variant.tile.num_warps
            assert sum(by_kind.values()) == tile.loop_instructions
            assert by_kind["other"] < tile.loop_instructions / 10
            # HMMA takes 16 x 8 x 16 per warp, HGMMA 64 x 64 x 16 of K and 64 x 128 x 16 of V per
            # four warps; with v in k half as wide of K, and twice of V.
            latent = report.variant.v_in_k
            products = tile.block_m * tile.block_n * (576 + 512 if latent else 2 * 128)
            hmma = products // (16 * 8 * 16 * warps)
            hgmma = 576 // 16 + 2 * 64 // 16 if latent else 128 // 16 + 64 // 16
            assert by_kind["matrix"] == (hgmma if tile.block_m >= 64 else hmma)
            copies = tile.kv_bytes // (32 * 16 * warps)
            # Each of K and V is committed once, and waited for together or one by one. V in k is
            # not copied a second time: each of the three blocks of k is committed.
            assert by_kind["copy"] - copies in ((4,) if latent else (3, 4))
            assert tile.first_copy_instructions is not None
            assert 100 < tile.first_copy_instructions < 1000


def test_committed_files_hold_the_main_variants() -> None:
    """Of the environment's Triton and of the GPU hosts', by the same command."""
    versions = {
        re.findall(r"sm_90-triton-(.*)\.json", file.name)[0]
        for file in COMMITTED.glob("sm_90-triton-*")
    }
    assert versions == {triton_version(), "3.6.0"}
    listed = []
    for version in versions:
        rows = read_figures(COMMITTED / f"sm_90-triton-{version}.json", version, "sm_90")[
            "variants"
        ]
        listed.append([{key: row[key] for key in ("kernel", "tile", "merge")} for row in rows])
        forward = [row for row in rows if row["kernel"] == "pack_forward"]
        assert {row["head_dim"] for row in forward} == {64, 128, 256, 576}
        assert {row["kv_dtype"] for row in forward} == {"bf16", "fp8_e4m3"}
        assert {row["tile"]["block_m"] for row in forward} == {*ROW_CLASSES}
        assert all(row["tiles"] for row in forward)
    assert listed[0] == listed[1]


def test_plans_reckon_with_what_was_counted() -> None:
    rows = read_figures(COMMITTED / "sm_90-triton-3.6.0.json", "3.6.0", "sm_90")["variants"]
    main = {"kernel": "pack_forward", "kv_dtype": "bf16", "merge": "launch"}
    for head_dim, expected in ((128, LOOP_INSTRUCTIONS), (576, LATENT_LOOP_INSTRUCTIONS)):
        asked = main | {"head_dim": head_dim}
        counted = {
            row["tile"]["block_m"]: row["loop_instructions"]
            for row in rows
            if asked.items() <= row.items()
        }
        assert counted == expected


# -- comparing files -------------------------------------------------------------------------------


def changed(**changes: Any) -> list[Any]:
    """The variants of a file with other figures in the first."""
    first, *rest = copy.deepcopy(kernel_figures()["variants"])
    return [first | changes, *rest]


def figures_of(before: list[Any], now: list[Any]) -> list[tuple[str, Any, Any]]:
    found = compare_figures(before, now)
    return [(one.figure, one.before, one.now) for one in found.changes]


def test_what_is_compared() -> None:
    rows = kernel_figures()["variants"]
    assert figures_of(rows, rows) == []
    assert figures_of(rows, changed(registers=160)) == [("registers", 154, 160)]
    tile = rows[0]["tiles"][0] | {"loop_instructions": 300, "first_copy_instructions": None}
    expected = [("loop of 16 rows", 400, 300), ("first copy of 16 rows", 362, None)]
    assert figures_of(rows, changed(tiles=[tile])) == expected
    (loop, _) = compare_figures(rows, changed(tiles=[tile])).changes
    assert loop.percent == pytest.approx(-25)
    assert not loop.is_loop_growth
    (grown, _) = compare_figures(changed(tiles=[tile]), rows).changes
    assert grown.percent == pytest.approx(100 / 3)
    assert grown.is_loop_growth


def test_a_variant_is_found_by_its_rows_where_its_tile_has_changed() -> None:
    rows = kernel_figures()["variants"]
    other = rows[0]["tile"] | {"num_stages": 2, "max_registers": 255}
    expected = [("stages", 3, 2), ("max registers", 168, 255)]
    assert figures_of(rows, changed(tile=other)) == expected
    found = compare_figures(rows, changed(tile=rows[0]["tile"] | {"block_n": 32}))
    assert (len(found.added), len(found.gone), found.num_compared) == (1, 1, len(rows) - 1)
    # With two that are alike but for their stages, neither is taken for the other.
    two = [changed(tile=other | {"num_stages": stages})[0] for stages in (2, 4)]
    found = compare_figures(rows, [*two, *rows[1:]])
    assert (found.added, found.gone) == (two, rows[:1])


def test_what_was_not_asked_for_is_not_gone() -> None:
    rows = kernel_figures()["variants"]
    of_64 = changed(head_dim=64)[:1]
    assert compare_figures([*rows, *of_64], rows).gone == []
    assert compare_figures([*rows, *changed(kernel="pack_forward_fused")[:1]], rows).gone != []


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(kernel_figures() | {"triton": triton_version()} | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"triton": "3.0.0"}, "cannot be compared: its triton is 3.0.0, not "),
        ({"arch": "sm_80"}, "cannot be compared: its arch is sm_80, not sm_90"),
        ({"kind": "bench-host"}, "is no file of `sglang-prefix kernels --json`: kind: "),
        ({"variants": [{}]}, "variants.0.kernel: Field required"),
        ({"variants": changed(registers=-1)}, "variants.0.registers: "),
    ],
)
def test_a_file_that_cannot_be_compared(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    """Before anything is compiled."""
    file = write(tmp_path / "earlier.json", **changes)
    done = CliRunner().invoke(app, ["kernels", "--arch", "sm_90", "--compare", str(file)])
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"sglang-prefix: --compare: {file} ")
    assert complaint in line


@pytest.mark.parametrize(("factor", "status"), [(1, 0), (0.97, 0), (0.9, 1)])
def test_the_command_compares(
    factor: float,
    status: int,
    main_reports: list[KernelReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it wrote, with shorter loops."""
    monkeypatch.setattr(compile_report, "compile_variants", lambda *_, **__: iter(main_reports))
    file = tmp_path / "earlier.json"
    command = ["kernels", "--arch", "sm_90"]
    assert CliRunner().invoke(app, [*command, "--json", str(file)]).exit_code == 0
    data = json.loads(file.read_text())
    for row in data["variants"]:
        for tile in row["tiles"]:
            tile["loop_instructions"] = int(tile["loop_instructions"] * factor)
    file.write_text(json.dumps(data))
    done = CliRunner().invoke(app, [*command, "--compare", str(file)])
    assert done.exit_code == status, done.output
    total, changed = len(main_reports), sum(bool(report.tiles) for report in main_reports)
    same = total if factor == 1 else total - changed
    assert f"{same} of {total} variants are as they were" in done.stdout
    assert ("loop of 128 rows" in done.stdout) == (factor != 1)
    assert done.stderr.count("by more than 5%") == (NUM_TILES if status else 0)


# -- another Triton --------------------------------------------------------------------------------


def a_triton(folder: Path, version: str, more: str = "") -> Path:
    """A folder with the environment's Triton under another version."""
    installed = Path(compile_report.find_spec("triton").origin).parent  # type: ignore
    package = folder / "triton"
    package.mkdir()
    for file in installed.iterdir():
        if file.name not in ("__init__.py", "__pycache__"):
            (package / file.name).symlink_to(file)
    source = (installed / "__init__.py").read_text()
    text, count = re.subn(r"(?m)^__version__ = .*$", f"__version__ = '{version}'", source)
    assert count == 1
    (package / "__init__.py").write_text(text + more)
    return folder


def test_another_triton_compiles(tmp_path: Path) -> None:
    """Although the parent's path, which a worker takes over, begins with the environment's."""
    folder = a_triton(tmp_path, "9.8.7")
    assert triton_version(folder) == "9.8.7" != triton_version()
    variants = [v for v in kernel_variants("sm_90", head_dims=[64]) if v.kernel == "append_slots"]
    (report,) = compile_variants(variants, "sm_90", jobs=1, triton_folder=folder)
    assert report.triton == "9.8.7"
    assert report.num_instructions > 10


def test_a_triton_that_fails_is_one_line(tmp_path: Path) -> None:
    folder = a_triton(tmp_path, "9.8.7", "raise ImportError('for another Python\\nit says')\n")
    command = ["kernels", "--arch", "sm_90", "--head-dim", "64", "--kv-length", "99", "--jobs", "1"]
    done = CliRunner().invoke(app, [*command, "--triton", str(folder), "--json"])
    assert (done.exit_code, done.stdout) == (2, "")
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"sglang-prefix: --triton is {folder}, which cannot compile this: ")
    assert "for another Python" in line


def test_a_folder_without_triton_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["kernels", "--arch", "sm_90", "--triton", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"sglang-prefix: --triton: {tmp_path} has no Triton; legal: ")
