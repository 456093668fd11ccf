"""What the report reads of each kind of result file; other keys are nobody's business here.

Typed dictionaries, so that a parsed file stays what it is and pydantic, which comes with SGLang,
can say where one does not hold what it should.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

__all__ = [
    "CpuAttention",
    "CpuResult",
    "GpuCell",
    "GpuResult",
    "KernelCell",
    "KernelContender",
    "KernelResult",
    "KernelRunResult",
    "ServingCell",
    "ServingResult",
    "ServingSide",
]

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]


class Environment(TypedDict):
    device: str
    cpu: NotRequired[str | None]
    threads: NotRequired[int | None]
    gpu: NotRequired[str | None]
    python: NotRequired[str | None]
    versions: NotRequired[dict[str, str | None]]
    commit: NotRequired[str | None]


class BenchResult(TypedDict):
    schema: int
    kind: str
    created: str
    command: NotRequired[list[str]]
    quick: NotRequired[bool]
    seed: NotRequired[int | None]
    environment: Environment
    absent: NotRequired[dict[str, str]]
    not_run: NotRequired[list[str]]
    why_not_run: NotRequired[dict[str, str]]
    wall_s: NotRequired[Annotated[float, Field(ge=0)]]


class Heads(TypedDict):
    qo: int
    kv: int
    dim: int
    v_dim: NotRequired[int]


class Ideal(TypedDict):
    """Of shared tokens read once, and of every request's own."""

    ideal: Count
    logical: Count


class KernelContender(TypedDict):
    kind: str
    ms: Milliseconds
    executor: NotRequired[str | None]
    policy: NotRequired[str | None]
    raw_ms: NotRequired[list[float]]
    plan_ms: NotRequired[float | None]
    copy_ms: NotRequired[float | None]
    forward_ms: NotRequired[float | None]
    merge_ms: NotRequired[float | None]
    bytes_read: NotRequired[Count | None]
    kv_read_ratio: NotRequired[float | None]
    packs: NotRequired[Count | None]
    speedup: NotRequired[float | None]
    max_abs_error: NotRequired[float | None]


class KernelCell(TypedDict):
    name: str
    group: NotRequired[str]
    tree: NotRequired[str | None]
    batch: int
    heads: Heads
    dtype: str
    page_size: int
    tokens: Ideal
    bytes: NotRequired[Ideal]
    layers: NotRequired[int]
    bandwidth_gb_s: NotRequired[float | None]
    absent: NotRequired[dict[str, str]]
    failed: NotRequired[dict[str, str]]
    contenders: dict[str, KernelContender]


class KernelOptions(TypedDict):
    policies: NotRequired[list[str]]


class KernelResult(BenchResult):
    options: NotRequired[KernelOptions]
    cells: list[KernelCell]


class KernelRunCell(TypedDict):
    """What `bench kernel` itself reads of a cell, beside what the report reads."""

    best_stock: str | None
    tokens: Ideal
    bytes: Ideal
    flop: int
    layers: int
    bandwidth_gb_s: Positive
    absent: dict[str, str]
    failed: dict[str, str]
    contenders: dict[str, KernelRunContender]


class KernelRunContender(TypedDict):
    executor: str
    policy: str | None
    plan_ms: float | None
    copy_ms: float | None
    forward_ms: float | None
    merge_ms: float | None
    bytes_read: AtLeastOne
    kv_read_ratio: float
    speedup: float | None


@with_config(ConfigDict(extra="forbid"))
class KernelRunOptions(TypedDict):
    quick: bool
    workloads: list[str]
    trees: list[str]
    traces: list[str]
    trace_batches: AtLeastOne
    policies: Annotated[list[Literal["pat", "node", "chunk", "query"]], Field(min_length=1)]
    heads: list[str]
    dtype: Literal["bfloat16", "float16", "float32"]
    page_size: AtLeastOne
    rounds: AtLeastOne | None
    seed: Count
    max_tokens: AtLeastOne
    threads: AtLeastOne | None


