"""A batch and the plan that was made for it, as plain values: what files and servers carry.

Counts of tokens only, no token and no text. A record holds what decided, so that everything else
can be found again: the forest, the packs with their splits, the cost model, and the gate's answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.tiles import LAUNCH_MODES
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import POLICIES, AttentionShape, CostModel, DeviceProfile, Packs
from sglang_prefix.packing.layout import CostedPlan

__all__ = ["SCHEMA", "Answer", "PlanRecord", "ShapePlan", "find_plan", "packs_of", "read_record"]

SCHEMA = 1
_KIND = "plan"

IntArray = NDArray[np.int64]
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, eq=False)
class ShapePlan:
    """The plan for the layers of one attention shape.

    Attributes:
        num_layers: layers that it serves.
        policy: name of the packing policy.
        max_partials: the planner's bound on partials; None for no bound.
        plan: the plan.
    """

    num_layers: int
    policy: str
    max_partials: int | None
    plan: CostedPlan


@dataclass(frozen=True, slots=True)
class Answer:
    """Who serves the batch, and why.

    Attributes:
        gate: the gate's setting.
        reason: why the stock backend serves the batch, a key of `fallback.REASONS`; None if our
            kernels do.
        packed_us, stock_us: the gate's predictions for all layers of the record; None where it
            made none.
        stock_backend: what the second is a prediction of; None if the record does not say.
    """

    gate: str
    reason: str | None
    packed_us: float | None = None
    stock_us: float | None = None
    stock_backend: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PlanRecord:
    """One decode batch.

    Attributes:
        source: where this comes from, for people.
        page_size: tokens per KV page.
        forest: who shares what.
        plans: a plan for each attention shape.
        answer: who serves the batch.
        launch_mode: how the Triton executor launches.
        graph_rows: rows of the decode graph, padding included; None outside graphs.
        gpu: the GPU's name, by which tuned tiles are found; None for none.
        notes: what was assumed, for people.
    """

    source: str
    page_size: int
    forest: PrefixForest
    plans: tuple[ShapePlan, ...]
    answer: Answer
    launch_mode: str = "streams"
    graph_rows: int | None = None
    gpu: str | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it as values that JSON has."""
        forest = {f.name: getattr(self.forest, f.name).tolist() for f in fields(self.forest)}
        return {
            "schema": SCHEMA,
            "kind": _KIND,
            "source": self.source,
            "page_size": self.page_size,
            "launch_mode": self.launch_mode,
            "graph_rows": self.graph_rows,
            "gpu": self.gpu,
            "notes": list(self.notes),
            "answer": asdict(self.answer),
            "forest": forest,
            "plans": [_plan_as_dict(plan) for plan in self.plans],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PlanRecord:
        """The record behind what :meth:`as_dict` gave.

        Raises:
            ValueError: it is not that, or does not fit together; one line.
        """
        if not isinstance(data, Mapping) or data.get("kind") != _KIND:
            raise ValueError("there is no plan in it")
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema {data.get('schema')!r}; legal: {SCHEMA}")
        try:
            forest = PrefixForest(**{k: _integers(v) for k, v in data["forest"].items()})
            _check_forest(forest)
            record = cls(
                source=str(data["source"]),
                page_size=_number(data["page_size"]),
                forest=forest,
                plans=tuple(_plan_from_dict(plan, forest) for plan in data["plans"]),
                answer=_answer(data["answer"]),
                launch_mode=_one_of(data["launch_mode"], LAUNCH_MODES),
                graph_rows=_optional(_number, data["graph_rows"]),
                gpu=_optional(str, data["gpu"]),
                notes=tuple(map(str, data["notes"])),
            )
        except KeyError as error:
            raise ValueError(f"{error.args[0]!r} is missing") from None
        except (TypeError, IndexError, AttributeError, OverflowError) as error:
            raise ValueError(f"it is damaged: {error}") from None
        if not record.plans:
            raise ValueError("it has no plans")
        return record


def read_record(path: Path) -> PlanRecord:
    """Read a record, or the first one in a saved answer of ``GET /server_info``.

    Raises:
        ValueError: the file holds none; one line that names the file.
        OSError: it cannot be read.
    """
    try:
        return PlanRecord.from_dict(find_plan(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def find_plan(data: Any) -> Mapping[str, Any]:
    """The plan in a record, or in what a server says of itself.

    Raises:
        ValueError: there is none; the message says what to do about it.
    """
    if isinstance(data, Mapping) and data.get("kind") == _KIND:
        return data
    states = data.get("internal_states") if isinstance(data, Mapping) else None
    if not isinstance(states, Sequence):
        raise ValueError("there is no plan in it")
    backends = [
        backend for state in states if isinstance(state, Mapping) for backend in _backends_of(state)
    ]
    if not backends:
        raise ValueError("the server does not run the attention backend prefix")
    kept = [backend["last_plan"] for backend in backends if backend.get("last_plan") is not None]
    if not kept and not any("last_plan" in backend for backend in backends):
        raise ValueError(
            "the server keeps no plan; start it with SGLANG_PREFIX_KEEP_PLAN=1 in its environment"
        )
    if not kept:
        raise ValueError("the server has not planned a decode batch yet; send requests first")
    if not all(isinstance(plan, Mapping) for plan in kept):
        raise ValueError("it is damaged: last_plan is no plan")
    found = next((plan for plan in kept if "left_out" not in plan), None)
    if found is None:
        raise ValueError(str(kept[0]["left_out"]))
    return dict(found)


def _backends_of(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the prefix backends of one scheduler say of themselves."""
    listed = state.get("sglang_prefix", [])
    if not isinstance(listed, list) or not all(isinstance(entry, Mapping) for entry in listed):
        raise ValueError("it is damaged: sglang_prefix is no list of counters")
    return listed


def packs_of(plan: CostedPlan) -> Packs:
    """The packs that a plan was laid out from."""
    shared = plan.num_shared_packs
    indptr = plan.query_indptr[: shared + 1]
    start, end = plan.pack_start, plan.pack_end[:shared]
    return Packs(start[:shared], end, indptr, plan.queries[: int(indptr[-1])], start[shared:])


def _plan_as_dict(shape: ShapePlan) -> dict[str, Any]:
    plan, packs = shape.plan, packs_of(shape.plan)
    return {
        "num_layers": shape.num_layers,
        "policy": shape.policy,
        "max_partials": shape.max_partials,
        "reserved_tail_slots": plan.reserved_tail_slots,
        "shape": asdict(plan.costs.shape),
        "device": asdict(plan.costs.device),
        **{field.name: getattr(packs, field.name).tolist() for field in fields(packs)},
        "num_splits": plan.num_splits.tolist(),
    }


def _plan_from_dict(data: Mapping[str, Any], forest: PrefixForest) -> ShapePlan:
    packs = Packs(**{field.name: _integers(data[field.name]) for field in fields(Packs)})
    num_splits = _integers(data["num_splits"])
    _check_packs(packs, num_splits, forest.seq_lens)
    shape = AttentionShape(**{name: _number(value) for name, value in data["shape"].items()})
    if shape.num_qo_heads % shape.num_kv_heads:
        raise ValueError("it is damaged: its query heads are no multiple of its KV heads")
    plan = CostedPlan.build(
        packs,
        forest.seq_lens,
        num_splits,
        reserved_tail_slots=_number(data["reserved_tail_slots"]),
        kv_tokens_unique=forest.unique_tokens,
        costs=CostModel(shape, _device(data["device"])),
    )
    policy, most = _one_of(data["policy"], POLICIES), _optional(_number, data["max_partials"])
    return ShapePlan(_number(data["num_layers"]), policy, most, plan)


def _device(data: Mapping[str, Any]) -> DeviceProfile:
    numbers = ("max_block_rows", "pack_bytes", "num_workers", "min_split_tokens")
    return DeviceProfile(
        name=str(data["name"]),
        reread_cost=_amount(data["reread_cost"]),
        **{name: _number(data[name]) for name in numbers},
    )


def _answer(data: Mapping[str, Any]) -> Answer:
    return Answer(
        gate=str(data["gate"]),
        reason=_optional(str, data["reason"]),
        packed_us=_optional(_amount, data["packed_us"]),
        stock_us=_optional(_amount, data["stock_us"]),
        stock_backend=_optional(str, data["stock_backend"]),
    )


def _number(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"it is damaged: {value!r} is no positive whole number")
    return value


def _amount(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise ValueError(f"it is damaged: {value!r} is no number of 0 or more")
    return float(value)


def _optional(convert: Callable[[Any], _Value], value: Any) -> _Value | None:
    return None if value is None else convert(value)


def _one_of(value: Any, legal: Collection[str]) -> str:
    if not isinstance(value, str) or value not in legal:
        raise ValueError(f"it is damaged: {value!r}; legal: {', '.join(legal)}")
    return value


def _integers(values: Any) -> IntArray:
    found = np.array(values)
    if found.ndim != 1 or (len(found) and found.dtype.kind != "i"):
        raise ValueError("it is damaged: a list of whole numbers is something else")
    return found.astype(np.int64)


def _check_forest(forest: PrefixForest) -> None:
    """Arrays have one entry per request or node, and point at what exists."""
    batch, nodes = forest.batch_size, forest.num_nodes
    begin, end = forest.node_begin, forest.node_end
    whole = (
        batch > 0
        and len(forest.shared_lens) == batch
        and sorted(forest.order.tolist()) == list(range(batch))
        and {len(begin), len(end), len(forest.node_stop), len(forest.node_parent)} == {nodes}
        and bool(((begin >= 0) & (begin < end) & (end <= batch)).all())
        and bool((forest.node_start < forest.node_stop).all())
        and bool((forest.node_parent < np.arange(nodes)).all())
        and bool((forest.node_parent >= -1).all())
        and bool((forest.shared_lens <= forest.seq_lens).all())
    )
    if not whole:
        raise ValueError("it is damaged: its forest does not fit together")


def _check_packs(packs: Packs, num_splits: IntArray, seq_lens: IntArray) -> None:
    """Every position of every request is in exactly one pack of it."""
    shared, batch = len(packs.start), len(seq_lens)
    sizes = np.diff(packs.query_indptr)
    fits = (
        len(packs.end) == shared
        and len(packs.query_indptr) == shared + 1
        and len(packs.tail_start) == batch
        and len(num_splits) == shared + batch
        and bool((num_splits > 0).all())
        and bool((sizes > 0).all())
        and packs.query_indptr[0] == 0
        and packs.query_indptr[-1] == len(packs.queries)
        and bool(((packs.queries >= 0) & (packs.queries < batch)).all())
    )
    if fits:
        pack = np.repeat(np.arange(shared), sizes)
        row = np.concatenate((packs.queries, np.arange(batch)))
        start = np.concatenate((packs.start[pack], packs.tail_start))
        end = np.concatenate((packs.end[pack], seq_lens))
        # Row by row in order of position, each stretch must begin where the one before ended.
        order = np.lexsort((end, start, row))
        row, start, end = row[order], start[order], end[order]
        expected = np.where(row[1:] == row[:-1], end[:-1], 0)
        fits = bool((start[1:] == expected).all()) and start[0] == 0
        last = np.flatnonzero(np.append(row[1:] != row[:-1], True))
        fits = fits and bool((end[last] == seq_lens).all())
    if not fits:
        raise ValueError("it is damaged: its packs do not cover its requests")
