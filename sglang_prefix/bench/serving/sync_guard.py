"""A hook that guards the preparation of every decode step against waiting for the device.

While our backend prepares a step outside the graph, `torch.cuda.set_sync_debug_mode("error")`
makes every operation raise that would wait for the device. (It does not know of waiting for an
event.) The stock backend's own part is not guarded. The file named by the variable
:data:`SYNC_FILE` gets the number of steps, and whether a planted wait raised.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_prefix.bench.hooks import patch_after_import
from sglang_prefix.files import write_file

__all__ = ["SYNC_FILE", "Guard", "patch"]

SYNC_FILE = "SGLANG_PREFIX_SYNC_FILE"
Context = contextlib.AbstractContextManager[None]

_ENTRY_POINTS = ("init_forward_metadata", "init_forward_metadata_out_graph")


class Guard:
    """Counts guarded steps and keeps what raised.

    Args:
        path: file for both.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: dict[str, Any] = {"steps": 0, "on_gpu": False, "control": None, "raised": []}

    @contextlib.contextmanager
    def mode(self, name: str) -> Iterator[None]:
        """A sync debug mode for a while; nothing where there is no GPU."""
        import torch

        if not torch.cuda.is_available():
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(name)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One decode step."""
        if self._seen["steps"] == 0:
            self._try_control()
        try:
            with self.mode("error"):
                yield
        except Exception as error:  # planning catches it further up and the step ends as a fallback
            self._seen["raised"].append(f"{type(error).__name__}: {error}"[:500])
            raise
        finally:
            self._seen["steps"] += 1
            write_file(self._path, json.dumps(self._seen))

    def _try_control(self) -> None:
        import torch

        self._seen["on_gpu"] = torch.cuda.is_available()
        if self._seen["on_gpu"]:
            value = torch.ones(1, device="cuda")
            with self.mode("error"):
                try:
                    value.item()
                    self._seen["control"] = False
                except RuntimeError:
                    self._seen["control"] = True


def patch(module: ModuleType) -> None:
    """Guard the entry points of our backend, and lift the guard in those of the stock backend.

    Args:
        module: `sglang_prefix.backend.backend`.
    """
    guard = Guard(Path(os.environ[SYNC_FILE]))
    backend = module.PrefixAttnBackend
    plain_init = backend.__init__

    def step(self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Context:
        # In a capture SGLang itself waits for the device.
        if kwargs.get("in_capture") or any(args) or not forward_batch.forward_mode.is_decode():
            return contextlib.nullcontext()
        return guard.step()

    def lift(*args: Any, **kwargs: Any) -> Context:
        return guard.mode("default")

    @functools.wraps(plain_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        for name in _ENTRY_POINTS:
            setattr(self.stock, name, _within(lift, getattr(self.stock, name)))

    backend.__init__ = init
    for name in _ENTRY_POINTS:
        setattr(backend, name, _within(step, getattr(backend, name)))


def _within(context: Callable[..., Context], method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, called within a context that is made from its arguments."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with context(*args, **kwargs):
            return method(*args, **kwargs)

    return call


if SYNC_FILE in os.environ:
    patch_after_import({"sglang_prefix.backend.backend": patch})
