"""What `bench serving --engine` needs on disk: a model of random weights, our package as a plugin.

The weights are spread as in `sglang_prefix.tiny_model`, whose matrices have a standard deviation of
0.08 for 256 inputs: here it is that times ``sqrt(256 / inputs)``, so that every layer puts out
values of the same size. Queries and keys get a quarter more: over thousands of tokens, attention
would otherwise average nearly everything away and the tokens would not depend on it.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["LLAMA_8B", "TINY", "weight_std", "write_model", "write_plugin"]

ROOT = Path(__file__).parents[3]
_WEIGHTS_PER_FILE = 40
_QUERY_KEY_GAIN = 1.25

# Arguments of a LlamaConfig. Llama-3.1-8B but for its 128,256 tokens and 131,072 positions: those
# of random weights would cost disk and time on both sides of a comparison alike.
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 65536,
    "dtype": "bfloat16",
}
TINY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
    "dtype": "float32",
}


def weight_std(name: str, num_inputs: int) -> float:
    """Standard deviation of a matrix by its name in the checkpoint."""
    if "embed_tokens" in name:
        return 0.08
    gain = _QUERY_KEY_GAIN if "q_proj" in name or "k_proj" in name else 1.0
    return 0.08 * sqrt(256 / num_inputs) * gain


def write_model(
    folder: Path, shape: Mapping[str, Any], device: torch.device, seed: int = 0
) -> bool:
    """Write a model that SGLang loads; nothing if the same one is there already.

    Args:
        folder: made if it does not exist.
        shape: arguments of a ``LlamaConfig``.
        device: where the weights are drawn; they depend on it.
        seed: of the weights.

    Returns:
        Whether it was written.

    Raises:
        ValueError: the folder holds something else.
    """
    wanted = json.dumps({**shape, "seed": seed, "device": device.type})
    mark = folder / "complete.json"
    if mark.exists() and mark.read_text() == wanted:
        return False
    if mark.exists():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else; legal: a folder that is new or empty")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text("")
    _write_weights(folder, shape, device, seed)
    mark.write_text(wanted)
    return True


def _write_weights(folder: Path, shape: Mapping[str, Any], device: torch.device, seed: int) -> None:
    """Write a few weights per file, since all of them together may not fit into memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        **shape,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):  # names and shapes are all we take from it
        weights = LlamaForCausalLM(config).state_dict()
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, shape["dtype"])
    files: dict[str, str] = {}
    names = list(weights)
    for first in range(0, len(names), _WEIGHTS_PER_FILE):
        some = {}
        for name in names[first : first + _WEIGHTS_PER_FILE]:
            size = weights[name].shape
            if len(size) == 1:
                some[name] = torch.ones(size, dtype=dtype)
            else:
                drawn = torch.randn(size, generator=generator, device=device, dtype=dtype)
                some[name] = drawn.mul_(weight_std(name, size[1])).cpu()
        file = f"model-{first:05d}.safetensors"
        save_file(some, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(some, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_plugin(folder: Path) -> Path | None:
    """Make our source tree a distribution to `importlib.metadata`, which SGLang asks for plugins.

    Args:
        folder: to be put on ``PYTHONPATH`` before any place where the package is installed.

    Returns:
        The ``.dist-info`` folder in it, with the name, version and entry points of pyproject.toml.
        None in an installed wheel, which is a distribution already.
    """
    if not (ROOT / "pyproject.toml").is_file():
        return None
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
