"""What a result file of each kind holds: one set of types for writer, resume and report.

Every kind has the same envelope, :class:`Result`; a kind says what its cases are. Keys that are not
named here are allowed, and nobody's business. Needs pydantic, which comes with SGLang:
`results` imports this module only when a file is checked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

__all__ = [
    "RESULTS",
    "CheckCase",
    "EngineCase",
    "EngineResult",
    "Environment",
    "HostCase",
    "HostResult",
    "KernelCase",
    "KernelProvider",
    "KernelResult",
    "Result",
    "ServingCase",
    "ServingResult",
    "ServingSide",
    "TuneCase",
    "TuneResult",
]

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Reasons = dict[str, str]


class Environment(TypedDict):
    """What numbers were measured on and with; more on a GPU host."""

    device: str
    cpu: NotRequired[str | None]
    threads: NotRequired[int | None]
    gpu: NotRequired[str | None]
    python: NotRequired[str | None]
    versions: NotRequired[dict[str, str | None]]
    commit: NotRequired[str | None]


class Target(TypedDict):
    """A promise of the project, read off the cases."""

    value: float | None
    status: Literal["met", "missed", "not measured", "did not pack"]
    meaning: str


class Result(TypedDict):
    """The envelope of all kinds.

    ``absent`` says of providers, workloads or backends why they are not here; ``not_run`` and
    ``failed`` say it of cases that are not among the ``cases``. A resumed run tries the former
    again. ``note`` is for the reader.
    """

    schema: Literal[2]
    kind: str
    created: str
    command: list[str]
    options: dict[str, Any]
    seed: int | None
    dry: bool
    environment: Environment
    absent: Reasons
    not_run: Reasons
    failed: Reasons
    wall_s: NotNegative | None
    limits: NotRequired[dict[str, Any]]
    targets: NotRequired[dict[str, Target]]
    note: NotRequired[str]


# Kernels.


class Heads(TypedDict):
    qo: AtLeastOne
    kv: AtLeastOne
    dim: AtLeastOne
    v_dim: AtLeastOne


class Amount(TypedDict):
    """Of shared tokens counted once, and of every request's own."""

    ideal: Count
    logical: Count


class Floor(TypedDict):
    """Time of a layer that no kernel can beat: bytes, operations, one launch."""

    bytes_us: NotNegative
    flop_us: NotNegative
    launch_us: NotNegative
    us: Positive


class KernelProvider(TypedDict):
    """Times of a provider. ``ms`` and the parts are medians of a step of all ``layers``.

    A part that there is not, or that is not timed apart, is None. Files that were converted from
    older ones lack more.
    """

    kind: Literal["ours", "stock", "peer", "chain"]
    executor: str
    policy: str | None
    mode: str | None
    merge: str | None
    fixed: bool | None
    ms: Positive
    raw_ms: list[float]
    plan_ms: float | None
    copy_ms: float | None
    append_ms: float | None
    forward_ms: float | None
    merge_ms: float | None
    kernel_us: Positive | None
    over_floor: Positive | None
    bytes_read: AtLeastOne
    kv_read_ratio: float
    packs: Count | None
    speedup: float | None
    max_abs_error: float | None


class KernelCase(TypedDict):
    name: str
    group: str
    tree: str | None
    note: str
    batch: AtLeastOne
    heads: Heads
    dtype: str
    page_size: AtLeastOne
    slots: Literal["scattered", "consecutive"]
    layers: AtLeastOne
    tokens: Amount
    bytes: Amount
    flop: Count
    floor: Floor | None
    best_stock: str | None
    target: float | None
    bandwidth_gb_s: Positive | None
    absent: Reasons
    failed: Reasons
    providers: dict[str, KernelProvider]


class Limits(TypedDict):
    """Measured in the same run."""

    read_bytes_per_s: NotRequired[Positive]
    flop_per_s: Positive
    empty_launch_us: NotRequired[NotNegative]


