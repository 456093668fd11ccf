"""A batch as lines of a tree: segments that look alike are one line."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_prefix.backend.fallback import REASONS
from sglang_prefix.explain.format import plural, size
from sglang_prefix.explain.segments import Explanation, Segment

if TYPE_CHECKING:
    from rich.console import Console
    from rich.tree import Tree

__all__ = [
    "MAX_DEPTH",
    "MAX_ROWS",
    "Row",
    "batch_line",
    "counts_line",
    "gate_line",
    "print_explanation",
    "row_of",
    "rows_of",
    "totals",
    "tree_of",
]

# Three lines each in the terminal: a few screens, no wider than one.
MAX_CHILDREN = 8
MAX_DEPTH = 10
MAX_ROWS = 40
_MAX_NAMED = 4


@dataclass(frozen=True, slots=True)
class Row:
    """Segments that are read alike, have equally many readers, and stand below equal ones.

    Attributes:
        what: their name, tokens and readers; or how many segments are not shown here.
        depth: rows above this one in the tree.
        segments: in order; tails of one row may differ in length. Empty for what is not shown.
        how: by which packs they are read.
    """

    what: str
    depth: int = 0
    segments: tuple[Segment, ...] = ()
    how: str = ""

    @property
    def why(self) -> str:
        """Why they are packed so."""
        return self.segments[0].why if self.segments else ""

    @property
    def reads(self) -> str:
        """Bytes read of all of them together."""
        return size(sum(segment.bytes_read for segment in self.segments))

    @property
    def saves(self) -> str:
        """Bytes saved, of all of them together; empty if none are."""
        saved = sum(segment.bytes_saved for segment in self.segments)
        return size(saved) if saved > 0 else ""

    @property
    def lines(self) -> list[str]:
        """What it is, how and how much of it is read, and why; of what is not shown the first."""
        if not self.segments:
            return [self.what]
        saved = f", saves {self.saves}" if self.saves else ""
        return [self.what, f"{self.how}; reads {self.reads}{saved}", self.why]


def row_of(segments: list[Segment], depth: int = 0) -> Row:
    """The row of segments that look alike."""
    first, each = segments[0], " each" if len(segments) > 1 else ""
    tokens = [segment.tokens for segment in segments]
    what = f"{_name(segments)}: {_count(tokens, 'token')}{each}"
    if first.is_node:
        what += f", {plural(first.num_readers, 'reader')}{each}"
    queries = [segment.num_queries for segment in segments]
    if any(segment.num_queries > segment.num_readers for segment in segments):
        what += f", {_count(queries, 'query token')}{each}"
    how = _how(segments) if first.packs else "read below"
    return Row(what, depth, tuple(segments), how)


def _name(segments: list[Segment]) -> str:
    """What segments are called: nodes by number, requests by batch row."""
    noun = "node" if segments[0].is_node else "request"
    numbers = [segment.index for segment in segments]
    if len(numbers) == 1:
        return f"{noun} {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{noun}s {numbers[0]}-{numbers[-1]}"
    hidden = len(numbers) - _MAX_NAMED + 1
    if hidden <= 1:
        return f"{noun}s {', '.join(map(str, numbers))}"
    return f"{noun}s {', '.join(map(str, numbers[:-hidden]))} and {hidden} more"


def _how(segments: list[Segment]) -> str:
    """By which packs segments are read."""
    first = segments[0]
    if first.is_node:
        packs = [pack for segment in segments for pack in segment.packs]
        text = f"pack {packs[0].index}" if len(packs) == 1 else f"{len(packs)} packs"
        num_together = len(packs[0].requests)
        if num_together < first.num_readers:
            text += f" of {num_together} of {first.num_readers} readers"
    else:
        text = "own pass" + (" each" if len(segments) > 1 else "")
    if first.takes_over:
        text += f" from {_count([segment.takes_over for segment in segments], 'token')} above"
    if first.packs[0].tile:
        text += ", tile {} x {}".format(*first.packs[0].tile)
    return text + f", {_count([segment.packs[0].num_splits for segment in segments], 'split')}"


def _count(numbers: list[int], noun: str) -> str:
    """So many things, or a range of them."""
    low, high = min(numbers), max(numbers)
    return plural(low, noun) if low == high else f"{low:,} to {high:,} {noun}s"


def rows_of(explanation: Explanation) -> list[Row]:
    """The tree, rows above others first.

    Up to :data:`MAX_ROWS` rows of segments are made, those near the roots first, up to
    :data:`MAX_CHILDREN` directly below one, and :data:`MAX_DEPTH` levels. The rest is counted, in
    a row without segments at its place.
    """
    segments = explanation.segments
    below: dict[int, list[int]] = defaultdict(list)
    for index, segment in enumerate(segments):
        below[segment.parent].append(index)
    forms, num_nodes = _forms(segments, below)
    rows: dict[tuple[int, ...], Row] = {}  # by place: the numbers of its branches from the top
    room = MAX_ROWS
    waiting: deque[tuple[tuple[int, ...], list[int]]] = deque([((), [-1])])
    while waiting:
        place, members = waiting.popleft()
        alike: dict[int, list[int]] = defaultdict(list)
        for child in (child for member in members for child in below[member]):
            alike[forms[child]].append(child)
        hidden: list[int] = []
        for number, found in enumerate(alike.values()):
            if number >= MAX_CHILDREN or len(place) >= MAX_DEPTH or room == 0:
                hidden += found
                continue
            room -= 1
            rows[(*place, number)] = row_of([segments[i] for i in found], len(place))
            if segments[found[0]].is_node:
                waiting.append(((*place, number), found))
        if hidden:
            nodes = sum(num_nodes[i] for i in hidden)
            tails = sum(segments[i].num_readers for i in hidden)
            counts = [
                plural(n, f"more {noun}") for n, noun in ((nodes, "node"), (tails, "tail")) if n
            ]
            rows[(*place, len(alike))] = Row("... " + " and ".join(counts), len(place))
    return [rows[place] for place in sorted(rows)]


def _forms(segments: list[Segment], below: dict[int, list[int]]) -> tuple[list[int], list[int]]:
    """For each segment, a number that those which look alike share, and its subtree's nodes."""
    number_of: dict[object, int] = {}
    forms, num_nodes = [0] * len(segments), [0] * len(segments)
    for index, segment in reversed([*enumerate(segments)]):
        first = segment.packs[0] if segment.packs else None
        form: object = (len(segment.packs), segment.takes_over > 0, first and first.tile)
        if segment.is_node:
            children = Counter(forms[child] for child in below[index])
            packed = first and (len(first.requests), first.num_splits)
            readers = segment.num_readers, segment.num_queries
            form = (segment.tokens, readers, packed, form, frozenset(children.items()))
            num_nodes[index] = 1 + sum(num_nodes[child] for child in below[index])
        forms[index] = number_of.setdefault(form, len(number_of))
    return forms, num_nodes


