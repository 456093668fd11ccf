"""One cell of `bench kernel`: contenders checked against the oracle, then timed, interleaved."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from sglang_prefix.bench.cells import KernelCell
from sglang_prefix.bench.contenders import Contender, ContenderMaker, StepSeconds, TorchPacked
from sglang_prefix.bench.output_check import OutputCheck
from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["is_out_of_memory", "measure_cell", "our_makers", "peak_gflop_s"]

# Larger than any cache, so that a read of it comes from memory.
_STREAM_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_MATRIX_SIZE = {"cpu": 1536, "cuda": 8192}
_MIN_ROUNDS, _MAX_ROUNDS = 3, 15
# On a GPU a step is as many layers as hold KV of their own in this many bytes, up to a usual depth.
_GPU_LAYERS = 32
_GPU_KV_BYTES = 6 << 30

# Of errors that torch and its libraries raise as a plain RuntimeError.
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc")

Tell = Callable[[str], None]


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that the host or the device has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _NO_MEMORY)


def our_makers(policies: Sequence[str], device: torch.device) -> dict[str, ContenderMaker]:
    """Makers of our contenders on a device, by name."""
    if device.type != "cuda":
        return {f"torch/{p}": lambda inputs, p=p: TorchPacked(inputs, p) for p in policies}  # type: ignore[misc]
    from sglang_prefix.bench.gpu_contenders import TritonPacked

    return {f"triton/{p}": lambda inputs, p=p: TritonPacked(inputs, p) for p in policies}  # type: ignore[misc]


def measure_cell(
    cell: KernelCell,
    makers: Mapping[str, ContenderMaker],
    device: torch.device,
    *,
    dtype: torch.dtype,
    seed: int,
    rounds: int | None,
    seconds: float,
    tell: Tell = lambda what: None,
) -> dict[str, Any]:
    """Check and time all contenders on one batch.

    A contender whose output is wrong, or that fails, is not timed: it stands in "failed" with the
    reason. One that cannot run such a batch stands in "absent".

    Args:
        cell: the batch.
        makers: contenders by name; one may raise ``NotImplementedError`` with a reason.
        device, dtype, seed: where the tensors are, of what type, and drawn from what.
        rounds: timed rounds; None for as many as fit into ``seconds``, 3 to 15.
        seconds: time for the rounds, where ``rounds`` is None.
        tell: is told what happens now, in a few words.

    Returns:
        The cell of the result file.

    Raises:
        MemoryError, RuntimeError: memory does not suffice for the inputs, the oracle or a timed
            step; see :func:`is_out_of_memory`.
    """
    tell("laying out")
    layers = _GPU_LAYERS if device.type == "cuda" else 1
    inputs = AttentionInputs.lay_out(
        cell.make_tree(),
        cell.heads,
        device,
        seed,
        dtype=dtype,
        page_size=cell.page_size,
        max_layers=layers,
        max_kv_bytes=_GPU_KV_BYTES,
    )
    tell("oracle")
    check = OutputCheck(inputs, seed)
    ready: dict[str, Contender] = {}
    errors: dict[str, float] = {}
    problems: dict[str, dict[str, str]] = {"absent": {}, "failed": {}}
    for name, make in makers.items():
        tell(f"checking {name}")
        try:
            contender = make(inputs)
            inputs.out.fill_(torch.nan)
            out = contender.first_layer()
            check(out)
            errors[name] = check.max_abs_error(out)
            ready[name] = contender
        except NotImplementedError as error:
            problems["absent"][name] = str(error)
        except Exception as error:  # of anyone's kernel: the others are still worth their time
            problems["failed"][name] = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
    stream = torch.ones(_STREAM_BYTES[device.type] // 4, device=device)
    times, reads = _interleaved(ready, stream, rounds, seconds, tell)
    contenders = {
        name: _facts(contender, times[name], errors[name]) for name, contender in ready.items()
    }
    stock = {name: c["ms"] for name, c in contenders.items() if c["kind"] == "stock"}
    best = min(stock, key=stock.__getitem__, default=None)
    for facts in contenders.values():
        facts["speedup"] = stock[best] / facts["ms"] if best else None
    return {
        "name": cell.name,
        "group": cell.group,
        "tree": cell.tree,
        "note": cell.note,
        "batch": inputs.batch.batch_size,
        "heads": asdict(cell.heads),
        "dtype": str(dtype).removeprefix("torch."),
        "page_size": cell.page_size,
        "layers": inputs.num_layers,
        "tokens": {"ideal": inputs.unique_tokens, "logical": inputs.logical_tokens},
        "bytes": {
            "ideal": inputs.kv_bytes_unique,
            "logical": inputs.logical_tokens * inputs.token_bytes,
        },
        "flop": inputs.flop,
        "best_stock": best,
        "bandwidth_gb_s": stream.nbytes / median(reads) / 1e9,
        "contenders": contenders,
        **problems,
    }


def _interleaved(
    ready: Mapping[str, Contender],
    stream: torch.Tensor,
    rounds: int | None,
    seconds: float,
    tell: Tell,
) -> tuple[dict[str, list[StepSeconds]], list[float]]:
    """Steps of every contender, and streaming reads: each round runs all, in random order.

    What runs after one that touches much memory finds cold caches, so that must not always be the
    same.
    """

    def one_round(number: int) -> tuple[dict[str, StepSeconds], float]:
        order = random.Random(number).sample(list(ready), len(ready))
        return {name: ready[name].step() for name in order}, _read_seconds(stream)

    tell("warming up")
    one_round(0)
    began = time.perf_counter()
    found = [one_round(1)]
    if rounds is None:
        fit = int(seconds / (time.perf_counter() - began))
        rounds = min(max(fit, _MIN_ROUNDS), _MAX_ROUNDS)
    while len(found) < rounds:
        tell(f"round {len(found) + 1} of {rounds}")
        found.append(one_round(1 + len(found)))
    return {name: [steps[name] for steps, _ in found] for name in ready}, [r for _, r in found]


def _read_seconds(stream: torch.Tensor) -> float:
    began = _now(stream)
    stream.sum()
    return _now(stream) - began


def _now(tensor: torch.Tensor) -> float:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _facts(contender: Contender, steps: list[StepSeconds], error: float) -> dict[str, Any]:
    """A contender in the result file, without what needs the others."""
    inputs = contender.inputs

    def middle(part: str) -> float | None:
        values = [getattr(step, part) for step in steps]
        return None if None in values else median(values) * 1e3

    def difference() -> float | None:
        """The run without its merge, which is timed elsewhere: noise can leave nothing of it."""
        alone = [step.run - step.merge for step in steps if step.run and step.merge]
        value = median(alone) * 1e3 if alone else middle("run")
        return value if value is not None and value > 0 else None

    return {
        "kind": contender.kind,
        "executor": contender.executor,
        "policy": contender.policy,
        "ms": middle("total"),
        "raw_ms": [step.total * 1e3 for step in steps],
        "plan_ms": middle("plan"),
        "copy_ms": middle("copy"),
        "forward_ms": difference(),
        "merge_ms": middle("merge"),
        "bytes_read": contender.kv_tokens_read * inputs.token_bytes,
        "kv_read_ratio": contender.kv_tokens_read / inputs.logical_tokens,
        "packs": contender.num_packs,
        "max_abs_error": error,
    }


def peak_gflop_s(device: torch.device, dtype: torch.dtype) -> float:
    """Measured here and now: the best of a few square matrix products, in GFLOP/s.

    In float32 on the CPU, in which our executor computes whatever the caches hold.
    """
    size = _MATRIX_SIZE[device.type]
    dtype = dtype if device.type == "cuda" else torch.float32
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = _now(a)
        torch.matmul(a, b)
        best = min(best, _now(a) - began)
    return 2 * size**3 / best / 1e9
