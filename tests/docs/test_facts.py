"""What the documentation says is so, and its checker sees when it is not."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from sglang_prefix.backend.fallback import REASONS
from sglang_prefix.cli import doctor
from sglang_prefix.forest import PrefixForest, RadixPath
from sglang_prefix.packing import CPU_PROFILE, GPU_PROFILE, AttentionShape
from sglang_prefix.packing.layout import CostedPlan
from sglang_prefix.packing.planner import PackPlanner
from tests.docs.facts import problems
from tests.docs.pages import ACTIVATE, ROOT, Page, pages, read_page

# Where the messages that end a start come from, and as what they are raised.
STARTS = {
    "patches/prefix_patches/install.py": "RuntimeError",
    "patches/prefix_patches/stock_backend.py": "ValueError",
    "patches/prefix_patches/versions.py": "RuntimeError",
    "sglang_prefix/backend/backend.py": "ValueError",
    "sglang_prefix/config.py": "ValueError",
    "sglang_prefix/backend/stock_rules.py": "ValueError",
    "sglang_prefix/backend/workspace.py": "ValueError",
}
# Shorter ones, such as ": " between two values, say nothing.
TELLING = 12


def test_what_the_pages_say_is_so() -> None:
    assert problems(pages()) == []


PLANTED = {
    "[there](nowhere.md)": "the link nowhere.md leads nowhere",
    "[there](#no-such-heading)": "#no-such-heading names no heading",
    "see `sglang_prefix/nonesuch.py`": "there is no sglang_prefix/nonesuch.py",
    "`test_engines.py::test_nonesuch`": "there is no test test_engines.py::test_nonesuch",
    "set `SGLANG_PREFIX_NONESUCH`": "nothing reads SGLANG_PREFIX_NONESUCH",
    "`sglang_prefix_nonesuch_total`": "there is no metric sglang_prefix_nonesuch_total",
    "`--no-such-option`": "no program has the option --no-such-option",
    "`make nonesuch`": "make has no target nonesuch",
    "`sglang-prefix nonesuch`": "there is no command sglang-prefix nonesuch",
    "`/home/me/model`": "/home/me/model is a place on one machine",
    "```bash\nsglang-prefix doctor --arch a\n```": "sglang-prefix doctor has no option --arch",
    "```bash\nsglang serve --n 8\n```": "sglang serve has no option --n",
    "```bash\nsglang-prefix exec -- python examples/openai_n.py --samples 8\n```": (
        "examples/openai_n.py has no option --samples"
    ),
    "<!-- docs-check: tested by tests/nonesuch.py -->\n```bash\ntrue\n```": (
        "there is no test tests/nonesuch.py"
    ),
    "`docs/results/cpu/2026-11-29-598929c-kernel.json`\n\n| 32 | 2048 + 128 | 1 |": (
        "this row does not stand in"
    ),
}


@pytest.mark.parametrize(("planted", "complaint"), PLANTED.items(), ids=PLANTED.values())
def test_a_planted_mistake_is_found(planted: str, complaint: str, tmp_path: Path) -> None:
    (found,) = problems([_page(tmp_path, planted)])
    assert complaint in found
    assert found.startswith("page.md")


def test_what_a_table_or_the_index_lacks_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    lacking = {
        "README.md": "docs/README.md: metrics.md is not listed",
        "configuration.md": "docs/configuration.md: the table lacks SGLANG_PREFIX_POLICY",
        "metrics.md": "docs/metrics.md: the table lacks packed_steps",
    }
    for name in lacking:
        (tmp_path / "docs" / name).write_text("# Page\n")
    found = problems([read_page(tmp_path / "docs" / name, tmp_path) for name in lacking])
    assert set(lacking.values()) <= set(found)


@pytest.mark.parametrize("note", ["skpi no GPU", "skip", "tested by"])
def test_a_note_that_says_nothing_is_refused(note: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"page.md:\d+: docs-check: "):
        _page(tmp_path, f"<!-- docs-check: {note} -->\n```bash\ntrue\n```")


def test_blocks_are_run_unless_they_say_otherwise() -> None:
    for page in pages():
        for block in page.blocks:
            assert block.language in ("", "bash", "python"), block.where
            assert block.language or block.kind in ("text", "prints"), block.where
    # Where people begin, the page itself says how to find our commands.
    assert all(ACTIVATE in page.text for page in pages()[:2])


# Troubleshooting has an entry for whatever can go wrong.


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    """Text of docs/troubleshooting.md by heading, with single spaces and without emphasis."""
    text = (ROOT / "docs/troubleshooting.md").read_text()
    parts = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)[1:]
    return {
        name: " ".join(re.sub(r"[`*]", "", body).split())
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def test_every_reason_has_an_entry() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    listed = re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(REASONS)


def test_every_message_of_doctor_has_an_entry(sections: dict[str, str]) -> None:
    checks: dict[str, Callable[..., str]] = {
        **doctor.METADATA_CHECKS,
        **doctor.SGLANG_CHECKS,
        "sgl_kernel": doctor.check_kernel,
    }
    assert sections.keys() >= {*checks, "SGLang process"}
    for name, check in checks.items():
        for texts in _raises(inspect.getsource(check), "CheckError"):
            for text in texts:
                assert text.lower() in sections[name].lower(), f"{name} lacks: {text}"


def test_every_message_that_ends_a_start_has_an_entry(sections: dict[str, str]) -> None:
    section = sections["What ends the start"] + sections["SGLang version"]
    messages = [
        (file, texts)
        for file, error in STARTS.items()
        for texts in _raises((ROOT / file).read_text(), error)
    ]
    assert len(messages) >= 10
    for file, texts in messages:
        assert texts, file
        assert texts[0] in section, f"the message of {file} is not there: {texts[0]}"


def _raises(source: str, error: str) -> Iterator[list[str]]:
    """What the errors of one type say that are raised in some source."""
    for node in ast.walk(ast.parse(source)):
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == error:
            yield [text for arg in call.args for text in _constants(arg)]


def _constants(node: ast.AST) -> list[str]:
    """The fixed parts of a text that say enough to be looked up, as the sections have them."""
    texts = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    plain = (" ".join(t.replace("`", "").split()) for t in texts if isinstance(t, str))
    return [text.strip(" :;,.") for text in plain if len(text) >= TELLING]


# The batch that README.md and docs/how-it-works.md draw.


@pytest.fixture(scope="module")
def forest() -> PrefixForest:
    """Five requests under a system prompt, two branches and a short node."""
    a, b = RadixPath((1, 2), (1000, 1200)), RadixPath((1, 3), (1000, 1300))
    c = RadixPath((1, 3, 4), (1000, 1300, 1306))
    limits = [1200, 1200, 1300, 1306, 1306]
    return PrefixForest.from_paths([a, a, b, c, c], limits, [1240, 1232, 1324, 1330, 1318])


SHAPE = AttentionShape(32, 8, 128, 128, 2, 2)


def test_the_numbers_of_the_drawing(forest: PrefixForest) -> None:
    plan = PackPlanner(SHAPE, CPU_PROFILE).plan(forest)
    drawing = (ROOT / "docs/images/one-batch.svg").read_text()
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", drawing)
    packs = [f"{_tokens(plan, pack)}" for pack in range(plan.num_packs)]
    drawn = [t.rsplit(" ", 1)[1] for t in texts if re.fullmatch(r"(system|A|B|tail) \d+", t)]
    # The tree's three nodes, then the packs in the plan's order.
    assert drawn == [*packs[:3], *packs]
    queries = [" ".join(f"r{r}" for r in plan.pack_queries(p)) for p in range(plan.num_packs)]
    times = "\N{MULTIPLICATION SIGN} "
    assert [t.removeprefix(times) for t in texts if t.startswith(times)] == queries
    stats = plan.stats()
    assert f"stock {stats.kv_tokens_logical:,}" in texts
    assert f"these packs {stats.kv_tokens_read:,}" in texts
    assert f"every different token once {stats.kv_tokens_unique:,}" in texts
    partials = [t for t in texts if t in ("sys", "A", "B", "tail")]
    assert len(partials) == stats.num_partials


# In docs/how-it-works.md, which prints the plans: tokens of a shared document and of each request's
# own before its query tokens, and their numbers.
DRAWN_QUERIES = {"extend": (1000, (0, 0, 0), (4, 2, 3)), "verify": (1000, (40, 32), (3, 3))}


@pytest.mark.parametrize("name", DRAWN_QUERIES)
def test_the_drawing_of_query_tokens_is_of_their_plan(name: str) -> None:
    """Each row of q has as many cells filled as it sees of its request's query tokens."""
    shared, own, counts = DRAWN_QUERIES[name]
    lens = [shared + mine + count for mine, count in zip(own, counts, strict=True)]
    path = RadixPath((1,), (shared,))
    forest = PrefixForest.from_paths([path] * len(lens), [shared] * len(lens), lens)
    plan = PackPlanner(SHAPE, CPU_PROFILE).plan(forest, query_lens=np.array(counts))
    assert plan.pack_end.tolist() == [shared, *lens]
    assert plan.pack_start.tolist() == [0, *[shared] * len(lens)]
    svg = ET.fromstring((ROOT / "docs/images/query-tokens.svg").read_text())
    (group,) = (part for part in svg if part.get("id") == name)
    texts = [text.text for text in group.findall("{*}text")]
    assert f"document {shared}" in texts
    assert f"{len(plan.pack_queries(0))} rows read it once" in texts
    assert [text for text in texts if str(text).startswith("own")] == [f"own {n}" for n in own if n]
    sees = [shared + mine + j + 1 for mine, n in zip(own, counts, strict=True) for j in range(n)]
    assert [text for text in texts if " sees " in str(text)] == [
        f"row {row} sees {number}" for row, number in enumerate(sees)
    ]
    cells: dict[str, list[bool]] = {}
    for box in group.findall("{*}rect"):
        if box.get("width") == box.get("height"):
            cells.setdefault(str(box.get("y")), []).append(box.get("fill") != "#ffffff")
    drawn = [[True] * (j + 1) + [False] * (n - j - 1) for n in counts for j in range(n)]
    assert [*cells.values()] == drawn


