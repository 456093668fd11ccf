"""Makes an installation wrong: an SGLang of another release, or without a symbol that we need."""

from __future__ import annotations

import importlib.metadata
import os
from types import ModuleType

from sglang_prefix.bench.hooks import patch_after_import


def remove_init_new(module: ModuleType) -> None:
    """Rename a symbol that our patches need."""
    module.ForwardBatch.renamed_upstream = module.ForwardBatch.init_new
    del module.ForwardBatch.init_new


if "SGLANG_PREFIX_TEST_WITHOUT_INIT_NEW" in os.environ:
    patch_after_import({"sglang.srt.model_executor.forward_batch_info": remove_init_new})

if "SGLANG_PREFIX_TEST_VERSION" in os.environ:
    real_version = importlib.metadata.version

    def fake_version(distribution_name: str) -> str:
        """The version that a test wants for SGLang, the true one for everything else."""
        fake = os.environ["SGLANG_PREFIX_TEST_VERSION"]
        return fake if distribution_name == "sglang" else real_version(distribution_name)

    importlib.metadata.version = fake_version
