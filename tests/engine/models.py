"""The models of the engine tests: tiny ones, some turned into others, and LoRA adapters."""

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
    # Written over by a DeepSeek.
    "latent": TinyModelConfig(),
    # Turned into a Granite with attention sinks in every layer.
    "sinks": TinyModelConfig(),
    # Written over by a gpt-oss.
    "gpt-oss": TinyModelConfig(),
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
    write_deepseek(folder / "latent", MODELS["latent"])
    turn_into_granite(folder / "sinks")
    write_gpt_oss(folder / "gpt-oss", MODELS["gpt-oss"])
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


def write_deepseek(folder: Path, tiny: TinyModelConfig) -> None:
    """Write a DeepSeek-V3 over a tiny model of the same vocabulary: its attention, its experts.

    16 heads over a latent of 64 and a part with RoPE of 16. On the CPU SGLang knows no RoPE for it
    but YaRN, which DeepSeek's own checkpoints have as well.
    """
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    original = tiny.context_length // 4
    config = DeepseekV3Config(
        vocab_size=tiny.vocab_size,
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.resolved_intermediate_size,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=1,
        moe_intermediate_size=128,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        # Of DeepSeek's own files; Transformers leaves them out.
        moe_layer_freq=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        max_position_embeddings=tiny.context_length,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": tiny.context_length / original,
            "original_max_position_embeddings": original,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=None,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = DeepseekV3ForCausalLM(config).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "norm" not in name:
                weight.normal_(0, tiny.std, generator=generator)
    model.save_pretrained(folder)


def turn_into_granite(folder: Path) -> None:
    """Rewrite a tiny Llama: the same weights, and sinks that take a good part of every softmax."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    theta = config["rope_parameters"]["rope_theta"]
    config |= {
        "architectures": ["GraniteSWAForCausalLM"],
        "model_type": "granite_swa",
        "attention_multiplier": config["head_dim"] ** -0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "layer_types": ["full_attention"] * layers,
        "layer_rope_theta": [theta] * layers,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        # The sum of a softmax over 100 tokens and more is near exp(5). SGLang keeps sinks in
        # bfloat16.
        sinks = (5 + torch.randn(heads, generator=generator)).bfloat16().float()
        weights[f"model.layers.{layer}.self_attn.sinks"] = sinks
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_gpt_oss(folder: Path, tiny: TinyModelConfig) -> None:
    """Write a gpt-oss over a tiny model of the same vocabulary: its attention, its experts.

    As in the released models, every other layer has a window of 128 tokens, 8 query heads read one
    KV head, and all layers have sinks. Requests should be shorter than the window: SGLang's Triton
    backend decodes with one of a token less than it prefills with (0.5.23).
    """
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=tiny.vocab_size,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=tiny.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=257,
        pad_token_id=None,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = GptOssForCausalLM(config).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if name.endswith("sinks"):
                weight.copy_((4 + torch.randn(8, generator=generator)).bfloat16())
            elif "norm" not in name:
                weight.normal_(0, 0.1 if weight.dim() > 1 else 0.02, generator=generator)
    model.save_pretrained(folder)


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