def test_the_numbers_of_the_readme_drawing(forest: PrefixForest) -> None:
    plan = PackPlanner(SHAPE, CPU_PROFILE).plan(forest)
    text = (ROOT / "README.md").read_text()
    for pack, name in enumerate(("system", "A", "B")):
        read, readers = _tokens(plan, pack), len(plan.pack_queries(pack))
        assert re.search(rf"{name} +. \([\d ]+\) +{read * readers} +{read}$", text, re.MULTILINE)
    assert re.search(rf"{forest.seq_lens.sum()} +{plan.kv_tokens_read}$", text, re.MULTILINE)


def test_the_bytes_and_splits_in_the_text(forest: PrefixForest) -> None:
    text = (ROOT / "docs/how-it-works.md").read_text()
    cpu, gpu = (PackPlanner(SHAPE, profile).plan(forest) for profile in (CPU_PROFILE, GPU_PROFILE))
    query = SHAPE.query_bytes + SHAPE.partial_bytes
    for number in (SHAPE.kv_token_bytes, query, 6 * SHAPE.kv_token_bytes, 2 * query):
        assert f"| {number:,} |" in text
    assert gpu.num_splits.tolist() == [8, 2, 3, 1, 1, 1, 1, 1]
    assert "are cut into 8 splits, branch A into 2 and branch B into 3" in text
    assert f"has {gpu.num_partials} partial results" in text
    assert f"plan has {cpu.num_partials}" in text


def test_the_splits_in_the_text() -> None:
    text = " ".join((ROOT / "docs/kernels.md").read_text().split())
    workers = [132 * tile.programs for tile in GPU_PROFILE.tiles]
    assert GPU_PROFILE.num_sms == 132
    assert "{}, {}, {} and {} on 132 multiprocessors".format(*workers) in text
    path = RadixPath((1,), (8192,))
    forest = PrefixForest.from_paths([path] * 64, [8192] * 64, [8192 + 256] * 64)
    plan = PackPlanner(SHAPE, GPU_PROFILE).plan(forest)
    assert plan.num_splits[0] == 8
    wide = plan.loads()[-1]
    assert wide.num_items == 128
    assert f"the {wide.num_workers} workers" in text


def _tokens(plan: CostedPlan, pack: int) -> int:
    return int(plan.pack_end[pack] - plan.pack_start[pack])


def _page(folder: Path, text: str) -> Page:
    (folder / "page.md").write_text(f"# Page\n\n{text}\n")
    return read_page(folder / "page.md", folder)
