"""What changed in compiled kernels since a file of their figures was written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from prefix_kernels.compile_report import KernelVariant
from sglang_prefix.bench.results import ResultError, check_type
from sglang_prefix.files import read_json

__all__ = [
    "MAX_GROWTH",
    "Change",
    "Comparison",
    "Variant",
    "compare_figures",
    "read_figures",
]

# By which an inner loop may grow: any change makes a compiler choose registers anew.
MAX_GROWTH = 0.05

# Nothing in a kernel has more; its instructions have 16 bytes each.
Count = Annotated[int, Field(ge=0, lt=1 << 32)]
Name = Annotated[str, Field(pattern=r"^[\w.+-]{1,64}$")]
# Of a variant as a whole; its tiles have more.
_FIGURES = {
    "registers": "registers",
    "spill_bytes": "spilled bytes",
    "shared_bytes": "shared bytes",
    "programs_per_sm": "programs per SM",
    "kv_bytes_in_flight": "KV bytes in flight",
    "num_instructions": "all instructions",
}
_TILE_FIGURES = {"loop_instructions": "loop", "first_copy_instructions": "first copy"}


class Tile(TypedDict):
    """See `tiles.TileConfig`."""

    block_m: Count
    block_n: Count
    num_warps: Count
    num_stages: Count
    max_registers: Count


class TileFigures(TypedDict):
    """See `kernel_report.TileReport`."""

    block_m: Count
    block_n: Count
    loop_instructions: Count
    first_copy_instructions: Count | None


class VariantFigures(TypedDict):
    """What is compared of a `KernelReport.as_dict`."""

    kernel: Name
    head_dim: Count
    dtype: Name
    kv_dtype: Name
    tile: Tile
    narrow_tile: Tile | None
    merge: Name
    group_size: Count
    registers: Count
    spill_bytes: Count
    shared_bytes: Count
    programs_per_sm: Count
    kv_bytes_in_flight: Count | None
    num_instructions: Count
    tiles: Annotated[list[TileFigures], Field(max_length=2)]


class Figures(TypedDict):
    """A file of ``sglang-prefix kernels --json``."""

    kind: Literal["kernels"]
    schema: Literal[1]
    triton: Name
    arch: Name
    variants: Annotated[list[VariantFigures], Field(max_length=10_000)]


# A variant as `KernelReport.as_dict` has it.
Variant = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """A figure of a variant that is not what it was; None where there was, or is, no such one."""

    variant: Variant
    figure: str
    before: int | None
    now: int | None

    @property
    def percent(self) -> float | None:
        """By which it grew; None where that has no meaning."""
        if not self.before or self.now is None:
            return None
        return 100 * (self.now / self.before - 1)

    @property
    def is_loop_growth(self) -> bool:
        """Whether an inner loop grew by more than :data:`MAX_GROWTH`."""
        is_loop = self.figure.startswith(_TILE_FIGURES["loop_instructions"])
        return is_loop and self.percent is not None and self.percent > 100 * MAX_GROWTH


@dataclass(frozen=True, slots=True)
class Comparison:
    """What changed.

    Attributes:
        added, gone: variants that are here alone, and in the file alone.
        changes: of the others, figure by figure.
        num_compared: variants that are in both.
    """

    added: Sequence[Variant]
    gone: Sequence[Variant]
    changes: Sequence[Change]
    num_compared: int


def read_figures(path: Path, triton: str, arch: str) -> dict[str, Any]:
    """Read a file of figures that these can be compared with.

    Args:
        path: what `--json` wrote.
        triton, arch: of the figures to compare.

    Raises:
        OSError: it cannot be read.
        ResultError: it is no such file, or is of another compiler or architecture; one line.
    """
    try:
        data = read_json(path)
    except ValueError as error:
        raise ResultError(f"{path}: {error}") from None
    check_type(path, data, TypeAdapter(Figures), "is no file of `sglang-prefix kernels --json`")
    for key, value in (("triton", triton), ("arch", arch)):
        if data[key] != value:
            raise ResultError(f"{path} cannot be compared: its {key} is {data[key]}, not {value}")
    found: dict[str, Any] = data
    return found


def compare_figures(before: Sequence[Variant], now: Sequence[Variant]) -> Comparison:
    """Compare variants.

    A variant is found by all that was asked of the compiler, or else, where one of each is left, by
    that without warps, stages and registers of its tiles. Of the earlier ones, those of other head
    dims, dtypes and ways to merge are left out.
    """
    pairs, rest, added = _match(before, now, _identity)
    more, rest, added = _match(rest, added, _loose_identity)
    pairs += more
    asked = {_setting(one) for one in now}
    gone = [one for one in rest if _setting(one) in asked]
    changes = [change for pair in pairs for change in _changes(*pair)]
    return Comparison(added, gone, changes, len(pairs))


def _match(
    before: Sequence[Variant], now: Sequence[Variant], identity: Callable[[Variant], str]
) -> tuple[list[tuple[Variant, Variant]], list[Variant], list[Variant]]:
    """Pairs that are alike and the only ones, then what is left of before and of now."""
    times = [Counter(map(identity, side)) for side in (before, now)]
    alone = {key for key, number in times[0].items() if number == times[1][key] == 1}
    earlier = {identity(one): one for one in before}
    pairs = [(earlier[identity(one)], one) for one in now if identity(one) in alone]
    rest = [one for one in before if identity(one) not in alone]
    return pairs, rest, [one for one in now if identity(one) not in alone]


def _identity(variant: Variant) -> str:
    return json.dumps([variant.get(one.name, one.default) for one in fields(KernelVariant)])


def _loose_identity(variant: Variant) -> str:
    tiles = [variant["tile"], variant["narrow_tile"]]
    blocks = [tile and (tile["block_m"], tile["block_n"]) for tile in tiles]
    return json.dumps([*_setting(variant), variant["kernel"], blocks])


def _setting(variant: Variant) -> tuple[str, ...]:
    """All but the kernel and its tiles."""
    names = ("kernel", "tile", "narrow_tile")
    return tuple(
        json.dumps(variant.get(one.name, one.default))
        for one in fields(KernelVariant)
        if one.name not in names
    )


def _changes(before: Variant, now: Variant) -> Iterator[Change]:
    for old, new in zip(before["tiles"], now["tiles"], strict=False):
        for key, figure in _TILE_FIGURES.items():
            if old[key] != new[key]:
                yield Change(now, f"{figure} of {new['block_m']} rows", old[key], new[key])
    for key, figure in _FIGURES.items():
        if before[key] != now[key]:
            yield Change(now, figure, before[key], now[key])
    for key in ("num_warps", "num_stages", "max_registers"):
        if before["tile"][key] != now["tile"][key]:
            figure = key.replace("_", " ").replace("num ", "")
            yield Change(now, figure, before["tile"][key], now["tile"][key])
