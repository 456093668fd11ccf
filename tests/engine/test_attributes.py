"""What we read of SGLang: the list is complete, true of the installed release, and no default."""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, get_type_hints

import pytest

from prefix_patches import attributes, install, stock_backend
from prefix_patches.attributes import HOMES, Only
from prefix_patches.install import declared, missing_attributes
from sglang_prefix.backend import fallback
from sglang_prefix.cli.doctor import SGLANG_CHECKS, CheckError
from tests.engine.bare_backend import make_layer, make_runner
from tests.engine.releases import needs
from tests.engine.server_args import server_args

ROOT = Path(__file__).parents[2]
DP_ATTENTION = "--tp-size 2 --dp-size 2 --enable-dp-attention"


def test_the_installed_release_has_what_the_list_says() -> None:
    assert missing_attributes() == ()
    assert install.lacks_attributes(make_runner()) == []


@pytest.mark.parametrize(
    ("flags", "dp_attention", "tensor_parallel", "captures"),
    [
        ("", False, False, True),
        (DP_ATTENTION, True, True, True),
        pytest.param("--tp-size 2 --attn-dp-size 2", True, True, True, marks=needs("attn-dp-size")),
        ("--tp-size 2 --dp-size 2", False, True, True),
        ("--tp-size 2 --dcp-size 2", False, True, True),
        ("--enable-two-batch-overlap --enable-pdmux --page-size 16", False, False, True),
        ("--speculative-algorithm EAGLE", False, False, True),
        ("--disable-cuda-graph", False, False, False),
        ("--cuda-graph-backend-decode disabled", False, False, False),
        ("--cuda-graph-backend-decode breakable", False, False, True),
        ("--cuda-graph-backend-prefill disabled", False, False, True),
        ("--disaggregation-mode prefill", False, False, False),
    ],
)
def test_facts_about_a_server_follow_from_flags_that_sglang_resolved(
    flags: str, dp_attention: bool, tensor_parallel: bool, captures: bool
) -> None:
    runner = make_runner(flags=flags, device="cuda")
    assert fallback.has_dp_attention(runner) is dp_attention
    assert fallback.has_tensor_parallelism(runner) is tensor_parallel
    assert fallback.captures_decode(runner) is captures
    assert not fallback.captures_decode(make_runner(flags=flags))


@needs("attn-dp-size")
def test_dp_attention_is_what_sglang_says_it_is() -> None:
    from sglang.srt.runtime_context import attn_dp_enabled_of

    for flags in ("", DP_ATTENTION, "--tp-size 2 --attn-dp-size 2", "--tp-size 2 --dp-size 2"):
        args = stock_backend.resolved_args(make_runner(flags=flags))
        assert stock_backend.runs_dp_attention(args) is attn_dp_enabled_of(args)


def test_every_kv_cache_dtype_of_sglang_is_plain_or_known_to_be_quantised_in_blocks() -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    (flag,) = (action for action in parser._actions if action.dest == "kv_cache_dtype")
    plain = {"auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2"}
    assert flag.choices is not None
    assert set(flag.choices) <= plain | set(fallback._BLOCK_QUANTIZED)
    for dtype in plain & set(flag.choices):
        args = server_args(f"--kv-cache-dtype {dtype}")
        assert stock_backend.resolved_args(make_runner(server_args=args)).kv_cache_dtype == dtype


class Renamed(Protocol):
    """As if SGLang had renamed a flag."""

    enable_pd_multiplexing: bool


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setitem(HOMES, Renamed, HOMES[attributes.ServerArgs])
    missing_attributes.cache_clear()
    yield monkeypatch
    missing_attributes.cache_clear()


RENAMED = "ServerArgs.enable_pd_multiplexing"


def test_an_attribute_that_is_gone_ends_the_start_and_doctor_names_it(
    renamed: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RuntimeError, match=f"^SGLang .* lacks {RENAMED}, which sglang-prefix"):
        install.check_attributes(make_runner())
    with pytest.raises(CheckError, match=RENAMED):
        SGLANG_CHECKS["patched symbols"]()


def test_an_object_without_what_its_class_has_ends_the_start() -> None:
    runner = make_runner()
    del runner.page_size
    with pytest.raises(RuntimeError, match=r"lacks ModelRunner\.page_size"):
        install.check_attributes(runner)


