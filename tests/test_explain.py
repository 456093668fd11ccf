"""What is said of a plan: against small trees by hand, against the plan, and as a picture."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefix.explain.picture import draw, html_page, svg_picture
from sglang_prefix.explain.reasons import pat_choices
from sglang_prefix.explain.record import Answer, PlanRecord, ShapePlan
from sglang_prefix.explain.segments import Explanation, explain
from sglang_prefix.explain.sources import Setting, plan_of_tree
from sglang_prefix.explain.text import MAX_DEPTH, MAX_GROUPS, group_segments
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import CPU_PROFILE, GPU_PROFILE, POLICIES, AttentionShape
from sglang_prefix.packing.planner import PackPlanner
from tests.forests import Batch, batches, comb_batch, random_batch

SVG = "{http://www.w3.org/2000/svg}"
# 2 x (8 + 8) x 4 bytes of K and V and 4 of a slot index: 132 bytes for a token. A query and its
# partial: 128 + 288 = 416.
SMALL = AttentionShape(4, 2, 8, 8, 4, 4)
TOKEN_BYTES, QUERY_BYTES = 132, 416
LLAMA = AttentionShape(32, 8, 128, 128, 2, 2)
DEVICES = (CPU_PROFILE, GPU_PROFILE)


def of_tree(tree: str, shape: AttentionShape = LLAMA, device: str = "h200") -> Explanation:
    return explain(plan_of_tree(tree, Setting(shape, device)))


def of_forest(forest: PrefixForest, policy: str = "pat", **options: Any) -> Explanation:
    """An explanation of a forest that comes from nowhere in particular."""
    device, shape = options.pop("device", CPU_PROFILE), options.pop("shape", SMALL)
    plan = PackPlanner(shape, device, policy=policy, **options).plan(forest)
    shape_plan = ShapePlan(1, policy, options.get("max_partials"), plan)
    return explain(PlanRecord("test", 1, forest, (shape_plan,), Answer("always", None)))


class TestSegments:
    def test_a_tree_on_the_cpu(self) -> None:
        explanation = of_tree("1,2,4_5000,2000,3", SMALL, "cpu")
        root, left, right, *tails = explanation.segments
        assert (root.tokens, root.num_readers, root.parent, len(root.packs)) == (5000, 4, -1, 1)
        assert (root.tokens_read, root.bytes_saved) == (5000, 3 * 5000 * TOKEN_BYTES)
        # Two readers of 2,000 tokens are not worth the 480,000 bytes that a pack costs a CPU:
        # 2 x 264,000 against 480,000 + 264,000 + 2 x 416.
        for node in (left, right):
            assert (node.tokens, node.num_readers, node.parent, node.packs) == (2000, 2, 0, ())
            assert (node.tokens_read, node.bytes_saved) == (4000, 0)
            assert node.why == (
                "no pack: 528 kB moved if each of the 2 below reads it, 745 kB with a pack"
            )
        (choice, other, _) = pat_choices(explanation.forest, explanation.plan.costs)
        assert choice.pack_bytes == 480_000 + 5000 * TOKEN_BYTES + 2 * (528_000 + 2 * QUERY_BYTES)
        assert choice.fold_bytes is None
        assert (other.fold_bytes, other.pack_bytes) == (528_000, 744_000 + 2 * QUERY_BYTES)
        assert "too long to be worth reading again" in root.why
        for tail in tails:
            assert (tail.tokens, tail.start) == (3, 7000)
            assert (tail.pack_start, tail.takes_over, tail.tokens_read) == (5000, 2000, 3)
            assert tail.why == "reads the 2,000 tokens above itself: there is no pack"
        assert explanation.stats.kv_tokens_read == 5000 + 4 * 2000 + 4 * 3

    def test_a_tree_on_a_gpu(self) -> None:
        """PAT's case: a root that is folded into its children, whose packs have two row blocks."""
        explanation = of_tree("1,8,512_512,512,256")
        root, *nodes = (segment for segment in explanation.segments if segment.is_node)
        assert (root.packs, root.tokens_read) == ((), 8 * 2 * 512)
        assert root.why.startswith("no pack: 82.1 MB moved if each of the 8 below reads it, 84.3")
        places = [(node.start, node.pack_start, node.tile) for node in nodes]
        assert places == [(512, 0, (128, 64))] * 8
        assert {node.tokens_read for node in nodes} == {2 * 512}
        answer = explanation.record.answer
        assert answer.reason is None
        assert answer.packed_us is not None
        assert answer.stock_us is not None
        assert 0 < answer.packed_us < 0.95 * answer.stock_us
        assert any("up to 2 times" in note for note in explanation.notes)
        assert any("H200, by its data sheet" in note for note in explanation.notes)

    def test_the_gate_leaves_what_shares_nothing_to_stock(self) -> None:
        explanation = of_tree("6_700")
        assert explanation.record.answer == Answer("auto", "gate-nothing-shared")
        assert [segment.why for segment in explanation.segments] == ["shares nothing"] * 6

    def test_splits_are_those_of_the_plan(self) -> None:
        explanation = of_tree("1,4_8192,64")
        (root, *tails) = explanation.segments
        assert root.num_splits == explanation.plan.num_splits[0] > 1
        assert [tail.num_splits for tail in tails] == explanation.plan.num_splits[1:].tolist()

    @given(batches(), st.sampled_from(list(POLICIES)), st.sampled_from(DEVICES))
    def test_what_segments_read_is_what_the_plan_reads(
        self, batch: Batch, policy: str, device: Any
    ) -> None:
        explanation = of_forest(batch.forest(), policy, device=device)
        stats, segments = explanation.stats, explanation.segments
        assert sum(segment.tokens_read for segment in segments) == stats.kv_tokens_read
        saved = sum(segment.bytes_saved for segment in segments)
        assert saved == (stats.kv_tokens_logical - stats.kv_tokens_read) * TOKEN_BYTES
        assert sum(segment.tokens for segment in segments) == stats.kv_tokens_unique
        packs = sorted(pack for segment in segments for pack in segment.packs)
        assert packs == list(range(stats.num_packs))

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
                assert choice.keeps == (
                    choice.fold_bytes is None or choice.pack_bytes < choice.fold_bytes
                )
                assert not choice.keeps or segment.pack_start == choice.start
                if choice.own_bytes is not None and choice.join_bytes is not None:
                    assert choice.takes_over == (choice.own_bytes < choice.join_bytes)
                kept += choice.keeps
        assert kept > 0

    def test_a_child_may_read_what_others_read_in_a_pack(self) -> None:
        """40 tokens: read again for 60 requests at once, sooner than 60 partial results more."""
        common = np.array([1040] * 59 + [40] * 50)
        forest = PrefixForest.from_neighbours(np.arange(110), common, np.full(110, 1100))
        root, child, *tails = of_forest(forest, device=GPU_PROFILE, shape=LLAMA).segments
        assert (root.num_readers, root.pack_readers) == (110, 50)
        assert (child.num_readers, child.pack_start, child.takes_over) == (60, 0, 40)
        assert child.why.startswith("packed: ")
        assert "; reads 40 tokens above itself: " in child.why
        assert {tail.takes_over for tail in tails} == {0}

    def test_a_plan_without_room_says_so(self) -> None:
        forest = of_tree("1,8_900,40", SMALL, "cpu").forest
        explanation = of_forest(forest, device=GPU_PROFILE, max_partials=8)
        assert {segment.why for segment in explanation.segments} == {
            "nothing is shared, so that the plan fits into the workspace"
        }