class KernelRunResult(TypedDict):
    """What a `bench-kernel` file must have, beyond :class:`KernelResult`, to be resumed."""

    options: KernelRunOptions
    cells: list[KernelRunCell]


class Spread(TypedDict):
    median: float | None
    p99: float | None


class Steps(TypedDict):
    packed: Count
    stock: Count
    fallback: Count


class ServingSide(TypedDict):
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    output_tokens_per_s: float | None
    requests_per_s: NotRequired[float | None]
    duration_s: NotRequired[float | None]
    steps: NotRequired[Steps | None]
    packed_share: NotRequired[float | None]
    kv_read_ratio: NotRequired[float | None]
    reasons: NotRequired[dict[str, Any] | None]


class Ratios(TypedDict):
    """The prefix server's value over the stock server's."""

    ttft: NotRequired[Positive | None]
    tpot: NotRequired[Positive | None]
    itl: NotRequired[Positive | None]
    throughput: NotRequired[Positive | None]


class ServingCell(TypedDict):
    name: str
    group: NotRequired[str]
    requests: int
    tokens_compared: NotRequired[int | None]
    tokens_equal: NotRequired[int | None]
    requests_equal: NotRequired[int | None]
    is_comparison: bool
    why_not: NotRequired[str | None]
    sides: dict[str, ServingSide]
    ratios: Ratios
    unpacked_ratios: NotRequired[Ratios | None]


class ServingServer(TypedDict):
    server_args: NotRequired[list[str]]


class ServingResult(BenchResult):
    model: NotRequired[str | None]
    dtype: NotRequired[str | None]
    stock: NotRequired[ServingServer | None]
    prefix: NotRequired[ServingServer | None]
    method: NotRequired[dict[str, Any]]
    settings: NotRequired[dict[str, Any]]
    cells: list[ServingCell]


class CpuAttention(TypedDict):
    batch: int
    shared: int
    private: int
    dtype: str
    scattered: NotRequired[bool]
    target: NotRequired[float | None]
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    median_ms: dict[str, Milliseconds]


class CpuPlanning(TypedDict):
    num_requests: int
    median_us: dict[str, float]


class CpuEngine(TypedDict):
    num_requests: int
    us: dict[str, float]


class CpuResult(TypedDict):
    """The file of ``make bench-cpu``, which has no "kind"."""

    date: str
    commit: str
    seed: NotRequired[int]
    cpu: str
    threads: NotRequired[int]
    python: NotRequired[str]
    versions: NotRequired[dict[str, str | None]]
    attention: list[CpuAttention]
    planning: NotRequired[list[CpuPlanning]]
    engine: NotRequired[list[CpuEngine]]
    host: NotRequired[list[CpuEngine]]


class GpuCell(TypedDict):
    status: str
    reason: NotRequired[str]
    shape: NotRequired[dict[str, Any]]
    candidates: NotRequired[dict[str, dict[str, Any]]]
    chains: NotRequired[dict[str, dict[str, Any]]]
    measured: NotRequired[dict[str, dict[str, Any]]]
    errors: NotRequired[dict[str, float]]
    floor: NotRequired[dict[str, float]]
    formula: NotRequired[str]
    load: NotRequired[dict[str, Any]]
    stock: NotRequired[str]
    ratio: NotRequired[Positive]


class GpuRun(TypedDict):
    environment: dict[str, Any]
    baselines: NotRequired[dict[str, str]]
    absent: NotRequired[dict[str, str]]


class GpuResult(TypedDict):
    """The files of ``make gpu-bench``, ``gpu-check``, ``gpu-serve`` and ``gpu-tune``."""

    schema: int
    kind: str
    dry: bool
    date: str
    commit: str
    seed: NotRequired[int]
    device: str
    runs: Annotated[list[GpuRun], Field(min_length=1)]
    cells: dict[str, GpuCell]
    targets: NotRequired[dict[str, Any]]
