"""A batch as a tree for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_prefix.explain.format import (
    amount,
    batch_line,
    gate_line,
    plural,
    size,
    span,
    total_rows,
)
from sglang_prefix.explain.groups import Group, group_parts
from sglang_prefix.explain.segments import Explanation

if TYPE_CHECKING:
    from rich.console import Console
    from rich.tree import Tree

__all__ = ["group_lines", "print_explanation", "text_tree"]


def group_lines(group: Group) -> tuple[str, str, str, str]:
    """What a group is, how it is read, how much that is, and why."""
    first, count = group.first, len(group.members)
    what = f"{group.name}: "
    tokens = plural(first.tokens, "token") if len(set(group.token_range)) == 1 else ""
    tokens = tokens or f"{span(*group.token_range)} tokens"
    what += tokens + (" each" if count > 1 else "")
    if first.is_node:
        what += f", {plural(first.num_readers, 'reader')}" + (" each" if count > 1 else "")
    if not first.packs:
        how = "read below"
    elif first.is_node:
        packs = sorted(pack for part in group.members for pack in part.packs)
        how = f"pack {packs[0]}" if len(packs) == 1 else f"{len(packs)} packs"
        if first.pack_readers < first.num_readers:
            how += f" of {first.pack_readers} of {first.num_readers} readers"
    else:
        how = "own pass" + (" each" if count > 1 else "")
    if first.packs:
        taken = [part.takes_over for part in group.members]
        if taken[0]:
            how += f" from {span(min(taken), max(taken))} token"
            how += " above" if max(taken) == 1 else "s above"
        if first.tile:
            how += ", tile {} x {}".format(*first.tile)
        splits = [part.num_splits for part in group.members]
        how += f", {span(min(splits), max(splits))} split" + ("" if max(splits) == 1 else "s")
    much = f"reads {size(group.bytes_read)}"
    if group.bytes_saved:
        much += f", saves {size(group.bytes_saved)}"
    return what, how, much, first.why


def hidden_line(group: Group) -> str | None:
    """What stands below a group without being shown; None if everything is."""
    if not group.num_hidden_nodes and not group.num_hidden_tails:
        return None
    nodes, tails = group.num_hidden_nodes, group.num_hidden_tails
    text = [plural(nodes, "more node")] if nodes else []
    return "... " + " and ".join([*text, plural(tails, "more tail")] if tails else text)


def text_tree(explanation: Explanation) -> Tree:
    """The tree; parts that look alike are one line."""
    from rich.text import Text
    from rich.tree import Tree

    root = group_parts(explanation)
    top = Tree(Text(f"{explanation.record.source}: {batch_line(explanation)}", "bold"))
    waiting = [(root, top)]
    while waiting:
        group, branch = waiting.pop()
        for child in group.children:
            what, how, much, why = group_lines(child)
            label = Text(what, "bold" if child.first.is_node else "")
            label.append(
                f"\n{how}; {much}", "green" if child.first.packs and child.first.is_node else ""
            )
            label.append(f"\n{why}", "dim")
            waiting.append((child, branch.add(label)))
        hidden = hidden_line(group)
        if hidden:
            branch.add(Text(hidden, "dim"))
    return top


def print_explanation(explanation: Explanation, out: Console) -> None:
    """Print the tree, what is read, what the gate decided, and what was assumed."""
    from rich.table import Table

    table = Table("KV read in one layer", title=None)
    for name in ("tokens", "bytes", "share"):
        table.add_column(name, justify="right")
    token_bytes = explanation.plan.costs.shape.kv_token_bytes
    for name, tokens, share in total_rows(explanation):
        table.add_row(name, amount(tokens), size(tokens * token_bytes), f"{share:.3f}")
    out.print(text_tree(explanation))
    out.print(table)
    stats = explanation.stats
    counts = f"{plural(stats.num_packs, 'pack')}, {plural(stats.num_partials, 'partial result')}"
    for line in (counts, gate_line(explanation), *explanation.notes):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
