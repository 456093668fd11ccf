"""Parts that look alike as one: what keeps a forest of thousands readable."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from sglang_prefix.explain.segments import Explanation, Part

__all__ = ["MAX_CHILDREN", "MAX_DEPTH", "MAX_GROUPS", "Group", "group_parts"]

# Three lines each in the terminal: a few screens, no wider than one.
MAX_CHILDREN = 8
MAX_DEPTH = 10
MAX_GROUPS = 40
_MAX_NAMED = 4


@dataclass(slots=True, eq=False)
class Group:
    """Parts that are read alike, have equally many readers, and stand below equal parts.

    Attributes:
        members: the parts, in order. Tails of one group may differ in length.
        children: the groups below all of them.
        num_hidden_nodes, num_hidden_tails: parts below that are in no group, since there are too
            many different ones.
    """

    members: list[Part]
    children: list[Group] = field(default_factory=list)
    num_hidden_nodes: int = 0
    num_hidden_tails: int = 0

    @property
    def first(self) -> Part:
        """One that stands for all."""
        return self.members[0]

    @property
    def name(self) -> str:
        """What they are called: nodes by number, requests by batch row."""
        noun = "node" if self.first.is_node else "request"
        numbers = [part.index for part in self.members]
        if len(numbers) == 1:
            return f"{noun} {numbers[0]}"
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return f"{noun}s {numbers[0]}-{numbers[-1]}"
        if len(numbers) <= _MAX_NAMED:
            return f"{noun}s {', '.join(map(str, numbers))}"
        shown = ", ".join(map(str, numbers[: _MAX_NAMED - 1]))
        return f"{noun}s {shown} and {len(numbers) - _MAX_NAMED + 1} more"

    @property
    def token_range(self) -> tuple[int, int]:
        """Tokens of the shortest and of the longest."""
        tokens = [part.tokens for part in self.members]
        return min(tokens), max(tokens)

    @property
    def bytes_read(self) -> int:
        """Of all together."""
        return sum(part.bytes_read for part in self.members)

    @property
    def bytes_saved(self) -> int:
        """Of all together."""
        return sum(part.bytes_saved for part in self.members)


def group_parts(explanation: Explanation) -> Group:
    """Group the parts of an explanation.

    Up to :data:`MAX_GROUPS` groups are made, those near the roots first, up to
    :data:`MAX_CHILDREN` directly below one, and :data:`MAX_DEPTH` levels. The rest is counted.

    Returns:
        A root without members, above all groups.
    """
    below: dict[int, list[int]] = {}
    parts = explanation.parts
    for index, part in enumerate(parts):
        below.setdefault(part.parent, []).append(index)
    forms = _forms(parts, below)
    sizes = _sizes(parts)
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
            child_group = Group([parts[i] for i in found])
            group.children.append(child_group)
            if child_group.first.is_node:
                waiting.append((depth + 1, child_group, found))
    return root


def _forms(parts: tuple[Part, ...], below: dict[int, list[int]]) -> list[object]:
    """What makes two parts look alike: one value per form, children before parents."""
    number_of: dict[object, int] = {}
    forms: list[object] = [None] * len(parts)
    for index in range(len(parts) - 1, -1, -1):
        part = parts[index]
        way = (len(part.packs), part.takes_over > 0, part.tile)
        if part.is_node:
            children = Counter(forms[child] for child in below.get(index, []))
            readers = part.num_readers, part.pack_readers, part.num_splits
            form: object = (part.tokens, *readers, way, frozenset(children.items()))
        else:
            form = way
        forms[index] = number_of.setdefault(form, len(number_of))
    return forms


def _sizes(parts: tuple[Part, ...]) -> list[tuple[int, int]]:
    """Nodes and tails in the subtree of each part, itself included."""
    sizes = [(int(part.is_node), int(not part.is_node)) for part in parts]
    for index in range(len(parts) - 1, -1, -1):
        above = parts[index].parent
        if above >= 0:
            nodes, tails = sizes[above]
            sizes[above] = nodes + sizes[index][0], tails + sizes[index][1]
    return sizes
