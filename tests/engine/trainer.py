"""What a trainer does to an engine while its requests run: pause, new weights, memory, abort."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sglang_prefix.bench.engine import free_port

__all__ = ["Step", "take_steps"]

# The name of a step and what it is done with:
#   ("pause", MODE)       in_place: requests stay where they are; retract: they lose their KV
#   ("continue",)
#   ("flush",)            empties the radix cache
#   ("disk", MODEL, CACHE)    weights of the model in a folder, read by the engine; CACHE is what
#                             becomes of KV of the old ones: flush, keep
#   ("tensor", MODEL, CACHE)  the same, sent
#   ("distributed", MODEL, CACHE)  the same, broadcast over a process group of its own
#   ("release",), ("resume",)  memory of weights and cache
#   ("abort", RID)
Step = tuple[str, ...]

# For a message to cross a local socket; the scheduler looks for messages before each pass.
ARRIVAL_S = 0.3


async def take_steps(engine: Any, steps: Sequence[Step], hold: Path) -> None:
    """Take the first step while the scheduler is held, let it go on, take the others.

    Without a file ``hold`` the scheduler is not held, and nothing is waited for.
    """
    while hold.exists() and not hold.with_suffix(".reached").exists():
        await asyncio.sleep(0.01)
    caller = copy.copy(engine)
    caller.loop = _LoopOfAnotherThread(engine.loop)
    first = asyncio.create_task(asyncio.to_thread(_take, caller, steps[0]))
    # One that came too late would be taken at another token than in the engine beside it.
    await asyncio.sleep(5 * ARRIVAL_S)
    hold.unlink(missing_ok=True)
    await first
    for step in steps[1:]:
        await asyncio.sleep(ARRIVAL_S)
        await asyncio.to_thread(_take, caller, step)


class _LoopOfAnotherThread:
    """Lets the methods of an engine be called while its loop runs requests."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def run_until_complete(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The coroutine's result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def _take(engine: Any, step: Step) -> None:
    from sglang.srt.managers import io_struct

    manager, wait_for = engine.tokenizer_manager, engine.loop.run_until_complete
    match step:
        case ("pause", mode):
            wait_for(manager.pause_generation(io_struct.PauseGenerationReqInput(mode=mode)))
        case ("continue",):
            wait_for(manager.continue_generation(io_struct.ContinueGenerationReqInput()))
        case ("flush",):
            _check(engine.flush_cache())
        case ("disk", model, cache):
            update = io_struct.UpdateWeightFromDiskReqInput(
                model_path=model, flush_cache=cache == "flush"
            )
            _check(wait_for(manager.update_weights_from_disk(update)))
        case ("tensor", model, cache):
            weights = list(_weights(model).items())
            with _session(engine):
                _check(engine.update_weights_from_tensor(weights, flush_cache=cache == "flush"))
        case ("distributed", model, cache):
            with _session(engine):
                _broadcast_weights(engine, _weights(model), cache == "flush")
        case ("release",):
            engine.release_memory_occupation()
        case ("resume",):
            engine.resume_memory_occupation()
        case ("abort", rid):

            async def abort() -> None:
                manager.abort_request(rid)

            wait_for(abort())
        case _:
            raise ValueError(f"step {step!r} is not known")


def _check(answer: Any) -> None:
    success = answer[0] if isinstance(answer, tuple) else answer.success
    assert success, answer


@contextlib.contextmanager
def _session(engine: Any) -> Iterator[None]:
    """Between the calls that later releases ask for."""
    has_sessions = hasattr(engine, "begin_weight_update")
    if has_sessions:
        _check(engine.begin_weight_update())
    yield
    if has_sessions:
        _check(engine.end_weight_update())


def _broadcast_weights(engine: Any, weights: dict[str, Any], flush: bool) -> None:
    """As the trainer of a process group of two; the engine's only rank is the other."""
    import torch
    from sglang.srt.utils.common import init_custom_process_group

    port = free_port()
    group_name = f"weights-{port}"  # a name can be given once
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(
            engine.init_weights_update_group,
            master_address="127.0.0.1",
            master_port=port,
            rank_offset=1,
            world_size=2,
            group_name=group_name,
            backend="gloo",
        )
        group = init_custom_process_group(
            backend="gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            world_size=2,
            rank=0,
            group_name=group_name,
        )
        _check(joined.result())
        updated = pool.submit(
            engine.update_weights_from_distributed,
            names=list(weights),
            dtypes=[str(weight.dtype).removeprefix("torch.") for weight in weights.values()],
            shapes=[list(weight.shape) for weight in weights.values()],
            group_name=group_name,
            flush_cache=flush,
        )
        for weight in weights.values():
            torch.distributed.broadcast(weight, src=0, group=group)
        _check(updated.result())


def _weights(model: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(Path(model) / "model.safetensors")
