"""The models of the engine tests: tiny ones, one turned into a Qwen3, and LoRA adapters."""

from __future__ import annotations

import json
from pathlib import Path

from sglang_prefix.tiny_model import TinyModelConfig, build_tiny_model
from tests.engine.releases import has

__all__ = ["ADAPTERS", "MODELS", "write_models"]

SCALES = ((2.0, 0.5), (0.25, 4.0))

MODELS = {
    "llama": TinyModelConfig(),
    # What a trainer might make of it.
    "other": TinyModelConfig(seed=1),
    # Layers 0 and 2 see 48 tokens, less than nearly every prompt has; 1 and 3 see all.
    "sliding": TinyModelConfig(
        arch="olmo3" if has("olmo3") else "gemma2", num_layers=4, sliding_window=48
    ),
    "scales": TinyModelConfig(kv_scales=SCALES),
    # SGLang's Llama is not made for DP attention.
    "qwen3": TinyModelConfig(),
}

# Adapters of "llama".
ADAPTERS = ("adapter-a", "adapter-b")
RANK = 8
# Wide enough to change the tokens, as the model's own weights are.
ADAPTER_STD = 0.2


def write_models(folder: Path) -> dict[str, str]:
    """Write all models and adapters below a folder; return where each is."""
    for name, config in MODELS.items():
        build_tiny_model(folder / name, config)
    turn_into_qwen3(folder / "qwen3")
    for seed, name in enumerate(ADAPTERS):
        write_adapter(folder / name, MODELS["llama"], seed)
    return {name: str(folder / name) for name in (*MODELS, *ADAPTERS)}


def turn_into_qwen3(folder: Path) -> None:
    """Rewrite a tiny Llama: the same weights, and norms of q and k."""
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
                weight = torch.randn(shape, generator=generator) * ADAPTER_STD
                weights[f"{prefix}.{half}.weight"] = weight
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(folder.parent / "llama"),
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(shapes),
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
