"""A batch and the plan that was made for it, as plain values: what files and servers carry.

Counts of tokens only, no token and no text. A record holds what decided, so that everything else
can be found again: the forest, the packs with their splits, the cost model, and the gate's answer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)

from prefix_kernels.tiles import LAUNCH_MODES
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import POLICIES, AttentionShape, CostModel, DeviceProfile, Packs
from sglang_prefix.packing.layout import CostedPlan

__all__ = ["SCHEMA", "Answer", "PlanRecord", "ShapePlan", "find_plan", "packs_of", "read_record"]

SCHEMA = 1
_KIND = "plan"
# Above any real count or position, and small enough that products of two fit into 64 bits.
_LIMIT = 1 << 31
# More than 16,384 requests have in 1,024 splits each.
_MAX_PARTIALS = 1 << 24
_DAMAGED = "it is damaged: "

IntArray = NDArray[np.int64]


def _one_of(legal: Collection[str], value: str) -> str:
    if value not in legal:
        raise ValueError(f"{value!r}; legal: {', '.join(legal)}")
    return value


def _integers(values: Any) -> IntArray:
    found = np.array(values)
    if found.ndim != 1 or (len(found) and found.dtype.kind != "i"):
        raise ValueError("a list of whole numbers is something else")
    if ((found <= -_LIMIT) | (found >= _LIMIT)).any():
        raise ValueError(f"it has numbers of {_LIMIT} and more")
    return found.astype(np.int64)


def _amounts(found: Any) -> Any:
    """Check a dataclass of numbers: counts begin at 1, other amounts at 0."""
    for name, value in asdict(found).items():
        least = 1 if isinstance(value, int) else 0
        if not isinstance(value, str) and not least <= value < _LIMIT:
            raise ValueError(f"{name} is {value}")
    return found


def _shape(shape: AttentionShape) -> AttentionShape:
    if shape.num_qo_heads % shape.num_kv_heads:
        raise ValueError("its query heads are no multiple of its KV heads")
    return shape


Count = Annotated[int, Field(ge=1, lt=_LIMIT)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Integers = Annotated[IntArray, PlainValidator(_integers)]


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

    def as_dict(self) -> dict[str, Any]:
        """As values that JSON has."""
        return {
            "num_layers": self.num_layers,
            "policy": self.policy,
            "max_partials": self.max_partials,
            "reserved_tail_slots": self.plan.reserved_tail_slots,
            "shape": asdict(self.plan.costs.shape),
            "device": asdict(self.plan.costs.device),
            **_lists(packs_of(self.plan)),
            "num_splits": self.plan.num_splits.tolist(),
        }


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
    packed_us: Amount | None = None
    stock_us: Amount | None = None
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
            "forest": _lists(self.forest),
            "plans": [plan.as_dict() for plan in self.plans],
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
        known = {name: data[name] for name in _RecordFile.model_fields if name in data}
        try:
            # Of JSON text, strict validation makes dataclasses and tuples.
            found = _RecordFile.model_validate_json(json.dumps(known))
        except ValidationError as error:
            raise ValueError(_line(error)) from None
        except RecursionError:
            raise ValueError(f"{_DAMAGED}it is nested too deep") from None
        if not found.plans:
            raise ValueError("it has no plans")
        forest = found.forest.checked()
        plans = tuple(plan.checked(forest) for plan in found.plans)
        return cls(**dict(found) | {"forest": forest, "plans": plans})


class _ForestFile(BaseModel):
    """The fields of :class:`PrefixForest`."""

    seq_lens: Integers
    shared_lens: Integers
    order: Integers
    node_begin: Integers
    node_end: Integers
    node_start: Integers
    node_stop: Integers
    node_parent: Integers

    def checked(self) -> PrefixForest:
        """Arrays have one entry per request or node, and point at what exists."""
        forest = PrefixForest(**dict(self))
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
            raise ValueError(f"{_DAMAGED}its forest does not fit together")
        return forest


class _PlanFile(BaseModel):
    """What :meth:`ShapePlan.as_dict` gives."""

    model_config = ConfigDict(strict=True)

    num_layers: Count
    policy: Annotated[str, AfterValidator(partial(_one_of, POLICIES))]
    max_partials: Count | None
    reserved_tail_slots: Count
    shape: Annotated[AttentionShape, AfterValidator(_amounts), AfterValidator(_shape)]
    device: Annotated[DeviceProfile, AfterValidator(_amounts)]
    start: Integers
    end: Integers
    query_indptr: Integers
    queries: Integers
    tail_start: Integers
    num_splits: Integers

    def checked(self, forest: PrefixForest) -> ShapePlan:
        """The plan, if every position of every request is in exactly one pack of it."""
        packs = Packs(self.start, self.end, self.query_indptr, self.queries, self.tail_start)
        if not _covers(packs, self.num_splits, forest.seq_lens):
            raise ValueError(f"{_DAMAGED}its packs do not cover its requests")
        plan = CostedPlan.build(
            packs,
            forest.seq_lens,
            self.num_splits,
            reserved_tail_slots=self.reserved_tail_slots,
            kv_tokens_unique=forest.unique_tokens,
            costs=CostModel(self.shape, self.device),
        )
        return ShapePlan(self.num_layers, self.policy, self.max_partials, plan)


class _RecordFile(BaseModel):
    """What :meth:`PlanRecord.as_dict` gives, without schema and kind."""

    model_config = ConfigDict(strict=True)

    source: str
    page_size: Count
    forest: _ForestFile
    plans: tuple[_PlanFile, ...]
    answer: Answer
    launch_mode: Annotated[str, AfterValidator(partial(_one_of, LAUNCH_MODES))]
    graph_rows: Count | None
    gpu: str | None
    notes: tuple[str, ...]


def _covers(packs: Packs, num_splits: IntArray, seq_lens: IntArray) -> bool:
    shared, batch = len(packs.start), len(seq_lens)
    sizes = np.diff(packs.query_indptr)
    fits = (
        len(packs.end) == shared
        and len(packs.query_indptr) == shared + 1
        and len(packs.tail_start) == batch
        and len(num_splits) == shared + batch
        and bool((num_splits > 0).all())
        and bool((sizes > 0).all())
        and num_splits @ np.append(sizes, np.ones(batch, np.int64)) <= _MAX_PARTIALS
        and packs.query_indptr[0] == 0
        and packs.query_indptr[-1] == len(packs.queries)
        and bool(((packs.queries >= 0) & (packs.queries < batch)).all())
    )
    if not fits:
        return False
    pack = np.repeat(np.arange(shared), sizes)
    request = np.concatenate((packs.queries, np.arange(batch)))
    start = np.concatenate((packs.start[pack], packs.tail_start))
    end = np.concatenate((packs.end[pack], seq_lens))
    # Of each request, in order of position, every pack must begin where the one before ended.
    order = np.lexsort((end, start, request))
    request, start, end = request[order], start[order], end[order]
    expected = np.where(request[1:] == request[:-1], end[:-1], 0)
    last = np.flatnonzero(np.append(request[1:] != request[:-1], True))
    return bool(start[0] == 0 and (start[1:] == expected).all() and (end[last] == seq_lens).all())


def _line(error: ValidationError) -> str:
    """The first thing that is wrong, in one line with its place."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{place!r} is missing"
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    return f"{_DAMAGED}{place}{': ' if place else ''}{message}"


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
        raise ValueError(f"{_DAMAGED}last_plan is no plan")
    found = next((plan for plan in kept if "left_out" not in plan), None)
    if found is None:
        raise ValueError(str(kept[0]["left_out"]))
    return dict(found)


def _backends_of(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the prefix backends of one scheduler say of themselves."""
    listed = state.get("sglang_prefix", [])
    if not isinstance(listed, list) or not all(isinstance(entry, Mapping) for entry in listed):
        raise ValueError(f"{_DAMAGED}sglang_prefix is no list of counters")
    return listed


def packs_of(plan: CostedPlan) -> Packs:
    """The packs that a plan was laid out from."""
    shared = plan.num_shared_packs
    indptr = plan.query_indptr[: shared + 1]
    start, end = plan.pack_start, plan.pack_end[:shared]
    return Packs(start[:shared], end, indptr, plan.queries[: int(indptr[-1])], start[shared:])


def _lists(arrays: PrefixForest | Packs) -> dict[str, list[int]]:
    return {field.name: getattr(arrays, field.name).tolist() for field in fields(arrays)}
