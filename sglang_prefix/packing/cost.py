"""What a pack costs: the byte model that packing and splitting decide by.

Everything is counted in bytes of main-memory traffic for one layer, all heads together. Fixed
costs are turned into the bytes that the device could have moved in the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefix_kernels.plan import AttentionShape

__all__ = ["CPU_PROFILE", "GPU_PROFILE", "AttentionShape", "CostModel", "DeviceProfile"]


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What the cost model knows of a device.

    Attributes:
        name: for messages and result files.
        max_block_rows: query rows (requests times group size) that read one KV tile together.
        reread_cost: cost of a further row block reading the same KV, as a share of reading it
            from main memory; below 1 because the KV then comes from a cache.
        pack_bytes: fixed cost of one pack, in bytes the device could have read instead.
        num_workers: programs that run at the same time; packs are split until they fill it.
        min_split_tokens: no pack is cut into splits shorter than this.
    """

    name: str
    max_block_rows: int
    reread_cost: float
    pack_bytes: int
    num_workers: int
    min_split_tokens: int


# The torch executor takes all rows of a pack in one matrix product and parallelises inside it:
# nothing is read twice and nothing is gained by splitting. A pack costs about eight torch calls. At
# 5 us a call and 12 GB/s, round figures for one server core, that is the time of some 480 kB. The
# native executor, which splits packs by itself, is planned for like it until it is measured.
CPU_PROFILE = DeviceProfile(
    name="cpu",
    max_block_rows=1 << 20,
    reread_cost=0.0,
    pack_bytes=480_000,
    num_workers=1,
    min_split_tokens=1 << 20,
)

# 128 rows is the widest tile of the kernels. The other figures come from the data sheet and are not
# measured: 132 SMs at two programs each; a program costs about 2 us to start and drain at
# 4.8 TB/s / 132 SMs; L2 delivers some 2.5 times what main memory does.
GPU_PROFILE = DeviceProfile(
    name="cuda",
    max_block_rows=128,
    reread_cost=0.4,
    pack_bytes=72_000,
    num_workers=264,
    min_split_tokens=256,
)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Bytes of the parts of a plan, for one attention shape on one device."""

    shape: AttentionShape
    device: DeviceProfile

    def row_blocks(self, num_queries: int) -> int:
        """How many row blocks read a pack's KV, each of them all of it."""
        return -(-num_queries * self.shape.group_size // self.device.max_block_rows)

    @property
    def query_bytes(self) -> int:
        """Cost of one more query in a pack that writes partials: its q and its partial."""
        return self.shape.query_bytes + self.shape.partial_bytes

    @property
    def reread_bytes(self) -> float:
        """Cost per KV token of one more query in a pack, through the row blocks it adds."""
        share = self.device.reread_cost * self.shape.group_size / self.device.max_block_rows
        return share * self.shape.kv_token_bytes
