"""What decided how a batch is packed, as plain values: what files and servers carry.

Counts of tokens only, no token and no text. Planners are pure functions, so a record holds what
goes into them, and the plan is made from it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from prefix_kernels.launches import AUTO, LAUNCH_MODES
from sglang_prefix.files import read_json
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import (
    POLICIES,
    AttentionShape,
    CostModel,
    DeviceProfile,
    policy_named,
)
from sglang_prefix.packing.cost import FITTED
from sglang_prefix.packing.layout import CostedPlan
from sglang_prefix.packing.planner import PackPlanner, check_query_lens
from sglang_prefix.packing.policies import CHUNK_TOKENS
from sglang_prefix.packing.splits import choose_num_splits

__all__ = [
    "SCHEMA",
    "Answer",
    "Neighbours",
    "PlanRecord",
    "ShapePlan",
    "find_plan",
    "read_record",
]

SCHEMA = 4
IntArray = NDArray[np.int64]
_KIND = "plan"
_DAMAGED = "it is damaged: "

# Above any real batch, and so small that the compiled loops of planning, which add up tokens times
# heads, stay within 64 bits, and that an explanation takes some 200 MB at most.
_LIMIT = 1 << 31
_MAX_REQUESTS = 1 << 14
_MAX_TOKENS = 1 << 40
_MAX_PARTIALS = 1 << 18
_MOST: dict[str, float] = {
    **dict.fromkeys(("num_qo_heads", "num_kv_heads", "head_dim", "v_head_dim"), 1 << 16),
    **{"q_itemsize": 16, "kv_itemsize": 16, "v_in_k": True},
    **{"max_block_rows": 1 << 20, "min_split_tokens": 1 << 20, "num_sms": 1 << 12},
    **{"read_bytes_per_us": 1e9, "rows": 1 << 20, "tokens": 1 << 20, "sm_share": 1.0},
    **dict.fromkeys(("item_us", "token_us"), 1e6),
    **{"lone_bytes_per_us": 1e9},
    **{"reread_cost": 1.0, **FITTED, "pack_bytes": _LIMIT},
}
_LEAST = {
    "v_in_k": False,
    "pack_bytes": 0,
    "read_bytes_per_us": 1e-3,
    "lone_bytes_per_us": 1e-3,
    "sm_share": 1 / 64,
}
_MAX_TEXT, _MAX_TEXTS, _MAX_TILES = 4096, 64, 8


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has characters that cannot be printed")
    return text


Count = Annotated[int, Field(ge=1, lt=_LIMIT)]
Length = Annotated[int, Field(ge=0, lt=_LIMIT)]
Amount = Annotated[float, Field(ge=0, lt=1e15)]
Text = Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(_printable)]


def _one_of(legal: Iterable[str]) -> Any:
    return Field(pattern=f"^({'|'.join(legal)})$")


def _amounts(found: AttentionShape | DeviceProfile) -> Any:
    """Check numbers: counts begin at 1, what is divided by above 0, other amounts at 0."""
    values = asdict(found)
    tiles = values.pop("tiles", ())
    if len(tiles) > _MAX_TILES:
        raise ValueError(f"there are {len(tiles)} tiles; legal: up to {_MAX_TILES}")
    for name, value in chain(values.items(), *(tile.items() for tile in tiles)):
        if isinstance(value, str):
            if len(_printable(value)) > _MAX_TEXT:
                raise ValueError(f"{name} is longer than {_MAX_TEXT} characters")
            continue
        least = _LEAST.get(name, int(isinstance(value, int)))
        if not least <= value <= _MOST[name]:
            raise ValueError(f"{name} is {value}")
    return found


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Who shares what, as :meth:`PrefixForest.from_neighbours` takes it.

    Attributes:
        seq_lens: [B] KV tokens of each request.
        order: [B] batch rows with equal prefixes side by side.
        common: [B - 1] tokens that ``order[i]`` and ``order[i + 1]`` have in common.
    """

    seq_lens: Annotated[list[Count], Field(min_length=1, max_length=_MAX_REQUESTS)]
    order: Annotated[list[Length], Field(max_length=_MAX_REQUESTS)]
    common: Annotated[list[Length], Field(max_length=_MAX_REQUESTS)]

    @classmethod
    def of(cls, forest: PrefixForest) -> Neighbours:
        """Those of a forest; a node further down has more in common than those above it."""
        common = np.zeros(forest.batch_size - 1, dtype=np.int64)
        spans = zip(forest.node_begin, forest.node_end, forest.node_stop, strict=True)
        for begin, end, stop in spans:
            common[begin : end - 1] = stop
        return cls(forest.seq_lens.tolist(), forest.order.tolist(), common.tolist())

    def forest(self) -> PrefixForest:
        """The forest.

        Raises:
            ValueError: these are no requests that have so much in common.
        """
        batch = len(self.seq_lens)
        fits = sorted(self.order) == list(range(batch)) and len(self.common) == batch - 1
        if fits:
            lens = [self.seq_lens[row] for row in self.order]
            fits = all(map(int.__le__, self.common, map(min, pairwise(lens))))
        if not fits:
            raise ValueError("its requests do not fit together")
        return PrefixForest.from_neighbours(
            np.array(self.order), np.array(self.common), np.array(self.seq_lens)
        )


