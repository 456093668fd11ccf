"""The environment in which SGLang imports on this host, GPU or not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

__all__ = ["SglKernel", "find_sgl_kernel", "has_gpu", "sglang_environment", "stand_in_root"]

_GPU_DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd")

# Run with -P: a folder `sgl_kernel` in the working directory is not an installation.
_PROBE = "import sgl_kernel; print(getattr(sgl_kernel, 'IS_STAND_IN', False))"


class SglKernel(NamedTuple):
    """What `import sgl_kernel` gives in a fresh process.

    Attributes:
        kind: "real", "stand-in" (already on the path), "broken" (installed, does not import) or
            "missing".
        detail: for "broken", why it does not import, in one line; else empty.
    """

    kind: Literal["real", "stand-in", "broken", "missing"]
    detail: str = ""


def find_sgl_kernel() -> SglKernel:
    """Import `sgl_kernel` in a subprocess, since loading kernels cannot be undone in this one."""
    if find_spec("sgl_kernel") is None:
        return SglKernel("missing")
    probe = subprocess.run(
        [sys.executable, "-P", "-c", _PROBE],
        stdin=subprocess.DEVNULL,  # what is piped in is for the command
        capture_output=True,
        text=True,
        errors="replace",
    )
    if probe.returncode:
        return SglKernel("broken", _cause(probe.stderr) or f"status {probe.returncode}")
    return SglKernel("stand-in" if probe.stdout.split()[-1:] == ["True"] else "real")


def _cause(error_output: str) -> str:
    """Pick the line of a failed import that a user can act on: the library that is missing."""
    lines = [line.strip(" -") for line in error_output.strip().splitlines()]
    missing = [line for line in lines if "cannot open shared object file" in line]
    return [*lines[-1:], *missing[:1]][-1] if lines else ""


def stand_in_root() -> Path:
    """Return the folder that holds the stand-in `sgl_kernel`, to be put on `PYTHONPATH`."""
    spec = find_spec("prefix_patches.sgl_kernel_cpu")
    if spec is None or spec.origin is None:
        raise RuntimeError("sglang-prefix is installed without its sgl_kernel stand-in: reinstall")
    return Path(spec.origin).parent


def has_gpu() -> bool:
    """Whether this host has a GPU's device files: NVIDIA's driver or AMD's."""
    return any(Path(node).exists() for node in _GPU_DEVICE_FILES)


def sglang_environment(kernel: SglKernel, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment in which SGLang imports on this host.

    Args:
        kernel: what `find_sgl_kernel` found; "broken" and "missing" get the stand-in where there
            is no GPU. Where there is one, a broken installation is to show itself.
        base: the environment to start from; not changed.
    """
    environment = dict(base)
    if has_gpu():
        return environment
    if kernel.kind in ("broken", "missing"):
        paths = [str(stand_in_root()), *filter(None, [base.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    # Read once, when SGLang is imported: without it SGLang looks for CUDA.
    environment["SGLANG_USE_CPU_ENGINE"] = "1"
    return environment