class TestGroups:
    def test_equal_siblings_are_one(self) -> None:
        root = group_segments(of_tree("2,8,1024_600,300,20"))
        assert [group.what for _, group in root.below()] == [
            "nodes 0, 5: 600 tokens each, 512 readers each",
            "nodes 1, 2, 3 and 5 more: 300 tokens each, 128 readers each",
            "requests 0-1023: 20 tokens each",
        ]

    def test_tails_of_all_lengths_are_one(self) -> None:
        forest = PrefixForest.from_neighbours(
            np.arange(4), np.full(3, 4000), np.array([4001, 4100, 4030, 4007])
        )
        (node,) = group_segments(of_forest(forest)).children
        (tails,) = node.children
        assert tails.what == "requests 0-3: 1 to 100 tokens each"

    @pytest.mark.parametrize(
        "batch",
        [random_batch(5, num_requests=400, max_tokens=900), comb_batch(500)],
        ids=["uneven", "chain"],
    )
    def test_no_forest_floods_the_terminal(self, batch: Any) -> None:
        explanation = of_forest(batch.forest(), "node")
        root = group_segments(explanation)
        groups = [root, *(group for _, group in root.below())]
        assert len(groups) <= 1 + MAX_GROUPS
        assert max(depth for depth, _ in root.below()) < MAX_DEPTH
        shown = sum(len(group.members) for group in groups)
        hidden = sum(group.num_hidden_nodes + group.num_hidden_tails for group in groups)
        assert hidden > 0
        assert shown + hidden == len(explanation.segments)


class TestPicture:
    @pytest.mark.parametrize("tree", ["1,8,1024_512,512,256", "1,2,4_5000,2000,3", "3_50"])
    def test_the_svg_names_every_group(self, tree: str) -> None:
        explanation = of_tree(tree)
        text = svg_picture(explanation)
        drawing = ET.fromstring(text)
        assert drawing.tag == f"{SVG}svg"
        said = [element.text or "" for element in drawing.iter(f"{SVG}text")]
        groups = [group for _, group in group_segments(explanation).below()]
        assert groups
        for group in groups:
            assert any(line.startswith(group.what) for line in said), group.name
        assert len(text) < 100_000

    def test_every_node_and_pack_is_drawn_in_its_place(self) -> None:
        boxes: dict[str, list[float]] = {}
        drawing = draw(of_tree("1,2,8_8000,4000,1000", device="cpu"), with_key=False)
        for box in drawing.iter("rect"):
            title = box.find("title")
            if title is not None and title.text:
                place = [float(box.get(name, "")) for name in ("x", "y", "width", "height")]
                boxes[title.text.split("\n")[0]] = place
        root = boxes["node 0: 8,000 tokens, 8 readers"]
        left, right = (boxes[f"node {n}: 4,000 tokens, 4 readers"] for n in (1, 2))
        assert root[2] == pytest.approx(2 * left[2], rel=1e-3)
        assert root[3] == pytest.approx(left[3] + right[3])
        assert left[0] == right[0] == pytest.approx(root[0] + root[2], abs=0.02)
        assert right[1] == pytest.approx(left[1] + left[3])
        assert boxes["pack 0: 8,000 tokens, 8 readers"] == root
        assert boxes["pack 1: 4,000 tokens, 4 readers"] == left
        assert boxes["request 7: 1,000 tokens"][2] == pytest.approx(left[2] / 4, rel=1e-2)

    def test_the_page_needs_nothing_else(self) -> None:
        page = html_page(of_tree("1,4,64_512,256,32", device="cpu"))
        assert page.count("<svg") == 1
        for foreign in ("src=", "href=", "url(", "@import", "<script"):
            assert foreign not in page
        assert "nodes 1-4: 256 tokens each, 16 readers each" in page
