"""Lets SGLang's ``torch_native`` run models with multi-head latent attention.

It decodes them, but it cannot prefill them as SGLang has it do. For a name that SGLang's table of
code paths lacks it takes that of ``triton``, which prefills with heads that the pool does not hold,
and ``torch_native`` reads K from the pool whatever it is given (0.5.17 to 0.5.23). So the table
gets a line for it: the absorbed form throughout, which SGLang itself takes for prompts whose
beginning is in the cache.
"""

from __future__ import annotations

from types import ModuleType

from sglang_prefix.bench.hooks import patch_after_import


def absorb_always(module: ModuleType) -> None:
    """Prefill in the absorbed form, too."""
    module.AttentionBackendRegistry.register("torch_native", vars(module)["_dispatch_mla_subtype"])


patch_after_import({"sglang.srt.models.deepseek_common.attention_backend_handler": absorb_always})
