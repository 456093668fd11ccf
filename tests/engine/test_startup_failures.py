"""Asked for `prefix` and something is missing or wrong: one message that names it, no server."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.bare_backend import make_runner
from tests.engine.driver import Scenario, Section, run_scenario
from tests.engine.families import write_config
from tests.engine.releases import BACKEND_FLAG, has

# Hooks, engine arguments, messages.
FAILURES: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    # Says that an exception of our factory ends the engine; `test_plugin.py` has the others.
    "symbol": (
        ("failures",),
        {BACKEND_FLAG: "prefix"},
        "RuntimeError: sglang-prefix cannot attach to SGLang",
    ),
}
if not has("resolution-hooks"):  # SGLang's own message
    FAILURES["deterministic"] = (
        (),
        {"attention_backend": "prefix", "enable_deterministic_inference": True},
        "but you explicitly specified 'prefix'",
    )
if not has("any-name-on-cpu"):
    FAILURES["prefill"] = (
        (),
        {"attention_backend": "prefix"},
        "ValueError: --attention-backend prefix does not work on the CPU with SGLang",
    )


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "symbol" else pytest.mark.extended) for n in FAILURES],
)
def test_the_engine_ends_with_one_message(
    name: str, models: dict[str, str], tmp_path: Path
) -> None:
    hooks, options, message = FAILURES[name]
    scenario = Scenario((Section("none", ()),), {"max_total_tokens": 2000, **options}, hooks=hooks)
    with pytest.raises(RuntimeError, match="engine ended"):
        run_scenario(scenario, models, tmp_path / "engine")
    log = (tmp_path / "engine" / "log").read_text(errors="replace")
    assert log.count(message) == 1
    if name == "symbol":
        assert "ForwardBatch.init_new" in log[log.index(message) :].splitlines()[0]
    # The driver writes this file as soon as the engine is up.
    assert not (tmp_path / "engine" / "mode").exists()


@pytest.mark.parametrize("variable", ["SGLANG_PREFIX_GATE", "SGLANG_PREFIX_POLICY"])
def test_the_factory_reads_the_settings_before_anything_else(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_prefix.plugin import create_prefix_backend

    monkeypatch.setenv(variable, "maybe")
    with pytest.raises(ValueError, match=f"{variable}='maybe' is not legal"):
        create_prefix_backend(object())


@pytest.mark.parametrize("name", ["nonesuch", "prefix"])
def test_an_unknown_stock_backend_is_named_with_the_legal_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_prefix.plugin import create_prefix_backend, register

    register()
    monkeypatch.setenv("SGLANG_PREFIX_STOCK_BACKEND", name)
    with pytest.raises(ValueError, match=f"SGLANG_PREFIX_STOCK_BACKEND='{name}'") as failure:
        create_prefix_backend(make_runner())
    legal = str(failure.value).split("legal: ")[1].split(", ")
    assert "torch_native" in legal
    assert "prefix" not in legal


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("name", "page_size", "dtype", "flag"),
    [
        ("trtllm_mha", 1, FP8, "--page-size 1 "),
        ("flashmla", 16, FP8, "--page-size 16 "),
        ("fa4", 64, FP8, "--page-size 64 "),
        ("fa3", 1, torch.float8_e5m2, "--kv-cache-dtype float8_e5m2 "),
        ("trtllm_mha", 64, FP8, None),
        ("torch_native", 1, FP8, None),
        ("fa3", 1, FP8, None),
        ("triton", 16, FP8, None),
    ],
)
def test_the_rules_of_a_stock_backend_name_the_flag(
    name: str, page_size: int, dtype: torch.dtype, flag: str | None
) -> None:
    from sglang_prefix.backend.stock_rules import check_stock_rules

    runner = make_runner(kv_dtype=dtype, page_size=page_size)
    if flag is None:
        check_stock_rules(name, runner)
        return
    with pytest.raises(ValueError, match=flag) as failure:
        check_stock_rules(name, runner)
    assert name in str(failure.value)
    assert "SGLANG_PREFIX_STOCK_BACKEND" in str(failure.value)


@pytest.mark.parametrize(
    ("release", "flags", "fits"),
    [
        ("0.5.21", "--attention-backend prefix", False),
        ("0.5.21", "--attention-backend prefix --prefill-attention-backend triton", True),
        ("0.5.21", "--decode-attention-backend prefix", True),
        ("0.5.22", "--attention-backend prefix", True),
    ],
)
def test_our_name_alone_does_not_do_for_prefill_on_the_cpu_of_older_releases(
    release: str, flags: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_prefix.backend import stock_rules

    monkeypatch.setattr(stock_rules, "version", lambda _: release)
    runner = make_runner(flags=flags)
    if fits:
        stock_rules.check_cpu_prefill(runner, "prefix")
        return
    with pytest.raises(ValueError, match="use --decode-attention-backend prefix"):
        stock_rules.check_cpu_prefill(runner, "prefix")


@pytest.mark.parametrize(
    ("stock_name", "changes"), [("fa3", {"use_mla_backend": True}), ("dsv4", {}), ("dsa", {})]
)
def test_models_that_nobody_refused_before_are_refused_by_the_factory(
    stock_name: str, changes: dict[str, Any]
) -> None:
    from sglang_prefix.backend.stock_rules import check_stock_rules

    runner = make_runner(**changes)
    runner.model_config.hf_config.architectures = ["DeepseekV3ForCausalLM"]
    with pytest.raises(ValueError, match="prefix cannot serve DeepseekV3ForCausalLM, which "):
        check_stock_rules(stock_name, runner)
    runner.is_draft_worker = True  # which runs on a backend of its own, and packs nothing
    check_stock_rules(stock_name, runner)


def test_a_model_can_be_refused_by_its_architecture() -> None:
    from sglang_prefix.backend.stock_rules import check_model

    check_model("LlamaForCausalLM", "fa4", uses_mla=False)
    with pytest.raises(ValueError, match=r"Inkling.* accepts the backends fa4 and triton only"):
        check_model("InklingForConditionalGeneration", "fa4", uses_mla=False)
    with pytest.raises(ValueError, match=r"Dots3.* goes by the class of the backend"):
        check_model("Dots3NoteForCausalLM", "fa3", uses_mla=True)


def test_a_model_is_refused_by_the_command_before_anything_is_launched(tmp_path: Path) -> None:
    folder = write_config("DeepseekV3ForCausalLM", tmp_path)
    sglang = str(Path(sys.executable).with_name("sglang"))
    command = [sglang, "serve", "--model-path", folder]
    command += ["--device", "cpu", "--skip-tokenizer-init", "--decode-attention-backend", "prefix"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode != 0
    said = ended.stdout + ended.stderr
    assert said.count("prefix cannot serve DeepseekV3ForCausalLM") == 1
    *_, last = said.strip().splitlines()
    assert last.endswith(
        "SGLANG_PREFIX=1 instead of the name: our decode then stands over torch_native"
    )


# With SGLANG_PREFIX=1.

STOCK_FACTORIES = ("fa3", "triton", "dsa", "torch_native")


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """SGLang's registry with factories that answer with a name, wrapped twice."""
    from sglang.srt.layers.attention import attention_registry

    from prefix_patches.stock_backend import wrap_factories

    def answering(name: str) -> Callable[[Any], str]:
        return lambda runner: name

    registry = {name: answering(name) for name in STOCK_FACTORIES}
    monkeypatch.setattr(attention_registry, "ATTENTION_BACKENDS", registry)
    for _ in range(2):
        wrap_factories("prefix", lambda runner, name: f"ours over {name}")
    return registry


