"""What a result file of each kind holds: one set of types for writer, resume and report.

Every kind has the same envelope, :class:`Result`, and cases of a type of its own. A type has what
is read back; keys that are not named here are for people. Needs pydantic, which comes with SGLang:
`results` imports this module only when a file is checked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

__all__ = ["CASES", "OPTIONS", "Result"]

# Above any measurement, and within 64 bits.
_MOST = 1e18
Number = Annotated[float, Field(gt=-_MOST, lt=_MOST)]
Positive = Annotated[float, Field(gt=0, lt=_MOST)]
NotNegative = Annotated[float, Field(ge=0, lt=_MOST)]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
AtLeastOne = Annotated[int, Field(ge=1, lt=1 << 62)]
Rounds = Annotated[int, Field(ge=1, le=100_000)]
Words = Annotated[str, Field(min_length=1)]
Reasons = dict[str, str]


class Environment(TypedDict):
    """What numbers were measured on and with, see `results.environment`."""

    device: Words
    versions: NotRequired[dict[str, str | None]]


class Target(TypedDict):
    """A promise of the project, read off the cases."""

    value: Number | None
    status: Literal["met", "missed", "not measured", "did not pack"]
    meaning: str


class Server(TypedDict):
    """One of the two servers of `bench serving`."""

    server_args: NotRequired[list[str]]
    variables: NotRequired[dict[str, str]]
    model: NotRequired[str | None]
    dtype: NotRequired[str | None]
    max_total_num_tokens: NotRequired[Count | None]


class Result(TypedDict):
    """The envelope of all kinds, whose ``cases`` are those of :data:`CASES`.

    ``absent`` says of providers, workloads or backends why they are not here; ``not_run`` and
    ``failed`` say it of cases that are not among the ``cases``. A resumed run tries the former
    again. ``note`` is for the reader.
    """

    schema: Literal[2]
    kind: str
    created: Words
    command: list[str]
    options: dict[str, Any]
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] | None
    dry: bool
    environment: Environment
    absent: Reasons
    not_run: Reasons
    failed: Reasons
    wall_s: NotNegative | None
    limits: NotRequired[dict[str, NotNegative]]
    targets: NotRequired[dict[str, Target]]
    note: NotRequired[str]
    device_name: NotRequired[str]
    arch: NotRequired[str]
    profiles: NotRequired[dict[str, dict[str, NotNegative]]]
    stock: NotRequired[Server | None]
    prefix: NotRequired[Server | None]
    cases: Annotated[list[dict[str, Any]], Field(max_length=10_000)]


class Case(TypedDict):
    """What cases of all kinds have."""

    name: str
    group: str


class Heads(TypedDict):
    qo: AtLeastOne
    kv: AtLeastOne
    dim: AtLeastOne


class Amount(TypedDict):
    """Of shared tokens counted once, and of every request's own."""

    ideal: Count
    logical: Count


class KernelProvider(TypedDict):
    """Times of a provider. ``ms`` and the parts are medians of a step of all ``layers``.

    ``waited_ms`` says of each sample how long threads waited for a core; the medians are without
    the ``disturbed`` ones, see `timing.undisturbed`. A part that there is not, or that is not timed
    apart, is None. Files that were converted from older ones lack more.
    """

    kind: Literal["ours", "stock", "peer", "chain"]
    executor: str
    policy: str | None
    mode: str | None
    merge: str | None
    ms: Positive
    raw_ms: list[Number]
    waited_ms: NotRequired[list[NotNegative] | None]
    disturbed: NotRequired[Count | None]
    plan_ms: Number | None
    copy_ms: Number | None
    append_ms: Number | None
    forward_ms: Number | None
    merge_ms: Number | None
    kernel_us: Positive | None
    over_floor: Positive | None
    bytes_read: AtLeastOne
    kv_read_ratio: NotNegative
    packs: Count | None
    max_abs_error: Number | None


class KernelCase(Case):
    note: str
    batch: AtLeastOne
    query_tokens: NotRequired[AtLeastOne]
    heads: Heads
    dtype: str
    page_size: AtLeastOne
    slots: Literal["scattered", "consecutive"]
    layers: AtLeastOne
    tokens: Amount
    bytes: Amount
    flop: Count
    floor: dict[str, NotNegative] | None
    target: Number | None
    bandwidth_gb_s: Positive | None
    absent: Reasons
    failed: Reasons
    providers: dict[str, KernelProvider]


