"""LoRA adapters with random weights for a tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path

from sglang_prefix.tiny_model import TinyModelConfig

__all__ = ["ADAPTERS", "write_adapter"]

# Names, and folders below that of the model.
ADAPTERS = ("adapter-a", "adapter-b")
RANK = 8
# Wide enough to change the tokens, as the model's own weights are.
STD = 0.2


def write_adapter(folder: Path, config: TinyModelConfig, seed: int) -> None:
    """Write an adapter of all four attention projections in the format of PEFT."""
    import torch
    from safetensors.torch import save_file

    width = config.resolved_head_dim
    queries, kv, hidden = config.num_heads * width, config.num_kv_heads * width, config.hidden_size
    shapes = {  # outputs, inputs
        "q_proj": (queries, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, queries),
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config.num_layers):
        for name, (outputs, inputs) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for half, shape in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
                weight = torch.randn(shape, generator=generator) * STD
                weights[f"{prefix}.{half}.weight"] = weight
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(folder.parent),
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(shapes),
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
