"""Which batches `bench kernel` runs: from the registry, from trees and from traces of the user."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sglang_prefix.bench.settings import chosen_settings
from sglang_prefix.bench.workloads.registry import (
    Heads,
    KernelCase,
    load_registry,
    registry_names,
)
from sglang_prefix.bench.workloads.traces import read_trace, trace_batches
from sglang_prefix.bench.workloads.trees import pat_tree

__all__ = ["POLICIES", "TRACE_MAX_TOKENS", "KernelOptions", "compile_pattern", "kernel_cases"]

# Of a batch from a trace, which is cut to what fits.
TRACE_MAX_TOKENS = 1 << 18
POLICIES = ("pat", "node", "chunk", "query")
_DEFAULT_HEADS = Heads(32, 8)
# In the order of what they tell, each with its first head configuration before any has its second.
_DEFAULT_FILES = ["trees", "unrelated", "rollouts", "chunk", "uneven", "fixed", "long"]


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """What decides which cases a run has and what their numbers mean, as in the result file.

    The options of `bench kernel`, whose help says more. The first of the ``policies`` is "ours" in
    tables; None is for what fits the host. With ``ours`` no kernels of others are looked for.
    ``settings`` are names of `settings.SETTINGS`, or "all".
    """

    quick: bool = False
    workloads: list[str] = field(default_factory=list)
    ours: bool = False
    settings: list[str] = field(default_factory=list)
    trees: list[str] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)
    trace_batches: int = 3
    policies: list[str] = field(default_factory=lambda: list(POLICIES))
    heads: list[str] = field(default_factory=list)
    dtype: str = "bfloat16"
    page_size: int = 1
    rounds: int | None = None
    seed: int = 0
    max_tokens: int | None = None
    threads: int | None = None
    dry: bool = False


def kernel_cases(options: KernelOptions) -> list[KernelCase]:
    """The cases of a run in order; names are unique.

    Raises:
        ValueError: a policy, a setting, a tree, a trace, heads or a workload are not legal; one
            line.
    """
    for policy in options.policies:
        if policy not in POLICIES:
            raise ValueError(f"--policy is {policy!r}; legal: {', '.join(POLICIES)}")
    chosen_settings(options.settings)
    cases = _under(options, [*_tree_cases(options), *_trace_cases(options)])
    if options.workloads or not cases:
        cases += _registry_cases(options)
    if options.page_size > 1:
        _check_pages(cases, options.page_size)
    cases = list({case.name: case for case in cases}.values())
    return _dry(cases) if options.dry else cases


def _under(options: KernelOptions, cases: Sequence[KernelCase]) -> list[KernelCase]:
    """Cases with the heads, the dtype and the page size that the user asks for."""
    found = list(cases)
    if options.heads:
        found = [
            replace(case, heads=Heads.parse(text), rank=max(number, case.rank))
            for number, text in enumerate(options.heads)
            for case in cases
            if case.rank == 0 or case.is_of_suite
        ]
    if options.page_size > 1:
        found = [replace(case, page_size=options.page_size) for case in found]
    return [replace(case, dtype=case.dtype or options.dtype) for case in found]


def _dry(cases: Sequence[KernelCase]) -> list[KernelCase]:
    """The first case of every group and the first with larger pages, tiny."""
    first: dict[str, KernelCase] = {}
    for case in cases:
        first.setdefault("pages" if case.page_size > 1 else case.group, case)
    return [
        replace(
            case,
            heads=_tiny(case.heads),
            tree=case.tree.shrunk(case.page_size),
            query_tokens=min(case.query_tokens, 2),
            dtype="float32",
            target=None,
        )
        for case in first.values()
    ]


def _tiny(heads: Heads) -> Heads:
    group = heads.qo // heads.kv
    return Heads(group, 1, 40, 32, v_in_k=True) if heads.v_in_k else Heads(group, 1, 16, 16)


def _tree_cases(options: KernelOptions) -> Iterator[KernelCase]:
    for text in options.trees:
        yield KernelCase("tree", text, _DEFAULT_HEADS, pat_tree(text), text)


def _trace_cases(options: KernelOptions) -> Iterator[KernelCase]:
    for path in options.traces:
        requests = read_trace(path)
        stem = Path(path).name.partition(".")[0]
        try:
            most = options.max_tokens or TRACE_MAX_TOKENS
            batches = trace_batches(requests, options.trace_batches, most)
        except ValueError as error:
            raise ValueError(f"--trace {path}: {error}; legal: a larger --max-tokens") from None
        for batch in batches:
            name = f"{stem}@{batch.moment_ms / 1e3:.0f}s"
            note = f"{batch.left_out} more ran at that moment but did not fit into --max-tokens"
            yield KernelCase("trace", name, _DEFAULT_HEADS, batch.tree, note=note)


def _registry_cases(options: KernelOptions) -> list[KernelCase]:
    """Of the files that the user names, or the usual ones, the cases that match a pattern."""
    files = f"a file ({', '.join(registry_names())}), or a regular expression"
    names = [text for text in options.workloads if text in registry_names()]
    asked = [text for text in options.workloads if text not in names]
    patterns = [compile_pattern("--workload", text, files) for text in asked]
    default = ["gpu"] if options.dry else ["quick"] if options.quick else _DEFAULT_FILES
    cases = [case for name in names or default for case in load_registry(name)]
    # Each batch with its first heads before any has its second.
    cases = _under(options, sorted(cases, key=lambda case: (case.is_of_suite, case.rank)))
    cases = [c for c in cases if not patterns or any(p.search(c.name) for p in patterns)]
    if not cases:
        raise ValueError(
            f"--workload {', '.join(asked)!r} matches no case; legal: {files} that the name of a "
            "case contains"
        )
    return cases


def compile_pattern(option: str, text: str, legal: str) -> re.Pattern[str]:
    """A regular expression of a user's.

    Raises:
        ValueError: it is none; one line.
    """
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        reason = getattr(error, "msg", None) or "it repeats or nests too much"
        raise ValueError(
            f"{option} is {text!r}, no regular expression: {reason}; legal: {legal}"
        ) from None


def _check_pages(cases: Sequence[KernelCase], page_size: int) -> None:
    for case in cases:
        if tokens := case.tree.undivided_by(page_size):
            raise ValueError(
                f"--page-size {page_size} does not divide the {tokens} tokens of a shared node of "
                f"{case.name}; legal: a divisor"
            )