@pytest.mark.parametrize(
    ("flags", "built"),
    [
        ("--attention-backend fa3", {"fa3": "ours over fa3"}),
        (
            "--prefill-attention-backend fa3 --decode-attention-backend triton",
            {"fa3": "fa3", "triton": "ours over triton"},
        ),
        (
            "--prefill-attention-backend fa3 --decode-attention-backend prefix",
            {"fa3": "fa3"},
        ),
    ],
)
def test_the_switch_wraps_what_decodes_and_once(
    flags: str, built: dict[str, str], wrapped: dict[str, Any]
) -> None:
    from prefix_patches.stock_backend import build_stock

    runner = make_runner(flags=flags)
    assert {name: wrapped[name](runner) for name in built} == built
    assert build_stock(runner, "triton", "prefix") == "triton"
    runner.is_draft_worker = True
    assert wrapped["fa3"](runner) == "fa3"


def test_the_switch_leaves_a_model_of_which_nothing_can_be_packed(
    wrapped: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    from sglang_prefix.plugin import create_prefix_backend

    runner = make_runner(use_mla_backend=True)
    runner.model_config.hf_config.architectures = ["DeepseekV32ForCausalLM"]
    with caplog.at_level("INFO"):
        assert create_prefix_backend(runner, "dsa") == "dsa"
    assert "DeepseekV32ForCausalLM is left to dsa: it " in caplog.text


def test_the_switch_and_a_stock_backend_for_our_name_contradict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang_prefix.plugin import create_prefix_backend

    monkeypatch.setenv("SGLANG_PREFIX_STOCK_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"name the backend to SGLang: --attention-backend"):
        create_prefix_backend(make_runner(), "fa3")


FORWARD_BATCH = "sglang.srt.model_executor.forward_batch_info.ForwardBatch"
GONE = object()


@pytest.mark.parametrize(
    ("symbol", "found"),
    [
        (f"{FORWARD_BATCH}.init_new", GONE),
        (f"{FORWARD_BATCH}.init_new", classmethod(lambda cls, model_runner, batch: None)),
        ("sglang.srt.model_executor.model_runner.ModelRunner.forward", GONE),
        ("sglang.srt.managers.scheduler.Scheduler.get_internal_state", GONE),
        ("sglang.srt.layers.attention.attention_registry.ATTENTION_BACKENDS", None),
    ],
)
def test_a_symbol_that_is_gone_or_another_one_is_named(
    symbol: str, found: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sglang.srt.managers.scheduler
    import sglang.srt.model_executor.model_runner  # noqa: F401

    from prefix_patches.install import install

    if found is GONE:
        monkeypatch.delattr(symbol)
    else:
        monkeypatch.setattr(symbol, found)
    with pytest.raises(RuntimeError, match="cannot attach to SGLang") as failure:
        install()
    message = str(failure.value)
    assert symbol in message
    assert message.count("sglang.") == 1  # and nothing else


def test_a_patch_that_does_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefix_patches.install import install
    from prefix_patches.patch import Touch

    monkeypatch.setattr(Touch, "installed", lambda touch: not touch.name.endswith(".forward"))
    with pytest.raises(RuntimeError, match=r"ModelRunner\.forward did not take effect"):
        install()


def test_installing_twice_patches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from prefix_patches.install import install

    install()
    once = inspect.getattr_static(ForwardBatch, "init_new")
    install()
    assert inspect.getattr_static(ForwardBatch, "init_new") is once
