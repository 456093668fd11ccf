"""What `serve` needs on disk: a model of random weights, and our package as a plugin.

The weights are spread as in `sglang_prefix.tiny_model`, whose matrices have a standard deviation of
0.08 for 256 inputs: here it is that times ``sqrt(256 / inputs)``, so that every layer puts out
values of the same size. Queries and keys get a quarter more: over thousands of tokens, attention
would otherwise average nearly everything away and the tokens would not depend on it.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch

__all__ = ["LLAMA_8B", "TINY", "ModelShape", "weight_std", "write_model", "write_plugin"]

ROOT = Path(__file__).parents[2]
_LAYERS_PER_SHARD = 4
_QUERY_KEY_GAIN = 1.25


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Shape of a Llama; ``dtype`` is a name in torch."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    dtype: str


# Llama-3.1-8B but for its 128,256 tokens and 131,072 positions: those of random weights would cost
# disk and time on both sides of a comparison alike.
LLAMA_8B = ModelShape(4096, 14336, 32, 32, 8, 128, 32000, 65536, "bfloat16")
TINY = ModelShape(256, 512, 2, 8, 2, 32, 512, 8192, "float32")


def weight_std(name: str, num_inputs: int) -> float:
    """Standard deviation of a matrix by its name in the checkpoint."""
    if "embed_tokens" in name:
        return 0.08
    gain = _QUERY_KEY_GAIN if "q_proj" in name or "k_proj" in name else 1.0
    return 0.08 * sqrt(256 / num_inputs) * gain


def write_model(folder: Path, shape: ModelShape, device: torch.device, seed: int = 0) -> bool:
    """Write a model that SGLang loads; nothing if the same one is there already.

    Args:
        folder: made if it does not exist.
        shape: of the model.
        device: where the weights are drawn; they depend on it.
        seed: of the weights.

    Returns:
        Whether it was written.

    Raises:
        ValueError: the folder holds something else.
    """
    wanted = json.dumps({**asdict(shape), "seed": seed, "device": device.type})
    mark = folder / "complete.json"
    if mark.exists() and mark.read_text() == wanted:
        return False
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    if mark.exists():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else; legal: a folder that is new or empty")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text("")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context_length,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype=shape.dtype,
    ).save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, shape.dtype)
    where: dict[str, str] = {}
    for number, names in enumerate(_shards(shape)):
        shard = {}
        for name, size in names.items():
            if len(size) == 1:
                shard[name] = torch.ones(size, dtype=dtype)
            else:
                drawn = torch.randn(size, generator=generator, device=device, dtype=dtype)
                shard[name] = drawn.mul_(weight_std(name, size[1])).cpu()
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    mark.write_text(wanted)
    return True


def _shards(shape: ModelShape) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and sizes of the weights, file by file."""
    hidden, wide = shape.hidden_size, shape.intermediate_size
    heads, kv_heads = (n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads))
    yield {
        "model.embed_tokens.weight": (shape.vocab_size, hidden),
        "lm_head.weight": (shape.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    for first in range(0, shape.num_layers, _LAYERS_PER_SHARD):
        yield {
            f"model.layers.{number}.{name}.weight": size
            for number in range(first, min(first + _LAYERS_PER_SHARD, shape.num_layers))
            for name, size in layer.items()
        }


def write_plugin(folder: Path) -> Path:
    """Make our source tree a distribution to `importlib.metadata`, which SGLang asks for plugins.

    Args:
        folder: to be put on ``PYTHONPATH`` before any place where the package is installed.

    Returns:
        The ``.dist-info`` folder in it, with the name, version and entry points of pyproject.toml.
    """
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return info
