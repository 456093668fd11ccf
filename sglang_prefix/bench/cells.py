"""Which batches `bench kernel` runs: from the registry, from trees and from traces of the user."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sglang_prefix.bench.workloads.registry import (
    Heads,
    WorkloadSpec,
    load_registry,
    registry_names,
)
from sglang_prefix.bench.workloads.traces import read_trace, trace_batches
from sglang_prefix.bench.workloads.trees import Tree, pat_tree

__all__ = ["DEFAULT_HEADS", "KernelCell", "KernelOptions", "kernel_cells"]

DEFAULT_HEADS = Heads(32, 8)
_QUICK = "quick"
# In the order of what they tell, each with its first head configuration before any has its second.
_DEFAULT_FILES = ("trees", "unrelated", "rollouts", "chunk", "uneven", "fixed", "long")


@dataclass(frozen=True)
class KernelCell:
    """One row of the table.

    Attributes:
        name: unique; "group/what/heads".
        group: cells that answer one question.
        heads: of the layer.
        make_tree: the batch.
        tree: PAT's notation; None for a forest that it cannot say.
        page_size: tokens per page of the KV pool.
        note: what else a reader should know; empty for nothing.
        rank: place of these heads among those of the same batch.
    """

    name: str
    group: str
    heads: Heads
    make_tree: Callable[[], Tree]
    tree: str | None
    page_size: int
    note: str = ""
    rank: int = 0

    @cached_property
    def logical_elements(self) -> int:
        """Elements of KV of all requests, each with its own: what stock kernels read."""
        tokens = int(self.make_tree().seq_lens.sum())
        return tokens * self.heads.kv * (self.heads.dim + self.heads.v_dim)


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """What decides which cells a run has and what their numbers mean.

    Attributes:
        quick: the small batches of the registry instead of the full ones.
        workloads: registry files, or regular expressions that a cell's name contains.
        trees: batches in PAT's notation.
        traces: files in Mooncake's format.
        trace_batches: moments of each trace.
        policies: packing policies; the first one is "ours" in tables.
        heads: configurations instead of the registry's own.
        dtype: of q and of the caches.
        page_size: tokens per page.
        rounds: timed rounds per cell; None for as many as fit.
        seed: of all inputs.
        max_tokens: KV tokens that a batch may store.
        threads: of torch on the CPU; None for its own choice.
    """

    quick: bool = False
    workloads: tuple[str, ...] = ()
    trees: tuple[str, ...] = ()
    traces: tuple[str, ...] = ()
    trace_batches: int = 3
    policies: tuple[str, ...] = ("pat", "node", "chunk", "query")
    heads: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    page_size: int = 1
    rounds: int | None = None
    seed: int = 0
    max_tokens: int = 1 << 18
    threads: int | None = None

    def as_json(self) -> dict[str, Any]:
        """For the result file."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> KernelOptions:
        """From a result file.

        Raises:
            TypeError: it holds other fields.
        """
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }
        return cls(**fields)


def kernel_cells(options: KernelOptions) -> list[KernelCell]:
    """The cells of a run in order; names are unique.

    Raises:
        ValueError: a tree, a trace, heads or a workload are not legal; one line.
    """
    heads = tuple(Heads.parse(text) for text in options.heads)
    cells = [*_tree_cells(options, heads), *_trace_cells(options, heads)]
    if options.workloads or not cells:
        cells += _registry_cells(options, heads)
    if options.page_size > 1:
        _check_pages(cells, options.page_size)
    return list({cell.name: cell for cell in cells}.values())


def _tree_cells(options: KernelOptions, heads: Sequence[Heads]) -> Iterator[KernelCell]:
    for text in options.trees:
        pat_tree(text)
        for one in heads or (DEFAULT_HEADS,):
            yield _cell(options, "tree", text, one, partial(pat_tree, text), text)


def _trace_cells(options: KernelOptions, heads: Sequence[Heads]) -> Iterator[KernelCell]:
    for path in options.traces:
        requests = read_trace(path)
        stem = Path(path).name.partition(".")[0]
        try:
            batches = trace_batches(requests, options.trace_batches, options.max_tokens)
        except ValueError as error:
            raise ValueError(f"trace {path}: {error}; legal: a larger --max-tokens") from None
        for batch in batches:
            what = f"{stem}@{batch.moment_ms / 1e3:.0f}s"
            note = f"{batch.left_out} more ran at that moment but did not fit into --max-tokens"
            for one in heads or (DEFAULT_HEADS,):
                yield _cell(options, "trace", what, one, partial(_same, batch.tree), None, note)


def _same(tree: Tree) -> Tree:
    return tree


def _registry_cells(options: KernelOptions, heads: Sequence[Heads]) -> list[KernelCell]:
    names, patterns = _files_and_patterns(options)
    specs: list[WorkloadSpec] = [spec for name in names for spec in load_registry(name).batches]
    most = max(len(heads or spec.heads) for spec in specs)
    cells = []
    for number in range(most):
        for spec in specs:
            own = heads or spec.heads
            if number < len(own):
                cell = _cell(options, spec.group, spec.name, own[number], spec.make_tree, spec.tree)
                cell = replace(cell, rank=number)
                if not patterns or any(pattern.search(cell.name) for pattern in patterns):
                    cells.append(cell)
    if not cells:
        asked = ", ".join(pattern.pattern for pattern in patterns)
        raise ValueError(
            f"workload {asked!r} matches no cell; legal: a file ({', '.join(registry_names())}), "
            "or a regular expression that the name of a cell contains"
        )
    return cells


def _files_and_patterns(options: KernelOptions) -> tuple[list[str], list[re.Pattern[str]]]:
    """Files to read, and patterns that choose among their cells."""
    names = [text for text in options.workloads if text in registry_names()]
    try:
        patterns = [re.compile(text) for text in options.workloads if text not in names]
    except re.error as error:
        raise ValueError(
            f"workload {error.pattern!r} is no regular expression: {error.msg}; legal: a file "
            f"({', '.join(registry_names())}), or a regular expression"
        ) from None
    if names and patterns:
        raise ValueError(
            "workloads are either files of the registry or regular expressions, not both: "
            f"{', '.join(names)} and {', '.join(p.pattern for p in patterns)}"
        )
    return names or [_QUICK] if options.quick else names or list(_DEFAULT_FILES), patterns


def _cell(
    options: KernelOptions,
    group: str,
    what: str,
    heads: Heads,
    make_tree: Callable[[], Tree],
    tree: str | None,
    note: str = "",
) -> KernelCell:
    page = f"/page{options.page_size}" if options.page_size > 1 else ""
    name = f"{group}/{what}/{heads}{page}"
    return KernelCell(name, group, heads, make_tree, tree, options.page_size, note)


def _check_pages(cells: Sequence[KernelCell], page_size: int) -> None:
    for cell in cells:
        tree = cell.make_tree()
        inner = set(tree.parent.tolist()) - {-1}
        short = [node for node in inner if tree.length[node] % page_size]
        if short:
            raise ValueError(
                f"page size {page_size} does not divide the {tree.length[short[0]]} tokens of a "
                f"shared node of {cell.name}; legal: a divisor"
            )
