"""Settings of the backend: one typed object, from ``SGLANG_PREFIX_*`` environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BACKEND_NAME", "EXTENDS", "GATES", "PrefixConfig", "verify_requested", "wrap_requested"]

# Value of SGLang's attention backend flags that chooses our backend.
BACKEND_NAME = "prefix"

GATES = ("auto", "always", "never")
EXTENDS = ("auto", "always", "never")


@dataclass(frozen=True, slots=True)
class PrefixConfig:
    """What a user can set.

    Attributes:
        gate: ``SGLANG_PREFIX_GATE``: "auto" packs the batches for which that is predicted to be
            faster, "always" every batch it can, "never" none. The CPU executors are faster than the
            stock backend whatever is shared, so there "auto" is "always".
        extends: ``SGLANG_PREFIX_EXTENDS``: whether extends over cached prefixes are packed where
            our backend has a part in prefill: "auto" on the CPU, "always" on a GPU as well, where
            the gate decides and nothing has been measured, "never" nowhere.
        policy: ``SGLANG_PREFIX_POLICY``: name of the packing policy.
        wrap: ``SGLANG_PREFIX``: pack the decode of whatever backend SGLang has chosen or was told,
            without our name.
        stock_backend: ``SGLANG_PREFIX_STOCK_BACKEND``: SGLang attention backend to delegate to;
            None for the one that SGLang would have chosen.
        verify: ``SGLANG_PREFIX_VERIFY``: check every plan against the slot rows and raise on a
            difference; for debugging, costs a device sync per plan.
        keep_plan: ``SGLANG_PREFIX_KEEP_PLAN``: keep the newest plan, and show it in
            ``GET /server_info``; for ``sglang-prefix explain --base-url``.
        executor: ``SGLANG_PREFIX_EXECUTOR``: what runs the plans: "native" is compiled code for
            CPUs, "torch" torch operations, "triton" kernels, "auto" the fastest that works.
        launch_mode, merge_mode: ``SGLANG_PREFIX_LAUNCH_MODE``, ``SGLANG_PREFIX_MERGE_MODE``: how
            the Triton executor launches, see docs/kernels.md; "auto" goes by the batch size.
        workspace_mib: ``SGLANG_PREFIX_WORKSPACE_MIB``: memory for plans and partial results, in
            MiB; of the torch executor, for partial results.
    """

    gate: str = "auto"
    extends: str = "auto"
    policy: str = "pat"
    wrap: bool = False
    stock_backend: str | None = None
    verify: bool = False
    keep_plan: bool = False
    executor: str = "auto"
    launch_mode: str = "auto"
    merge_mode: str = "auto"
    workspace_mib: int = 256

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> PrefixConfig:
        """Read and validate the environment.

        Raises:
            ValueError: a variable has a value that is not legal; the message names both.
        """
        from prefix_kernels.executor import EXECUTORS
        from prefix_kernels.launches import AUTO, LAUNCH_MODES, MERGE_MODES
        from sglang_prefix.packing import POLICIES

        env = os.environ if env is None else env
        legal = {
            "gate": GATES,
            "extends": EXTENDS,
            "policy": tuple(POLICIES),
            "executor": EXECUTORS,
            "launch_mode": (AUTO, *LAUNCH_MODES),
            "merge_mode": (AUTO, *MERGE_MODES),
        }
        default = cls()
        chosen = {
            name: _one_of(env, f"SGLANG_PREFIX_{name.upper()}", getattr(default, name), values)
            for name, values in legal.items()
        }
        return cls(
            **chosen,
            wrap=_switch(env, "SGLANG_PREFIX"),
            stock_backend=env.get("SGLANG_PREFIX_STOCK_BACKEND") or None,
            verify=verify_requested(env),
            keep_plan=_switch(env, "SGLANG_PREFIX_KEEP_PLAN"),
            workspace_mib=_positive_int(env, "SGLANG_PREFIX_WORKSPACE_MIB", default.workspace_mib),
        )


def wrap_requested() -> bool:
    """Whether ``SGLANG_PREFIX`` has any value but 0, legal or not: who asks reads it once more."""
    return os.environ.get("SGLANG_PREFIX", "") not in ("", "0")


def verify_requested(env: Mapping[str, str] | None = None) -> bool:
    """Whether ``SGLANG_PREFIX_VERIFY`` asks for every plan to be checked."""
    env = os.environ if env is None else env
    return _switch(env, "SGLANG_PREFIX_VERIFY")


def _switch(env: Mapping[str, str], name: str) -> bool:
    return _one_of(env, name, "0", ("0", "1")) == "1"


def _one_of(env: Mapping[str, str], name: str, default: str, legal: tuple[str, ...]) -> str:
    value = env.get(name) or default
    if value not in legal:
        raise ValueError(f"{name}={value!r} is not legal; legal: {', '.join(legal)}")
    return value


def _positive_int(env: Mapping[str, str], name: str, default: int) -> int:
    value = env.get(name) or str(default)
    if not value.isascii() or not value.isdigit() or int(value) == 0:
        raise ValueError(f"{name}={value!r} is not legal; legal: a positive whole number")
    return int(value)