class TileTimes(TypedDict):
    tile: dict[str, Count | bool]
    kernel_us: Positive


class TuneCase(Case):
    """Tiles by name on one pack shape; ``formula`` is the one used without a table."""

    shape: dict[str, Count]
    formula: str
    tiles: dict[str, TileTimes]
    absent: Reasons
    failed: Reasons


class PackTimes(TypedDict):
    """A plan: ``packs`` of ``requests`` that share ``tokens``, and what requests read alone."""

    requests: AtLeastOne
    tokens: AtLeastOne
    packs: Count
    lone_requests: Count
    lone_tokens: Count
    us: Positive


class ProfileCase(Case):
    """Plans on one executor with layers of one shape."""

    executor: Literal["native", "torch"]
    heads: Heads
    itemsize: AtLeastOne
    packs: list[PackTimes]


class HostCase(Case):
    """Host time by stage, in microseconds."""

    num_requests: AtLeastOne
    us: dict[str, NotNegative]


class Spread(TypedDict):
    median: NotNegative
    p99: NotNegative


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
    extends: NotRequired[Steps]


class ServingRun(TypedDict):
    """A timed run of one side, from which all else is concluded, again if a run is resumed."""

    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
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
    raw: ServingRuns


class ServingCase(Case):
    """Ratios are the prefix server's values over the stock server's."""

    requests: Count
    is_comparison: bool
    why_not: NotRequired[str | None]
    sides: dict[str, ServingSide]
    ratios: dict[str, Positive | None]


class NamedLoad(TypedDict):
    name: str


class EngineCase(Case):
    """Engines of SGLang itself, without a server, on a load."""

    load: NotRequired[NamedLoad]
    measured: NotRequired[dict[str, dict[str, Any]]]
    stock: NotRequired[str]
    ratio: NotRequired[Positive]


class CheckCase(Case):
    errors: NotRequired[dict[str, NotNegative]]


class GpuStep(Case):
    """A step of `bench gpu`: how it ended, kernels that it had to compile, and what it found."""

    status: Literal["done", "failed", "overran"]
    limit_s: NotNegative
    wall_s: NotNegative
    compiled: Count
    says: dict[str, Number | str | None]
    failed: Reasons


# By kind, in the order in which a page shows them.
CASES: dict[str, Any] = {
    "bench-kernel": list[KernelCase],
    "bench-serving": list[ServingCase],
    "bench-engine": list[EngineCase],
    "bench-tune": list[TuneCase],
    "bench-profile": list[ProfileCase],
    "bench-host": list[HostCase],
    "gpu-check": list[CheckCase],
    "bench-gpu": list[GpuStep],
}


class KernelOptions(TypedDict):
    """What a resumed run takes up again, see `cases.KernelOptions`."""

    quick: NotRequired[bool]
    workloads: NotRequired[list[str]]
    ours: NotRequired[bool]
    settings: NotRequired[list[str]]
    trees: NotRequired[list[str]]
    traces: NotRequired[list[str]]
    trace_batches: NotRequired[Annotated[int, Field(ge=1, le=1000)]]
    policies: NotRequired[list[str]]
    heads: NotRequired[list[str]]
    dtype: NotRequired[Literal["bfloat16", "float16", "float32"]]
    page_size: NotRequired[Annotated[int, Field(ge=1, le=1 << 16)]]
    rounds: NotRequired[Rounds | None]
    max_tokens: NotRequired[Annotated[int, Field(ge=1, lt=1 << 31)] | None]
    threads: NotRequired[Annotated[int, Field(ge=1, le=1024)] | None]


class HostOptions(TypedDict):
    requests: NotRequired[list[Annotated[int, Field(ge=1, le=1 << 14)]]]
    rounds: NotRequired[Rounds]
    engine: NotRequired[bool]
    model: NotRequired[bool]


class EngineOptions(TypedDict):
    long_output: NotRequired[Annotated[int, Field(ge=1, le=1 << 16)] | None]


# By kind, for those whose numbers a resumed run computes with.
OPTIONS: dict[str, Any] = {
    "bench-kernel": KernelOptions,
    "bench-host": HostOptions,
    "bench-engine": EngineOptions,
}
