"""`bench tune`: the forward kernel with every tile that is worth trying, on one pack shape per row
class; and the table that a result file becomes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from prefix_kernels.launch import launch
from prefix_kernels.oracle import RELATIVE_TOLERANCES
from prefix_kernels.tiles import (
    ARCHS,
    TABLE,
    TileConfig,
    TileShape,
    candidate_tiles,
    formula_tile,
    load_tuned_tiles,
)
from prefix_kernels.triton_executor import TritonExecutor
from sglang_prefix.bench.graphs import launches_of
from sglang_prefix.bench.packed_attention import PackedAttention, work_item_counts
from sglang_prefix.bench.results import read_result, write_whole
from sglang_prefix.bench.run import BenchRun, Case, NotRunError
from sglang_prefix.bench.timing import Clock, clock_for, interleaved
from sglang_prefix.bench.workloads.inputs import (
    AttentionInputs,
    MismatchError,
    Outputs,
    relative_error,
)
from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import Tree, pat_tree, shared_then_private
from sglang_prefix.packing import GPU_PROFILE

__all__ = [
    "FILE_NAME",
    "KIND",
    "TABLE",
    "PackShape",
    "TileWork",
    "TuneRun",
    "pack_shapes",
    "write_table",
]

KIND, FILE_NAME = "bench-tune", "tune.json"
_ROOT = Path(__file__).parents[2]
_SECONDS_PER_CASE = 3.0
# A choice must be worth its line: the medians of two runs differ by about as much.
_LEAST_GAIN = 1.02
# Compiling some 30 tiles takes longer than all else.
_FIRST_CASE_SECONDS = 150.0
# Query heads per KV head, as in Qwen3-235B-A22B: then a lone request fills the tile of 16 rows, and
# those of more rows are shared packs with no tails among them.
_GROUP = 16
_KV_HEADS = 4
# Packs per SM. With four KV heads an SM has 12 equal pieces of work, which one, two, three and four
# programs share without a rest.
_PACKS_PER_SM = 3
_LEAST_TOKENS = 1024
_LEAST_KV_BYTES = 256 << 20
# One split per pack, however long it is.
_UNSPLIT = replace(GPU_PROFILE, name="unsplit", num_workers=1)
# Every graph launches the class of 16 rows and that of all rows of its batch, most often 128.
_ROWS = (16, 128, 64, 32)
_DTYPES = {"bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
_SHAPES = ((128, "bf16"), (64, "bf16"), (128, "fp8_e4m3"), (64, "fp8_e4m3"))


@dataclass(frozen=True, slots=True)
class PackShape:
    """Packs of ``rows`` query rows, bf16 queries, and a head dim and cache dtype."""

    head_dim: int
    kv_dtype: str
    rows: int

    @property
    def name(self) -> str:
        """Unique."""
        return f"dim{self.head_dim}/{self.kv_dtype}/rows{self.rows}"


def pack_shapes(*, dry: bool = False) -> list[PackShape]:
    """The most valuable first; in a dry run a lone request's, a shared pack's, and fp8."""
    if dry:
        return [
            PackShape(128, "bf16", 16),
            PackShape(128, "bf16", 32),
            PackShape(128, "fp8_e4m3", 32),
        ]
    return [PackShape(*shape, rows) for shape, rows in product(_SHAPES, _ROWS)]


@dataclass(frozen=True, slots=True)
class _Launch:
    """A recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def __call__(self) -> None:
        launch(self.kernel, self.grid, **self.arguments)


