"""What is said of a plan: by hand, against the plan, in files and pictures, and as users run it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefix.config import PrefixConfig
from sglang_prefix.explain.last_plan import LastPlan
from sglang_prefix.explain.picture import draw, html_page, svg_picture
from sglang_prefix.explain.reasons import pat_choices
from sglang_prefix.explain.record import Answer, Neighbours, PlanRecord, ShapePlan, find_plan
from sglang_prefix.explain.segments import Explanation, explain
from sglang_prefix.explain.sources import Setting, plan_of_tree
from sglang_prefix.explain.text import MAX_DEPTH, MAX_ROWS, rows_of
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import CPU_PROFILE, GPU_PROFILE, POLICIES, AttentionShape
from tests.forests import Batch, batches, comb_batch, random_batch
from tests.scheduling import Scheduler

DOCS = (Path(__file__).parents[1] / "docs" / "explain.md").read_text()
HTTP = b"HTTP/1.0 200 OK\r\n\r\n"
CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}"
# 2 x (8 + 8) x 4 bytes of K and V and 4 of a slot index: 132 bytes for a token. A query and its
# partial: 128 + 288 = 416.
SMALL = AttentionShape(4, 2, 8, 8, 4, 4)
TOKEN_BYTES, QUERY_BYTES = 132, 416
LLAMA = AttentionShape(32, 8, 128, 128, 2, 2)
DEVICES = (CPU_PROFILE, GPU_PROFILE)
# Of reads alone.
COSTS: dict[str, Any] = {
    "query_cost": 1.0,
    "element_cost": 0.0,
    "lone_row_cost": 0.0,
    "pack_row_cost": 0.0,
}


def of_tree(tree: str, shape: AttentionShape = LLAMA, device: str = "h200") -> Explanation:
    return explain(plan_of_tree(tree, Setting(shape, device)))


def of_forest(
    forest: PrefixForest,
    policy: str = "pat",
    device: Any = CPU_PROFILE,
    shape: AttentionShape = SMALL,
    room: int | None = None,
    query_lens: list[int] | None = None,
) -> Explanation:
    """An explanation of a forest that comes from nowhere in particular."""
    plans = (ShapePlan(1, policy, room, shape, device),)
    record = PlanRecord("test", 1, Neighbours.of(forest), plans, Answer("always", None))
    return explain(replace(record, query_lens=query_lens))


def test_tiles_are_those_of_a_graph_of_the_batch_size() -> None:
    """8 groups of 8 requests by 4 heads: 32 rows, for which a graph has the tile of 64."""
    record = plan_of_tree("8,64_2000,100", Setting(LLAMA, "h200"))
    for mode in ("auto", "streams", "fused"):
        segments = explain(replace(record, launch_mode=mode)).segments
        tiles = {pack.tile for segment in segments[:8] for pack in segment.packs}
        assert tiles == {(64, 64)}
        assert {pack.tile for segment in segments[8:] for pack in segment.packs} == {(16, 64)}
    alone = explain(replace(record, graph_rows=None)).segments  # launches that fit this plan
    assert {pack.tile for pack in alone[0].packs} == {(32, 64)}


class TestSegments:
    def test_a_tree_on_the_cpu(self) -> None:
        explanation = of_tree("1,2,4_5000,3,2000", SMALL, "cpu")
        root, left, right, *tails = explanation.segments
        assert (root.tokens, root.num_readers, root.parent, len(root.packs)) == (5000, 4, -1, 1)
        assert (root.tokens_read, root.bytes_saved) == (5000, 3 * 5000 * TOKEN_BYTES)
        for node in (left, right):
            assert (node.tokens, node.num_readers, node.parent, node.packs) == (3, 2, 0, [])
            assert (node.tokens_read, node.bytes_saved) == (6, 0)
        for tail in tails:
            assert (tail.tokens, tail.start) == (2000, 5003)
            assert (tail.pack_start, tail.takes_over, tail.tokens_read) == (5000, 3, 2000)
            assert tail.why == "reads the 3 tokens above itself: there is no pack"
        assert explanation.stats.kv_tokens_read == 5000 + 4 * 3 + 4 * 2000

    def test_the_bytes_of_a_choice(self) -> None:
        """Two readers of 2,000 tokens are not worth a pack that costs 480,000 bytes."""
        device = replace(CPU_PROFILE, **COSTS, pack_bytes=480_000)
        forest = of_tree("1,2,4_5000,2000,3", SMALL, "cpu").forest
        explanation = of_forest(forest, device=device)
        root, left, right, *_ = explanation.segments
        for node in (left, right):
            assert node.why == (
                "no pack: 528 kB moved if each of the 2 below reads it, 745 kB with a pack"
            )
        (choice, other, _) = pat_choices(explanation.forest, explanation.plan.costs)
        assert choice.pack_bytes == 480_000 + 5000 * TOKEN_BYTES + 2 * (528_000 + 2 * QUERY_BYTES)
        assert choice.fold_bytes == np.inf
        assert (other.fold_bytes, other.pack_bytes) == (528_000, 744_000 + 2 * QUERY_BYTES)
        assert "too long to be worth reading again" in root.why

    def test_the_gate_leaves_what_shares_nothing_to_stock(self) -> None:
        explanation = of_tree("6_700")
        assert explanation.record.answer == Answer("auto", "gate-nothing-shared")
        assert [segment.why for segment in explanation.segments] == ["shares nothing"] * 6

    @given(batches(), st.sampled_from(list(POLICIES)), st.sampled_from(DEVICES))
    def test_what_segments_read_is_what_the_plan_reads(
        self, batch: Batch, policy: str, device: Any
    ) -> None:
        """And a record has the forest that it was made of."""
        forest = batch.forest()
        explanation = of_forest(forest, policy, device)
        for name in PrefixForest.__slots__:
            assert np.array_equal(getattr(explanation.forest, name), getattr(forest, name))
        stats, segments = explanation.stats, explanation.segments
        assert sum(segment.tokens_read for segment in segments) == stats.kv_tokens_read
        saved = sum(segment.bytes_saved for segment in segments)
        assert saved == (stats.kv_tokens_logical - stats.kv_tokens_read) * TOKEN_BYTES
        assert sum(segment.tokens for segment in segments) == stats.kv_tokens_unique
        packs = sorted(pack.index for segment in segments for pack in segment.packs)
        assert packs == list(range(stats.num_packs))

    @given(batches(), st.sampled_from(list(POLICIES)), st.sampled_from(DEVICES), st.data())
    def test_query_tokens_are_those_of_the_plan(
        self, batch: Batch, policy: str, device: Any, data: st.DataObject
    ) -> None:
        """Also where they reach into what is shared; who reads a pack are its requests."""
        forest = batch.forest()
        lens = forest.seq_lens.tolist()
        counts = [data.draw(st.integers(1, min(length, 9))) for length in lens]
        explanation = of_forest(forest, policy, device, query_lens=counts)
        stats, segments, plan = explanation.stats, explanation.segments, explanation.plan
        assert sum(segment.tokens_read for segment in segments) == stats.kv_tokens_read
        for segment in segments:
            requests = explanation.forest.order[segment.begin : segment.end].tolist()
            assert segment.num_queries == sum(counts[b] for b in requests)
            for pack in segment.packs:
                assert set(pack.requests) <= set(requests)
                assert pack.num_queries == len(plan.pack_queries(pack.index))
                assert pack.num_queries == sum(counts[b] for b in pack.requests)
        # No query's own position is in what several read, where there are several.
        for b, count in enumerate(counts):
            if count > 1:
                assert explanation.forest.shared_lens[b] <= lens[b] - count
        record = PlanRecord.from_dict(json.loads(json.dumps(explanation.record.as_dict())))
        assert explain(record).plan.same_as(plan)
        if policy == "pat":
            choices = pat_choices(explanation.forest, plan.costs, plan.query_lens)
            for segment, choice in zip(segments, choices, strict=False):
                assert bool(segment.packs) == choice.keeps
                assert not choice.keeps or segment.pack_start == choice.start

    @pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
    def test_reasons_are_those_that_decided(self, device: Any) -> None:
        """A node has a pack exactly if the cheaper side says so, and it begins where it says."""
        kept = 0
        for seed in range(12):
            batch = random_batch(seed, num_requests=40, max_tokens=300)
            explanation = of_forest(batch.forest(), device=device, shape=LLAMA)
            choices = pat_choices(explanation.forest, explanation.plan.costs)
            for segment, choice in zip(explanation.segments, choices, strict=False):
                assert bool(segment.packs) == choice.keeps
                if choice.keeps:
                    assert segment.pack_start == choice.start
                    above = 0 if np.isnan(choice.own_bytes) else segment.start - choice.start
                    assert choice.takes_over == (above > 0)
                kept += choice.keeps
        assert kept > 0

    def test_a_child_may_read_what_others_read_in_a_pack(self) -> None:
        """40 tokens: read again for 60 requests at once, sooner than 60 partial results more."""
        common = np.array([1040] * 59 + [40] * 50)
        forest = PrefixForest.from_neighbours(np.arange(110), common, np.full(110, 1100))
        root, child, *tails = of_forest(forest, device=GPU_PROFILE, shape=LLAMA).segments
        assert (root.num_readers, len(root.packs[0].requests)) == (110, 50)
        assert (child.num_readers, child.pack_start, child.takes_over) == (60, 0, 40)
        assert child.why.startswith("packed: ")
        assert "; reads 40 tokens above itself: " in child.why
        assert {tail.takes_over for tail in tails} == {0}

    def test_a_plan_without_room_says_so(self) -> None:
        forest = of_tree("1,8_900,40", SMALL, "cpu").forest
        explanation = of_forest(forest, device=GPU_PROFILE, room=8)
        assert {segment.why for segment in explanation.segments} == {
            "nothing is shared, so that the plan fits into the workspace"
        }
        with pytest.raises(ValueError, match="the batch cannot be planned: max_partials=7"):
            of_forest(forest, room=7)


class TestRows:
    def test_what_looks_alike_is_one(self) -> None:
        """Equal siblings, and tails of all lengths."""
        assert [row.what for row in rows_of(of_tree("2,8,1024_600,300,20"))] == [
            "nodes 0, 5: 600 tokens each, 512 readers each",
            "nodes 1, 2, 3 and 5 more: 300 tokens each, 128 readers each",
            "requests 0-1023: 20 tokens each",
        ]
        lens = np.array([4001, 4100, 4030, 4007])
        forest = PrefixForest.from_neighbours(np.arange(4), np.full(3, 4000), lens)
        _, tails = rows_of(of_forest(forest))
        assert (tails.depth, tails.what) == (1, "requests 0-3: 1 to 100 tokens each")

    def test_query_tokens_are_said(self) -> None:
        record = plan_of_tree("1,4_4000,40", Setting(LLAMA, "cpu"), "2,4,4,3")
        assert [row.what for row in rows_of(explain(record))] == [
            "node 0: 4,000 tokens, 4 readers, 13 query tokens",
            "requests 0-3: 40 tokens each, 2 to 4 query tokens each",
        ]

    @pytest.mark.parametrize(
        "batch",
        [random_batch(5, num_requests=400, max_tokens=900), comb_batch(500)],
        ids=["uneven", "chain"],
    )
    def test_no_forest_floods_the_terminal(self, batch: Any) -> None:
        explanation = of_forest(batch.forest(), "node")
        rows = rows_of(explanation)
        assert sum(bool(row.segments) for row in rows) <= MAX_ROWS
        assert max(row.depth for row in rows if row.segments) < MAX_DEPTH
        counted = "".join(row.what for row in rows if not row.segments).replace(",", "")
        hidden = sum(map(int, re.findall(r"\d+", counted)))
        assert hidden > 0
        assert sum(len(row.segments) for row in rows) + hidden == len(explanation.segments)


class TestPicture:
    @pytest.mark.parametrize("tree", ["1,8,1024_512,512,256", "1,2,4_5000,2000,3", "3_50"])
    def test_the_svg_names_every_row(self, tree: str) -> None:
        explanation = of_tree(tree)
        text = svg_picture(explanation)
        said = [element.text or "" for element in ET.fromstring(text).iter() if element.text]
        for row in rows_of(explanation):
            assert any(line.startswith(f"{row.what}; {row.how}") for line in said), row.what
        assert len(text) < 100_000

    def test_every_node_and_pack_is_drawn_in_its_place(self) -> None:
        boxes: dict[str, list[float]] = {}
        for box in draw(of_tree("1,2,8_8000,4000,1000", device="cpu"), with_key=False):
            said = box.findtext("title")
            if said is not None and box.tag == "rect":
                place = [float(box.get(name, "")) for name in ("x", "y", "width", "height")]
                boxes[said.split("\n")[0]] = place
        root = boxes["node 0: 8,000 tokens, 8 readers"]
        left, right = (boxes[f"node {n}: 4,000 tokens, 4 readers"] for n in (1, 2))
        assert root[2] == pytest.approx(2 * left[2], rel=1e-3)
        assert root[3] == pytest.approx(left[3] + right[3])
        assert left[0] == right[0] == pytest.approx(root[0] + root[2], abs=0.02)
        assert right[1] == pytest.approx(left[1] + left[3])
        assert boxes["pack 0: 8,000 tokens, 8 readers"] == root
        assert boxes["pack 1: 4,000 tokens, 4 readers"] == left

    def test_each_query_token_has_a_row_that_ends_at_its_own_position(self) -> None:
        """Packs span the rows of all their requests' query tokens."""
        record = plan_of_tree("1,3_1000,40", Setting(LLAMA, "cpu"), "4,1,2")
        drawing = draw(explain(record), with_key=False)
        (pack,) = (
            box
            for box in drawing
            if (box.findtext("title") or "") == "pack 0: 1,000 tokens, 3 readers, 7 query tokens"
        )
        (tails,) = drawing.findall("path")
        top, height = (float(pack.get(name, "")) for name in ("y", "height"))
        outlines = [re.findall(r"[MHv][^MHvZ]+", path) for path in tails.get("d", "").split("Z")]
        ends = [[float(step[1:]) for step in path if step[0] == "H"][:-1] for path in outlines[:-1]]
        assert [*map(len, ends)] == [4, 1, 2]
        # By the position at which a query token stands, and far enough apart to be seen.
        assert ends[1:] == [ends[0][3:], ends[0][2:]]
        assert np.diff(ends[0]).min() > 8
        rows = [float(step[1:]) for path in outlines for step in path if step[0] == "v"]
        assert rows == pytest.approx([height / 7] * 7, abs=0.01)
        begins = [float(path[0].split()[1]) for path in outlines[:-1]]
        assert begins == pytest.approx([top + n * height / 7 for n in (0, 4, 5)], abs=0.02)

    def test_more_query_tokens_than_pixels_are_a_slope(self) -> None:
        text = svg_picture(explain(plan_of_tree("1,32_2000,90", Setting(LLAMA, "cpu"), "60")))
        (drawn,) = re.findall(r' d="([^"]+)"', text)
        assert drawn.count("L") == 32
        assert "v" not in drawn

    def test_the_page_needs_nothing_else(self) -> None:
        page = html_page(of_tree("1,4,64_512,256,32", device="cpu"))
        assert page.count("<svg") == 1
        for foreign in ("src=", "href=", "url(", "@import", "<script"):
            assert foreign not in page
        assert "nodes 1-4: 256 tokens each, 16 readers each" in page


