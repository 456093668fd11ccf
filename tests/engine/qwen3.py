"""A tiny Llama as a Qwen3, whose attention SGLang splits between the ranks of DP attention."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["turn_into_qwen3"]


def turn_into_qwen3(folder: Path) -> None:
    """Rewrite a model of ``build_tiny_model``: the same weights, and norms of q and k."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for name in ("q_norm", "k_norm"):
            norm = torch.ones(config["head_dim"])
            weights[f"model.layers.{layer}.self_attn.{name}.weight"] = norm
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
