"""SGLang's own decode graph runner on the CPU, where there are no graphs.

The runner is the real one: padding, static buffers, keys, metadata before each replay. Only the
device is replaced: streams, events, and the object that captures and replays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

from sglang_prefix.bench.hooks import patch_after_import

__all__ = ["GraphBackend", "run_graphs_on_cpu"]


class GraphBackend:
    """What SGLang calls a graph backend, see its ``BaseCudaGraphBackend``.

    Subclasses say what is captured and how it is replayed.
    """

    def __init__(self, runner: Any) -> None:
        self.captured: dict[Any, Any] = {}

    @contextlib.contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        """Nothing to open."""
        yield

    def capture_one(
        self,
        shape_key: Any,
        forward_fn: Callable[[], Any],
        capture_inputs: Any = None,
        post_warmup_hook: Callable[[], None] | None = None,
    ) -> None:
        """Run once to warm up, then capture."""
        assert shape_key not in self.captured
        forward_fn()
        if post_warmup_hook is not None:
            post_warmup_hook()
        self.captured[shape_key] = self.capture(shape_key, forward_fn)

    def capture(self, shape_key: Any, forward_fn: Callable[[], Any]) -> Any:
        """What a replay needs."""
        raise NotImplementedError

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        """Whether the shape was captured."""
        return shape_key in self.captured

    def replay_session(self) -> Any:
        """Nothing to open."""
        return contextlib.nullcontext()

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        """Run what was captured."""
        raise NotImplementedError

    def cleanup(self) -> None:
        """Nothing to free."""


def run_graphs_on_cpu(
    graph_backend: Callable[[Any], GraphBackend], batch_sizes: Sequence[int]
) -> None:
    """Let SGLang capture and replay decode graphs on the CPU; for a hook.

    Args:
        graph_backend: makes the graph backend of a graph runner.
        batch_sizes: that are captured.
    """

    def replace_device(module: ModuleType) -> None:
        import torch

        names = vars(module)
        names["graph_capture"] = _no_stream
        names["get_or_create_global_graph_capture_stream"] = lambda: None
        names["resolve_decode_backend"] = graph_backend
        names["get_batch_sizes_to_capture"] = lambda *args, **kwargs: (list(batch_sizes), [])
        if not hasattr(torch.cpu, "Event"):  # 0.5.17 and .18 record one before each replay
            vars(torch.cpu)["Event"] = lambda: SimpleNamespace(record=lambda: None)
        module.DecodeCudaGraphRunner._publish_read_done = lambda self, in_graph: None
        module.DecodeCudaGraphRunner._record_in_graph_metadata_prep_done = lambda self: None

    runner, layers = "sglang.srt.model_executor", "sglang.srt.layers.attention"
    patch_after_import(
        {
            f"{runner}.model_runner_components.cuda_graph_setup": _capture_on_cpu,
            f"{runner}.forward_batch_info": _replay_idle_batches,
            f"{runner}.runner.decode_cuda_graph_runner": replace_device,
            f"{layers}.torch_native_backend": _complete_torch_native,
            "sglang_prefix.backend.fallback": _say_that_decode_is_captured,
        }
    )


@contextlib.contextmanager
def _no_stream(stream: Any = None) -> Iterator[Any]:
    yield SimpleNamespace(stream=None)


def _replay_idle_batches(module: ModuleType) -> None:
    """Let a rank without requests replay a graph with the others, as it does on a GPU."""
    module.ForwardMode.is_cpu_graph = module.ForwardMode.is_cuda_graph


def _capture_on_cpu(module: ModuleType) -> None:
    """Let SGLang capture decode on the CPU."""

    def capture_decode_graph(*, model_runner: Any) -> Any:
        runner = model_runner._decode_cuda_graph_runner_cls()(model_runner)
        return module.GraphCapture(
            runner=runner, memory_phase="decode", memory_usage_gb=0, capture_time=0
        )

    module.capture_decode_graph = capture_decode_graph  # type: ignore[attr-defined]


def _complete_torch_native(module: ModuleType) -> None:
    """Give ``torch_native`` what a graph runner asks of a backend."""
    backend = module.TorchNativeAttnBackend
    backend.init_cuda_graph_state = lambda self, max_bs, max_num_tokens: None
    backend.get_cuda_graph_seq_len_fill_value = lambda self: 1


def _say_that_decode_is_captured(module: ModuleType) -> None:
    """Our backend takes it that only CUDA has graphs."""
    vars(module)["captures_decode"] = lambda model_runner: True
