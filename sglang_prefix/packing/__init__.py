"""Packing: from a prefix forest to packs, by a cost model, as pure functions on host arrays."""

from sglang_prefix.packing.cost import (
    CPU_PROFILE,
    CPU_PROFILES,
    AttentionShape,
    CostModel,
    DeviceProfile,
    TileCost,
)
from sglang_prefix.packing.gpu import GPU_PROFILE
from sglang_prefix.packing.packs import Packs
from sglang_prefix.packing.policies import POLICIES, PackPolicy, policy_named

__all__ = [
    "CPU_PROFILE",
    "CPU_PROFILES",
    "GPU_PROFILE",
    "POLICIES",
    "AttentionShape",
    "CostModel",
    "DeviceProfile",
    "PackPolicy",
    "Packs",
    "TileCost",
    "policy_named",
]
