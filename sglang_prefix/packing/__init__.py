"""Packing: from a prefix forest to packs, by a cost model, as pure functions on host arrays."""

from sglang_prefix.packing.cost import (
    CPU_PROFILE,
    CPU_PROFILES,
    GPU_PROFILE,
    AttentionShape,
    CostModel,
    DeviceProfile,
)
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
    "policy_named",
]
