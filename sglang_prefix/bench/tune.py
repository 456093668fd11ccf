"""`bench tune`: the forward kernel with every tile that is worth trying, on one pack shape per row
class; and the table that a result file becomes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from prefix_kernels.launch import launch
from prefix_kernels.tiles import (
    TABLE,
    TileConfig,
    TileShape,
    candidate_tiles,
    formula_tile,
    load_tuned_tiles,
)
from prefix_kernels.triton_executor import TritonExecutor
from sglang_prefix.bench.graphs import launches_of
from sglang_prefix.bench.packed_attention import PackedAttention
from sglang_prefix.bench.results import check_source, read_result, write_checked
from sglang_prefix.bench.run import BenchRun, Case, NotRunError
from sglang_prefix.bench.timing import Clock, clock_for, interleaved, prepare_each
from sglang_prefix.bench.workloads.inputs import AttentionInputs, OutputCheck
from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import Tree, pat_tree, shared_then_private
from sglang_prefix.files import read_json
from sglang_prefix.packing import GPU_PROFILE

__all__ = ["TABLE", "PackShape", "TileWork", "TuneRun", "new_table", "pack_shapes", "write_table"]

_SECONDS_PER_CASE = 3.0
# A choice must be worth its line: the medians of two runs differ by about as much.
_LEAST_GAIN = 1.02
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
_UNSPLIT = replace(GPU_PROFILE, name="unsplit", tiles=())
_SHAPE_FIELDS = ("head_dim", "v_head_dim", "q_itemsize", "kv_itemsize")  # of a table's tile
# Every graph launches the class of 16 rows, and most of them that of 64 and that of all rows of
# their batch, most often 128.
_ROWS = (16, 128, 64, 32)


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
        return [PackShape(128, *more) for more in (("bf16", 16), ("bf16", 32), ("fp8_e4m3", 32))]
    return [
        PackShape(dim, dtype, rows)
        for dtype, dim, rows in product(("bf16", "fp8_e4m3"), (128, 64), _ROWS)
    ]


class TileWork:
    """Tensors and launches of a pack shape.

    Args:
        pack: which.
        device, seed: of the tensors.
        dry: tiny, and float16 instead of bfloat16.
        size: packs, and tokens of each; None for what fills the device.

    Attributes:
        shape: for which a tile is chosen.
        tiles: that are worth trying; the first one is the formula's, used without a table.
        num_packs, tokens, kv_bytes: size of the packs.
    """

    def __init__(
        self,
        pack: PackShape,
        device: torch.device,
        seed: int,
        *,
        dry: bool,
        size: tuple[int, int] | None = None,
    ) -> None:
        self._num_sms = 1
        if device.type == "cuda":
            self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        dim, kv_heads = (16, 1) if dry else (pack.head_dim, _KV_HEADS)
        heads = Heads(_GROUP * kv_heads, kv_heads, dim, dim)
        dtype = torch.float16 if dry else torch.bfloat16
        kv_dtype = dtype if pack.kv_dtype == "bf16" else torch.float8_e4m3fn
        # As TritonExecutor has it.
        major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
        sizes = (dtype.itemsize, kv_dtype.itemsize)
        self.shape = TileShape(heads.dim, heads.dim, *sizes).on_arch(f"sm_{major}0")
        token_bytes = 2 * heads.kv * heads.dim * kv_dtype.itemsize
        usual = (2, 33) if dry else _size(self._num_sms, token_bytes)
        self.num_packs, self.tokens = size or usual
        self.kv_bytes = self.num_packs * self.tokens * token_bytes
        inputs = AttentionInputs.lay_out(
            _tree(self.num_packs, self.tokens, pack.rows // _GROUP),
            heads,
            device,
            seed,
            dtype=dtype,
            kv_dtype=kv_dtype,
            poison=True,
        )
        formula = formula_tile(pack.rows, self.shape)
        others = [tile for tile in candidate_tiles(pack.rows, self.shape) if tile != formula]
        self.tiles = [formula, *others[: 1 if dry else None]]
        self._record(inputs, pack.rows)
        self._check = OutputCheck(inputs, seed)

    def _record(self, inputs: AttentionInputs, rows: int) -> None:
        """Record the launches of a plan, and which of them is that of the row class."""
        shape = inputs.heads.shape(inputs.q.dtype, inputs.k.dtype)
        # Owns the buffers that the launches read.
        self._attention = PackedAttention(
            shape,
            inputs.q.device,
            policy="node",
            profile=_UNSPLIT,
            mode="streams",
            merge="launch",
        )
        plan = self._attention.plan(inputs.batch.forest())
        self._attention.load(plan, inputs.req_to_token, inputs.req_pool_indices)
        self._outputs = inputs.outputs()
        executor = self._attention.executor
        self._launches = launches_of(lambda: inputs.run(executor, self._outputs))
        self._place = next(
            i for i, one in enumerate(self._launches) if one.keywords.get("BLOCK_M") == rows
        )
        work_list = self._launches[self._place].keywords["LIST"]
        counts = self._attention.work_item_counts()
        self._num_units = int(counts[work_list]) * inputs.heads.kv

    def forward(self, tile: TileConfig) -> partial[None]:
        """The launch of the row class, alone, with another tile."""
        one = self._launches[self._place]
        programs = min(self._num_units, self._num_sms * tile.resident_programs(self.shape))
        options = {
            "BLOCK_N": tile.block_n,
            **tile.switches,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "maxnreg": tile.max_registers,
        }
        return partial(launch, one.args[0], (programs,), **one.keywords | options)

    def compile(self, tile: TileConfig) -> tuple[int, int]:
        """Registers and spills of a thread; zeros in the interpreter. Launches it once."""
        one = self.forward(tile)
        kernel, grid = one.args
        compiled = kernel[grid](**one.keywords)
        return getattr(compiled, "n_regs", 0), getattr(compiled, "n_spills", 0)

    def prepare(self, tile: TileConfig, clock: Clock) -> tuple[dict[str, Any], Callable[[], float]]:
        """Compile and check a tile: what the result has of it, and what times its launch once.

        Raises:
            NotRunError: it is too large for this device, or spills.
            MismatchError: see :meth:`check`.
        """
        try:
            registers, spills = self.compile(tile)
        except Exception as error:  # the driver's, or the compiler's
            raise NotRunError(f"{type(error).__name__}: {error}"[:500]) from None
        if spills:
            raise NotRunError(f"spills, {spills} by the driver's count")
        facts = {"tile": asdict(tile), "registers": registers, "error": self.check(tile)}
        return facts, partial(clock.seconds_of, clock.replayable(self.forward(tile)))

    def check(self, tile: TileConfig) -> float:
        """The largest error of an element, all launches made, that of the row class with a tile.

        Raises:
            MismatchError: the output is not what the oracle, or the first tile, says.
        """
        self._outputs.poison()
        for place, one in enumerate(self._launches):
            (self.forward(tile) if place == self._place else one)()
        return self._check(self._outputs.out)


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
    makers = {_name(tile): partial(work.prepare, tile, clock) for tile in work.tiles}
    ready, absent, failed = prepare_each(makers, clock)
    tiles = {name: facts for name, (facts, _) in ready.items()}
    works = {name: seconds_of for name, (_, seconds_of) in ready.items()}
    rounds = clock.rounds_within(_SECONDS_PER_CASE)
    for name, seconds in interleaved(works, rounds, warmups=int(not clock.dry)).items():
        tiles[name] |= {
            "kernel_us": median(seconds) * 1e6,
            "raw_us": [one * 1e6 for one in seconds],
        }
    return {
        "shape": {key: getattr(work.shape, key) for key in _SHAPE_FIELDS},
        "packs": work.num_packs,
        "tokens_per_pack": work.tokens,
        "kv_bytes": work.kv_bytes,
        "formula": _name(work.tiles[0]),
        "tiles": tiles,
        "absent": absent,
        "failed": failed,
    }


def _name(tile: TileConfig) -> str:
    size = f"{tile.block_m}x{tile.block_n}"
    return f"{size}/{tile.num_warps} warps/{tile.num_stages} stages/{tile.max_registers} registers"


class TuneRun(BenchRun):
    """The run of `bench tune`; it has no options."""

    kind, file_name = "bench-tune", "tune.json"

    def use(self, options: Mapping[str, Any]) -> None:
        """There are none."""

    def prepare(self) -> None:
        """Name the device, and measure its limits."""
        device = self._device = torch.device(self.data["environment"]["device"])
        # A dry run stands for a device with wgmma.
        self.data |= {"device_name": "cpu", "arch": "sm_90"}
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            name = torch.cuda.get_device_name(device)
            self.data |= {"device_name": name, "arch": f"sm_{major}{minor}"}
        self._clock = clock_for(device, dry=self.data["dry"])
        self.data["limits"] = self._clock.limits(torch.bfloat16)

    def cases(self) -> list[Case]:
        """The most valuable first."""
        return [
            Case(pack.name, f"dim{pack.head_dim}/{pack.kv_dtype}", partial(self._measure, pack))
            for pack in pack_shapes(dry=self.data["dry"])
        ]

    def _measure(self, pack: PackShape) -> dict[str, Any]:
        is_fp8 = pack.kv_dtype != "bf16" and self._device.type == "cuda"
        reason = TritonExecutor.why_not(self._device, torch.bfloat16, torch.float8_e4m3fn)
        if is_fp8 and reason:
            raise NotRunError(reason)
        work = TileWork(pack, self._device, self.data["seed"], dry=self.data["dry"])
        return measure_tiles(work, self._clock)


def write_table(result_file: Path, table: Path = TABLE) -> str:
    """Make a result file the entry of its device: of each case the fastest tile, if it is not the
    formula's or within 2% of it.

    Returns:
        What was written and what to do next, for a reader.

    Raises:
        ValueError: the file is no result of `bench tune`, a dry run's, for which ``table`` must be
            another file, outside the repository, of an architecture that cannot be audited, or
            names a tile that is no candidate; or it holds no shape that was measured.
        OSError: the table cannot be written.
    """
    data = read_result(result_file, TuneRun.kind)
    source = check_source(result_file, data, table, TABLE)
    text, said = new_table(result_file, data, source, table)
    write_checked(table, text, load_tuned_tiles)
    return said


def new_table(
    result_file: Path, data: Mapping[str, Any], source: str, table: Path
) -> tuple[str, str]:
    """What a table becomes with a result; tiles of shapes that it has not measured stay.

    Args:
        result_file, data: the result.
        source: its name in the table.
        table: is not written.

    Returns:
        The table's text, and what it holds and what to do next, for a reader.

    Raises:
        ValueError: the result does not name its device, or measured nothing; the table is none.
    """
    name, arch = data.get("device_name"), data.get("arch")
    if name is None or arch is None:
        raise ValueError(f"{result_file} does not name its device and arch")
    measured = [case for case in data["cases"] if case["formula"] in case["tiles"]]
    if not measured:
        raise ValueError(f"{result_file} has no case that was measured; legal: at least one")
    if table.exists():
        load_tuned_tiles(table)
    content = read_json(table) if table.exists() else {}
    replaced = [_place(case["shape"], case["tiles"][case["formula"]]["tile"]) for case in measured]
    before = content[name]["tiles"] if name in content else []
    tiles = [tile for case in measured if (tile := _faster_tile(case))]
    tiles += [row for row in before if _place(row, row) not in replaced]
    content[name] = {
        "arch": arch,
        "result_file": source,
        "tiles": tiles,
    }
    said = (
        f"{table}: {len(tiles)} tiles for {name}. Next: sglang-prefix kernels --arch {arch}, which "
        "says whether all variants with them are free of spills; then commit both files"
    )
    return json.dumps(content, indent=1) + "\n", said


def _place(shape: Mapping[str, int], tile: Mapping[str, int]) -> tuple[int, ...]:
    """For what a table has one tile."""
    return (*(shape[field] for field in _SHAPE_FIELDS), tile["block_m"])


def _faster_tile(case: dict[str, Any]) -> dict[str, int] | None:
    tiles = case["tiles"]
    formula = tiles[case["formula"]]
    best = min(tiles.values(), key=lambda found: float(found["kernel_us"]))
    if formula["kernel_us"] <= _LEAST_GAIN * best["kernel_us"]:
        return None
    return {**case["shape"], **best["tile"]}