class TestRecord:
    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({}, "does not run the attention backend prefix"),
            ({"sglang_prefix": [{"plans": 3}]}, "SGLANG_PREFIX_KEEP_PLAN=1"),
            ({"sglang_prefix": [{"last_plan": None}]}, "has not planned a batch yet"),
            ({"sglang_prefix": [1]}, "there is no plan in it"),
            ({"sglang_prefix": {"last_plan": {}}}, "there is no plan in it"),
            ({"sglang_prefix": [{"last_plan": 5}]}, "there is no plan in it"),
        ],
    )
    def test_a_server_without_a_plan(self, state: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            find_plan({"internal_states": [state]})

    def test_a_server_shows_the_newest_plan(self) -> None:
        """As a record that says what runs, and that survives being written as JSON."""
        system, scheduler = list(range(50)), Scheduler()
        last = LastPlan(PrefixConfig(keep_plan=True))
        scheduler.planner.on_plan = last.note
        assert last.as_dict() is None
        scheduler.start(*([*system, 60 + i, *range(70, 75 + i)] for i in range(3)))
        shown = PlanRecord.from_dict(json.loads(json.dumps(last.as_dict())))
        explanation = explain(shown)
        for found, group in zip(shown.plans, scheduler.groups, strict=True):
            assert group.executor.plan is not None
            assert found.plan(explanation.forest).same_as(group.executor.plan)
        (node, *tails) = explanation.segments
        assert (node.tokens, node.num_readers) == (len(system), 3)
        # What each has of its own in its prompt, and two generated.
        assert sorted((tail.index, tail.tokens) for tail in tails) == [(0, 8), (1, 9), (2, 10)]

    def test_a_server_says_that_its_newest_plan_is_a_verify_pass(self) -> None:
        scheduler = Scheduler()
        last = LastPlan(PrefixConfig(keep_plan=True))
        scheduler.planner.on_plan = last.note
        reqs = scheduler.start(*([*range(50), 60 + i] for i in range(3)))
        scheduler.schedule.epoch += 1  # no plan of before serves
        scheduler.verify(reqs, 4, [1, 2, 4])
        shown = PlanRecord.from_dict(json.loads(json.dumps(last.as_dict())))
        assert shown.source == "last plan of a running server, a verify pass"
        assert shown.query_lens == [4, 4, 4]
        explanation = explain(shown)
        assert [segment.num_queries for segment in explanation.segments] == [12, 4, 4, 4]
        for found, group in zip(shown.plans, scheduler.groups, strict=True):
            assert group.executor.plan is not None
            plan = found.plan(explanation.forest, shown.queries)
            assert plan.same_as(group.executor.plan)
