"""Small models with random weights, made locally: for tests, the demo and hosts without a GPU.

Weights are drawn wide enough for attention to decide the tokens. With the usual tiny spread (or
SGLang's dummy weights) a model whose attention is broken still says the same, and comparing its
tokens would prove nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, Literal, get_args

__all__ = [
    "MAX_CONTEXT",
    "MAX_HEADS",
    "MAX_HEAD_DIM",
    "MAX_HIDDEN",
    "MAX_LAYERS",
    "MAX_PARAMETERS",
    "MAX_STD",
    "MAX_VOCAB",
    "Arch",
    "Dtype",
    "TinyModelConfig",
    "build_once",
    "build_tiny_model",
]

Arch = Literal["llama", "olmo3", "gemma2"]
Dtype = Literal["float32", "bfloat16", "float16"]

# Beyond any model's. What the numbers make together has a bound of its own: the parameters of an 8B
# model, whose shape `bench serving --engine` builds.
MAX_HIDDEN, MAX_HEADS, MAX_HEAD_DIM, MAX_LAYERS = 1 << 16, 1 << 10, 1 << 10, 1 << 10
MAX_VOCAB, MAX_CONTEXT, MAX_STD = 1 << 20, 1 << 24, 100.0
MAX_PARAMETERS = 1 << 33
_MAX_SEED = 1 << 63

_BOS, _EOS = "<|bos|>", "<|eos|>"
_NUM_BYTES = 256
# Of a whole model, and the mark that it is one, with what it was made of.
_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_MARK = "whole.txt"
_NUM_NAMED_TOKENS = _NUM_BYTES + 2

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True, slots=True)
class TinyModelConfig:
    """Shape and randomness of a tiny model. Raises ValueError for what no model can have.

    Attributes:
        arch: "llama" has full attention only; the others alternate, beginning with a
            sliding-window layer, and "gemma2" can have a soft cap on its attention logits.
        head_dim: None means hidden_size / num_heads.
        vocab_size: at least 258, one token for each byte and two special ones. The rest has
            names but is never produced by encoding text.
        context_length: longest sequence, in tokens.
        std: standard deviation of all weights but the norms, which are the identity, and the
            tied embeddings of "gemma2", which get an eighth of it.
        sliding_window: tokens that a sliding-window layer sees; not for "llama".
        logit_cap: soft cap on attention logits; "gemma2" only, where None means no cap.
        kv_scales: for each layer its (k_scale, v_scale), stored in the checkpoint together with
            the FP8 cache scheme that makes SGLang load them; "llama" only.
        intermediate_size: None means twice hidden_size.
        scales_with_inputs: spread every matrix but the embeddings by ``std * sqrt(256 / inputs)``,
            so that every layer of a wide model puts out values of the same size. Queries and keys
            get a quarter more: over thousands of tokens, attention would otherwise average nearly
            everything away and the tokens would not depend on it.
    """

    arch: Arch = "llama"
    hidden_size: int = 256
    num_layers: int = 2
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int | None = None
    vocab_size: int = 512
    context_length: int = 8192
    dtype: Dtype = "float32"
    std: float = 0.08
    seed: int = 0
    sliding_window: int | None = None
    logit_cap: float | None = None
    kv_scales: tuple[tuple[float, float], ...] | None = None
    intermediate_size: int | None = None
    scales_with_inputs: bool = False

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            _require(name, value, value is None or 0 < value <= most, f"between 1 and {most}")
        _require("arch", self.arch, self.arch in get_args(Arch), f"one of {get_args(Arch)}")
        _require("dtype", self.dtype, self.dtype in get_args(Dtype), f"one of {get_args(Dtype)}")
        is_legal = isfinite(self.std) and 0 < self.std <= MAX_STD
        _require("std", self.std, is_legal, f"above 0 and up to {MAX_STD:g}")
        _require("seed", self.seed, 0 <= self.seed < _MAX_SEED, "between 0 and 2**63 - 1")
        legal = f"a multiple of num_kv_heads ({self.num_kv_heads})"
        _require("num_heads", self.num_heads, self.num_heads % self.num_kv_heads == 0, legal)
        if self.head_dim is None:
            legal = f"a multiple of num_heads ({self.num_heads}) where head_dim is not given"
            _require("hidden_size", self.hidden_size, self.hidden_size % self.num_heads == 0, legal)
        width = self.resolved_head_dim
        # Rotary embeddings turn pairs of channels.
        fits = 0 < width <= MAX_HEAD_DIM and width % 2 == 0
        _require("head_dim", width, fits, f"even, and between 2 and {MAX_HEAD_DIM}")
        legal = f"at least {_NUM_NAMED_TOKENS}"
        _require("vocab_size", self.vocab_size, self.vocab_size >= _NUM_NAMED_TOKENS, legal)
        if self.sliding_window is not None:
            fits = self.arch != "llama" and self.sliding_window > 0
            _require("sliding_window", self.sliding_window, fits, "positive, and not with llama")
        if self.logit_cap is not None:
            fits = self.arch == "gemma2" and self.logit_cap > 0
            _require("logit_cap", self.logit_cap, fits, "positive, and only with gemma2")
        if self.kv_scales is not None:
            fits = self.arch == "llama" and len(self.kv_scales) == self.num_layers
            _require("kv_scales", self.kv_scales, fits, "one pair per layer, and only with llama")
        legal = f"up to {MAX_PARAMETERS:,}: choose a smaller hidden size, vocabulary or depth"
        _require("the number of parameters", self._size, self._size <= MAX_PARAMETERS, legal)

    @property
    def resolved_head_dim(self) -> int:
        """Channels per head, given or derived."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    @property
    def resolved_intermediate_size(self) -> int:
        """Channels of the MLP, given or derived."""
        return self.intermediate_size or 2 * self.hidden_size

    @property
    def _size(self) -> int:
        """Parameters but for the norms, which are too few to count."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.resolved_head_dim
        layer = self.hidden_size * (attention + 3 * self.resolved_intermediate_size)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.arch == "gemma2" else 2)
        return self.num_layers * layer + embeddings

    @property
    def num_bytes(self) -> int:
        """Of the weights, nearly."""
        return self._size * (4 if self.dtype == "float32" else 2)


_MOST = {
    "hidden_size": MAX_HIDDEN,
    "num_layers": MAX_LAYERS,
    "num_heads": MAX_HEADS,
    "num_kv_heads": MAX_HEADS,
    "vocab_size": MAX_VOCAB,
    "context_length": MAX_CONTEXT,
    "sliding_window": MAX_CONTEXT,
    "intermediate_size": MAX_VOCAB,
}


def build_tiny_model(
    directory: Path | str, config: TinyModelConfig | None = None, device: str = "cpu"
) -> int:
    """Write a model that SGLang and transformers load without network, whole or not at all.

    Args:
        directory: made if it does not exist; files of the same names are replaced.
        config: shape and seed; equal configurations give equal files. None means the defaults.
        device: where the weights are drawn; they depend on it.

    Returns:
        The number of parameters.

    Raises:
        OSError: it cannot be written, or the disk or the memory does not hold it.
    """
    config = config or TinyModelConfig()
    folder = Path(os.path.realpath(directory))
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    _check_room(folder.parents[len(missing) - 1] if missing else folder, config, device)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # On the same file system, from which files are moved in place.
        with tempfile.TemporaryDirectory(prefix=".tiny-model-", dir=folder) as beside:
            num_parameters = _write(Path(beside), config, device)
            files = list(Path(beside).iterdir())
            for target in (folder / file.name for file in files):
                if target.is_dir():
                    raise IsADirectoryError(errno.EISDIR, f"{target.name} is a folder")
            for file in files:
                os.replace(file, folder / file.name)
    except BaseException:
        for made in missing:
            made.rmdir()
        raise
    return num_parameters


def _check_room(folder: Path, config: TinyModelConfig, device: str) -> None:
    """Raise OSError if the disk, or the memory for weights on the CPU, is too small."""
    import psutil  # type: ignore[import-untyped]

    free = shutil.disk_usage(folder).free
    if config.num_bytes > free:
        raise OSError(errno.ENOSPC, f"{_size(config.num_bytes)} of weights, {_size(free)} free")
    free = psutil.virtual_memory().available
    # Of each matrix the drawn values, in float32, stand beside all that there are already.
    if device == "cpu" and config.num_bytes > free // 2:
        needs = f"{_size(config.num_bytes)} of weights, over half of the {_size(free)} of memory"
        raise OSError(errno.ENOMEM, f"{needs} that are free")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"


def _write(folder: Path, config: TinyModelConfig, device: str) -> int:
    """Write all files; the number of parameters."""
    from transformers import GenerationConfig

    num_parameters = _write_weights(folder, config, device)
    GenerationConfig(
        bos_token_id=_NUM_BYTES, eos_token_id=_NUM_BYTES + 1, do_sample=False
    ).save_pretrained(folder)
    _write_tokenizer(folder, config)
    return num_parameters


def build_once(folder: Path, config: TinyModelConfig, device: str = "cpu") -> None:
    """Build a model unless it is there already; whole, or not at all.

    Args:
        folder: made with those above it; config, device: see `build_tiny_model`.

    Raises:
        ValueError: the folder holds something else, or not all of the model.
    """
    wanted, marks = f"{config} {device}", folder / _MARK
    if folder.exists() and any(folder.iterdir()):
        if not marks.is_file() or marks.read_text() != wanted:
            raise ValueError(f"{folder} does not hold the model that is needed: remove it")
        if lacking := [name for name in _FILES if not (folder / name).is_file()]:
            raise ValueError(f"{folder} is not a whole model, it lacks {lacking[0]}: remove it")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        whole = Path(beside, "model")
        build_tiny_model(whole, config, device)
        (whole / _MARK).write_text(wanted)
        whole.rename(folder)


def _require(name: str, value: object, holds: bool, legal: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}, but must be {legal}")


def _write_weights(folder: Path, config: TinyModelConfig, device: str) -> int:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    architecture = _architecture(config)
    with torch.device("meta"):  # names and shapes are all we take from it
        model = AutoModelForCausalLM.from_config(architecture)
    architecture.architectures = [type(model).__name__]
    architecture.save_pretrained(folder)

    dtype = getattr(torch, config.dtype)
    # Gemma's norms multiply by one plus their weight.
    norm_weight = 0.0 if config.arch == "gemma2" else 1.0
    # Gemma scales embeddings up and uses them as its output layer: at full spread every token
    # would only repeat itself.
    tied = "model.embed_tokens.weight" if architecture.tie_word_embeddings else None
    generator = torch.Generator(device).manual_seed(config.seed)
    weights = {}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 1:
            weights[name] = torch.full(parameter.shape, norm_weight, dtype=dtype)
        else:
            std = config.std / 8 if name == tied else _std(config, name, parameter.shape[1])
            drawn = torch.randn(parameter.shape, generator=generator, device=device)
            weights[name] = drawn.mul_(std).to(dtype).cpu()
    num_parameters = sum(weight.numel() for weight in weights.values())
    for layer, (k_scale, v_scale) in enumerate(config.kv_scales or ()):
        prefix = f"model.layers.{layer}.self_attn"
        weights[f"{prefix}.k_scale"] = torch.tensor(k_scale)
        weights[f"{prefix}.v_scale"] = torch.tensor(v_scale)
    # Not `save`, which would hold a large model twice.
    path = folder / "model.safetensors"
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from None
    path.chmod(0o644)  # it was readable by the owner alone
    return num_parameters


def _std(config: TinyModelConfig, name: str, num_inputs: int) -> float:
    """Standard deviation of a matrix by its name in the checkpoint."""
    if not config.scales_with_inputs or "embed_tokens" in name:
        return config.std
    gain = 1.25 if "q_proj" in name or "k_proj" in name else 1.0
    return config.std * sqrt(256 / num_inputs) * gain


def _architecture(config: TinyModelConfig) -> Any:
    """Return the transformers configuration."""
    from transformers import Gemma2Config, LlamaConfig, Olmo3Config

    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.resolved_intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.resolved_head_dim,
        "max_position_embeddings": config.context_length,
        "bos_token_id": _NUM_BYTES,
        "eos_token_id": _NUM_BYTES + 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "initializer_range": config.std,
        "dtype": config.dtype,
    }
    if config.arch == "llama":
        if config.kv_scales is not None:
            common["quantization_config"] = _FP8_CACHE_ONLY
        return LlamaConfig(**common)
    common["layer_types"] = [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(config.num_layers)
    ]
    if config.sliding_window is not None:
        common["sliding_window"] = config.sliding_window
    if config.arch == "olmo3":
        # SGLang 0.5.23 does not see a base inside these and takes 10000.
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        bases = {"full_attention": rope, "sliding_attention": rope}
        return Olmo3Config(**common, rope_parameters=bases)
    # SGLang always ties the embeddings of this one.
    return Gemma2Config(
        **common | {"tie_word_embeddings": True},
        query_pre_attn_scalar=config.resolved_head_dim,
        attn_logit_softcapping=config.logit_cap,
        final_logit_softcapping=None,
        hidden_act="gelu_pytorch_tanh",  # SGLang's name for hidden_activation
    )


# Says that nothing but the KV cache is quantised; the scales are in the checkpoint.
_FP8_CACHE_ONLY = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "config_groups": {},
    "kv_cache_scheme": {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "dynamic": False,
        "symmetric": True,
    },
}


def _write_tokenizer(folder: Path, config: TinyModelConfig) -> None:
    """Write a tokenizer without merges, so that every byte of the text is one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), _BOS, _EOS]
    # Random weights choose these as well; a name keeps every generated token visible.
    words += [f"<|{index}|>" for index in range(len(words), config.vocab_size)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in (_BOS, _EOS)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        model_max_length=config.context_length,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    ).save_pretrained(folder)
