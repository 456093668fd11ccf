"""What a trainer does to an engine while its requests run: pause, new weights, memory, abort."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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
    first = asyncio.create_task(_take(engine, steps[0]))
    await asyncio.sleep(ARRIVAL_S)
    hold.unlink(missing_ok=True)
    await first
    for step in steps[1:]:
        await asyncio.sleep(ARRIVAL_S)
        await _take(engine, step)


async def _take(engine: Any, step: Step) -> None:
    from sglang.srt.managers import io_struct

    manager = engine.tokenizer_manager
    match tuple(step):
        case ("pause", mode):
            await manager.pause_generation(io_struct.PauseGenerationReqInput(mode=mode))
        case ("continue",):
            await manager.continue_generation(io_struct.ContinueGenerationReqInput())
        case ("flush",):
            _check(await manager.flush_cache())
        case ("disk", model, cache):
            update = io_struct.UpdateWeightFromDiskReqInput(
                model_path=model, flush_cache=cache == "flush"
            )
            _check(await manager.update_weights_from_disk(update))
        case ("tensor", model, cache):
            await _in_session(manager, _send_weights(manager, model, cache == "flush"))
        case ("distributed", model, cache):
            await _in_session(manager, _broadcast_weights(manager, model, cache == "flush"))
        case ("release",):
            await manager.release_memory_occupation(io_struct.ReleaseMemoryOccupationReqInput())
        case ("resume",):
            await manager.resume_memory_occupation(io_struct.ResumeMemoryOccupationReqInput())
        case ("abort", rid):
            manager.abort_request(rid)
        case _:
            raise ValueError(f"step {step!r} is not known")


def _check(answer: Any) -> None:
    if isinstance(answer, tuple):
        success, message, *_ = answer
    else:
        success, message = answer.success, getattr(answer, "message", answer)
    assert success, message


async def _in_session(manager: Any, update: Any) -> None:
    """Update in between the calls that later releases ask for."""
    from sglang.srt.managers import io_struct

    has_sessions = hasattr(io_struct, "BeginWeightUpdateReqInput")
    if has_sessions:
        _check(await manager.begin_weight_update(io_struct.BeginWeightUpdateReqInput(), None))
    await update
    if has_sessions:
        _check(await manager.end_weight_update(io_struct.EndWeightUpdateReqInput(), None))


async def _send_weights(manager: Any, model: str, flush: bool) -> None:
    from sglang.srt.managers import io_struct
    from sglang.srt.utils import MultiprocessingSerializer

    weights = list(_weights(model).items())
    _check(
        await manager.update_weights_from_tensor(
            io_struct.UpdateWeightsFromTensorReqInput(
                serialized_named_tensors=[MultiprocessingSerializer.serialize(weights)],
                flush_cache=flush,
            ),
            None,
        )
    )


async def _broadcast_weights(manager: Any, model: str, flush: bool) -> None:
    """As the trainer of a process group of two; the engine's only rank is the other."""
    import torch
    from sglang.srt.managers import io_struct
    from sglang.srt.utils.common import init_custom_process_group

    weights = _weights(model)
    port = free_port()
    name = f"weights-{port}"  # a name can be given once
    joined = asyncio.create_task(
        manager.init_weights_update_group(
            io_struct.InitWeightsUpdateGroupReqInput(
                master_address="127.0.0.1",
                master_port=port,
                rank_offset=1,
                world_size=2,
                group_name=name,
                backend="gloo",
            ),
            None,
        )
    )
    await asyncio.sleep(0)
    group = await asyncio.to_thread(
        init_custom_process_group,
        backend="gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        world_size=2,
        rank=0,
        group_name=name,
    )
    _check(await joined)
    updated = asyncio.create_task(
        manager.update_weights_from_distributed(
            io_struct.UpdateWeightsFromDistributedReqInput(
                names=list(weights),
                dtypes=[str(weight.dtype).removeprefix("torch.") for weight in weights.values()],
                shapes=[list(weight.shape) for weight in weights.values()],
                group_name=name,
                flush_cache=flush,
            ),
            None,
        )
    )

    def broadcast() -> None:
        for weight in weights.values():
            torch.distributed.broadcast(weight, src=0, group=group)

    await asyncio.to_thread(broadcast)
    _check(await updated)


def _weights(model: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(Path(model) / "model.safetensors")
