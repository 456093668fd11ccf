"""What a pack costs: the model that packing and splitting decide by.

Everything is counted in bytes of main-memory traffic for one layer, all heads together. What else
takes time, arithmetic and fixed costs, is turned into the bytes that the device could have read
meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from prefix_kernels.plan import AttentionShape
from sglang_prefix.files import read_json

__all__ = [
    "CPU_PROFILE",
    "CPU_PROFILES",
    "FITTED",
    "PROFILES_FILE",
    "AttentionShape",
    "CostModel",
    "DeviceProfile",
    "TileCost",
    "load_cpu_profiles",
]


@dataclass(frozen=True, slots=True)
class TileCost:
    """What a tile class of the Triton kernels takes on a GPU.

    Attributes:
        rows: query rows of a tile.
        tokens: KV tokens of a tile.
        sm_share: part of a multiprocessor that one program takes, in registers or shared memory.
        item_us: time of a work item beside its KV: before the first copy and after the loop.
        token_us: time that the instructions for one KV token take on a multiprocessor.
        lone_bytes_per_us: what one program reads at most, with all of its copies in flight.
    """

    rows: int
    tokens: int
    sm_share: float
    item_us: float
    token_us: float
    lone_bytes_per_us: float

    @property
    def programs(self) -> int:
        """Programs that a multiprocessor runs at a time; a share of a third is three."""
        return max(1, int(1 / self.sm_share + 1e-9))


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What the cost model knows of a device.

    Attributes:
        name: for messages and result files.
        max_block_rows: query rows (requests times group size) that read one KV tile together.
        reread_cost: cost of a further row block reading the same KV, as a share of reading it
            from main memory; below 1 because the KV then comes from a cache.
        pack_bytes: fixed cost of one pack, in bytes the device could have read instead.
        min_split_tokens: no pack is cut into splits shorter than this, or than a tile.
        query_cost: cost of one more query in a pack, over that of the bytes of q and its partial.
        element_cost: cost of an element of KV, in bytes, beyond reading it: of converting and
            copying it. Like the two below, 0 where it hides behind reads.
        lone_row_cost: cost of multiplying an element by a row of a request that reads alone.
        pack_row_cost: the same by a row of a pack.
        num_sms: multiprocessors of a GPU.
        read_bytes_per_us: bandwidth of its main memory.
        tiles: its tile classes by ascending rows, the last of ``max_block_rows``; packs are split
            until they fill the programs of their class. None: one pass uses all of the device.
    """

    name: str
    max_block_rows: int
    reread_cost: float
    pack_bytes: int
    min_split_tokens: int
    query_cost: float = 1.0
    element_cost: float = 0.0
    lone_row_cost: float = 0.0
    pack_row_cost: float = 0.0
    num_sms: int = 1
    read_bytes_per_us: float = 1.0
    tiles: tuple[TileCost, ...] = ()

    @property
    def sm_bytes_per_us(self) -> float:
        """A multiprocessor's share of the bandwidth."""
        return self.read_bytes_per_us / self.num_sms

    def narrowed_to(self, max_block_rows: int) -> DeviceProfile:
        """The same for an executor whose widest tile has so many rows, if that is fewer."""
        rows = min(self.max_block_rows, max_block_rows)
        tiles = [tile for tile in self.tiles if tile.rows < rows]
        tiles += [replace(tile, rows=rows) for tile in self.tiles if tile.rows >= rows][:1]
        return replace(self, max_block_rows=rows, tiles=tuple(tiles))


# Written by `sglang-prefix bench profile --write-table`.
PROFILES_FILE = Path(__file__).with_name("cpu_profiles.json")
# What is measured, and what is above any measurement.
FITTED = {
    "pack_bytes": 1e9,
    **dict.fromkeys(("query_cost", "element_cost", "lone_row_cost", "pack_row_cost"), 1e6),
}


def load_cpu_profiles(path: Path) -> dict[str, DeviceProfile]:
    """Read the profiles of a CPU by executor, as `sglang-prefix bench profile` writes them.

    On a CPU a pack is read once, whatever its rows, and executors share work out themselves.

    Raises:
        ValueError: the file is no such table; one line.
    """
    try:
        table = read_json(path)["profiles"]
        found = {}
        for executor in ("native", "torch"):
            values = {name: table[executor][name] for name in FITTED}
            for name, value in values.items():
                if type(value) not in (int, float) or not 0 <= value <= FITTED[name]:
                    raise ValueError(f"{name} of {executor} is {value!r}")
            found[executor] = DeviceProfile(
                "cpu",
                max_block_rows=1 << 20,
                reread_cost=0.0,
                min_split_tokens=1 << 20,
                **values | {"pack_bytes": max(1, int(values["pack_bytes"]))},
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of CPU profiles: {error!r}") from error
    return found


# By executor. The table names the result file that it was made of, of two threads of an AMD EPYC
# with AVX2. Its numbers are ratios to the time of a read: a processor that is faster at everything
# has the same ones; where arithmetic is much faster than reads, as with AMX, they are too high.
CPU_PROFILES = load_cpu_profiles(PROFILES_FILE)
CPU_PROFILE = CPU_PROFILES["native"]


@dataclass(frozen=True, slots=True)
class CostModel:
    """Bytes of the parts of a plan, for one attention shape on one device."""

    shape: AttentionShape
    device: DeviceProfile

    def row_blocks(self, num_queries: int) -> int:
        """How many row blocks read a pack's KV, each of them all of it."""
        return -(-num_queries * self.shape.group_size // self.device.max_block_rows)

    @property
    def lone_token_bytes(self) -> float:
        """Cost per KV token of a request that reads alone."""
        return self.pack_token_bytes + self.device.lone_row_cost * self._multiplications

    @property
    def pack_token_bytes(self) -> float:
        """Cost per KV token of a pack, whatever its rows."""
        elements = self._multiplications / self.shape.group_size
        return self.shape.kv_token_bytes + self.device.element_cost * elements

    @property
    def query_token_bytes(self) -> float:
        """Cost per KV token of one more query in a pack: through the row blocks that it adds, and
        for its own arithmetic."""
        share = self.device.reread_cost * self.shape.group_size / self.device.max_block_rows
        arithmetic = self.device.pack_row_cost * self._multiplications
        return share * self.shape.kv_token_bytes + arithmetic

    @property
    def pack_bytes(self) -> float:
        """Fixed cost of one pack: on a GPU that of an item per KV head, in the narrowest tile."""
        device = self.device
        per_head = sum(tile.item_us * tile.sm_share for tile in device.tiles[:1])
        return device.pack_bytes + self.shape.num_kv_heads * per_head * device.sm_bytes_per_us

    @property
    def query_bytes(self) -> float:
        """Cost of one more query in a pack that writes partials: its q and its partial."""
        return self.device.query_cost * (self.shape.query_bytes + self.shape.partial_bytes)

    @property
    def _multiplications(self) -> int:
        """Of one query with one KV token."""
        return self.shape.num_qo_heads * (self.shape.head_dim + self.shape.v_head_dim)
