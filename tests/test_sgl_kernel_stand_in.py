"""The stand-in `sgl_kernel`: enough for SGLang's imports, and not one kernel more."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

from sglang_prefix.cli.exec import stand_in_root

NEEDED_BY_SGLANG = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
]


@pytest.fixture
def sgl_kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Make `import sgl_kernel` give the stand-in, also on a host with the real one."""
    stand_in = importlib.import_module("prefix_patches.sgl_kernel_cpu.sgl_kernel")
    monkeypatch.setitem(sys.modules, "sgl_kernel", stand_in)
    return stand_in


@pytest.mark.parametrize("name", NEEDED_BY_SGLANG)
def test_a_needed_name_imports_and_refuses_to_be_called(sgl_kernel: ModuleType, name: str) -> None:
    namespace: dict[str, object] = {}
    exec(f"from sgl_kernel import {name} as function", namespace)
    function = namespace["function"]
    assert callable(function)
    with pytest.raises(NotImplementedError, match=rf"sgl_kernel\.{name} .*sglang-kernel"):
        function(1, key=2)


def test_any_other_name_is_an_import_error(sgl_kernel: ModuleType) -> None:
    assert sgl_kernel.__version__
    for name in ("rmsnorm", "__wrapped__"):  # SGLang asks for the first, inspect for the second
        assert not hasattr(sgl_kernel, name)
    with pytest.raises(AttributeError, match=r"'rmsnorm'.*stand-in"):
        _ = sgl_kernel.rmsnorm
    with pytest.raises(ImportError, match=r"'rmsnorm'.*stand-in"):
        exec("from sgl_kernel import rmsnorm")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("sgl_kernel.allreduce")


def test_its_folder_on_the_path_is_enough() -> None:
    probe = subprocess.run(
        [sys.executable, "-S", "-c", "import sgl_kernel; print(sgl_kernel.IS_STAND_IN)"],
        env={"PYTHONPATH": str(stand_in_root())},
        capture_output=True,
        text=True,
        check=True,
    )
    assert probe.stdout.strip() == "True"
