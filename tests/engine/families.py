"""Configurations of the families of docs/compatibility.md: tiny, and without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["LATENT", "MODELS", "UNSERVED", "write_config"]

BASE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
INDEX = {"index_head_dim": 16, "index_n_heads": 4, "index_topk": 64}
WINDOWS = {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
# Architecture, model type, and what its configuration has beside `BASE`.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", {}),
    "Llama4ForCausalLM": ("llama4_text", MOE),
    "Qwen3ForCausalLM": ("qwen3", {}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", MOE),
    "Qwen3NextForCausalLM": ("qwen3_next", MOE | LINEAR),
    "Qwen3_5MoeForCausalLM": ("qwen3_5_moe_text", MOE | LINEAR),
    "GptOssForCausalLM": ("gpt_oss", MOE | WINDOWS),
    "Gemma3ForCausalLM": ("gemma3_text", WINDOWS),
    "Gemma4ForCausalLM": ("gemma4_text", WINDOWS | {"global_head_dim": 16}),
    "DeepseekV3ForCausalLM": ("deepseek_v3", MLA),
    "DeepseekV32ForCausalLM": ("deepseek_v32", MLA | INDEX),
    "DeepseekV4ForCausalLM": (
        "deepseek_v4",
        MLA | INDEX | {"sliding_window": 128, "compress_ratios": [0, 0, 4, 128]},
    ),
    "KimiK25ForConditionalGeneration": ("kimi_k25", {"text_config": BASE | MLA}),
    "Glm4ForCausalLM": ("glm4", {}),
    "Glm4MoeForCausalLM": ("glm4_moe", MOE),
    "Glm4MoeLiteForCausalLM": ("glm4_moe_lite", MLA),
    "GlmMoeDsaForCausalLM": ("glm_moe_dsa", MLA | INDEX),
    "MiniMaxM2ForCausalLM": ("minimax_m2", MOE),
    "MistralForCausalLM": ("mistral", {}),
    "MistralLarge3ForCausalLM": ("deepseek_v3", MLA),
    "NemotronHForCausalLM": ("nemotron_h", {"hybrid_override_pattern": "M*M-"}),
    "Phi3ForCausalLM": ("phi3", {"pad_token_id": 0}),
    "PhiMoEForCausalLM": ("phimoe", MOE),
    "Ernie4_5_ForCausalLM": ("ernie4_5", {}),
    "Ernie4_5_MoeForCausalLM": ("ernie4_5_moe", MOE),
    "HunYuanDenseV1ForCausalLM": ("hunyuan_v1_dense", {}),
    "HunYuanMoEV1ForCausalLM": ("hunyuan_v1_moe", MOE),
    "Step3p5ForCausalLM": ("step3p5", WINDOWS),
    "MiMoForCausalLM": ("qwen2", {}),
    "MiMoV2FlashForCausalLM": ("mimo_v2_flash", {"hybrid_layer_pattern": [1, 0, 1, 0]}),
}
# Whose decode is not ours to take.
UNSERVED = (
    "DeepseekV32ForCausalLM",
    "DeepseekV4ForCausalLM",
    "GlmMoeDsaForCausalLM",
)
# With multi-head latent attention, which follows the backend's name: SGLANG_PREFIX=1 leaves it.
LATENT = (
    "DeepseekV3ForCausalLM",
    "KimiK25ForConditionalGeneration",
    "Glm4MoeLiteForCausalLM",
    "MistralLarge3ForCausalLM",
)


def write_config(architecture: str, folder: Path) -> str:
    """Write one into a folder, and return the folder."""
    model_type, more = MODELS[architecture]
    whole = more if "text_config" in more else BASE | more
    config = whole | {"architectures": [architecture], "model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