class KernelOptions(TypedDict):
    policies: Annotated[list[Literal["pat", "node", "chunk", "query"]], Field(min_length=1)]
    dtype: Literal["bfloat16", "float16", "float32"]


class KernelResult(Result):
    options: KernelOptions  # type: ignore[misc]
    limits: NotRequired[Limits]  # type: ignore[misc]
    cases: list[KernelCase]


class TileTimes(TypedDict):
    tile: dict[str, int]
    registers: Count
    error: NotNegative
    kernel_us: Positive
    raw_us: list[float]
    bytes_per_s: Positive


class TuneCase(TypedDict):
    """Tiles by name on one pack shape; ``formula`` is the one used without a table."""

    name: str
    group: str
    shape: dict[str, int]
    packs: AtLeastOne
    tokens_per_pack: AtLeastOne
    kv_bytes: AtLeastOne
    formula: str
    tiles: dict[str, TileTimes]
    absent: Reasons
    failed: Reasons


class TuneResult(Result):
    device_name: str
    arch: str
    cases: list[TuneCase]


class HostCase(TypedDict):
    """Host time by stage, in microseconds; ``seconds`` are the raw times of those that have any."""

    name: str
    group: str
    num_requests: AtLeastOne
    us: dict[str, NotNegative]
    seconds: NotRequired[dict[str, list[float]]]
    counters: NotRequired[dict[str, Any]]


class HostResult(Result):
    cases: list[HostCase]


# Served models.


class Spread(TypedDict):
    median: float | None
    p99: float | None


class Steps(TypedDict):
    packed: Count
    stock: Count
    fallback: Count


class Counters(TypedDict):
    """What a timed run added to the counters of the prefix server."""

    steps: Steps
    kv_tokens_read: Count
    kv_tokens_logical: Count
    reasons: dict[str, Count]


class WholeSpread(TypedDict):
    median: NotNegative
    p99: NotNegative


class ServingRun(TypedDict):
    """A timed run of one side, from which a resumed run concludes everything again."""

    ttft_ms: WholeSpread | None
    tpot_ms: WholeSpread | None
    itl_ms: WholeSpread | None
    output_tokens_per_s: Positive
    requests_per_s: Positive
    duration_s: Positive
    counters: Counters | None
    texts: list[str]
    load_per_cpu: NotRequired[NotNegative]


class ServingRuns(TypedDict):
    """Timed runs of one side, and what came out.

    ``tokens`` are the ids of each answer to the requests of this ``fingerprint``; ``texts`` of a
    run are the hashes of its answers.
    """

    fingerprint: str
    tokens: list[str]
    runs: list[ServingRun]


class ServingSide(TypedDict):
    raw: NotRequired[ServingRuns]
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


class ServingCase(TypedDict):
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
    model: NotRequired[str | None]
    dtype: NotRequired[str | None]
    max_total_num_tokens: NotRequired[Count | None]


class ServingResult(Result):
    model: NotRequired[str | None]
    dtype: NotRequired[str | None]
    stock: NotRequired[ServingServer | None]
    prefix: NotRequired[ServingServer | None]
    method: NotRequired[dict[str, Any]]
    cases: list[ServingCase]


class EngineCase(TypedDict):
    """Engines of SGLang itself, without a server, on a load."""

    name: str
    group: str
    load: NotRequired[dict[str, Any]]
    measured: NotRequired[dict[str, dict[str, Any]]]
    engines: NotRequired[dict[str, dict[str, Any]]]
    stock: NotRequired[str]
    ratio: NotRequired[Positive]


class EngineResult(Result):
    cases: list[EngineCase]


class CheckCase(TypedDict):
    name: str
    group: str
    errors: NotRequired[dict[str, NotNegative]]


class CheckResult(Result):
    cases: list[CheckCase]


# In the order in which a page shows them.
RESULTS: dict[str, Any] = {
    "bench-kernel": KernelResult,
    "bench-serving": ServingResult,
    "bench-engine": EngineResult,
    "bench-tune": TuneResult,
    "bench-host": HostResult,
    "gpu-check": CheckResult,
}
