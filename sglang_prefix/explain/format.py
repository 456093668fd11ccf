"""The words and numbers that text and pictures share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_prefix.backend.fallback import REASONS

if TYPE_CHECKING:
    from sglang_prefix.explain.reasons import NodeChoice
    from sglang_prefix.explain.segments import Explanation
    from sglang_prefix.forest import PrefixForest

__all__ = [
    "amount",
    "batch_line",
    "gate_line",
    "plural",
    "size",
    "span",
    "total_rows",
    "why_node",
    "why_tail",
]


def amount(number: int) -> str:
    """A whole number with separators."""
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def span(low: int, high: int) -> str:
    """A range of whole numbers, or the one that it is."""
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def size(num_bytes: float) -> str:
    """Bytes in thousands or millions, with three digits where that many are needed."""
    value, unit = (num_bytes / 1e3, "kB") if num_bytes < 999_500 else (num_bytes / 1e6, "MB")
    return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.3g} {unit}"


def why_node(choices: list[NodeChoice], forest: PrefixForest, node: int, num_below: int) -> str:
    """Why ``pat`` packs a node or does not; ``num_below`` counts its children and tails."""
    choice = choices[node]
    pack = size(choice.pack_bytes)
    fold = None if choice.fold_bytes is None else size(choice.fold_bytes)
    if not choice.keeps:
        text = (
            f"no pack: {fold} moved if each of the {num_below} below reads it, {pack} with a pack"
        )
    elif fold is None:
        text = f"packed: {pack} moved; too long to be worth reading again below"
    else:
        text = f"packed: {pack} moved, against {fold} if each of the {num_below} below reads it"
    taken = int(forest.node_start[node]) - choice.start
    if choice.takes_over and choice.own_bytes is not None and choice.join_bytes is not None:
        text += (
            f"; reads {plural(taken, 'token')} above itself: {size(choice.own_bytes)}, "
            f"against {size(choice.join_bytes)} in the pack above"
        )
    return text


def why_tail(choices: list[NodeChoice], forest: PrefixForest, node: int) -> str:
    """Why a tail begins where it does under ``pat``; ``node`` is the last above it, or -1."""
    if node < 0:
        return "shares nothing"
    choice = choices[node]
    above = f"reads the {plural(int(forest.node_stop[node]) - choice.start, 'token')} above itself"
    own, join = size(choice.tail_fold_bytes), size(choice.tail_join_bytes)
    if not choice.tails_fold:
        return f"joins the pack above: {join} more moved, against {own} to read its tokens alone"
    if choice.keeps:
        return f"{above}: {own} moved, against {join} more in the pack above"
    return f"{above}: there is no pack"


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


def total_rows(explanation: Explanation) -> list[tuple[str, int, float]]:
    """What is read in one layer: a name, KV tokens, and their share of what stock reads."""
    stats = explanation.stats
    return [
        ("stock: every request reads for itself", stats.kv_tokens_logical, 1.0),
        ("this plan", stats.kv_tokens_read, stats.kv_read_ratio),
        ("every token once", stats.kv_tokens_unique, stats.kv_unique_ratio),
    ]