@dataclass(frozen=True, slots=True)
class ShapePlan:
    """What the plan for the layers of one attention shape is made for.

    Attributes:
        num_layers: layers that it serves.
        policy: name of the packing policy.
        max_partials: the planner's bound on partials; None for no bound.
        shape, device: what costs depend on.
    """

    num_layers: Count
    policy: Annotated[str, _one_of(POLICIES)]
    max_partials: Count | None
    shape: Annotated[AttentionShape, AfterValidator(_amounts)]
    device: Annotated[DeviceProfile, AfterValidator(_amounts)]

    def plan(self, forest: PrefixForest, query_lens: IntArray | None = None) -> CostedPlan:
        """The plan.

        Args:
            forest: who shares what, of :meth:`PlanRecord.forest`.
            query_lens: [B] query tokens of each request; None for one each.

        Raises:
            ValueError: the workspace has no room for so many queries, or the batch is larger than
                any that is explained.
        """
        planner = PackPlanner(
            self.shape, self.device, policy=self.policy, max_partials=self.max_partials
        )
        self._check_size(forest, planner.costs, query_lens)
        return planner.plan(forest, query_lens=query_lens)

    def _check_size(
        self, forest: PrefixForest, costs: CostModel, query_lens: IntArray | None
    ) -> None:
        """Raise ValueError if planning would take much memory, before it does."""
        _check_most("requests", forest.batch_size, _MAX_REQUESTS)
        _check_most("KV tokens of all requests", int(forest.seq_lens.sum()), _MAX_TOKENS)
        # What a policy allocates, then what splits make of it.
        readers = forest.node_end - forest.node_begin
        if self.policy == "chunk":
            readers *= forest.node_stop // CHUNK_TOKENS - forest.node_start // CHUNK_TOKENS
        _check_most("requests in packs", int(readers.sum()), _MAX_PARTIALS)
        packs = policy_named(self.policy)(forest, costs, query_lens)
        queries = np.ones(forest.batch_size, np.int64) if query_lens is None else query_lens
        before = np.append(0, np.cumsum(queries[packs.queries]))
        readers = np.append(np.diff(before[packs.query_indptr]), queries)
        # Of which each has one at least, before there is a row for each.
        _check_most("partial results", int(readers.sum()), _MAX_PARTIALS)
        if query_lens is not None:
            packs = packs.of_rows(query_lens)
        num_splits = choose_num_splits(packs, forest.seq_lens, costs, query_lens)
        _check_most("partial results", int(num_splits @ readers), _MAX_PARTIALS)


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

    gate: Text
    reason: Text | None
    packed_us: Amount | None = None
    stock_us: Amount | None = None
    stock_backend: Text | None = None


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """One batch of a pass. Its fields are those of the file.

    Attributes:
        source: where this comes from, for people.
        page_size: tokens per KV page.
        neighbours: who shares what.
        plans: what a plan for each attention shape is made for; at least one.
        answer: who serves the batch.
        launch_mode: how the Triton executor launches, or "auto" for what it chooses.
        graph_rows: rows of the decode graph, padding included; None outside graphs.
        gpu: the GPU's name, by which tuned tiles are found; None for none.
        notes: what was assumed, for people.
        query_lens: [B] query tokens of each request, its newest, as when drafts are verified or a
            cached prefix is extended; None for one each, as in decode.
    """

    source: Text
    page_size: Count
    neighbours: Neighbours
    plans: Annotated[tuple[ShapePlan, ...], Field(min_length=1, max_length=_MAX_TEXTS)]
    answer: Answer
    launch_mode: Annotated[str, _one_of((AUTO, *LAUNCH_MODES))] = AUTO
    graph_rows: Count | None = None
    gpu: Text | None = None
    notes: Annotated[tuple[Text, ...], Field(max_length=_MAX_TEXTS)] = ()
    query_lens: Annotated[list[Count], Field(max_length=_MAX_REQUESTS)] | None = None

    @property
    def queries(self) -> IntArray | None:
        """``query_lens`` as planners take them."""
        return None if self.query_lens is None else np.array(self.query_lens, dtype=np.int64)

    def forest(self) -> PrefixForest:
        """Who shares what, query tokens aside, which nobody shares where there are several.

        Raises:
            ValueError: its requests do not fit together, or have not so many tokens.
        """
        forest = self.neighbours.forest()
        if self.query_lens is None:
            return forest
        counts = check_query_lens(self.query_lens, forest.seq_lens)
        return forest.limited_to(forest.seq_lens - counts * (counts > 1))

    def as_dict(self) -> dict[str, Any]:
        """All of it as values that JSON has."""
        fields: dict[str, Any] = _file().dump_python(self, mode="json")
        return {"schema": SCHEMA, "kind": _KIND} | fields

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PlanRecord:
        """The record behind what :meth:`as_dict` gave.

        Raises:
            ValueError: it is not that, or does not fit together; one line.
        """
        if not isinstance(data, Mapping) or data.get("kind") != _KIND:
            raise ValueError("there is no plan in it")
        if data.get("schema") not in (3, SCHEMA):  # 3: of one query token for each request
            raise ValueError(f"schema {data.get('schema')!r}; legal: 3, {SCHEMA}")
        try:
            # Of JSON text, strict validation makes dataclasses and tuples. What else a file holds,
            # as the explanation, is much.
            known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
            record = _file().validate_json(json.dumps(known), strict=True)
        except ValidationError as error:
            raise ValueError(_line(error)) from None
        except RecursionError:
            raise ValueError(f"{_DAMAGED}it is nested too deep") from None
        try:
            record.forest()
        except ValueError as error:
            raise ValueError(f"{_DAMAGED}{error}") from None
        return record


def _check_most(what: str, number: int, most: int) -> None:
    if number > most:
        raise ValueError(f"it is too large: {number:,} {what}; legal: up to {most:,}")


@cache
def _file() -> TypeAdapter[PlanRecord]:
    return TypeAdapter(PlanRecord)


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
        return find_plan(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def find_plan(data: Any) -> PlanRecord:
    """The plan in a record that was read, or in what a server says of itself.

    Raises:
        ValueError: there is none; the message says what to do about it.
    """
    if isinstance(data, Mapping) and data.get("kind") == _KIND:
        return PlanRecord.from_dict(data)
    try:
        reports = [
            dict(r) for state in data["internal_states"] for r in state.get("sglang_prefix", ())
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("there is no plan in it") from None
    if not reports:
        raise ValueError("the server does not run the attention backend prefix")
    if not any("last_plan" in report for report in reports):
        raise ValueError(
            "the server keeps no plan; start it with SGLANG_PREFIX_KEEP_PLAN=1 in its environment"
        )
    found = next((plan for report in reports if (plan := report.get("last_plan"))), None)
    if found is None:
        raise ValueError("the server has not planned a batch yet; send requests first")
    return PlanRecord.from_dict(found)
