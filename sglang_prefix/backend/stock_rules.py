"""Rules that SGLang applies to a stock backend by its name, checked for the one we delegate to."""

from __future__ import annotations

from importlib.metadata import version

import torch
from packaging.version import Version

from prefix_patches.attributes import ModelRunner
from prefix_patches.stock_backend import prefill_name, resolved_args

__all__ = ["REFUSED", "check_cpu_prefill", "check_model", "check_stock_rules", "why_refused"]

# Models of which nothing could be packed. Most ask for the backend's name themselves, and hand over
# what only the backends that they know understand: 0.5.23, models/deepseek_v2.py,
# inkling_common/attn.py. By the stock backend that SGLang chooses, and by architecture.
# docs/compatibility.md has the families.
REFUSED = {
    "dsa": "picks the tokens that it attends to",
    "nsa": "picks the tokens that it attends to",
    "dsv4": "picks the tokens that it attends to",
    "qsa": "picks the tokens that it attends to",
    "minicpm_flashattn": "picks the tokens that it attends to",
    "minicpm_flashinfer": "picks the tokens that it attends to",
    "InklingForConditionalGeneration": "accepts the backends fa4 and triton only",
    # By the class of the backend (0.5.19 to 0.5.23, models/dots3_common/modeling.py).
    "Dots3NoteForCausalLM": "goes by the class of the backend, of which it knows SGLang's own",
}

# From SGLang's argument resolution (arg_groups/overrides.py, 0.5.23): page sizes to which it
# snaps ``--page-size`` when one of these is named. It does not know them behind our name.
PAGE_SIZES = {
    "trtllm_mha": (16, 32, 64, 128),
    "trtllm_mla": (32, 64),
    "cutedsl_mla": (32, 64),
    "flashmla": (64,),
    "hpc_ops": (64,),
    "cutlass_mla": (128,),
    "fa4": (128,),
}
# SGLang turns fa3 into triton for this cache dtype.
_KV_DTYPES_REFUSED = {"fa3": (torch.float8_e5m2,)}


def check_cpu_prefill(model_runner: ModelRunner, own_name: str) -> None:
    """Refuse ``--attention-backend prefix`` on the CPU where SGLang would prefill with Triton.

    Before 0.5.22 SGLang decides by the prefill backend's name alone whether to launch its Triton
    helpers, and does so for every name that it does not know.

    Raises:
        ValueError: the message names the flag to use instead.
    """
    release = Version(version("sglang"))
    if model_runner.device != "cpu" or release >= Version("0.5.22"):
        return
    is_ours = resolved_args(model_runner).attention_backend == own_name
    if is_ours and prefill_name(model_runner, own_name) is None:
        raise ValueError(
            f"--attention-backend {own_name} does not work on the CPU with SGLang {release}; "
            f"use --decode-attention-backend {own_name}"
        )


def why_refused(architecture: str, stock_name: str) -> str | None:
    """Why nothing of a model could be packed, as the end of a sentence; None if something can."""
    return next((REFUSED[key] for key in (stock_name, architecture) if key in REFUSED), None)


def check_model(architecture: str, stock_name: str, *, uses_mla: bool) -> None:
    """Refuse a model of which nothing could be packed, or which our name would break.

    Those with multi-head latent attention choose their code path by the backend's name (0.5.17 to
    0.5.23, models/deepseek_common/attention_backend_handler.py): how they prefill, whether queries
    come in two parts, whether RoPE is left to the kernel. With our name they would take another
    path than with the stock backend's; without it, under SGLANG_PREFIX=1, all of that holds.

    Args:
        architecture: as the model's configuration names it.
        stock_name: the backend that SGLang runs it on.
        uses_mla: whether it has multi-head latent attention.

    Raises:
        ValueError: the message says how to serve it.
    """
    refused = f"the attention backend prefix cannot serve {architecture}, which"
    if why := why_refused(architecture, stock_name):
        raise ValueError(
            f"{refused} {why}. Start without it: SGLang then decodes with {stock_name}"
        )
    if uses_mla:
        raise ValueError(
            f"{refused} has multi-head latent attention and goes by the backend's name. Start "
            f"with SGLANG_PREFIX=1 instead of the name: our decode then stands over {stock_name}"
        )


def check_stock_rules(stock_name: str, model_runner: ModelRunner) -> None:
    """Refuse a model, page size or KV dtype that the stock backend cannot serve under our name.

    SGLang 0.5.20 and later have looked at all of them already, see `prefix_patches/resolution.py`.

    Raises:
        ValueError: the message names the flag to change, and the other way out.
    """
    uses_mla = model_runner.use_mla_backend
    if (uses_mla or stock_name in REFUSED) and not model_runner.is_draft_worker:
        architecture = model_runner.model_config.hf_config.architectures[0]
        check_model(architecture, stock_name, uses_mla=uses_mla)
    other = "or name another stock backend in SGLANG_PREFIX_STOCK_BACKEND"
    sizes = PAGE_SIZES.get(stock_name)
    if sizes and model_runner.page_size not in sizes:
        legal = ", ".join(map(str, sizes))
        advised = 64 if 64 in sizes else sizes[0]  # as SGLang snaps it
        raise ValueError(
            f"--page-size {model_runner.page_size} does not fit the stock attention backend "
            f"{stock_name}; legal: {legal}. Pass --page-size {advised}, {other}."
        )
    dtype = model_runner.token_to_kv_pool.dtype
    if dtype in _KV_DTYPES_REFUSED.get(stock_name, ()):
        raise ValueError(
            f"--kv-cache-dtype {str(dtype).removeprefix('torch.')} does not fit the stock "
            f"attention backend {stock_name}. Pass --kv-cache-dtype fp8_e4m3, {other}."
        )
