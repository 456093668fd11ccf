"""What the installed SGLang can do. Tests of what it cannot are skipped, and name the release."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

__all__ = ["BACKEND_FLAG", "PAGES_ENV", "has", "needs"]

# What comes with a release: the release, and what is said of a test that is skipped for it.
_SINCE = {
    "olmo3": ("0.5.18", "loading Olmo 3"),
    "beams": ("0.5.19", "beam search"),
    "kv-scales": ("0.5.19", "loading the KV scales of a compressed-tensors checkpoint"),
    "resolution-hooks": ("0.5.20", "a way into SGLang's resolution of its arguments"),
    "flush-while-paused": ("0.5.21", "flushing the cache while retracted requests wait"),
    "pages-on-cpu": ("0.5.22", "a page size above 1 on the CPU"),
    "attn-dp-size": ("0.5.22", "--attn-dp-size"),
    "located-latents": ("0.5.22", "a KVWriteLoc for every write of latents"),
    "latents": ("0.5.22", "a DeepSeek as its Transformers write it,"),
    "sinks": ("0.5.22", "Granite with attention sinks, in its Transformers,"),
    "any-name-on-cpu": ("0.5.22", "--attention-backend prefix on the CPU"),
}


def has(feature: str) -> bool:
    """Whether the installed SGLang has a feature of the table above."""
    return Version(version("sglang")) >= Version(_SINCE[feature][0])


def needs(feature: str) -> pytest.MarkDecorator:
    """Skip a test where the installed SGLang lacks a feature."""
    since, what = _SINCE[feature]
    return pytest.mark.skipif(not has(feature), reason=f"{what} comes with SGLang {since}")


# How to choose the backend on the CPU engine of every release.
BACKEND_FLAG = "attention_backend" if has("any-name-on-cpu") else "decode_attention_backend"
# Before, SGLang allocates pages with a Triton kernel on every device; Triton's interpreter runs it.
PAGES_ENV = {} if has("pages-on-cpu") else {"TRITON_INTERPRET": "1"}
