"""Makes an installation wrong: an SGLang without a symbol that our patches need."""

from __future__ import annotations

from types import ModuleType

from sglang_prefix.bench.hooks import patch_after_import


def remove_init_new(module: ModuleType) -> None:
    """Rename a symbol, as a release might."""
    module.ForwardBatch.renamed_upstream = module.ForwardBatch.init_new
    del module.ForwardBatch.init_new


patch_after_import({"sglang.srt.model_executor.forward_batch_info": remove_init_new})
