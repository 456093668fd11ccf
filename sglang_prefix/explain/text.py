"""A batch as a tree for the terminal: segments that look alike are one line."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from sglang_prefix.backend.fallback import REASONS
from sglang_prefix.explain.format import amount, plural, size, span
from sglang_prefix.explain.segments import Explanation, Segment

if TYPE_CHECKING:
    from rich.console import Console
    from rich.tree import Tree

__all__ = [
    "MAX_DEPTH",
    "MAX_GROUPS",
    "Group",
    "Total",
    "batch_line",
    "counts_line",
    "gate_line",
    "group_segments",
    "print_explanation",
    "totals",
]

# Three lines each in the terminal: a few screens, no wider than one.
MAX_CHILDREN = 8
MAX_DEPTH = 10
MAX_GROUPS = 40
_MAX_NAMED = 4


@dataclass(slots=True, eq=False)
class Group:
    """Segments that are read alike, have equally many readers, and stand below equal ones.

    Attributes:
        members: the segments, in order. Tails of one group may differ in length.
        children: the groups below all of them.
        num_hidden_nodes, num_hidden_tails: segments below that are in no group, since there are too
            many different ones.
    """

    members: list[Segment]
    children: list[Group] = field(default_factory=list)
    num_hidden_nodes: int = 0
    num_hidden_tails: int = 0

    @property
    def first(self) -> Segment:
        """One that stands for all."""
        return self.members[0]

    @property
    def name(self) -> str:
        """What they are called: nodes by number, requests by batch row."""
        noun = "node" if self.first.is_node else "request"
        numbers = [segment.index for segment in self.members]
        if len(numbers) == 1:
            return f"{noun} {numbers[0]}"
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return f"{noun}s {numbers[0]}-{numbers[-1]}"
        if len(numbers) <= _MAX_NAMED:
            return f"{noun}s {', '.join(map(str, numbers))}"
        shown = ", ".join(map(str, numbers[: _MAX_NAMED - 1]))
        return f"{noun}s {shown} and {len(numbers) - _MAX_NAMED + 1} more"

    @property
    def what(self) -> str:
        """Its name, its tokens and its readers."""
        tokens = [segment.tokens for segment in self.members]
        each = " each" if len(tokens) > 1 else ""
        low, high = min(tokens), max(tokens)
        text = plural(low, "token") if low == high else f"{span(low, high)} tokens"
        text = f"{self.name}: {text}{each}"
        if self.first.is_node:
            text += f", {plural(self.first.num_readers, 'reader')}{each}"
        return text

    @property
    def how(self) -> str:
        """By which packs it is read."""
        first = self.first
        if not first.packs:
            return "read below"
        if first.is_node:
            packs = sorted(pack for segment in self.members for pack in segment.packs)
            text = f"pack {packs[0]}" if len(packs) == 1 else f"{len(packs)} packs"
            if first.pack_readers < first.num_readers:
                text += f" of {first.pack_readers} of {first.num_readers} readers"
        else:
            text = "own pass" + (" each" if len(self.members) > 1 else "")
        taken = [segment.takes_over for segment in self.members]
        if taken[0]:
            text += f" from {span(min(taken), max(taken))} token"
            text += " above" if max(taken) == 1 else "s above"
        if first.tile:
            text += ", tile {} x {}".format(*first.tile)
        splits = [segment.num_splits for segment in self.members]
        return text + f", {span(min(splits), max(splits))} split{'s' * (max(splits) != 1)}"

    @property
    def bytes_read(self) -> int:
        """Of all together."""
        return sum(segment.bytes_read for segment in self.members)

    @property
    def bytes_saved(self) -> int:
        """Of all together."""
        return sum(segment.bytes_saved for segment in self.members)

    @property
    def how_much(self) -> str:
        """What is read of it, and what is saved."""
        saves = f", saves {size(self.bytes_saved)}" if self.bytes_saved else ""
        return f"reads {size(self.bytes_read)}{saves}"

    @property
    def hidden(self) -> str | None:
        """What stands below without being shown; None if everything is."""
        counts = ((self.num_hidden_nodes, "more node"), (self.num_hidden_tails, "more tail"))
        texts = [plural(count, noun) for count, noun in counts if count]
        return "... " + " and ".join(texts) if texts else None

    def below(self) -> Iterator[tuple[int, Group]]:
        """Every group below with its depth, parents before children."""
        waiting = [(0, group) for group in reversed(self.children)]
        while waiting:
            depth, group = waiting.pop()
            yield depth, group
            waiting += [(depth + 1, child) for child in reversed(group.children)]


def group_segments(explanation: Explanation) -> Group:
    """Group the segments of an explanation.

    Up to :data:`MAX_GROUPS` groups are made, those near the roots first, up to
    :data:`MAX_CHILDREN` directly below one, and :data:`MAX_DEPTH` levels. The rest is counted.

    Returns:
        A root without members, above all groups.
    """
    below: dict[int, list[int]] = {}
    segments = explanation.segments
    for index, segment in enumerate(segments):
        below.setdefault(segment.parent, []).append(index)
    forms = _forms(segments, below)
    sizes = _sizes(segments)
    root = Group([])
    waiting: deque[tuple[int, Group, list[int]]] = deque([(0, root, [-1])])
    room = MAX_GROUPS
    while waiting:
        depth, group, members = waiting.popleft()
        alike: dict[object, list[int]] = {}
        for child in (c for member in members for c in below.get(member, [])):
            alike.setdefault(forms[child], []).append(child)
        for number, found in enumerate(alike.values()):
            if number >= MAX_CHILDREN or depth >= MAX_DEPTH or room == 0:
                group.num_hidden_nodes += sum(sizes[i][0] for i in found)
                group.num_hidden_tails += sum(sizes[i][1] for i in found)
                continue
            room -= 1
            child_group = Group([segments[i] for i in found])
            group.children.append(child_group)
            if child_group.first.is_node:
                waiting.append((depth + 1, child_group, found))
    return root


def _forms(segments: tuple[Segment, ...], below: dict[int, list[int]]) -> list[object]:
    """What makes two segments look alike: one value per form, children before parents."""
    number_of: dict[object, int] = {}
    forms: list[object] = [None] * len(segments)
    for index in range(len(segments) - 1, -1, -1):
        segment = segments[index]
        form: object = (len(segment.packs), segment.takes_over > 0, segment.tile)
        if segment.is_node:
            children = Counter(forms[child] for child in below.get(index, []))
            readers = segment.num_readers, segment.pack_readers, segment.num_splits
            form = (segment.tokens, *readers, form, frozenset(children.items()))
        forms[index] = number_of.setdefault(form, len(number_of))
    return forms


def _sizes(segments: tuple[Segment, ...]) -> list[tuple[int, int]]:
    """Nodes and tails in the subtree of each segment, itself included."""
    sizes = [(int(segment.is_node), int(not segment.is_node)) for segment in segments]
    for index in range(len(segments) - 1, -1, -1):
        above = segments[index].parent
        if above >= 0:
            nodes, tails = sizes[above]
            sizes[above] = nodes + sizes[index][0], tails + sizes[index][1]
    return sizes


def batch_line(explanation: Explanation) -> str:
    """What batch this is, and for what the plan was made."""
    plan, record = explanation.plan, explanation.record
    shape, device = plan.costs.shape, plan.costs.device
    dims = f"{shape.head_dim}"
    if shape.v_head_dim != shape.head_dim:
        dims += f"/{shape.v_head_dim}"
    return (
        f"{plural(plan.batch_size, 'request')}, {amount(explanation.stats.kv_tokens_logical)} KV "
        f"tokens; policy {explanation.shape_plan.policy} for {device.name}, "
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
        text += "; on a CPU every batch is, without a prediction"
    return text


def counts_line(explanation: Explanation) -> str:
    """Packs and partial results of the plan."""
    stats = explanation.stats
    return f"{plural(stats.num_packs, 'pack')}, {plural(stats.num_partials, 'partial result')}"


class Total(NamedTuple):
    """What is read in one layer under one assumption, and its share of what stock reads."""

    name: str
    tokens: str
    bytes: str
    share: float


def totals(explanation: Explanation) -> list[Total]:
    """The rows of the table of KV read: stock, this plan, the ideal."""
    stats, token_bytes = explanation.stats, explanation.plan.costs.shape.kv_token_bytes
    rows = (
        ("stock: every request reads for itself", stats.kv_tokens_logical, 1.0),
        ("this plan", stats.kv_tokens_read, stats.kv_read_ratio),
        ("every token once", stats.kv_tokens_unique, stats.kv_unique_ratio),
    )
    return [Total(name, amount(n), size(n * token_bytes), share) for name, n, share in rows]


def print_explanation(explanation: Explanation, out: Console) -> None:
    """Print the tree, what is read, what the gate decided, and what was assumed."""
    from rich.table import Table

    table = Table("KV read in one layer", title=None)
    for name in ("tokens", "bytes", "share"):
        table.add_column(name, justify="right")
    for total in totals(explanation):
        table.add_row(total.name, total.tokens, total.bytes, f"{total.share:.3f}")
    out.print(_tree(explanation))
    out.print(table)
    for line in (counts_line(explanation), gate_line(explanation), *explanation.notes):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _tree(explanation: Explanation) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    top = Tree(Text(f"{explanation.record.source}: {batch_line(explanation)}", "bold"))
    waiting = [(group_segments(explanation), top)]
    while waiting:
        group, branch = waiting.pop()
        for child in group.children:
            is_node, is_read = child.first.is_node, bool(child.first.packs)
            label = Text(child.what, "bold" if is_node else "")
            label.append(f"\n{child.how}; {child.how_much}", "green" if is_node and is_read else "")
            label.append(f"\n{child.first.why}", "dim")
            waiting.append((child, branch.add(label)))
        if group.hidden:
            branch.add(Text(group.hidden, "dim"))
    return top