def test_a_release_that_nobody_has_read_packs_nothing_where_something_is_gone(
    renamed: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from sglang_prefix.backend.backend import PrefixAttnBackend
    from sglang_prefix.config import PrefixConfig

    renamed.setattr(install, "version", lambda _: "0.5.24")
    runner = make_runner([make_layer(0)])
    install.check_attributes(runner)
    stock = TorchNativeAttnBackend(runner)
    backend = PrefixAttnBackend(runner, stock, "torch_native", PrefixConfig())
    assert backend._server_reason == "unknown-attributes"
    (said,) = (text for text in caplog.messages if "SGLang 0.5.24 lacks" in text)
    assert RENAMED in said


@pytest.mark.parametrize(
    ("release", "is_newer"),
    [("0.5.17", False), ("0.5.23", False), ("0.5.23.post1", False), ("0.5.24.dev3+g1", True)],
)
def test_a_newer_release_is_told_from_one_that_was_read(release: str, is_newer: bool) -> None:
    assert install.is_newer_than_read(release) is is_newer


@pytest.mark.parametrize(
    ("view", "name", "old", "new"),
    [
        (attributes.ServerArgs, "attn_dp_size", False, True),
        (attributes.ServerArgs, "enable_dp_attention", True, False),
        (attributes.ServerArgs, "enable_pdmux", True, True),
        (attributes.Request, "cache_protected_len", True, False),
        (attributes.KVPool, "get_key_buffer", True, True),
    ],
)
def test_the_list_says_which_releases_have_an_attribute(
    view: type, name: str, old: bool, new: bool
) -> None:
    found = [name in declared(view, r) for r in ("0.5.17", "0.5.22.dev1", "0.5.23")]
    assert found == [old, new, new]


# Modules that read SGLang's objects. The type checker compares each read with the list wherever an
# object's class is named; here are the reads that it cannot see.
READERS = [
    *sorted((ROOT / "sglang_prefix" / "backend").glob("*.py")),
    ROOT / "sglang_prefix" / "plugin.py",
    *sorted((ROOT / "patches" / "prefix_patches").glob("*.py")),
]
# `patch.py` and `install.py` look up symbols, `delegation.py` hands everything over, and
# `load_generator.py` has symbols of its own.
OTHERS = {"attributes.py", "install.py", "delegation.py", "load_generator.py", "patch.py"}
READERS = [path for path in READERS if path.name not in OTHERS]
# Names that are no attributes of objects: of modules and classes, declared beside the code that
# looks for them, and of an enumeration's member.
SYMBOLS = {"get_default_attn_backend", "value"}
# What our code calls SGLang's objects.
VARIABLES = {
    "args": attributes.ServerArgs,
    "server_args": attributes.ServerArgs,
    "forward_batch": attributes.ForwardBatch,
    "layer": attributes.AttentionLayer,
    "model_runner": attributes.ModelRunner,
    "node": attributes.TreeNode,
    "pool": attributes.KVPool,
    "ranks": attributes.ParallelContext,
    "req": attributes.Request,
    "runner": attributes.ModelRunner,
}


def names_of(view: type) -> set[str]:
    """Every name of a class of the list, whatever the release."""
    return set(get_type_hints(view)) | set(dir(view))


def views() -> list[type]:
    found = [cls for _, cls in inspect.getmembers(attributes, inspect.isclass)]
    return [cls for cls in found if Protocol in cls.__mro__ and cls is not Protocol]


def optional_names() -> set[str]:
    """Names that are marked as absent somewhere."""
    hints = [get_type_hints(view, include_extras=True).items() for view in views()]
    return {
        name
        for items in hints
        for name, hint in items
        if any(isinstance(mark, Only) for mark in getattr(hint, "__metadata__", ()))
    }


@pytest.mark.parametrize("path", READERS, ids=lambda path: path.stem)
def test_every_read_is_on_the_list_and_no_default_hides_a_rename(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        match node:
            case ast.Call(func=ast.Name("getattr" | "hasattr"), args=[_, name, *_]):
                # A name that is computed cannot be compared with any list.
                known = isinstance(name, ast.Constant) or path.name in OURS_BY_NAME
                assert known, f"{where}: getattr of a computed name"
                if isinstance(name, ast.Constant):
                    legal = optional_names() | SYMBOLS
                    assert name.value in legal, f"{where}: {name.value!r} may not be absent"
            case ast.Attribute(value=ast.Name(variable), attr=name, ctx=ast.Load()):
                view = VARIABLES.get(variable)
                if view is not None and not name.startswith("_sglang_prefix"):
                    assert name in names_of(view), f"{where}: {variable}.{name}"


# Files that look up attributes of our own by computed names.
OURS_BY_NAME = {"counters.py", "metrics.py", "resolution.py"}


def test_every_attribute_of_the_list_is_read() -> None:
    sources = "\n".join(path.read_text() for path in READERS)
    for view in views():
        public = {n for n in {*vars(view), *view.__annotations__} if not n.startswith("_")}
        unread = {
            name for name in public if f".{name}" not in sources and f'"{name}"' not in sources
        }
        assert not unread, f"{view.__name__}: {unread}"
