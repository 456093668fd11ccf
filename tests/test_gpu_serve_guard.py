"""The guard of `make gpu-serve` against waiting for the device, with a device that is told of."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

HOOK = Path(__file__).parents[1] / "benchmarks" / "gpu" / "serve_hooks" / "sitecustomize.py"
DECODE = SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: True))
EXTEND = SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: False))


class Stock:
    """Notes the mode that it is called in."""

    def __init__(self, modes: list[Any]) -> None:
        self._modes = modes

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self._modes.append(("stock", mode_now()))

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        self._modes.append(("stock", mode_now()))


class Backend:
    """As ours is to SGLang; waits where the mode forbids it, if it is to."""

    def __init__(self) -> None:
        self.modes: list[Any] = []
        self.stock = Stock(self.modes)
        self.waits = False

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.init_forward_metadata_out_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        mode = mode_now()
        self.modes.append(("ours", mode))
        if self.waits and mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.stock.init_forward_metadata_out_graph(forward_batch, in_capture)


def mode_now() -> Any:
    """What the hook has set; the real one gives numbers."""
    return torch.cuda.get_sync_debug_mode()


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Backend]:
    """A fresh class under the guard, on a host that seems to have a GPU."""
    now = ["default"]

    def set_mode(mode: str) -> None:
        now[0] = mode

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    spec = importlib.util.spec_from_file_location("serve_hook", HOOK)
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)

    def waiting_is_seen(self: Any) -> None:
        self._seen |= {"on_gpu": True, "control": True}

    monkeypatch.setattr(hook.Guard, "_try_control", waiting_is_seen)
    monkeypatch.setenv("SGLANG_PREFIX_SERVE_SYNC_FILE", str(tmp_path / "sync.json"))
    module: Any = ModuleType("backend")
    module.PrefixAttnBackend = type("Guarded", (Backend,), {})
    hook.patch(module)
    found: type[Backend] = module.PrefixAttnBackend
    return found


def test_ours_is_guarded_and_stock_is_not(guarded: type[Backend], tmp_path: Path) -> None:
    backend = guarded()
    backend.init_forward_metadata_out_graph(DECODE)
    backend.init_forward_metadata_out_graph(DECODE, in_capture=False)
    assert backend.modes == [("ours", "error"), ("stock", "default")] * 2
    assert mode_now() == "default"
    seen = json.loads((tmp_path / "sync.json").read_text())
    assert seen == {"steps": 2, "on_gpu": True, "control": True, "raised": []}


def test_captures_and_prefill_are_not_guarded(guarded: type[Backend], tmp_path: Path) -> None:
    backend = guarded()
    backend.init_forward_metadata_out_graph(DECODE, in_capture=True)
    backend.init_forward_metadata_out_graph(DECODE, True)
    backend.init_forward_metadata_out_graph(EXTEND)
    assert {mode for _, mode in backend.modes} == {"default"}
    assert not (tmp_path / "sync.json").exists()


def test_control_a_wait_is_told_of_and_goes_on(guarded: type[Backend], tmp_path: Path) -> None:
    backend = guarded()
    backend.waits = True
    with pytest.raises(RuntimeError, match="synchronizing"):
        backend.init_forward_metadata_out_graph(DECODE)
    assert mode_now() == "default"
    seen = json.loads((tmp_path / "sync.json").read_text())
    assert seen["raised"] == ["RuntimeError: called a synchronizing CUDA operation"]