def batch_line(explanation: Explanation) -> str:
    """What batch this is, and for what the plan was made."""
    plan, record = explanation.plan, explanation.record
    shape, device = plan.costs.shape, plan.costs.device
    dims = f"{shape.head_dim}"
    if shape.v_head_dim != shape.head_dim:
        dims += f"/{shape.v_head_dim}"
    queries = "" if plan.query_lens is None else f", {plural(plan.num_rows, 'query token')}"
    return (
        f"{plural(plan.batch_size, 'request')}{queries}, "
        f"{explanation.stats.kv_tokens_logical:,} KV tokens; "
        f"policy {explanation.shape_plan.policy} for {device.name}, "
        f"{shape.num_qo_heads} query and {shape.num_kv_heads} KV heads of {dims}, "
        f"{8 * shape.kv_itemsize}-bit KV, page size {record.page_size}"
    )


def gate_line(explanation: Explanation) -> str:
    """What the gate decided."""
    answer = explanation.record.answer
    served = "packed" if answer.reason is None else "left to the stock backend"
    text = f"gate {answer.gate}: {served}"
    if answer.reason is not None:
        text += f", {REASONS.get(answer.reason, answer.reason)}"
    if answer.packed_us is not None and answer.stock_us is not None:
        layers = sum(plan.num_layers for plan in explanation.record.plans)
        stock = answer.stock_backend or "the stock backend"
        text += (
            f"; predicted {answer.packed_us:,.1f} us packed, {answer.stock_us:,.1f} us on {stock}, "
            f"{plural(layers, 'layer')}"
        )
    elif answer.reason is None and explanation.plan.costs.device.name == "cpu":
        each = "every batch is, " if explanation.plan.query_lens is None else ""
        text += f"; on a CPU {each}without a prediction"
    return text


def counts_line(explanation: Explanation) -> str:
    """Packs and partial results of the plan."""
    stats = explanation.stats
    return f"{plural(stats.num_packs, 'pack')}, {plural(stats.num_partials, 'partial result')}"


def totals(explanation: Explanation) -> list[tuple[str, str, str, float]]:
    """What is read in one layer: name, tokens, bytes, and share of what stock reads.

    One row each for stock, this plan, and the ideal.
    """
    stats, token_bytes = explanation.stats, explanation.plan.costs.shape.kv_token_bytes
    rows = (
        ("stock: every request reads for itself", stats.kv_tokens_logical, 1.0),
        ("this plan", stats.kv_tokens_read, stats.kv_read_ratio),
        ("every token once", stats.kv_tokens_unique, stats.kv_unique_ratio),
    )
    return [(name, f"{n:,}", size(n * token_bytes), share) for name, n, share in rows]


def print_explanation(explanation: Explanation, out: Console) -> None:
    """Print the tree, what is read, what the gate decided, and what was assumed."""
    from rich.table import Table

    table = Table("KV read in one layer", title=None)
    for name in ("tokens", "bytes", "share"):
        table.add_column(name, justify="right")
    for *cells, share in totals(explanation):
        table.add_row(*cells, f"{share:.3f}")
    out.print(tree_of(explanation))
    out.print(table)
    for line in (counts_line(explanation), gate_line(explanation), *explanation.notes):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def tree_of(explanation: Explanation) -> Tree:
    """The batch, and its rows below each other as their segments are."""
    from rich.text import Text
    from rich.tree import Tree

    top = Tree(Text(f"{explanation.record.source}: {batch_line(explanation)}", "bold"))
    branches = [top]
    for row in rows_of(explanation):
        styles = ["dim"]
        if row.segments:
            is_node, is_read = row.segments[0].is_node, bool(row.segments[0].packs)
            styles = ["bold" if is_node else "", "green" if is_node and is_read else "", "dim"]
        label = Text("\n").join(map(Text, row.lines, styles))
        del branches[row.depth + 1 :]
        branches.append(branches[-1].add(label))
    return top
