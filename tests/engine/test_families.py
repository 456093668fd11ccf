"""What SGLang resolves for the families of docs/compatibility.md, with our name and without it.

No weights and no engine: SGLang's own `ServerArgs` reads a configuration and decides. Hardware is
what SGLang's own `override_platform` says it is.
"""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
import torch

from prefix_patches.resolution import stock_choice
from prefix_patches.stock_backend import build_stock
from sglang_prefix.plugin import register
from tests.docs.pages import ROOT
from tests.engine.bare_backend import make_runner
from tests.engine.families import LATENT, MODELS, UNSERVED, write_config
from tests.engine.releases import needs

CUDA = {"is_cuda": True, "has_flashinfer": True}
# Device, its compute capability, and what SGLang asks its platform.
HARDWARE: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "cpu": ("cpu", (0, 0), {}),
    "sm80": ("cuda", (8, 0), CUDA),
    "sm90": ("cuda", (9, 0), CUDA | {"is_sm90": True, "is_hopper_with_cuda_12_3": True}),
    "sm100": (
        "cuda",
        (10, 0),
        CUDA | {"is_sm100": True, "is_blackwell": True, "is_sm100_or_sm110": True},
    ),
}
NAMES = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")

pytestmark = needs("resolution-hooks")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder with a configuration of each model, and our name known to SGLang."""
    register()
    return {name: write_config(name, tmp_path_factory.mktemp(name)) for name in MODELS}


class Resolved:
    """What SGLang resolves for a model on some hardware.

    Attributes:
        fields: all settings by name, as text; one that says how SGLang refused, if it did.
        names: of the backends for prefill and decode.
        choice: what we noted as the stock backends.
    """

    def __init__(self, folder: str, hardware: str, monkeypatch: pytest.MonkeyPatch, **args: Any):
        from sglang.srt.arg_groups.arg_utils import record_fields
        from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view
        from sglang.srt.runtime_context import override_platform
        from sglang.srt.server_args import ServerArgs

        device, capability, facts = HARDWARE[hardware]
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
        typed = ServerArgs(
            model_path=folder, device=device, random_seed=1, skip_tokenizer_init=True, **args
        )
        self.choice, self.names = None, ("", "")
        try:
            with override_platform(**facts):
                typed.resolve_once()
        except AssertionError as error:
            self.fields = {"refused": str(error)}
            return
        there = pickle.loads(pickle.dumps(typed))  # as it comes to a scheduler
        view = resolved_view(there)
        fields = [field.name for field in record_fields(type(there))]
        self.fields = {name: repr(getattr(view, name)) for name in fields}
        self.choice, self.names = stock_choice(there), attention_backends_of(view)

    @property
    def others(self) -> dict[str, str]:
        """The settings that do not name an attention backend."""
        return {name: value for name, value in self.fields.items() if name not in NAMES}


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("model", [name for name in MODELS if name not in UNSERVED + LATENT])
def test_with_our_name_sglang_chooses_what_it_chooses_without_it(
    model: str, hardware: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = Resolved(folders[model], hardware, monkeypatch)
    half = Resolved(folders[model], hardware, monkeypatch, decode_attention_backend="prefix")
    whole = Resolved(folders[model], hardware, monkeypatch, attention_backend="prefix")
    assert half.others == whole.others == stock.others
    if "refused" in stock.fields:  # some hybrid models on a CPU
        return
    assert half.names == (stock.names[0], "prefix")
    assert whole.names == ("prefix", "prefix")
    for found in (half.choice, whole.choice):
        assert found is not None
        assert (found.prefill, found.decode) == stock.names
        assert found.architecture == model


@pytest.mark.parametrize("hardware", ["sm80", "sm90", "sm100"])
@pytest.mark.parametrize("model", UNSERVED + LATENT)
def test_models_that_our_name_would_break_are_refused_in_one_line(
    model: str, hardware: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = Resolved(folders[model], hardware, monkeypatch).names[1]
    for flag in ("attention_backend", "decode_attention_backend"):
        with pytest.raises(ValueError, match=f"cannot serve {model}, which ") as failure:
            Resolved(folders[model], hardware, monkeypatch, **{flag: "prefix"})
        said, served = str(failure.value), model in LATENT
        with_the_switch = (
            "Start with SGLANG_PREFIX=1 instead of the name: our decode then stands over"
        )
        assert said.endswith(f"{with_the_switch if served else 'SGLang then decodes with'} {stock}")
        assert "\n" not in said


def test_what_the_user_names_is_kept(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = folders["LlamaForCausalLM"]
    ours: Any = {"decode_attention_backend": "prefix"}
    beside = Resolved(llama, "sm100", monkeypatch, attention_backend="triton", **ours)
    assert beside.names == ("triton", "prefix")
    assert beside.choice is not None
    assert beside.choice.decode == "triton"
    other = Resolved(llama, "sm100", monkeypatch, prefill_attention_backend="flashinfer", **ours)
    assert other.names == ("flashinfer", "prefix")
    assert other.choice is not None
    assert other.choice.decode == "trtllm_mha"


@pytest.mark.parametrize("flag", ["attention_backend", "prefill_attention_backend"])
def test_our_name_for_prefill_alone_is_refused(
    flag: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = {flag: "prefix", "decode_attention_backend": "triton"}
    told = "prefix is named for prefill, and decode is left to triton.* --decode-attention-backend"
    with pytest.raises(ValueError, match=told):
        Resolved(folders["LlamaForCausalLM"], "sm80", monkeypatch, **theirs)


def test_a_stock_backend_that_the_user_names_to_us_stands_in_for_our_name(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = folders["LlamaForCausalLM"]
    stock = Resolved(llama, "sm90", monkeypatch, decode_attention_backend="trtllm_mha")
    assert stock.fields["page_size"] == "64"  # which SGLang snaps for this backend
    monkeypatch.setenv("SGLANG_PREFIX_STOCK_BACKEND", "trtllm_mha")
    ours = Resolved(llama, "sm90", monkeypatch, decode_attention_backend="prefix")
    assert ours.others == stock.others
    assert ours.names == ("fa3", "prefix")
    whole = Resolved(llama, "sm90", monkeypatch, attention_backend="prefix")
    assert whole.choice is not None
    assert (whole.choice.prefill, whole.choice.decode) == ("trtllm_mha", "trtllm_mha")


@pytest.mark.parametrize("name", ["nonesuch", "prefix"])
def test_a_stock_backend_that_nobody_has_is_refused_before_sglangs_rules_meet_it(
    name: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PREFIX_STOCK_BACKEND", name)
    for model in ("LlamaForCausalLM", "GptOssForCausalLM"):
        with pytest.raises(ValueError, match=f"SGLANG_PREFIX_STOCK_BACKEND='{name}' is not"):
            Resolved(folders[model], "sm90", monkeypatch, decode_attention_backend="prefix")


@pytest.mark.parametrize("flag", ["attention_backend", "decode_attention_backend"])
def test_the_draft_model_runs_on_what_sglang_would_have_used(
    flag: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = folders["LlamaForCausalLM"]
    draft: Any = {"speculative_algorithm": "STANDALONE", "speculative_draft_model_path": llama}
    stock = Resolved(llama, "sm90", monkeypatch, **draft)
    ours = Resolved(llama, "sm90", monkeypatch, **{flag: "prefix"}, **draft)
    named = ours.others | {"speculative_draft_attention_backend": "None"}
    assert named == stock.others
    assert ours.fields["speculative_draft_attention_backend"] == repr(stock.names[1])


def test_deterministic_inference_is_resolved_as_without_us(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama, asked = folders["LlamaForCausalLM"], {"enable_deterministic_inference": True}
    stock = Resolved(llama, "sm90", monkeypatch, **asked)
    ours = Resolved(llama, "sm90", monkeypatch, attention_backend="prefix", **asked)
    assert ours.others == stock.others
    assert ours.names == ("prefix", "prefix")
    assert ours.fields["enable_deterministic_inference"] == "True"  # a reason to leave decode alone


def test_stock_backends_and_what_wraps_ours_find_a_name_that_they_know() -> None:
    names: Any = {"decode_attention_backend_str": "prefix", "prefill_attention_backend_str": "fa3"}
    runner = make_runner(**names)
    build_stock(runner, "torch_native", "prefix")
    assert runner.decode_attention_backend_str == "torch_native"
    assert runner.prefill_attention_backend_str == "fa3"
    del runner.prefill_attention_backend_str, runner.decode_attention_backend_str
    build_stock(runner, "torch_native", "prefix")  # as before 0.5.18
    assert not hasattr(runner, "decode_attention_backend_str")


def test_a_page_says_of_every_family_whether_it_is_served() -> None:
    page = (ROOT / "docs/compatibility.md").read_text()
    _, _, text = page.partition("## Model families")
    text, _, _ = text.partition("\n## ")
    rows = re.findall(r"^\| [^|]+ \| ([^|]*`\w+`[^|]*) \| (\w+)", text, re.MULTILINE)
    assert {word for _, word in rows} == {"packed", "partly", "refused", "switch"}
    said = {name: word for names, word in rows for name in re.findall(r"`(\w+)`", names)}
    assert said.keys() == MODELS.keys()
    assert {name for name, word in said.items() if word == "refused"} == set(UNSERVED)
    assert {name for name, word in said.items() if word == "switch"} == set(LATENT)
    families = re.findall(r"^\| ([^|]+) \| [^|]*`\w+`[^|]* \| (\w+)", text, re.MULTILINE)
    short = (ROOT / "README.md").read_text()
    for word in {word for _, word in families}:
        (row,) = re.findall(rf"^\| {word} \| ([^|]+;[^|]+) \|", short, re.MULTILINE)
        assert row.split("; ") == [family for family, found in families if found == word]