class TileWork:
    """Tensors and launches of a pack shape.

    Args:
        pack: which.
        device, seed: of the tensors.
        dry: tiny, and float16 instead of bfloat16.

    Raises:
        MismatchError: the result with the formula's tile is not what the oracle says.

    Attributes:
        shape: for which a tile is chosen.
        formula: the tile without a table.
        candidates: the other tiles that are worth trying.
        num_packs, tokens, kv_bytes: size of the packs.
    """

    def __init__(self, pack: PackShape, device: torch.device, seed: int, *, dry: bool) -> None:
        self._num_sms = 1
        if device.type == "cuda":
            self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        dim = 16 if dry else pack.head_dim
        kv_heads = 1 if dry else _KV_HEADS
        heads = Heads(_GROUP * kv_heads, kv_heads, dim, dim)
        dtype = torch.float16 if dry else torch.bfloat16
        kv_dtype = dtype if pack.kv_dtype == "bf16" else _DTYPES[pack.kv_dtype]
        # As TritonExecutor has it.
        has_wgmma = dry or torch.cuda.get_device_capability(device)[0] in (9, 10)
        self.shape = TileShape(dim, dim, dtype.itemsize, kv_dtype.itemsize, has_wgmma)
        token_bytes = 2 * kv_heads * dim * kv_dtype.itemsize
        self.num_packs, self.tokens = (2, 33) if dry else _size(self._num_sms, token_bytes)
        self.kv_bytes = self.num_packs * self.tokens * token_bytes
        self._inputs = AttentionInputs.lay_out(
            _tree(self.num_packs, self.tokens, pack.rows // _GROUP),
            heads,
            device,
            seed,
            dtype=dtype,
            kv_dtype=kv_dtype,
            poison=True,
        )
        self._record(pack, device)
        self.formula = formula_tile(pack.rows, self.shape)
        self.candidates = list(candidate_tiles(pack.rows, self.shape))
        if dry:
            self.candidates = self.candidates[:2]
        if self.formula in self.candidates:
            self.candidates.remove(self.formula)
        self._run_with(self.formula)
        self._inputs.compare(self._outputs)
        self._expected: Outputs = self._outputs.clone()

    def _record(self, pack: PackShape, device: torch.device) -> None:
        """Record the launches of a plan, and which of them is that of the row class."""
        w = self._inputs
        shape = w.heads.shape(w.q.dtype, w.k.dtype)
        attention = PackedAttention(shape, device, policy="node", profile=_UNSPLIT)
        plan = attention.plan(w.batch.forest())
        attention.load(plan, w.req_to_token, w.req_pool_indices)
        self._outputs = w.outputs()
        recorded = launches_of(lambda: w.run(attention.executor, self._outputs))
        self._launches = [_Launch(*one) for one in recorded]
        self._place = next(
            i for i, one in enumerate(self._launches) if one.arguments.get("BLOCK_M") == pack.rows
        )
        work_list = self._launches[self._place].arguments["LIST"]
        self._num_units = int(work_item_counts(attention.executor)[work_list]) * w.heads.kv
        self._executor = attention.executor  # owns the buffers that the launches read

    def forward(self, tile: TileConfig) -> _Launch:
        """The launch of the row class, alone, with another tile."""
        one = self._launches[self._place]
        programs = min(self._num_units, self._num_sms * tile.resident_programs(self.shape))
        options = {
            "BLOCK_N": tile.block_n,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "maxnreg": tile.max_registers,
        }
        return _Launch(one.kernel, (programs,), one.arguments | options)

    def compile(self, tile: TileConfig) -> tuple[int, int]:
        """Registers and spills of a thread; zeros in the interpreter. Launches it once."""
        one = self.forward(tile)
        compiled = one.kernel[one.grid](**one.arguments)
        return getattr(compiled, "n_regs", 0), getattr(compiled, "n_spills", 0)

    def check(self, tile: TileConfig) -> float:
        """The largest relative error of a head against the result with the formula's tile.

        Raises:
            MismatchError: it is over the tolerance.
        """
        self._run_with(tile)
        tolerance = 2 * RELATIVE_TOLERANCES[self._outputs.out.dtype]
        error = relative_error(self._outputs.out, self._expected.out.double())
        if not error <= tolerance:
            raise MismatchError(f"off by {error} from the formula's tile, more than {tolerance}")
        return error

    def _run_with(self, tile: TileConfig) -> None:
        self._outputs.poison()
        for place, one in enumerate(self._launches):
            (self.forward(tile) if place == self._place else one)()


def _size(num_sms: int, token_bytes: int) -> tuple[int, int]:
    """Packs, and tokens of each."""
    num_packs, tokens = _PACKS_PER_SM * num_sms, _LEAST_TOKENS
    while num_packs * tokens * token_bytes < _LEAST_KV_BYTES:
        tokens *= 2
    return num_packs, tokens


def _tree(num_packs: int, tokens: int, requests: int) -> Tree:
    """Lone requests, or packs of several with a tail of one token each."""
    if requests == 1:
        return shared_then_private(num_packs, 0, tokens)
    return pat_tree(f"{num_packs},{num_packs * requests}_{tokens},1")


def measure_tiles(work: TileWork, clock: Clock) -> dict[str, Any]:
    """Compile, check and time the tiles of a pack shape: what `schema.TuneCase` has."""
    checked: dict[str, dict[str, Any]] = {}
    replays: dict[str, Callable[[], object]] = {}
    absent: dict[str, str] = {}
    failed: dict[str, str] = {}
    for tile in (work.formula, *work.candidates):
        name = _name(tile)
        try:
            registers, spills = work.compile(tile)
            if spills:
                absent[name] = f"spills, {spills} by the driver's count"
                continue
            error = work.check(tile)
            replays[name] = clock.replayable(work.forward(tile))
            checked[name] = {"tile": asdict(tile), "registers": registers, "error": error}
        except MismatchError as mismatch:
            failed[name] = str(mismatch)
        except Exception as error:  # one tile too large for this device: the others are not
            clock.synchronize()  # raises again where the device itself is lost
            absent[name] = f"{type(error).__name__}: {error}"[:500]
    began = time.perf_counter()
    seconds = interleaved(replays, 1, clock.seconds_of, warmups=0)
    rounds = clock.rounds_within(time.perf_counter() - began, _SECONDS_PER_CASE)
    if not clock.dry:
        seconds = interleaved(replays, rounds, clock.seconds_of, warmups=0)
    for name, times in seconds.items():
        checked[name] |= {
            "kernel_us": median(times) * 1e6,
            "raw_us": [one * 1e6 for one in times],
            "bytes_per_s": work.kv_bytes / median(times),
        }
    fields = ("head_dim", "v_head_dim", "q_itemsize", "kv_itemsize")
    return {
        "shape": {key: getattr(work.shape, key) for key in fields},
        "packs": work.num_packs,
        "tokens_per_pack": work.tokens,
        "kv_bytes": work.kv_bytes,
        "formula": _name(work.formula),
        "tiles": checked,
        "absent": absent,
        "failed": failed,
    }


def _name(tile: TileConfig) -> str:
    size = f"{tile.block_m}x{tile.block_n}"
    return f"{size}/{tile.num_warps} warps/{tile.num_stages} stages/{tile.max_registers} registers"


class TuneRun(BenchRun):
    """The run of `bench tune`.

    Args:
        folder, command, seed, dry, resume: of :class:`BenchRun`.
    """

    kind, file_name = KIND, FILE_NAME

    def __init__(
        self, folder: Path, command: Sequence[str], *, seed: int, dry: bool, resume: bool
    ) -> None:
        super().__init__(folder, command=command, options={}, seed=seed, dry=dry, resume=resume)
        self._device = torch.device(self.data["environment"]["device"])
        self.data |= _device_facts(self._device)
        self._packs = pack_shapes(dry=dry)
        self._clock: Clock | None = None

    def use(self, options: Mapping[str, Any]) -> None:
        """There are none."""

    def prepare(self) -> None:
        """Measure the device's limits."""
        self._clock = clock_for(self._device, dry=self.data["dry"])
        self.data["limits"] = self._clock.limits(torch.bfloat16)

    def cases(self) -> list[Case]:
        """The most valuable first."""
        cases = [
            Case(p.name, f"dim{p.head_dim}/{p.kv_dtype}", partial(self._measure, p))
            for p in self._packs
        ]
        if not self.data["dry"]:
            cases[0] = replace(cases[0], expected_s=lambda: _FIRST_CASE_SECONDS)
        return cases

    def _measure(self, pack: PackShape) -> dict[str, Any]:
        is_fp8 = pack.kv_dtype != "bf16" and self._device.type == "cuda"
        reason = TritonExecutor.why_not(self._device, torch.bfloat16, torch.float8_e4m3fn)
        if is_fp8 and reason:
            raise NotRunError(reason)
        assert self._clock is not None
        work = TileWork(pack, self._device, self.data["seed"], dry=self.data["dry"])
        return measure_tiles(work, self._clock)


def _device_facts(device: torch.device) -> dict[str, str]:
    """Name and architecture; a dry run stands for a device with wgmma."""
    if device.type != "cuda":
        return {"device_name": "cpu", "arch": "sm_90"}
    major, minor = torch.cuda.get_device_capability(device)
    return {"device_name": torch.cuda.get_device_name(device), "arch": f"sm_{major}{minor}"}


def write_table(result_file: Path, table: Path = TABLE) -> str:
    """Make a result file the entry of its device: of each case the fastest tile, if it is not the
    formula's or within 2% of it.

    Returns:
        What was written and what to do next, for a reader.

    Raises:
        ValueError: the file is no result of `bench tune`, a dry run's, for which ``table`` must be
            another file, outside the repository, of an architecture that cannot be audited, or
            names a tile that is no candidate.
        OSError: the table cannot be written.
    """
    data = read_result(result_file, KIND)
    if data["dry"] and table.resolve() == TABLE:
        raise ValueError(f"{result_file} is a dry run's: name another --table than {TABLE}")
    path = result_file.resolve()
    if not data["dry"] and not path.is_relative_to(_ROOT):
        raise ValueError(f"{result_file} must stand in the repository, under {_ROOT}")
    name, arch = data["device_name"], data["arch"]
    if arch not in ARCHS:
        raise ValueError(f"{name} is {arch}, which has no audit; legal: {', '.join(ARCHS)}")
    content = json.loads(table.read_text()) if table.exists() else {}
    tiles = [tile for case in data["cases"] if (tile := _faster_tile(case))]
    content[name] = {
        "arch": arch,
        "result_file": str(path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path),
        "tiles": tiles,
    }
    text = json.dumps(content, indent=1) + "\n"
    trial = table.with_suffix(".new")
    try:
        trial.write_text(text)
        load_tuned_tiles(trial)
    finally:
        trial.unlink(missing_ok=True)
    write_whole(table, text)
    return (
        f"{table}: {len(tiles)} tiles for {name}. Next: sglang-prefix kernels --arch {arch}, which "
        "says whether all variants with them are free of spills; then commit both files"
    )


def _faster_tile(case: dict[str, Any]) -> dict[str, int] | None:
    tiles = case["tiles"]
    formula = tiles.get(case["formula"])
    if formula is None:
        return None
    best = min(tiles.values(), key=lambda found: float(found["kernel_us"]))
    if formula["kernel_us"] <= _LEAST_GAIN * best["kernel_us"]:
        return None
    return {**case["shape"], **best["tile"]}
