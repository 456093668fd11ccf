"""The one way to run a real engine: in a child process, which runs functions on it when asked.

A process of its own, in a session of its own, because SGLang kills all processes that it finds
below itself when an engine fails or is shut down.
"""

from __future__ import annotations

import os
import random
import socket
import time
import tomllib
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from sglang_prefix.bench.child import ChildProcess
from sglang_prefix.bench.hooks import HOOKS_FOLDER, HOOKS_VARIABLE
from sglang_prefix.files import write_file
from sglang_prefix.sglang_environment import find_sgl_kernel, sglang_environment

__all__ = [
    "EngineProcess",
    "counter_difference",
    "counters",
    "engine_environment",
    "flush",
    "free_port",
    "greedy",
    "is_free",
    "sum_of_ranks",
    "write_plugin",
]

ROOT = Path(__file__).parents[2]
_FLUSH_TRIES = 50
# Counters that hold the newest value; all others are added to.
_NEWEST = (
    "delegated_layers",
    "executor",
    "hook_us",
    "kv_read_ratio",
    "last_plan",
    "num_packs",
    "num_partials",
    "predicted_packed_us",
    "predicted_stock_us",
    "reused_step_us",
)


class EngineProcess(ChildProcess):
    """A ``sglang.Engine`` in a child process; functions that are asked for get it first.

    Args:
        arguments: keyword arguments of ``sglang.Engine``; ``port`` and ``nccl_port`` are chosen
            here where they are missing.
        environment: of the engine's processes, see `engine_environment`; None for this process's.
        log: file for what they print; written anew.

    Attributes:
        description: once it has started: "sglang", the release; "started_s", seconds to start;
            "arguments"; "settings", the SGLang and plugin variables of its environment;
            "max_total_num_tokens"; "load_format"; "plugin", the distributions through which SGLang
            finds our backend.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        log: Path,
    ) -> None:
        port = free_port()
        # Left to itself, SGLang before 0.5.22 takes a second port that may be gone.
        given = {"port": port, "nccl_port": port + 1, **arguments}
        make = f"{__name__}:start_engine"
        super().__init__(
            make, {"arguments": given}, name="engine", environment=environment, log=log
        )


def engine_environment(
    settings: Mapping[str, str],
    *,
    hooks: Sequence[str] = (),
    paths: Sequence[Path | str] = (),
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment for an engine on this host: as ``sglang-prefix exec`` has it, and settings.

    Args:
        settings: variables to set.
        hooks: modules that every process of the engine loads first, see
            :mod:`sglang_prefix.bench.hooks`.
        paths: put in front of ``PYTHONPATH``. The roots of a source checkout come last in it, so
            that hooks and functions to call are found in the child, too.
        base: the environment to start from; None for this process's without what it sets for the
            backend, so that the backend runs as it comes.
    """
    if base is None:
        base = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_PREFIX")}
    found = sglang_environment(find_sgl_kernel(), base)
    is_checkout = (ROOT / "kernels").is_dir()
    roots = (ROOT, ROOT / "kernels", ROOT / "patches") if is_checkout else ()
    places = [*paths, *filter(None, [found.get("PYTHONPATH")]), *roots]
    if hooks:
        places.insert(0, HOOKS_FOLDER)
        found[HOOKS_VARIABLE] = ",".join(hooks)
    return found | {"PYTHONPATH": os.pathsep.join(map(str, places)), **settings}


def write_plugin(folder: Path) -> Path | None:
    """Make our source tree a distribution to `importlib.metadata`, which SGLang asks for plugins.

    Args:
        folder: to be put on ``PYTHONPATH`` before any place where the package is installed.

    Returns:
        The ``.dist-info`` folder in it, with the name, version and entry points of pyproject.toml.
        None in an installed wheel, which is a distribution already.
    """
    if not (ROOT / "pyproject.toml").is_file():
        return None
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    write_file(info / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items()), ""]
    write_file(info / "entry_points.txt", "\n".join(lines))
    return info


def free_port() -> int:
    """A TCP port that nothing listens on, nor on those above it that an engine takes, too.

    With DP attention the processes of an engine talk on ports from 233 above it on. Ports that the
    system hands out for connections, from 32768 on, may be taken between the choice and their use.
    So may others: two processes that choose at the same time mostly choose different ones, though
    ports of DP attention may meet.
    """
    ports = list(range(10_000 + 2 * (os.getpid() % 115), 32_000, 275))
    random.SystemRandom().shuffle(ports)
    for port in ports:
        needed = (port, port + 1, *range(port + 233, port + 243))
        if port not in _newest_ports and all(map(is_free, needed)):
            _newest_ports.append(port)
            del _newest_ports[:-8]
            return port
    raise RuntimeError("no free TCP port between 10000 and 32000")


# Given out, and perhaps not listened on yet.
_newest_ports: list[int] = []


def is_free(port: int) -> bool:
    """Whether nothing on this machine listens on a TCP port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


# What follows runs in the child.


def counters(engine: Any) -> dict[str, Any]:
    """The backend's counters, added up over ranks; empty for a stock engine."""
    return sum_of_ranks(engine.get_server_info())


def sum_of_ranks(info: Mapping[str, Any]) -> dict[str, Any]:
    """The counters in an answer of ``/server_info``, added up; empty for a stock server.

    Ranks with batches of their own all answer, in any order.
    """
    found: dict[str, Any] = {}
    for state in info["internal_states"]:
        # A rank has one for each model runner; the first is the target model's.
        first, *_ = state.get("sglang_prefix") or [{}]
        found = _sum(found, first)
    return found


def _sum(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Counters added up, in mappings by reason and by kind of pass too."""
    found = dict(one)
    for name, value in other.items():
        if name in _NEWEST or name not in found:
            found[name] = value
        elif isinstance(value, Mapping):
            found[name] = _sum(found[name], value)
        else:
            found[name] += value
    return found


def counter_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What was added to the counters, and the newest of what does not add up."""
    found: dict[str, Any] = {}
    for name, value in after.items():
        if name in _NEWEST:
            found[name] = value
        elif name.endswith("_reasons"):
            old = before.get(name, {})
            found[name] = {k: n - old.get(k, 0) for k, n in value.items() if n > old.get(k, 0)}
        elif isinstance(value, Mapping):  # of another kind of pass
            found[name] = counter_difference(before.get(name, {}), value)
        else:
            found[name] = value - before.get(name, 0)
    if found.get("kv_tokens_logical"):
        found["kv_read_ratio"] = found["kv_tokens_read"] / found["kv_tokens_logical"]
    return found


def greedy(num_tokens: int) -> dict[str, Any]:
    """Sampling parameters for an answer of this length without chance."""
    return {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}


def flush(engine: Any) -> None:
    """Empty the radix cache; an engine is not idle at once when the last answer is out."""
    for _ in range(_FLUSH_TRIES):
        if engine.flush_cache().success:
            return
        time.sleep(0.1)
    raise RuntimeError("the engine would not empty its cache")


def start_engine(arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The engine, and what it is."""
    began = time.perf_counter()
    import sglang

    engine: Any = sglang.Engine(**arguments)
    info = engine.get_server_info()
    points = entry_points(group="sglang.srt.plugins", name="prefix")
    return engine, {
        "sglang": sglang.__version__,
        "started_s": time.perf_counter() - began,
        "arguments": arguments,
        "settings": {k: v for k, v in os.environ.items() if k.startswith("SGLANG_")},
        "max_total_num_tokens": info["max_total_num_tokens"],
        "load_format": info["load_format"],
        "plugin": [str(getattr(point.dist, "_path", "")) for point in points],
    }
